"""What packing has cost: bits, signal to noise and the largest error of each leaf."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import QuantizationError
from trustcore.ops.weight import Weight
from trustcore.quant.array import QuantizedArray
from trustcore.quant.quantize import path_name


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
    """

    path: str
    shape: tuple[int, ...]
    format: str
    bits_per_weight: float
    sqnr_db: float
    max_error: float


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
        lines = [f"{'path':{width}}  {'shape':>14}  {'format':>{wide}}  {'bits':>6}  {'SQNR dB':>7}  {'max error':>9}"]
        for leaf in self.leaves:
            shape = "x".join(map(str, leaf.shape))
            lines.append(
                f"{leaf.path:{width}}  {shape:>14}  {leaf.format:>{wide}}  {leaf.bits_per_weight:6.3f}  "
                f"{leaf.sqnr_db:7.2f}  {leaf.max_error:9.3g}"
            )
        return "\n".join([*lines, f"{self.bits_per_weight:.3f} bits a weight in all"])


def report(before: Any, after: Any) -> Report:
    """Returns what became of each float leaf of `before` in `after`.

    Args:
        before: a tree of weights.
        after: the same tree, any of its matrices packed.

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
    return Report(tuple(_compare(path, old[path], new[path]) for path in old))


def _weights(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, Weight))[0]
    named = {path_name(path): leaf for path, leaf in leaves}
    return {
        path: leaf
        for path, leaf in named.items()
        if isinstance(leaf, Weight)
        or (isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.floating))
    }


def _compare(path: str, before: Any, after: Any) -> LeafReport:
    signal, noise, error = (0.0, 0.0, 0.0)
    if math.prod(before.shape):
        signal, noise, error = map(float, _distance(_decoded(before), _decoded(after)))
    sqnr = math.inf if noise == 0 else -math.inf if signal == 0 else 10 * math.log10(signal / noise)
    format = after.description if isinstance(after, QuantizedArray) else str(after.dtype)
    bits = 8 * after.nbytes / max(math.prod(after.shape), 1)
    return LeafReport(path, tuple(before.shape), format, bits, sqnr, error)


def _decoded(leaf: Any) -> jax.Array:
    return leaf.dequantize() if isinstance(leaf, Weight) else jnp.asarray(leaf).astype(jnp.float32)


@jax.jit
def _distance(before: jax.Array, after: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of squares, relative to the largest number so that none vanishes, and the largest difference."""
    largest = jnp.max(jnp.maximum(jnp.abs(before), jnp.abs(after)))
    unit = jnp.where(largest > 0, largest, 1)
    difference = before - after
    return jnp.sum((before / unit) ** 2), jnp.sum((difference / unit) ** 2), jnp.max(jnp.abs(difference))
