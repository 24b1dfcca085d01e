"""`benchmarks/gpu.py` stands ready: its parts run on the CPU with tiny shapes, and what goes wrong is told."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # so that the script's own setting is undone, too
    for name in ("gpu", "gpu_entries"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import gpu  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(gpu, "cuda_torch", lambda: None)
    return gpu


def run(script: Any, tmp_path: Path, *options: str) -> dict[str, Any]:
    script.main(["--dry", "--out", str(tmp_path), *options])
    return json.loads((tmp_path / "gpu.json").read_text())


def test_a_dry_run_checks_and_times_what_the_cpu_has(script: Any, tmp_path: Path) -> None:
    found = run(script, tmp_path, "--only", "attention", "SwiGLU forward", "cross-entropy backward")
    assert found["dry"] and found["not reached"] == [] and len(found["entries"]) == 4
    assert found["peaks"]["flops"] > 0 and found["peaks"]["bytes"] > 0
    status = {
        (e["name"].split()[0], e["name"].split()[1], n): c for e in found["entries"] for n, c in e["contenders"].items()
    }
    for direction in ("forward", "backward"):
        ours = status["attention", direction, "xla"]
        assert ours["status"] == "timed" and ours["error"] < 1e-2 and len(ours["seconds"]) == script.ROUNDS
        assert ours["rate"] == pytest.approx(
            found["entries"][0]["work"] * (2.5 if direction == "backward" else 1) / ours["median"]
        )
        assert status["attention", direction, "triton"]["status"] == "refused"
        assert "cuda" in status["attention", direction, "mosaic_gpu"]["why"]
        assert status["attention", direction, "torch flash"]["status"] == "missing"
    assert status["SwiGLU", "forward", "xla, plain"]["share"] > 0
    assert status["cross-entropy", "backward", "trustcore"]["status"] == "timed"
    assert "| timed" not in (tmp_path / "gpu.md").read_text() and "refused" in (tmp_path / "gpu.md").read_text()


def test_scans_and_rotary_positions(script: Any, tmp_path: Path) -> None:
    found = run(script, tmp_path, "--only", "selective scan", "rope")
    assert [e["name"].split()[:3] for e in found["entries"]] == [
        ["selective", "scan", "forward"], ["selective", "scan", "backward"], ["rope", "forward", "1x64x2x32,"],
        ["rope", "backward", "1x64x2x32,"],
    ]  # fmt: skip
    for entry in found["entries"]:
        ours = entry["contenders"]
        assert ours["xla"]["status"] == "timed" and ours["xla"]["error"] < 2e-2 and ours["xla"]["share"] > 0
        assert ours["triton"]["status"] == "refused" and "cuda" in ours["triton"]["why"]


def test_packed_products_decoding_and_experts(script: Any, tmp_path: Path) -> None:
    found = run(script, tmp_path, "--only", "product of", "decoding", "grouped", "softmax forward")
    assert len(found["entries"]) == 18 + 2 + 2 + 1
    for entry in found["entries"]:
        status = {name: contender["status"] for name, contender in entry["contenders"].items()}
        for name, told in status.items():
            assert told == ("refused" if name == "triton" else "timed"), (entry["name"], entry["contenders"][name])


def test_no_entry_is_begun_when_the_time_is_up(script: Any, tmp_path: Path) -> None:
    found = run(script, tmp_path, "--minutes", "0")
    assert found["entries"] == [] and len(found["not reached"]) == len(list(script.entries(dry=True)))


def test_a_wrong_contender_is_not_timed_and_a_broken_one_stops_nothing(script: Any, tmp_path: Path) -> None:
    def broken(*operands: Any) -> Any:
        raise RuntimeError("no such instruction")

    entry = next(e for e in script.entries(dry=True) if e.name.startswith("SwiGLU forward"))
    plain = entry.contenders["xla, plain"]
    nan = lambda a, b: plain(a, b) * jnp.asarray(jnp.nan, a.dtype)  # noqa: E731
    wrong = {"double": lambda a, b: plain(a, b) * jnp.asarray(1.1, a.dtype), "nan": nan, "broken": broken}
    entry = dataclasses.replace(entry, contenders={**wrong, "plain": plain})
    found = script.run_entry(entry, {"bytes": 1.0}, script.Clock(1), None, dry=True)["contenders"]
    assert {n: c["status"] for n, c in found.items()} == {
        "double": "wrong", "nan": "wrong", "broken": "failed", "plain": "timed",
    }  # fmt: skip
    assert "no such instruction" in found["broken"]["why"] and "seconds" not in found["double"]


def test_without_a_gpu_it_says_what_to_write(script: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs a GPU, and jax sees cpu; write --dry"):
        script.main(["--out", str(tmp_path)])


def test_every_entry_makes_its_operands_and_names_itself(script: Any) -> None:
    import jax

    table = list(script.entries())
    assert len({e.name for e in table}) == len(table)
    for entry in table:
        operands = jax.eval_shape(entry.operands, jax.random.key(0))
        moved = sum(x.size * x.dtype.itemsize for x in operands)
        assert entry.work > 0 and (not entry.backward or max(entry.smooth) < len(operands)) and 1e6 < moved < 8e9
        out = jax.eval_shape(entry.oracle, *operands)
        assert all(x.size for x in jax.tree.leaves(out))
