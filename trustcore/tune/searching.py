"""Tunes one call now: lists candidates, compiles, checks and times them, and keeps the best.

The op's defaults are a candidate like any other, measured in turn with them. The fastest then meets the defaults alone:
it takes their place where it is faster in the median and in most rounds. Nothing wins that the oracle does not confirm.
If the defaults themselves are wrong, the best of the right candidates wins, and the result says so.

A search that is stopped, in whatever way, has kept what it found (`unfinished.py`): the next one of the same call on
the same device compiles and checks what was not out yet, and goes on timing where the other one ended.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from kernels_pallas import tuning
from kernels_pallas.tuning import Facts, Tunable, Values
from trustcore.errors import TrustcoreError, TuningError
from trustcore.tune import assembling, listing, measure, registry, table
from trustcore.tune.choosing import facts_of, text_of, tracing
from trustcore.tune.device import Device, this_device
from trustcore.tune.listing import Candidates, described
from trustcore.tune.measure import Trial
from trustcore.tune.unfinished import Unfinished

MARGIN = 0.05  # by which a candidate must be faster than the defaults
MAJORITY = 0.75  # of the rounds in which it must be
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        op, facts, device: the call.
        values: the fastest; {} are the defaults.
        trials: every candidate, the defaults first.
        candidates: what was listed, and what was cut with its reason.
        entry: as it is kept.
    """

    op: str
    facts: Facts
    device: Device
    values: Values
    trials: tuple[Trial, ...]
    candidates: Candidates
    entry: table.Entry

    @property
    def gain(self) -> float:
        """How many times as fast as the defaults; 1 where they won."""
        return self.entry.default_seconds / self.entry.seconds

    def __str__(self) -> str:
        lines = [f"{self.op} {text_of(self.facts)}", f"on {self.device}: {described(self.values)} ({self.gain:.2f})"]
        right = sorted((t for t in self.trials if t.summary and t.same_as is None), key=_seconds)
        for trial in right:
            s = trial.summary
            assert s is not None
            mark = "*" if dict(trial.values) == dict(self.values) else " "
            spread = f"+- {s.spread / s.seconds:.1%} of {s.samples}" + (f", {s.dropped} dropped" if s.dropped else "")
            told = "" if trial.compiling is None else f", compiled in {trial.compiling:.2f} s"
            lines.append(f" {mark} {s.seconds * 1e3:10.4f} ms  {spread:24}  {described(trial.values)}{told}")
        out = [t for t in self.trials if t.refused and t.same_as is None]
        lines += [f"   out: {described(t.values)}: {t.refused}" for t in out]
        lines.append(f"   {len(self.candidates.cut)} not tried")
        return "\n".join(lines)


