"""Ranges from histograms: percentile, entropy (KL divergence) and least squares.

One pass, though the largest number is not known ahead: the bins lie evenly in [-limit, limit), limit being a power of
two. A batch that reaches further doubles it, and neighbouring bins flow together: bin i, counted from the middle,
becomes floor(i / 2). That is exact, so batches may come in any order.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import QuantizationError
from trustcore.quant.calibration.observers import Observer, Range

_SMALLEST = -100  # exponent of the smallest limit


class Counts(NamedTuple):
    """A histogram: `counts` `[..., bins]` of the numbers in [-2**exponent, 2**exponent)."""

    counts: jax.Array
    exponent: jax.Array


class Rule(abc.ABC):
    """How a range is chosen from a histogram."""

    @abc.abstractmethod
    def choose(self, counts: np.ndarray, centres: np.ndarray) -> tuple[float, float]:
        """Returns (low, high).

        Args:
            counts: float64 `[bins]`, with at least one above zero.
            centres: float64 `[bins]`, the middle of each bin.
        """


@dataclasses.dataclass(frozen=True)
class Percentile(Rule):
    """The range that leaves out the given share of the numbers, half of it at either end.

    Args:
        percent: of the numbers that lie inside, 0 < percent <= 100.
    """

    percent: float = 99.99

    def __post_init__(self):
        if not 0 < self.percent <= 100:
            raise QuantizationError(f"Percentile: percent is {self.percent}; it must be above 0 and at most 100.")

    def choose(self, counts: np.ndarray, centres: np.ndarray) -> tuple[float, float]:
        """See `Rule`. Ends at outer edges of bins."""
        share = (1 - self.percent / 100) / 2
        below = np.cumsum(counts) / counts.sum()
        above = np.cumsum(counts[::-1])[::-1] / counts.sum()
        half = (centres[1] - centres[0]) / 2
        first = int(np.argmax(below > share))
        last = len(counts) - 1 - int(np.argmax(above[::-1] > share))
        return float(centres[first] - half), float(centres[last] + half)


@dataclasses.dataclass(frozen=True)
class LeastSquares(Rule):
    """The symmetric threshold under which rounding to codes makes the smallest mean squared error.

    Args:
        bits: of the codes, from `-(2**(bits-1) - 1)` to `2**(bits-1) - 1`.
        steps: thresholds that are tried, evenly up to the largest magnitude.
    """

    bits: int = 8
    steps: int = 256

    def choose(self, counts: np.ndarray, centres: np.ndarray) -> tuple[float, float]:
        """See `Rule`."""
        top = float(np.abs(centres[counts > 0]).max() + abs(centres[1] - centres[0]) / 2)
        tried = top * np.arange(1, self.steps + 1) / self.steps
        errors = [squared_error(counts, centres, threshold, self.bits) for threshold in tried]
        threshold = float(tried[int(np.argmin(errors))])
        return -threshold, threshold


@dataclasses.dataclass(frozen=True)
class Entropy(Rule):
    """The symmetric threshold whose codes lose the least information: the smallest KL divergence of the magnitudes.

    For each threshold, P is the histogram with everything beyond it put into its last bin, Q the same histogram without
    what lies beyond, averaged over the bins that share a code. As TensorRT calibrates activations (Migacz, GTC 2017).

    Args:
        bits: of the codes; magnitudes have `2**(bits-1)` levels.
    """

    bits: int = 8

    def choose(self, counts: np.ndarray, centres: np.ndarray) -> tuple[float, float]:
        """See `Rule`."""
        half = len(counts) // 2
        folded = counts[half:] + counts[:half][::-1]
        width = centres[1] - centres[0]
        levels = 2 ** (self.bits - 1)
        last = int(np.max(np.nonzero(folded)[0])) + 1
        if last <= levels:
            return -last * width, last * width
        ends = np.unique(np.linspace(levels, last, min(last - levels + 1, 128)).astype(int))
        losses = [_divergence(folded, int(end), levels) for end in ends]
        threshold = float(ends[int(np.argmin(losses))] * width)
        return -threshold, threshold


@dataclasses.dataclass(frozen=True)
class Histogram(Observer):
    """Counts the numbers, and lets a rule choose the range.

    Args:
        rule: `Percentile`, `Entropy` or `LeastSquares`; None gives the histogram itself, (counts, centres).
        per_channel: a range for each of the K inputs; `K * bins` counters.
        bins: of a histogram, a power of two.
    """

    rule: Rule | None = None
    per_channel: bool = False
    bins: int = 4096

    def __post_init__(self):
        if self.bins < 4 or self.bins & (self.bins - 1):
            raise QuantizationError(f"Histogram: bins is {self.bins}; it must be a power of two of at least 4.")

    def init(self, k: int) -> Counts:
        """See `Observer`. Counters are uint32: up to 4e9 numbers a bin."""
        shape = (k,) if self.per_channel else ()
        return Counts(jnp.zeros((*shape, self.bins), jnp.uint32), jnp.full(shape, _SMALLEST, jnp.int32))

    def update(self, state: Counts, x: jax.Array) -> Counts:
        """See `Observer`. NaN is not counted, infinities fall into the outermost bins."""
        if self.per_channel:
            return jax.vmap(self._count)(state, x.T)
        return self._count(state, x.reshape(-1))

    def merge(self, a: Counts, b: Counts) -> Counts:
        """See `Observer`."""
        join = jax.vmap(_join) if self.per_channel else _join
        return join(a, b)

    def finish(self, state: Counts) -> Range | tuple[np.ndarray, np.ndarray]:
        """Returns the range that the rule chooses; without a rule (counts, centres of the bins).

        Raises:
            QuantizationError: no data was seen.
        """
        counts, centres = histogram_of(state)
        if self.rule is None:
            return counts, centres
        if np.any(counts.sum(-1) == 0):
            raise QuantizationError("Histogram: no rows were seen; give at least one batch.")
        rows, middles = counts.reshape(-1, self.bins), centres.reshape(-1, self.bins)
        ends = np.array([self.rule.choose(c, m) for c, m in zip(rows, middles, strict=True)], np.float32)
        return Range(ends[:, 0].reshape(counts.shape[:-1]), ends[:, 1].reshape(counts.shape[:-1]))

    def _count(self, state: Counts, x: jax.Array) -> Counts:
        largest = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0), initial=0)
        _, exponent = jnp.frexp(largest)  # largest < 2**exponent
        exponent = jnp.maximum(jnp.clip(exponent, _SMALLEST, 127).astype(jnp.int32), state.exponent)
        half = self.bins // 2
        place = jnp.floor(jnp.ldexp(x, -exponent) * half) + half
        place = jnp.where(jnp.isnan(x), self.bins, jnp.clip(place, 0, self.bins - 1)).astype(jnp.int32)
        here = jnp.zeros((self.bins,), jnp.uint32).at[place].add(jnp.uint32(1), mode="drop")
        return _join(state, Counts(here, exponent))


def histogram_of(state: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Returns (counts, centres), float64 `[..., bins]`."""
    counts = np.asarray(state.counts).astype(np.float64)
    bins = counts.shape[-1]
    limit = np.ldexp(1.0, np.asarray(state.exponent))[..., None]
    return counts, ((np.arange(bins) + 0.5) * 2 / bins - 1) * limit


