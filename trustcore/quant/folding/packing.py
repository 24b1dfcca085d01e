"""What becomes of a matrix when `quantize` packs it: asked ahead of time, by the methods that choose weights for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from trustcore.quant.folding.structure import Leaves
from trustcore.quant.formats import get_format
from trustcore.quant.quantize import Formats, Predicate, _plan, is_table, quantize


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
        plans = _plan(named, format, where, transposed or is_table, {}, False)
        self._formats = {path: plan.format for (path, _), plan in zip(named, plans, strict=True) if plan is not None}

    def packs(self, path: str) -> bool:
        """Returns whether the leaf at `path` will be packed."""
        return path in self._formats

    def group(self, path: str) -> int | None:
        """Returns how many weights of a column share a scale; None where each weight stands alone."""
        block = get_format(self._formats[path]).block
        return block if block > 1 else None

    def rounded(self, path: str, matrix: jax.Array, importance: Any = None) -> jax.Array:
        """Returns `matrix` `[K, N]`, packed as the leaf at `path` will be and decoded, float32."""
        transposed = self._leaves.is_transposed(path)
        packed = quantize(
            {path: matrix.T if transposed else matrix},
            self._formats[path],
            where=lambda *_: True,
            transposed=lambda *_: transposed,
            importance=None if importance is None else {path: importance},
            search=self._search,
        )[path]
        decoded = packed.dequantize().astype(jnp.float32)
        return decoded.T if transposed else decoded