def search(
    op: str | Tunable,
    *shapes: Any,
    seconds: float = 4.0,
    most: int = listing.MOST,
    operands: tuple[Any, ...] | None = None,
    keep: bool = True,
    progress: Progress | None = None,
    check: Callable[[], None] | None = None,
    **options: Any,
) -> Result:
    """Tunes a call on the default device and keeps the result in the cache folder.

    Args:
        op: its name, or a declaration of your own.
        shapes, options: the call, as in `best`.
        seconds: of timing, all candidates together; each gets three rounds at least.
        most: candidates that are compiled.
        operands: those of the call; None: random ones.
        keep: whether the result is written.
        progress: called with (what is done, steps done, steps in all).
        check: called often; what it raises ends the search. What was measured until then is kept, and the next search
            of the call goes on from it.

    Raises:
        TuningError: the call is none of the op's, this is inside a trace, or no candidate is right.
    """
    tunable = op if isinstance(op, Tunable) else registry.declared(op)
    if tracing(shapes, operands):
        raise TuningError(f"{tunable.op}: nothing is tuned inside of a trace; call it outside of jit, grad and vmap.")
    facts = facts_of(tunable, shapes, options)
    device, check, progress = this_device(), check or (lambda: None), progress or (lambda what, done, total: None)
    compiled = device.platform == "cuda" and not assembling.why_not(tunable, device)
    listed = listing.candidates(tunable, device, facts, most=most, compiled=compiled)
    trials = [Trial({}), *(Trial(values) for values in listed.tried)]
    what, steps = f"{tunable.op} {text_of(facts)}", len(trials) + 10
    unfinished = Unfinished(device, tunable, facts)
    with tuning.CHOOSER(None):
        progress(what, 0, steps)
        race = _Race(tunable, facts, operands, trials, unfinished, check)
        try:
            race.confirm(lambda place: progress(what, place, steps))
            if not race.able:
                reasons = {t.refused for t in trials}
                raise TuningError(f"{what}: no candidate is right: {'; '.join(sorted(reasons))[:600]}")
            race.run(seconds, lambda share: progress(what, len(trials) + int(10 * share), steps))
            fastest = min(race.able, key=lambda place: _seconds(trials[place]))
            stands = fastest == 0 or (race.able[0] == 0 and race.defaults_stand(fastest, seconds / 2))
        except BaseException:
            if keep:
                unfinished.write(now=True)
            raise
    for trial in trials:
        if trial.same_as is not None:
            first = trials[trial.same_as]
            trial.refused, trial.error, trial.summary = first.refused, first.error, first.summary
            trial.compiling = first.compiling
    values = trials[0 if stands else fastest].values
    entry = _entry(tunable, facts, values, trials)
    if keep:
        table.record(device, entry)
    unfinished.drop()
    return Result(tunable.op, facts, device, values, tuple(trials), listed, entry)


class _Race:
    """The candidates of a search, from being compiled to their times; what becomes of them is kept as it is found out.

    `able`: places of those that are right and still in it.
    """

    def __init__(
        self, tunable: Tunable, facts: Facts, operands: tuple[Any, ...] | None, trials: list[Trial], kept: Unfinished,
        check: Callable[[], None],
    ) -> None:  # fmt: skip
        self.tunable, self.facts, self.trials, self.unfinished, self.check = tunable, facts, trials, kept, check
        self.made: Any = operands if operands is not None else _refusing(tunable.operands, facts)
        self.kept = [kept.of(trial.values) for trial in trials]
        for trial, known in zip(trials, self.kept, strict=True):
            trial.refused, trial.error, trial.compiling = known.refused, known.error, known.compile
        prepared = jax.block_until_ready(_refusing(tunable.prepare, facts, self.made))
        rounds = len(self.kept[0].samples)
        left = {id(t): 0 < len(k.samples) < rounds - 1 for t, k in zip(trials, self.kept, strict=True)}
        self.programs = measure.compiled(tunable, facts, prepared, trials, check, skip=lambda trial: left[id(trial)])
        for place, trial in enumerate(trials):
            if trial.same_as is None:
                self.kept[place].refused, self.kept[place].compile = trial.refused, trial.compiling

    @property
    def able(self) -> list[int]:
        return [place for place, program in enumerate(self.programs) if program is not None]

    def confirm(self, report: Callable[[int], None]) -> None:
        """Compares the results that no earlier search compared with the oracle's; what is wrong is out."""
        expected = None
        for place in self.able:
            self.check()
            report(place)
            trial, known = self.trials[place], self.kept[place]
            if known.error is None:
                if expected is None:
                    expected = jax.block_until_ready(
                        _refusing(jax.jit(functools.partial(self.tunable.oracle, self.facts)), self.made)
                    )
                if not measure.checked(self.tunable, self.facts, self.programs[place], expected, trial):
                    self.programs[place] = None
                known.refused, known.error = trial.refused, trial.error
                self.unfinished.write()
        self.made = None  # the race needs what was prepared alone

    def run(self, seconds: float, report: Callable[[float], None]) -> None:
        """Times those that are able, for what is left of the seconds."""
        able, before = self.able, self.unfinished.spent
        rest = max(0.0, seconds - before)

        def told(share: float) -> None:
            self.unfinished.spent = before + share * rest
            self.unfinished.write()
            report(share)

        measure.raced(
            [self.programs[place] for place in able], seconds=rest, check=self.check, report=told,
            offsets=[self._share(place) for place in able], before=[self.kept[place].samples for place in able],
        )  # fmt: skip
        for trial, known in zip(self.trials, self.kept, strict=True):
            if known.samples and trial.same_as is None:
                trial.summary = measure.summary(known.samples)

    def defaults_stand(self, fastest: int, seconds: float) -> bool:
        """Whether the defaults keep their place against the fastest, alone with it."""
        pair = [0, fastest]
        ours, theirs = measure.raced(
            [self.programs[place] for place in pair], seconds=seconds, check=self.check, fewest=measure.FINAL,
            offsets=[self._share(place) for place in pair],
        )  # fmt: skip
        self.trials[0].summary, self.trials[fastest].summary = measure.summary(ours), measure.summary(theirs)
        return _stands(ours, theirs)

    def _share(self, place: int) -> float:
        """The time of compiling that each call counts with."""
        calls = self.tunable.calls(self.facts)
        return (self.trials[place].compiling or 0.0) / calls if calls else 0.0


