"""Kernels on the GPU of this machine: checked against their oracles, then timed beside their peers.

    PYTHONPATH=. python3 benchmarks/gpu.py --minutes 8 --out DIR [--only WORD ...]
    PYTHONPATH=. python3 benchmarks/gpu.py --dry --out DIR       # tiny shapes, on any platform: does the script run?

It needs jax and this checkout; torch and tokamax take part where they are installed. First it measures what the machine
can do: a large product of bfloat16 matrices, and a large copy. Then each entry of `gpu_entries.py`: a contender that is
not within the tolerance of the oracle is not timed. DIR/gpu.json is written after every entry, so a run that is cut off
keeps what it has; what fails is recorded with its error, and the next goes on.

How time is taken: one compiled program calls a contender on several sets of random operands, so that the cache holds
none of them; programs are queued one after the other without waiting, so that the host's part does not count; the
contenders of an entry take turns for several rounds, of which the median and the range are kept.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory, too

import jax
import jax.numpy as jnp
from gpu_entries import Entry, Missing, entries

from kernels_pallas import ImplementationError

ROUNDS = 7
ROUND_SECONDS = 0.05
SETS_BYTES = 2**28  # operand sets of one program together, at least: five times an H200's cache
MOST_SETS = 8


class Clock:
    """How much of the time that was given is left."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60.0 * minutes

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


def machine() -> dict[str, Any]:
    """Returns what a result says of device, date and versions."""
    device = jax.devices()[0]
    found = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device.device_kind,
        "platform": device.platform,
        "capability": str(getattr(device, "compute_capability", "")),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    for name in ("torch", "tokamax"):
        module = sys.modules.get(name)
        found |= {name: module.__version__} if module is not None else {}
    return found


def seconds_a_call(launch: Callable[[], Any], wait: Callable[[Any], None], *, dry: bool) -> Callable[[], float]:
    """Returns a function that measures one round of `launch`, queued so often that a round takes long enough."""
    wait(launch())
    wait(launch())
    begin = time.perf_counter()
    wait(launch())
    once = time.perf_counter() - begin
    count = 1 if dry else max(2, min(2000, int(ROUND_SECONDS / max(once, 1e-6)) + 1))

    def measure() -> float:
        begin = time.perf_counter()
        last = None
        for _ in range(count):
            last = launch()
        wait(last)
        return (time.perf_counter() - begin) / count

    return measure


def rounds(measures: dict[str, Callable[[], float]], clock: Clock) -> dict[str, list[float]]:
    """Returns the seconds of each contender, in turn round by round, at least two if the time is short."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(ROUNDS):
        if turn >= 2 and clock.left < 0:
            break
        for name, measure in measures.items():
            found[name].append(measure())
    return found


def told(seconds: list[float]) -> dict[str, Any]:
    """Returns the seconds with their median."""
    return {"status": "timed", "seconds": seconds, "median": statistics.median(seconds)}


def peaks(clock: Clock, *, dry: bool) -> dict[str, Any]:
    """Returns what the machine reaches: FLOP/s of bfloat16 products, bytes/s of a copy (read and written)."""
    size = 256 if dry else 8192
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(k, (size, size), jnp.bfloat16) for k in keys)
    product = jax.jit(lambda a, b: a @ b)
    matmul = rounds({"": seconds_a_call(lambda: product(a, b), jax.block_until_ready, dry=dry)}, clock)[""]
    x = jax.random.normal(keys[0], (2**20 if dry else 2**30,), jnp.bfloat16)
    negative = jax.jit(jnp.negative)
    copy = rounds({"": seconds_a_call(lambda: negative(x), jax.block_until_ready, dry=dry)}, clock)[""]
    return {
        "flops": 2.0 * size**3 / statistics.median(matmul),
        "bytes": 2.0 * x.nbytes / statistics.median(copy),
        "matmul": {"size": size, "seconds": matmul},
        "copy": {"bytes": 2 * x.nbytes, "seconds": copy},
    }


def results_and_gradients(entry: Entry, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of operands: the results in float32, and for a backward entry the gradients of a sum."""

    def wide(tree: Any) -> Any:
        return [x.astype(jnp.float32) for x in jax.tree.leaves(tree)]

    def run(*operands: Any) -> Any:
        if not entry.backward:
            return wide(function(*operands))
        results, pull = jax.vjp(
            lambda *smooth: wide(function(*_with(entry, operands, smooth))), *_smooth(entry, operands)
        )
        weights = [jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in results]
        weights = [w.astype(jnp.bfloat16).astype(jnp.float32) for w in weights]
        return wide(pull(weights))

    return jax.jit(run)


