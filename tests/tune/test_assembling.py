"""Candidates that a chip's compiler refuses, or of which it says that they spill, never reach the chip."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import pytest

from kernels_pallas import offline
from trustcore import tune
from trustcore.errors import TuningError
from trustcore.tune import assembling
from trustcore.tune.device import Device

HOPPER, TPU = Device("cuda", "9.0", 132), Device("tpu", "TPU v5e", 1)
SHAPE = "B=1,T=2048,N=4,H=128,dtype=bfloat16"
CUDA, LIBTPU = os.environ.get("TRUSTCORE_CUDA", ""), os.environ.get("TRUSTCORE_LIBTPU", "")


def listed(device: Device, **options: Any) -> tune.Candidates:
    facts = tune.best("attention_forward", SHAPE, device=device).facts
    return tune.candidates(tune.declared("attention_forward"), device, facts, **options)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A compiler that fails hard at four warps and 128 queries, and spills at 128 keys; what it was asked."""
    asked: list[dict[str, Any]] = []

    def process(work: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
        asked.append(work)
        lines: list[dict[str, Any]] = []
        for values in work["values"]:
            if (values.get("warps"), values.get("queries")) == (4, 128):
                return lines, "status -6"
            lines.append({"spilled": 416 if values.get("keys") == 128 else 8, "registers": 255})
        return lines, "status 0"

    monkeypatch.setattr(assembling, "why_not", lambda tunable, device: "")
    monkeypatch.setattr(assembling, "_process", process)
    return asked


def test_what_spills_or_ends_the_compiler_is_cut_and_others_take_its_place(compiler: list[dict[str, Any]]) -> None:
    plain, found = listed(HOPPER), listed(HOPPER, compiled=True)
    assert len(found.tried) == len(plain.tried)  # as many as without
    ours = [v for v in found.tried if v["implementation"] == "triton"]
    assert ours and not any(v.get("keys") == 128 or (v.get("warps"), v.get("queries")) == (4, 128) for v in ours)
    reasons = {c.reason for c in found.cut if c.values["implementation"] == "triton" and "compiled for" in c.reason}
    assert "it spills 416 bytes of registers, the defaults 8 (compiled for H100)" in reasons
    everything = [dict(v) for v in (*found.tried, *(c.values for c in found.cut))]
    assert len(everything) == len([dict(v) for v in (*plain.tried, *(c.values for c in plain.cut))])
    assert {work["kind"] for work in compiler} == {"H100"} and all(
        work["op"] == "attention_forward" for work in compiler
    )
    assert not any(v["implementation"] == "xla" for work in compiler for v in work["values"])


def test_a_compiler_that_ends_goes_on_with_the_next(compiler: list[dict[str, Any]]) -> None:
    tunable, facts = tune.declared("attention_forward"), tune.best("attention_forward", SHAPE, device=HOPPER).facts
    kernel = {"implementation": "triton", "queries": 64, "keys": 64, "warps": 4, "stages": 1}
    values = [kernel, {**kernel, "queries": 128}, {**kernel, "keys": 32}]
    told = assembling._in_turn(tunable.op, HOPPER, facts, values)
    assert told == [{"spilled": 8, "registers": 255}, {"error": "the compiler ended: status -6"}, told[0]]
    assert [len(work["values"]) for work in compiler] == [3, 1]


@pytest.mark.parametrize(
    ("op", "device", "reason"),
    [
        ("attention_forward", Device("cpu", "x", 2), "there is no compiler for an absent cpu"),
        ("attention_forward", Device("cuda", "7.5", 40), "compute capability 7.5 is described"),
        ("attention_forward", Device("tpu", "TPU v3", 1), "TPU v3 is not described"),
        ("cross_entropy_forward", HOPPER, "cross_entropy_forward has no kernels"),
    ],
)
def test_it_says_why_no_compiler_is_asked(
    monkeypatch: pytest.MonkeyPatch, op: str, device: Device, reason: str
) -> None:
    monkeypatch.setattr(offline, "cuda_folder", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object())
    assert reason in assembling.why_not(tune.declared(op), device)


def test_without_a_compiler_listing_with_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(TuningError, match=r"candidates cannot be compiled for cuda 9\.0.*: .*write: make aot"):
        listed(HOPPER, compiled=True)


def test_a_process_answers_for_each_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, with a chip that no compiler describes: each candidate has its error, and none is lost."""
    monkeypatch.setattr(assembling, "_kind", lambda device: "TPU v3")
    kernel = {"implementation": "mosaic_tpu", "queries": 128, "keys": 128}
    facts = tune.best("attention_forward", SHAPE, device=TPU).facts
    told = assembling._in_turn("attention_forward", TPU, facts, [kernel, {**kernel, "keys": 256}])
    assert len(told) == 2 and all("KeyError" in t["error"] or "OfflineError" in t["error"] for t in told)


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(not CUDA and importlib.util.find_spec("nvidia") is None, reason="needs CUDA's compiler: make aot")
def test_real_spills_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, CUDA])
    found = listed(HOPPER, compiled=True, most=6)
    spilled = [c.values for c in found.cut if "bytes of registers" in c.reason]
    assert any((v["implementation"], v["queries"]) == ("triton", 256) for v in spilled)
    assert any(v["implementation"] == "mosaic_gpu" and len(v) > 1 for v in found.tried)


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(not LIBTPU and importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make aot")
def test_libtpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, LIBTPU])
    found = listed(TPU, compiled=True, most=3)
    assert [v for v in found.tried if v["implementation"] == "mosaic_tpu" and "queries" in v]