def _refusing(function: Callable[..., Any], *given: Any) -> Any:
    """What a function of a declaration returns; a ValueError of it says that the call cannot be tuned."""
    try:
        return function(*given)
    except TrustcoreError:
        raise
    except ValueError as error:
        raise TuningError(str(error)) from error


def _seconds(trial: Trial) -> float:
    return trial.summary.seconds if trial.summary else math.inf


def _stands(defaults: list[float], challenger: list[float]) -> bool:
    """Whether the defaults keep their place: the other is not clearly faster, in the median and in most rounds."""
    rounds = list(zip(defaults, challenger, strict=False))  # as many of both but for one that left
    won = sum(theirs < ours for ours, theirs in rounds)
    ours, theirs = measure.summary(defaults).seconds, measure.summary(challenger).seconds
    return not (theirs < (1 - MARGIN) * ours and won >= MAJORITY * len(rounds))


def _within(trials: list[Trial]) -> dict[str, Any]:
    """The best values of one implementation, its own defaults unless another is faster by more than the noise."""
    plain, fastest = next(t for t in trials if len(t.values) == 1), min(trials, key=_seconds)
    if plain.summary is not None and fastest.summary is not None:
        noise = plain.summary.spread + fastest.summary.spread
        if fastest.summary.seconds > (1 - MARGIN) * plain.summary.seconds - noise:
            fastest = plain
    told = {"values": dict(fastest.values), "seconds": _seconds(fastest)}
    return told if fastest.compiling is None else {**told, "compile_seconds": fastest.compiling}


def _entry(tunable: Tunable, facts: Facts, values: Values, trials: list[Trial]) -> table.Entry:
    exact, sizes = table.split(tunable, facts)
    names = dict.fromkeys(t.values["implementation"] for t in trials if t.values and t.summary)
    implementations = {name: _within([t for t in trials if t.values.get("implementation") == name]) for name in names}
    name = values.get("implementation") or next(
        (t.values["implementation"] for t in trials if t.same_as == 0 and len(t.values) == 1), None
    )
    if name is not None:  # what won in all won within its implementation, by more rounds
        implementations[name]["values"] = {"implementation": name, **values}
    won = next(t for t in trials if t.values == values)
    default = trials[0] if trials[0].summary else won
    return table.Entry(
        op=tunable.op,
        source=registry.source_hash(tunable),
        revision=tunable.revision,
        jaxlib=table.jaxlib_version(),
        exact=exact,
        sizes=sizes,
        values=dict(values),
        seconds=_seconds(won),
        default_seconds=_seconds(default),
        implementations=implementations,
        wrong=[{"values": dict(t.values), "why": t.refused} for t in trials if t.refused and t.error is not None],
        date=datetime.date.today().isoformat(),
    )