def _smooth(entry: Entry, operands: tuple[Any, ...]) -> list[Any]:
    return [operands[i] for i in entry.smooth]


def _with(entry: Entry, operands: tuple[Any, ...], smooth: Any) -> list[Any]:
    given = list(operands)
    for i, x in zip(entry.smooth, smooth, strict=True):
        given[i] = x
    return given


def error_of(entry: Entry, function: Callable[..., Any], seed: int) -> float:
    """Returns the largest error of a result over the norm of the truth; NaN counts as infinite."""
    operands = entry.small(jax.random.key(seed))
    with jax.default_matmul_precision("highest"):
        exact = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in operands]
        expected = results_and_gradients(entry, entry.oracle)(*exact)
    found = results_and_gradients(entry, function)(*operands)
    errors = [
        float(jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-30))
        for a, b in zip(found, expected, strict=True)
    ]
    return max((math.inf if math.isnan(e) else e for e in errors), default=math.inf)


def launcher(entry: Entry, function: Callable[..., Any], sets: list[tuple[Any, ...]]) -> Callable[[], Any]:
    """Returns a function that queues one program which calls the contender on every set of operands."""
    if not entry.backward:
        every = jax.jit(lambda sets: [function(*operands) for operands in sets])
        return lambda: every(sets)

    @jax.jit
    def kept(operands: tuple[Any, ...]) -> Any:
        return jax.vjp(lambda *smooth: function(*_with(entry, operands, smooth)), *_smooth(entry, operands))

    pulls = []
    for operands in sets:
        results, pull = kept(operands)
        pulls.append((pull, results))  # the results serve as cotangents: random numbers of their shape
    every = jax.jit(lambda pulls: [pull(cotangents) for pull, cotangents in pulls])
    return lambda: every(pulls)


def torch_launcher(entry: Entry, function: Callable[..., Any], torch: Any, sets: int) -> tuple[Callable[[], Any], Any]:
    """As `launcher`, of torch's tensors with random values, and how its device is waited for."""
    shapes = [x.shape for x in jax.eval_shape(entry.operands, jax.random.key(0))]
    made = [
        [torch.randn(*s, dtype=torch.bfloat16, device="cuda", requires_grad=entry.backward) for s in shapes]
        for _ in range(sets)
    ]

    def wait(_: Any) -> None:
        torch.cuda.synchronize()

    if not entry.backward:
        return lambda: [function(torch, *operands) for operands in made], wait
    outs = [function(torch, *operands) for operands in made]

    def backward() -> Any:
        return [torch.autograd.grad(o, x, o.detach(), retain_graph=True) for o, x in zip(outs, made, strict=True)]

    return backward, wait


