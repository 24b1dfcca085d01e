"""The kernels, really compiled for TPUs and GPUs that are not here: `make aot` brings the compilers and runs this."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels_pallas import _compat

ROOT = Path(__file__).parents[2]
PLACE = os.environ.get("TRUSTCORE_LIBTPU", "")
CUDA = os.environ.get("TRUSTCORE_CUDA", "")
CASES = 11  # of attention, forward and with its gradient
FLOAT8 = 2  # of attention, forward alone
FORWARD = 7 + 4 * 9  # of decode attention and of packed products
SPILLS = {"float32": 128}  # bytes, else none; float32's products are not what these kernels are for


def compiled(script: str, place: str, chip: str, *cases: str) -> list[dict]:
    paths = os.pathsep.join([str(ROOT), *([place] if place else [])])
    command = [sys.executable, str(Path(__file__).with_name(f"compile_{script}.py")), chip, *cases]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=3600, env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(not PLACE and importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make aot")
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:4x4x4", "v6e:4x4"])
def test_kernels_for_tpus(topology: str) -> None:
    """Every case, forward and with its gradient, fits the chip and calls the kernels; a memory overflow fails."""
    found = compiled("for_tpu", PLACE, topology)
    assert [line for line in found if not line["ok"]] == []
    assert len(found) == 2 * CASES + FLOAT8 + FORWARD
    assert all(line["kernels"] == {"forward": 1, "backward": 3}[line["direction"]] for line in found), found
    pools = 500 * 8 * 128 * 128 * 2  # bytes of keys: pages must be read where they lie
    assert all(line["temporary"] < pools / 100 for line in found if line["case"].startswith("decode pages")), found


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(not PLACE and importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make aot")
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v6e:4x4"])
def test_grouped_products_scans_rope_and_ops_over_rows_for_tpus(topology: str) -> None:
    found = compiled("rows_for_tpu", PLACE, topology)
    assert [line for line in found if not line["ok"]] == []
    assert len(found) == 13
    # Turned where they lie: XLA's own form of the first has three arrays of x's size for temporaries.
    assert all(line["temporary"] == 0 for line in found if line["case"].startswith("rope")), found
    every = 2048 * 5120 * 128 * 4  # bytes of all states
    assert all(line["temporary"] < every / 8 for line in found if line["case"].startswith("scan")), found


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(not CUDA and importlib.util.find_spec("nvidia") is None, reason="needs CUDA's compiler: make aot")
@pytest.mark.parametrize("chip", ["A100", "A10", "L4", "H100", "B200"])
def test_kernels_for_gpus(chip: str) -> None:
    """Every kernel is assembled and fits; one that spills registers to memory fails."""
    if chip == "L4" and _compat.JAX_VERSION < (0, 11):
        pytest.skip("for an L4 there are Mosaic-GPU's cases alone, which jax 0.10 has not")
    found = compiled("for_gpu", CUDA, chip)
    assert [line for line in found if not line["ok"]] == []
    assert len(found) > (10 if chip == "L4" else 100) and all(line["kernels"] for line in found)
    spilled = {
        (line["case"], kernel["kernel"]): kernel["spilled"]
        for line in found
        for kernel in line["kernels"]
        if kernel["spilled"] > SPILLS.get(line["case"].split()[1], 0)
    }
    assert spilled == {}
    if folder := os.environ.get("TRUSTCORE_AOT_OUT"):
        Path(folder, f"{chip}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
