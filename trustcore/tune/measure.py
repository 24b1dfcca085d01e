"""Compiles candidates side by side, checks each against the oracle, and times those that are right in turn.

Order: all are traced, then compiled on threads (XLA lets go of Python's lock), then run once and compared; what is
wrong, or does not compile, is out with its error and is never timed. The others take turns in one process, so that
whatever else the machine does falls on all of them; the one that begins changes from round to round. A sample lasts at
least a few milliseconds. Samples far from the median are dropped (`summary`), and a candidate that is far behind after
a few rounds leaves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import Target, tuning
from kernels_pallas.tuning import Facts, Tunable, Values
from trustcore import _jax

SAMPLE = 2e-3  # seconds of a sample at least: a call that is shorter is repeated
WARM_UP = 3  # calls before any is timed: pages, caches, clocks
FEWEST = 5  # rounds before a candidate may leave
BEHIND = 1.5  # times the best median: what is never faster than that leaves
HOPELESS = 4.0  # times the best warm call: what has none that is faster is not measured again
FINAL = 15  # rounds at least between the defaults and the one that is to take their place
OUTLIER = 5.0  # median absolute deviations


@dataclasses.dataclass(frozen=True)
class Pinned:
    """A chooser that gives one answer for one op, and leaves all others at their defaults."""

    op: str
    items: tuple[tuple[str, Any], ...]

    def values(self, op: str, target: Target, facts: Facts, implementation: str | None) -> Values:
        """See `kernels_pallas.tuning.Chooser`."""
        given = dict(self.items)
        if op != self.op or implementation not in (None, given.get("implementation")):
            return tuning.NO_VALUES
        return given

    def before(self, op: str, target: Target, facts: Facts) -> None:
        """Does nothing."""


def pinned(op: str, values: Values) -> Any:
    """Returns a context in which that op takes these values wherever it is traced."""
    return tuning.CHOOSER(Pinned(op, tuple(sorted(values.items()))))


@dataclasses.dataclass(frozen=True)
class Summary:
    """Seconds of a call: the median of the samples that count, their spread, how many there were and were dropped."""

    seconds: float
    spread: float
    samples: int
    dropped: int


@dataclasses.dataclass
class Trial:
    """What became of a candidate.

    Attributes:
        values: the candidate.
        refused: why it is out: it did not compile or run, or its result is wrong; "" if it is right.
        error: how far its result lies from the oracle, relative to the largest number there; None: it has none.
        summary: its time; None if it was not timed.
        compiling: seconds of compiling it, where they count.
        same_as: the place of the trial that is the same program.
    """

    values: Values
    refused: str = ""
    error: float | None = None
    summary: Summary | None = None
    compiling: float | None = None
    same_as: int | None = None


def tolerance(dtype: Any, reduction: int) -> float:
    """Returns how far results may lie apart, relative to the largest: a dtype's rounding, and that of long sums."""
    rounding = float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0
    return 4 * rounding + 32 * float(jnp.finfo(jnp.float32).eps) * math.sqrt(max(reduction, 1))


def compiled(
    tunable: Tunable,
    facts: Facts,
    operands: tuple[Any, ...],
    trials: Sequence[Trial],
    check: Callable[[], None],
    *,
    skip: Callable[[Trial], bool] = lambda trial: False,
) -> list[Any]:
    """Returns for each trial a function without arguments that runs its program; None where it did not compile.

    Why it did not is in the trial. A trial whose program is that of one before it is compiled once, and says which
    (`same_as`). Those to `skip` are only compared. Where the time of compiling counts, it is measured: one at a time,
    and from no cache.
    """
    lowered: list[Any] = []
    texts: dict[str, int] = {}
    for trial in trials:
        check()
        if trial.refused:  # by a search that was stopped
            lowered.append(None)
            continue
        try:
            given = tunable.arrange(facts, operands, trial.values)
            began = time.perf_counter()
            with pinned(tunable.op, trial.values):
                made = jax.jit(tunable.run(facts)).lower(*given)
            tracing = time.perf_counter() - began
            first = texts.setdefault(made.as_text(), len(lowered))
            trial.same_as = first if first < len(lowered) else None
            lowered.append((made, given, tracing) if trial.same_as is None and not skip(trial) else None)
        except Exception as error:  # a candidate may fail in any way: that is what is being found out
            trial.refused = f"it is not traced: {_one_line(error)}"
            lowered.append(None)

    def build(place: int) -> Any:
        if lowered[place] is None:
            return None
        made, given, tracing = lowered[place]
        try:
            began = time.perf_counter()
            program = made.compile()
            if tunable.calls(facts) and trials[place].compiling is None:
                trials[place].compiling = tracing + time.perf_counter() - began
            return functools.partial(program, *given)
        except Exception as error:
            trials[place].refused = f"it does not compile: {_one_line(error)}"
            return None

    workers = 1 if tunable.calls(facts) else max(1, min(len(trials), os.cpu_count() or 1))
    anew = _jax.compiled_anew() if tunable.calls(facts) else contextlib.nullcontext()
    with anew, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(build, place) for place in range(len(trials))]
        programs = []
        try:
            for future in futures:
                check()
                programs.append(future.result())
        finally:
            for future in futures:  # Ctrl-C does not wait for what has not begun
                future.cancel()
    return programs