def judged(entry: Entry, name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the outcome of the check on two seeds: "right", "wrong", "missing", "refused" or "failed", and why."""
    try:
        error = max(error_of(entry, function, seed) for seed in (1, 2))
    except Missing as reason:
        return {"status": "missing", "why": str(reason)}
    except ImplementationError as reason:
        return {"status": "refused", "why": str(reason)}
    except Exception as failure:  # a contender may fail in any way, and the others go on
        return {"status": "failed", "why": f"{type(failure).__name__}: {str(failure)[:600]}"}
    print(f"  {name}: error {error:.2e}", flush=True)
    return {"status": "right" if error <= entry.tolerance else "wrong", "error": error}


def run_entry(entry: Entry, peak: dict[str, Any], clock: Clock, torch: Any, *, dry: bool) -> dict[str, Any]:
    """Checks and times the contenders of an entry."""
    found = {name: judged(entry, name, function) for name, function in entry.contenders.items()}
    single = entry.operands(jax.random.key(0))
    size = sum(x.nbytes for x in single)
    count = 1 if dry else min(MOST_SETS, max(1, SETS_BYTES // size))
    sets = [single, *(entry.operands(jax.random.key(i)) for i in range(1, count))]
    measures: dict[str, Callable[[], float]] = {}

    def prepare(name: str, make: Callable[[], tuple[Callable[[], Any], Any]]) -> None:
        try:
            begin = time.perf_counter()
            measures[name] = seconds_a_call(*make(), dry=dry)
            found.setdefault(name, {})["first"] = time.perf_counter() - begin
        except Exception as failure:  # as in `judged`
            found[name] = {
                **found.get(name, {}),
                "status": "failed",
                "why": f"{type(failure).__name__}: {str(failure)[:600]}",
            }

    for name, function in entry.contenders.items():
        if found[name]["status"] == "right":
            prepare(name, lambda function=function: (launcher(entry, function, sets), jax.block_until_ready))
    for name, function in (entry.torch or {}).items():
        if torch is None:
            found[name] = {"status": "missing", "why": "torch with CUDA is not installed"}
        else:
            prepare(name, lambda function=function: torch_launcher(entry, function, torch, count))
    for name, seconds in rounds(measures, clock).items():
        found[name] |= told([s / count for s in seconds])
        rate = entry.work / found[name]["median"]
        found[name] |= {"rate": rate, "share": rate / peak[entry.unit]}
        print(
            f"  {name}: {rate / 1e12:.4g} T{entry.unit}/s, {100 * rate / peak[entry.unit]:.1f}% of the peak", flush=True
        )
    return {"name": entry.name, "unit": entry.unit, "work": entry.work, "sets": count, "contenders": found}


def cuda_torch() -> Any:
    """Returns torch where it sees a CUDA device, else None."""
    try:
        torch = importlib.import_module("torch")
        importlib.import_module("torch.nn.attention")
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: rate, share of the machine's own peak, time and error of every contender."""
    lines = ["| entry | contender | rate, T/s | of the peak | ms (range) | error |", "|---|---|---|---|---|---|"]
    for entry in result["entries"]:
        for name, c in entry["contenders"].items():
            if c["status"] != "timed":
                lines.append(
                    f"| {entry['name']} | {name} | {c['status']}: {c.get('why', c.get('error', ''))} | | | |"[:300]
                )
                continue
            low, high = min(c["seconds"]) * 1e3, max(c["seconds"]) * 1e3
            lines.append(
                f"| {entry['name']} | {name} | {c['rate'] / 1e12:.4g} {entry['unit']} | {100 * c['share']:.1f}% | "
                f"{c['median'] * 1e3:.4g} ({low:.4g} to {high:.4g}) | {c.get('error', float('nan')):.1e} |"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="no entry is begun after that")
    parser.add_argument("--out", required=True, help="a folder; gpu.json and gpu.md are written there")
    parser.add_argument("--only", nargs="+", default=[], help="entries whose names hold one of these words")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, on any platform")
    args = parser.parse_args(arguments)
    if jax.default_backend() != "gpu" and not args.dry:
        raise SystemExit(
            f"gpu.py needs a GPU, and jax sees {jax.devices()[0].device_kind}; write --dry to try it here."
        )
    clock, torch = Clock(args.minutes), cuda_torch()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {**machine(), "dry": args.dry, "peaks": peaks(clock, dry=args.dry), "entries": []}
    wanted = [e for e in entries(dry=args.dry) if not args.only or any(word in e.name for word in args.only)]
    result["not reached"] = [e.name for e in wanted]

    def write() -> None:
        (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "gpu.md").write_text(table(result) + "\n")

    write()
    print({k: v for k, v in result["peaks"].items() if k in ("flops", "bytes")}, flush=True)
    for entry in wanted:
        if clock.left <= 0:
            print(f"time is up; not reached: {len(result['not reached'])}")
            break
        print(entry.name, flush=True)
        try:
            result["entries"].append(run_entry(entry, result["peaks"], clock, torch, dry=args.dry))
        except Exception as failure:  # e.g. operands that do not fit the memory
            why = f"{type(failure).__name__}: {str(failure)[:600]}"
            result["entries"].append({"name": entry.name, "contenders": {"all": {"status": "failed", "why": why}}})
        result["not reached"].remove(entry.name)
        jax.clear_caches()
        write()
    print(table(result))


if __name__ == "__main__":
    main()
