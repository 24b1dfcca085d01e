"""What may stand where a weight matrix stands, besides an array.

`linear` is the one door for a product with a weight. A float array goes to a dot; anything else is a `Weight` and
brings its own product: packed codes, sparse blocks. Callers never branch on which.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import jax


class Weight(abc.ABC):
    """A matrix of shape `[..., in, out]` that is stored in some other form than one float array.

    Subclasses are registered pytrees, so that jit, scan, sharding and donation treat them as arrays.
    """

    shape: tuple[int, ...]

    @classmethod
    @abc.abstractmethod
    def products(
        cls, x: jax.Array, weights: Sequence[Weight], *, implementation: str | None = None
    ) -> tuple[jax.Array, ...]:
        """Returns `x @ w` for each weight of this class, in one go where that is faster."""

    @abc.abstractmethod
    def take(self, indices: jax.Array) -> jax.Array:
        """Returns rows along the first axis, decoded: float32 `[*indices.shape, out]`."""

    @abc.abstractmethod
    def dequantize(self) -> jax.Array:
        """Returns the whole matrix as float32: for tests and for small weights."""