def checked(tunable: Tunable, facts: Facts, program: Callable[[], Any], expected: Any, trial: Trial) -> bool:
    """Returns whether a program's result is right; says in the trial how far off it is, or what failed."""
    try:
        found = jax.block_until_ready(tunable.checked(facts, program()))
    except Exception as error:
        trial.refused = f"it does not run: {_one_line(error)}"
        return False
    ours, theirs = jax.tree.leaves(found), jax.tree.leaves(expected)
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        trial.refused = f"its result has the shapes {[x.shape for x in ours]}, the oracle's {[x.shape for x in theirs]}"
        return False
    allowed = max(tolerance(x.dtype, tunable.reduction(facts)) for x in ours)
    trial.error = max(map(_distance, ours, theirs))
    if not trial.error <= allowed:
        trial.refused = f"its result is wrong: {trial.error:.2g} from the oracle, where {allowed:.2g} is allowed"
        return False
    return True


def _distance(ours: jax.Array, theirs: jax.Array) -> float:
    """The largest difference relative to the largest number; NaN and infinity where they are not in both are far."""
    a, b = ours.astype(jnp.float32), theirs.astype(jnp.float32)
    same = (a == b) | (jnp.isnan(a) & jnp.isnan(b))
    difference = jnp.where(same, 0.0, jnp.abs(a - b))
    scale = jnp.max(jnp.where(jnp.isfinite(b), jnp.abs(b), 0.0), initial=1e-30)
    return float(jnp.max(jnp.where(jnp.isnan(difference), jnp.inf, difference), initial=0.0) / scale)


def raced(
    programs: Sequence[Callable[[], Any]],
    *,
    seconds: float,
    check: Callable[[], None],
    fewest: int = FEWEST,
    offsets: Sequence[float] | None = None,
    before: Sequence[list[float]] | None = None,
    report: Callable[[float], None] = lambda share: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Returns seconds of a call of each program, measured in turn for about that many seconds in all.

    Args:
        programs: compiled, with their operands; the first stays to the end.
        seconds: in all.
        check: called between samples; raises to stop.
        fewest: rounds at least; from then on what is far behind leaves.
        offsets: seconds of each program that every sample of it has more: its share of compiling.
        before: samples of an earlier race, to which those of this one are added; what had left it does not run again.
        report: told which share of the time is over.
        clock: in seconds.
    """
    more = offsets or [0.0] * len(programs)
    samples: list[list[float]] = [[] for _ in programs] if before is None else list(before)
    rounds = min(len(samples[0]), fewest) if samples[0] else 0
    able = [p for p in range(len(programs)) if p == 0 or len(samples[p]) >= len(samples[0]) - 1]
    warm = [math.inf] * len(programs)
    for place in able:
        calls = []
        for _ in range(WARM_UP):
            check()
            began = clock()
            jax.block_until_ready(programs[place]())
            calls.append(clock() - began)
        warm[place] = min(calls)  # one that was interrupted does not condemn a candidate
    begun = [last + offset for last, offset in zip(warm, more, strict=True)]
    repeats = [max(1, min(1000, math.ceil(SAMPLE / max(last, 1e-7)))) if last < math.inf else 0 for last in warm]
    running = [place for place in able if place == 0 or begun[place] <= HOPELESS * min(begun)]
    for place in able:
        if place not in running and not samples[place]:
            samples[place].append(begun[place])
    began = clock()
    while rounds < fewest or clock() < began + seconds:
        turn = rounds % len(running)
        for place in running[turn:] + running[:turn]:
            check()
            start = clock()
            for _ in range(repeats[place]):
                result = programs[place]()
            jax.block_until_ready(result)
            samples[place].append((clock() - start) / repeats[place] + more[place])
        rounds += 1
        if rounds >= fewest:
            best = min(statistics.median(samples[place]) for place in running)
            running = [place for place in running if place == 0 or min(samples[place]) <= BEHIND * best]
        report(min(1.0, (clock() - began) / seconds) if seconds else 1.0)
        if len(running) == 1:
            break
    return samples


def summary(times: Sequence[float]) -> Summary:
    """Returns the median of samples without those that lie more than `OUTLIER` deviations from it."""
    middle = statistics.median(times)
    deviation = statistics.median(abs(t - middle) for t in times)
    kept = [t for t in times if abs(t - middle) <= OUTLIER * deviation] if deviation else list(times)
    seconds = statistics.median(kept)
    spread = statistics.median(abs(t - seconds) for t in kept)
    return Summary(seconds, spread, len(times), len(times) - len(kept))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
