"""What packing has cost: bits, signal to noise, cosine and the largest error of each leaf, and what the logits lose.

With data, the KL divergence of the logits is measured with one leaf packed at a time, and `compare_formats` weighs
whole formats against each other, quality against size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import QuantizationError
from trustcore.ops.weight import Weight
from trustcore.quant.array import QuantizedArray
from trustcore.quant.calibration.capture import replaced
from trustcore.quant.quantize import path_name, quantize
from trustcore.quant.sensitivity import Reference


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """One leaf.

    Attributes:
        path: names from the root, joined by dots.
        shape: of the matrix.
        format: of a packed leaf, with its granularity; otherwise its dtype.
        bits_per_weight: as stored, scales included.
        sqnr_db: `10 log10(sum before^2 / sum (before - after)^2)`; inf where nothing changed.
        max_error: the largest `|before - after|`.
        cosine: of the angle between before and after as vectors; 1 where both are zero.
        kl: mean KL divergence of the logits in nats with this leaf alone as it is after; None where not measured.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    bits_per_weight: float
    sqnr_db: float
    max_error: float
    cosine: float
    kl: float | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """All float leaves of a tree; printed, a table."""

    leaves: tuple[LeafReport, ...]

    @property
    def bits_per_weight(self) -> float:
        """Of the whole tree."""
        sizes = [math.prod(leaf.shape) for leaf in self.leaves]
        bits = sum(leaf.bits_per_weight * size for leaf, size in zip(self.leaves, sizes, strict=True))
        return bits / max(sum(sizes), 1)

    def __str__(self) -> str:
        width = max([len(leaf.path) for leaf in self.leaves] + [4])
        wide = max([len(leaf.format) for leaf in self.leaves] + [8])
        measured = any(leaf.kl is not None for leaf in self.leaves)
        head = f"{'path':{width}}  {'shape':>14}  {'format':>{wide}}  {'bits':>6}  {'SQNR dB':>7}  {'max error':>9}"
        lines = [head + f"  {'cosine':>8}" + (f"  {'KL':>9}" if measured else "")]
        for leaf in self.leaves:
            shape = "x".join(map(str, leaf.shape))
            line = (
                f"{leaf.path:{width}}  {shape:>14}  {leaf.format:>{wide}}  {leaf.bits_per_weight:6.3f}  "
                f"{leaf.sqnr_db:7.2f}  {leaf.max_error:9.3g}  {leaf.cosine:8.6f}"
            )
            lines.append(line + ("" if leaf.kl is None else f"  {leaf.kl:9.3g}"))
        return "\n".join([*lines, f"{self.bits_per_weight:.3f} bits a weight in all"])

    def to_markdown(self) -> str:
        """Returns the same as a Markdown table."""
        lines = [
            "| path | shape | format | bits/weight | SQNR dB | max error | cosine | KL |",
            "|---|---|---|---:|---:|---:|---:|---:|",
        ]
        for leaf in self.leaves:
            kl = "" if leaf.kl is None else f"{leaf.kl:.3g}"
            lines.append(
                f"| {leaf.path} | {'x'.join(map(str, leaf.shape))} | {leaf.format} | {leaf.bits_per_weight:.3f} | "
                f"{leaf.sqnr_db:.2f} | {leaf.max_error:.3g} | {leaf.cosine:.6f} | {kl} |"
            )
        return "\n".join([*lines, f"\n{self.bits_per_weight:.3f} bits a weight in all"])


def report(
    before: Any, after: Any, *, fn: Callable[..., Any] | None = None, batches: Sequence[Any] | None = None
) -> Report:
    """Returns what became of each float leaf of `before` in `after`.

    Args:
        before: a tree of weights.
        after: the same tree, any of its matrices packed.
        fn: a function of (weights, *batch) that gives logits; None: the trees are models that are called themselves.
        batches: data to measure the logits on, one forward for each leaf that is packed: arrays, or tuples of the
            arguments after the weights. None: only weights are compared.

    Raises:
        QuantizationError: the trees do not have the same paths and shapes; all that differ are named.

    Decodes one matrix at a time.
    """
    old, new = _weights(before), _weights(after)
    faults = [f"{path} is missing" for path in old if path not in new]
    faults += [f"{path} was not there before" for path in new if path not in old]
    faults += [
        f"{path} was {list(old[path].shape)} and is {list(new[path].shape)}"
        for path in old
        if path in new and tuple(old[path].shape) != tuple(new[path].shape)
    ]
    if faults:
        raise QuantizationError(f"report: the trees do not match: {'; '.join(faults[:20])}")
    kl = {} if batches is None else _divergences(fn, before, old, new, batches)
    return Report(tuple(_compare(path, old[path], new[path], kl.get(path)) for path in old))