def squared_error(counts: np.ndarray, centres: np.ndarray, threshold: float, bits: int) -> float:
    """Returns the mean squared error of rounding to symmetric codes of that many bits, clipped at `threshold`.

    Bins count by their centres: right to about a twelfth of a squared bin.
    """
    top = 2 ** (bits - 1) - 1
    scale = threshold / top
    rounded = np.clip(np.round(centres / scale), -top, top) * scale if scale > 0 else np.zeros_like(centres)
    return float((counts * (centres - rounded) ** 2).sum() / max(counts.sum(), 1))


def _join(a: Counts, b: Counts) -> Counts:
    exponent = jnp.maximum(a.exponent, b.exponent)
    total = _widened(a.counts, exponent - a.exponent) + _widened(b.counts, exponent - b.exponent)
    return Counts(total, exponent)


def _widened(counts: jax.Array, times: jax.Array) -> jax.Array:
    """The counts under a limit that is `2**times` as large."""
    bins = counts.shape[0]
    half = bins // 2

    def double(_: int, counts: jax.Array) -> jax.Array:
        paired = counts.reshape(half, 2).sum(axis=1, dtype=counts.dtype)
        return jnp.zeros_like(counts).at[half // 2 : half // 2 + half].set(paired)

    # After as many doublings as there are bins to a side, everything lies in the two middle bins and stays there.
    return jax.lax.fori_loop(0, jnp.minimum(times, bins.bit_length()), double, counts)


def _divergence(folded: np.ndarray, end: int, levels: int) -> float:
    p = folded[:end].copy()
    kept = p.copy()
    p[-1] += folded[end:].sum()
    edges = np.linspace(0, end, levels + 1).astype(int)
    filled = kept > 0
    code = np.repeat(np.arange(levels), np.diff(edges))
    sums = np.bincount(code, kept, levels)
    members = np.bincount(code, filled, levels)
    q = np.where(filled, sums[code] / np.maximum(members[code], 1), 0)
    p, q = p / p.sum(), q / max(q.sum(), 1e-300)
    both = p > 0
    return float((p[both] * np.log(p[both] / np.maximum(q[both], 1e-12))).sum())
