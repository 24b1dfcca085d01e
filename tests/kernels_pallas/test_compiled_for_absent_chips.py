"""The kernels, really compiled for TPUs that are not here: `make aot` brings libtpu and runs this."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("compile_for_tpu.py")
PLACE = os.environ.get("TRUSTCORE_LIBTPU", "")
CASES = 9


def compiled(topology: str, *cases: str, script: Path = SCRIPT) -> list[dict]:
    paths = os.pathsep.join([str(ROOT), *([PLACE] if PLACE else [])])
    command = [sys.executable, str(script), topology, *cases]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(not PLACE and importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make aot")
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:4x4x4", "v6e:4x4"])
def test_attention_for_tpus(topology: str) -> None:
    """Every case, forward and with its gradient, fits the chip and calls the kernels; a memory overflow fails."""
    found = compiled(topology)
    assert [line for line in found if not line["ok"]] == []
    assert len(found) == 2 * CASES
    assert all(line["kernels"] == {"forward": 1, "backward": 3}[line["direction"]] for line in found), found


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(not PLACE and importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make aot")
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v6e:4x4"])
def test_grouped_products_and_ops_over_rows_for_tpus(topology: str) -> None:
    found = compiled(topology, script=SCRIPT.with_name("compile_rows_for_tpu.py"))
    assert [line for line in found if not line["ok"]] == []
    assert len(found) == 7
