"""Ranges chosen on some of the data and judged on the rest.

The data is split into parts; one pass makes a histogram of each. For every part in turn a rule chooses the range on the
histograms of the others, merged, and the codes under it are judged by their squared error on the part that was held
out. A rule that clips too much, or an outlier that happened to be in the data, shows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from trustcore.errors import QuantizationError
from trustcore.quant.calibration.capture import capture
from trustcore.quant.calibration.observers import Range
from trustcore.quant.calibration.ranges import Entropy, Histogram, LeastSquares, Percentile, Rule, squared_error
from trustcore.quant.quantize import Predicate

RULES: Mapping[str, Rule] = {
    "min-max": Percentile(100),
    "99.99%": Percentile(99.99),
    "99.9%": Percentile(99.9),
    "entropy": Entropy(),
    "least squares": LeastSquares(),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One rule for the inputs of one matrix.

    Attributes:
        path: of the matrix.
        rule: by name.
        sqnr_db: signal to noise of the codes on the parts held out, `10 log10(sum x^2 / sum (x - code)^2)`.
        worst_db: on the worst of the parts.
        threshold: that the rule chooses on all of the data.
    """

    path: str
    rule: str
    sqnr_db: float
    worst_db: float
    threshold: float


@dataclasses.dataclass(frozen=True)
class Validation:
    """All trials, and the best rule of each matrix: the one with the highest signal to noise on parts held out."""

    trials: tuple[Trial, ...]
    bits: int
    folds: int

    @property
    def best(self) -> dict[str, Trial]:
        """The best trial of each matrix."""
        found: dict[str, Trial] = {}
        for trial in self.trials:
            if trial.path not in found or trial.sqnr_db > found[trial.path].sqnr_db:
                found[trial.path] = trial
        return found

    @property
    def ranges(self) -> dict[str, Range]:
        """The range of each matrix's inputs by its best rule, chosen on all of the data."""
        ends = {path: np.float32(trial.threshold) for path, trial in self.best.items()}
        return {path: Range(np.asarray(-end), np.asarray(end)) for path, end in ends.items()}

    def to_json(self) -> str:
        """Returns everything as a JSON document."""
        best = {path: trial.rule for path, trial in self.best.items()}
        trials = [dataclasses.asdict(trial) for trial in self.trials]
        return json.dumps({"bits": self.bits, "folds": self.folds, "best": best, "trials": trials}, indent=1)

    def to_markdown(self) -> str:
        """Returns a table: signal to noise on parts held out, by matrix and rule; the best in bold."""
        rules = list(dict.fromkeys(trial.rule for trial in self.trials))
        lines = [
            f"Signal to noise in dB of {self.bits}-bit activations on data held out, {self.folds} folds.",
            "",
            f"| matrix | {' | '.join(rules)} | threshold |",
            f"|---|{'---:|' * (len(rules) + 1)}",
        ]
        for path, best in self.best.items():
            cells = []
            for rule in rules:
                trial = next(t for t in self.trials if (t.path, t.rule) == (path, rule))
                cells.append(f"**{trial.sqnr_db:.2f}**" if trial is best else f"{trial.sqnr_db:.2f}")
            lines.append(f"| {path} | {' | '.join(cells)} | {best.threshold:.4g} |")
        return "\n".join(lines)


def cross_validate(
    fn: Callable[..., Any] | None,
    params: Any,
    batches: Sequence[Any],
    *,
    rules: Mapping[str, Rule] | None = None,
    bits: int = 8,
    folds: int = 4,
    bins: int = 4096,
    where: Predicate | Sequence[str] | None = None,
) -> Validation:
    """Returns how well the ranges that rules choose for the inputs of products hold on data they have not seen.

    Args:
        fn: a function of (params, *batch); None: params is a model that is called itself.
        params: a pytree of weights.
        batches: arrays, or tuples of the arguments after params; at least as many as folds.
        rules: by name; None: `RULES`.
        bits: of the symmetric codes that are judged, one threshold for all inputs of a matrix.
        folds: parts of the data, batches going to them in turn.
        bins: of the histograms.
        where: as for `capture`.

    Raises:
        QuantizationError: fewer batches than folds, fewer than two folds, or what `capture` refuses.

    One pass over the data, `folds * bins` counters for each matrix. Matrices in a stack share one threshold.
    """
    if not 2 <= folds <= len(batches):
        raise QuantizationError(
            f"cross_validate: {folds} folds of {len(batches)} batches; folds must be at least 2 and at most the number "
            "of batches."
        )
    rules = RULES if rules is None else rules
    collect = capture(fn, params, Histogram(bins=bins), where=where)
    states: list[Any] = [None] * folds
    for i, batch in enumerate(batches):
        arguments = batch if isinstance(batch, tuple | list) else (batch,)
        states[i % folds] = collect(*arguments, state=states[i % folds])
    parts = [collect.finish(state) for state in states]
    trials = []
    for path in parts[0]:
        held = [_summed(*part[path]) for part in parts]
        for name, rule in rules.items():
            trials.append(_trial(path, name, rule, held, bits))
    return Validation(tuple(trials), bits, folds)


Bins = tuple[np.ndarray, np.ndarray]  # counts and centres


def _summed(counts: np.ndarray, centres: np.ndarray) -> Bins:
    """One histogram of those of a stack."""
    pairs = zip(counts.reshape(-1, counts.shape[-1]), centres.reshape(-1, centres.shape[-1]), strict=True)
    return _merged(list(pairs))


def _merged(histograms: Sequence[Bins]) -> Bins:
    """The histogram of all, under the widest limit among them."""
    widest = max(centres[-1] for _, centres in histograms)
    total = np.zeros(len(histograms[0][0]))
    chosen = next(centres for _, centres in histograms if centres[-1] == widest)
    width = chosen[1] - chosen[0]
    for counts, centres in histograms:
        place = np.clip(np.floor(centres / width).astype(int) + len(total) // 2, 0, len(total) - 1)
        total += np.bincount(place, counts, len(total))
    return total, chosen


def _trial(path: str, name: str, rule: Rule, held: list[Bins], bits: int) -> Trial:
    noise, signal, each = 0.0, 0.0, []
    for i, (counts, centres) in enumerate(held):
        low, high = rule.choose(*_merged([h for j, h in enumerate(held) if j != i]))
        error = squared_error(counts, centres, max(-low, high), bits) * counts.sum()
        power = float((counts * centres**2).sum())
        each.append(_decibels(power, error))
        noise, signal = noise + error, signal + power
    low, high = rule.choose(*_merged(held))
    return Trial(path, name, _decibels(signal, noise), min(each), max(-low, high))


def _decibels(signal: float, noise: float) -> float:
    return float(10 * np.log10(max(signal, 1e-300) / max(noise, 1e-300)))
