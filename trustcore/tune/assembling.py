"""Asks a chip's compiler about candidates, before any time of the chip is spent, or where there is none.

CUDA's compiler and libtpu need a description of a chip, not the chip (`kernels_pallas.offline`). They may end their
process, and want another platform than the one at hand: so candidates are compiled in processes of their own,

    python -m trustcore.tune.assembling     {"op", "facts", "platform", "kind", "values": [...]} on standard input,
                                            a line of JSON for each of the values on standard output

each on one core, several at a time. The candidate at which a process ended is refused for that, and the others go on in
a further one. Kernels that spill registers more than those of their implementation's defaults are refused as well: a
spill is a write to memory in the innermost loop.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from kernels_pallas import offline
from kernels_pallas.tuning import Facts, Tunable, Values
from trustcore.errors import TuningError
from trustcore.tune import registry
from trustcore.tune.device import Device
from trustcore.tune.measure import pinned

KERNELS = ("triton", "mosaic_gpu", "mosaic_tpu")  # implementations that are kernels
SECONDS = 300.0  # of a process
ROUNDS = 3  # times as many candidates as are wanted are compiled at most


def why_not(tunable: Tunable, device: Device) -> str:
    """Returns why no compiler can be asked about candidates of an op on a device; "" where one can."""
    if registry.known(tunable.op) is not tunable or not registry.family_of(tunable.op):
        return f"{tunable.op} is no op of trustcore, and a process of its own does not know it."
    if not set(KERNELS) & set(tunable.grids):
        return f"{tunable.op} has no kernels."
    if device.platform == "cuda":
        try:
            offline.cuda_folder()
        except offline.OfflineError as error:
            return str(error)
        return "" if _kind(device) else f"no chip of compute capability {device.architecture} is described."
    if device.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            return "libtpu is not installed; write: make aot"
        return "" if _kind(device) else f"{device.architecture} is not described."
    return f"there is no compiler for an absent {device.platform}."


def sifted(
    tunable: Tunable, device: Device, facts: Facts, defaults: Sequence[Values], ranked: Sequence[Values], most: int
) -> tuple[list[Values], list[tuple[Values, str]]]:
    """Returns the first `most` of the ranked values that compile well, and those before them that do not, with why.

    Raises:
        TuningError: no compiler can be asked.
    """
    if reason := why_not(tunable, device):
        raise TuningError(f"{tunable.op}: candidates cannot be compiled for {device}: {reason}")
    able = [values for values in defaults if values["implementation"] in KERNELS]
    allowed: dict[str, int] = {}
    for values, told in zip(able, _asked(tunable, device, facts, able), strict=True):
        allowed[values["implementation"]] = told.get("spilled", 0)
    tried: list[Values] = []
    refused: list[tuple[Values, str]] = []
    place = 0
    while len(tried) < most and place < min(len(ranked), ROUNDS * most):
        part = ranked[place : place + most - len(tried)]
        place += len(part)
        kernels = [values for values in part if values["implementation"] in KERNELS]
        told = dict(zip(map(id, kernels), _asked(tunable, device, facts, kernels), strict=True))
        for values in part:
            reason = _reason(told[id(values)], allowed.get(values["implementation"], 0)) if id(values) in told else ""
            if reason:
                refused.append((values, f"{reason} (compiled for {_kind(device)})"))
            else:
                tried.append(values)
    return tried, refused


def _reason(told: dict[str, Any], allowed: int) -> str:
    if "error" in told:
        return f"it does not compile: {told['error']}"
    spilled = told["spilled"]
    return f"it spills {spilled} bytes of registers, the defaults {allowed}" if spilled > allowed else ""


def _kind(device: Device) -> str:
    """The chip whose description stands for a device; "" if there is none."""
    if device.platform == "tpu":
        return device.architecture if device.architecture in offline.TPUS else ""
    return next((n for n, c in offline.CHIPS.items() if "{}.{}".format(*c.capability) == device.architecture), "")


def _asked(tunable: Tunable, device: Device, facts: Facts, values: Sequence[Values]) -> list[dict[str, Any]]:
    """What the compiler says of each of the values: {"spilled": bytes} or {"error": text}."""
    workers = max(1, min(len(values), 4, os.cpu_count() or 1))
    parts = [values[i::workers] for i in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(lambda part: _in_turn(tunable.op, device, facts, part), parts))
    return [found[i % workers][i // workers] for i in range(len(values))]


def _in_turn(op: str, device: Device, facts: Facts, values: Sequence[Values]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while len(found) < len(values):
        rest = values[len(found) :]
        work = {"op": op, "facts": dict(facts), "platform": device.platform, "kind": _kind(device)}
        lines, ended = _process({**work, "values": [dict(v) for v in rest]})
        found += lines[: len(rest)]
        if len(lines) < len(rest):
            found.append({"error": f"the compiler ended: {ended}"})
    return found


def _process(work: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The lines that a process wrote, and how it ended."""
    environment = {
        **os.environ, **offline.TPU_ENVIRONMENT, "JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }  # fmt: skip
    command = [sys.executable, "-m", "trustcore.tune.assembling"]
    try:
        done = subprocess.run(
            command, input=json.dumps(work), capture_output=True, text=True, timeout=SECONDS, env=environment,
            check=False,
        )  # fmt: skip
        out, ended = done.stdout, f"status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        out, ended = error.stdout or b"", f"not within {SECONDS:.0f} seconds"
        out = out.decode(errors="replace") if isinstance(out, bytes) else out
    return [json.loads(line) for line in out.splitlines() if line.startswith('{"')], ended


def _compiled(tunable: Tunable, facts: Facts, platform: str, kind: str, values: Values) -> dict[str, Any]:
    """What the compiler says of one candidate, in this process."""

    def program(operands: Any) -> Any:
        prepared = tunable.prepare(facts, operands)
        return tunable.run(facts)(*tunable.arrange(facts, prepared, values))

    types = jax.eval_shape(lambda: tunable.operands(facts))
    with pinned(tunable.op, values):
        if platform == "tpu":
            offline.compile_for_tpu(kind, program, types)
            return {"spilled": 0}
        _, reports = offline.compile_for(offline.CHIPS[kind], program, types)
    return {"spilled": sum(r.spilled for r in reports), "registers": max((r.registers for r in reports), default=0)}


def main() -> None:
    """Reads what is to be compiled, and writes what the compiler says, line by line."""
    work = json.loads(sys.stdin.read())
    tunable = registry.declared(work["op"])
    facts = tunable.complete(work["facts"])
    for values in work["values"]:
        try:
            jax.clear_caches()
            told = _compiled(tunable, facts, work["platform"], work["kind"], values)
        except Exception as error:  # whatever a compiler says against a candidate
            told = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
