"""What becomes of a matrix when `quantize` packs it: asked ahead of time, by the methods that choose weights for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from trustcore.quant.array import QuantizedArray
from trustcore.quant.folding.structure import Leaves
from trustcore.quant.formats import BlockFormat, ScaledFormat
from trustcore.quant.quantize import Formats, Predicate, is_table, plan_leaves, quantize


class Packing:
    """The decisions of `quantize(tree, format, ...)`, and its rounding of one matrix at a time.

    Args:
        leaves: the tree.
        format, where, transposed, search: as `quantize` will be given them.

    Raises:
        QuantizationError: what `quantize` would refuse.
    """

    def __init__(
        self,
        leaves: Leaves,
        format: Formats,
        *,
        where: Predicate | None,
        transposed: Predicate | None,
        search: bool,
    ):
        self._leaves, self._search = leaves, search
        named = leaves.items()
        plans = plan_leaves(named, format, where, transposed or is_table, {}, False)
        self._formats = {path: plan.format for (path, _), plan in zip(named, plans, strict=True) if plan is not None}

    def packs(self, path: str) -> bool:
        """Returns whether the leaf at `path` will be packed."""
        return path in self._formats

    def rounded(self, path: str, matrix: jax.Array, importance: Any = None) -> jax.Array:
        """Returns `matrix` `[K, N]`, packed as the leaf at `path` will be and decoded, float32."""
        return _decoded(self.packed(path, matrix, importance))

    def packed(self, path: str, matrix: jax.Array, importance: Any = None) -> QuantizedArray:
        """Returns `matrix` `[K, N]`, packed as the leaf at `path` will be, in the orientation of the leaf."""
        transposed = self._leaves.is_transposed(path)
        return quantize(
            {path: matrix.T if transposed else matrix},
            self._formats[path],
            where=lambda *_: True,
            transposed=lambda *_: transposed,
            importance=None if importance is None else {path: importance},
            search=self._search,
        )[path]


@jax.jit
def _decoded(packed: QuantizedArray) -> jax.Array:
    decoded = packed.dequantize().astype(jnp.float32)
    return decoded.T if packed.transposed else decoded


def group_of(packed: QuantizedArray) -> int:
    """Returns how many weights of a column share a scale; 1 where each stands alone."""
    spec = packed.spec
    if isinstance(spec, ScaledFormat):
        return spec.granularity(packed.fields)[0]
    return spec.block if isinstance(spec, BlockFormat) else 1