@dataclasses.dataclass(frozen=True)
class FormatReport:
    """One format for a whole model.

    Attributes:
        format: its name.
        nbytes: of all leaves.
        bits_per_weight: of the matrices that were packed.
        kl: mean KL divergence of the logits, in nats.
        top1: share of the tokens whose most likely next token is the same.
        recommended: whether no other format of the comparison is both smaller and better.
    """

    format: str
    nbytes: int
    bits_per_weight: float
    kl: float
    top1: float
    recommended: bool


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """Formats by size, smallest first; printed, a table."""

    formats: tuple[FormatReport, ...]

    def within(self, kl: float) -> FormatReport | None:
        """Returns the smallest format whose divergence is at most `kl`; None where there is none."""
        return next((f for f in self.formats if f.kl <= kl), None)

    def to_markdown(self) -> str:
        """Returns the table in Markdown."""
        lines = ["| format | bytes | bits/weight | KL | top-1 | |", "|---|---:|---:|---:|---:|---|"]
        for f in self.formats:
            mark = "recommended" if f.recommended else ""
            lines.append(f"| {f.format} | {f.nbytes} | {f.bits_per_weight:.3f} | {f.kl:.3g} | {f.top1:.1%} | {mark} |")
        return "\n".join(lines)

    __str__ = to_markdown


def compare_formats(
    fn: Callable[..., Any] | None, params: Any, batches: Sequence[Any], formats: Sequence[str], **options: Any
) -> Recommendation:
    """Returns quality against size for each of `formats`, the whole tree packed by it.

    Args:
        fn: a function of (params, *batch) that gives logits; None: params is a model that is called itself.
        params: a pytree of weights.
        batches: arrays, or tuples of the arguments after params.
        formats: names.
        options: of `quantize`: where, transposed, importance, search.

    Raises:
        QuantizationError: as `quantize`.

    One tree is packed at a time.
    """
    reference = Reference(fn, params, batches)
    found = []
    for name in formats:
        packed = quantize(params, name, requantize=True, **options)
        matrices = [w for w in _weights(packed).values() if isinstance(w, QuantizedArray)]
        bits = 8 * sum(w.nbytes for w in matrices) / max(sum(w.size for w in matrices), 1)
        nbytes = sum(leaf.nbytes for leaf in _weights(packed).values())
        found.append((name, nbytes, bits, *reference.compare(packed)))
    found.sort(key=lambda row: (row[1], row[3]))
    best, rows = math.inf, []
    for row in found:
        rows.append(FormatReport(*row, recommended=row[3] < best))
        best = min(best, row[3])
    return Recommendation(tuple(rows))


def _divergences(fn: Any, before: Any, old: Any, new: Any, batches: Sequence[Any]) -> dict[str, float]:
    """KL of the logits with one changed leaf at a time."""
    floats = replaced(before, {path: _decoded(leaf).astype(leaf.dtype) for path, leaf in old.items()})
    reference = Reference(fn, floats, batches)
    changed = [path for path, leaf in new.items() if isinstance(leaf, Weight) and leaf is not old[path]]
    return {
        path: max(reference.compare(replaced(floats, {path: _decoded(new[path]).astype(old[path].dtype)})).kl, 0.0)
        for path in changed
    }


def _weights(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, Weight))[0]
    named = {path_name(path): leaf for path, leaf in leaves}
    return {
        path: leaf
        for path, leaf in named.items()
        if isinstance(leaf, Weight)
        or (isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.floating))
    }


class Distance:
    """How far a leaf is from what it was, over pieces of it: sums of squares in float64."""

    def __init__(self) -> None:
        self._before = self._after = self._both = self._apart = self._largest = 0.0

    def add(self, before: Any, after: Any) -> None:
        """Adds a piece, float32: what stood there, and what stands there now."""
        if not math.prod(before.shape):
            return
        unit, *sums, largest = map(float, _sums(before, after))
        self._before += sums[0] * unit**2
        self._after += sums[1] * unit**2
        self._both += sums[2] * unit**2
        self._apart += sums[3] * unit**2
        self._largest = max(self._largest, largest)

    def report(self, path: str, shape: tuple[int, ...], after: Any, kl: float | None = None) -> LeafReport:
        """Returns the figures for a leaf of that shape, of which `after` is all there is now."""
        ratio = 10 * math.log10(self._before / self._apart) if self._before and self._apart else -math.inf
        sqnr = ratio if self._apart else math.inf
        norms = math.sqrt(self._before) * math.sqrt(self._after)
        cosine = 1.0 if not self._before and not self._after else self._both / norms if norms else 0.0
        format = after.description if isinstance(after, QuantizedArray) else str(after.dtype)
        bits = 8 * after.nbytes / max(math.prod(shape), 1)
        return LeafReport(path, tuple(shape), format, bits, sqnr, self._largest, max(min(cosine, 1.0), -1.0), kl)


def _compare(path: str, before: Any, after: Any, kl: float | None) -> LeafReport:
    distance = Distance()
    distance.add(_decoded(before), _decoded(after))
    return distance.report(path, tuple(before.shape), after, kl)


def _decoded(leaf: Any) -> jax.Array:
    return leaf.dequantize() if isinstance(leaf, Weight) else jnp.asarray(leaf).astype(jnp.float32)


@jax.jit
def _sums(before: jax.Array, after: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the largest number, sums of squares and of products in units of it, so that none vanishes, and the
    largest difference."""
    largest = jnp.max(jnp.maximum(jnp.abs(before), jnp.abs(after)))
    unit = jnp.where(largest > 0, largest, 1)
    difference = before - after
    a, b = before / unit, after / unit
    squares = jnp.sum((difference / unit) ** 2)
    return unit, jnp.sum(a * a), jnp.sum(b * b), jnp.sum(a * b), squares, jnp.max(jnp.abs(difference))
