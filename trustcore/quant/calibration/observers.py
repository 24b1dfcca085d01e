"""Observers: statistics of the inputs of a product, gathered batch by batch.

    state = init(k);  state = update(state, x) for each batch x [rows, K];  result = finish(state)

`merge` joins the states of two parts of the data, in any order:

    finish(update(update(init(k), a), b)) = finish(merge(update(init(k), a), update(init(k), b)))

States are pytrees of arrays of fixed shape, so that they pass through jit, scan and vmap; the observers themselves are
hashable and hold options alone. `finish` runs once, in NumPy, for one product.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import QuantizationError

State = Any


class Observer(abc.ABC):
    """One kind of statistic."""

    @abc.abstractmethod
    def init(self, k: int) -> State:
        """Returns the state before any data, for K inputs: the neutral element of `merge`."""

    @abc.abstractmethod
    def update(self, state: State, x: jax.Array) -> State:
        """Returns the state after the rows of x, float32 `[rows, K]`."""

    @abc.abstractmethod
    def merge(self, a: State, b: State) -> State:
        """Returns the state of both parts of the data."""

    @abc.abstractmethod
    def finish(self, state: State) -> Any:
        """Returns the statistic, in NumPy."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a code should reach: between `low` and `high`, `[K]` by input or `[]` for all of them."""

    low: np.ndarray
    high: np.ndarray

    @property
    def largest(self) -> np.ndarray:
        """The larger magnitude of both ends: the threshold of a symmetric code."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def scale(self, bits: int = 8) -> np.ndarray:
        """Returns the step of symmetric codes from `-(2**(bits-1) - 1)` to `2**(bits-1) - 1`; 1 where all is zero."""
        scale = self.largest / (2 ** (bits - 1) - 1)
        return np.where(scale > 0, scale, 1).astype(np.float32)

    def affine(self, bits: int = 8) -> tuple[np.ndarray, np.ndarray]:
        """Returns (scale, zero) of codes from 0 to `2**bits - 1`, `x ~ scale * (code - zero)`.

        The range is widened to hold 0, which then is a code.
        """
        low, high = np.minimum(self.low, 0), np.maximum(self.high, 0)
        scale = (high - low) / (2**bits - 1)
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        return scale, np.round(-low / scale).astype(np.int32)


class MeanSquareState(NamedTuple):
    """A mean, and how many rows it is of."""

    mean: jax.Array
    rows: jax.Array


@dataclasses.dataclass(frozen=True)
class MeanSquare(Observer):
    """The mean square of each input, `[K]`: what an error in a weight costs the product. llama.cpp's importance.

    Kept as a mean, not a sum, so that float32 loses nothing however long the data is.
    """

    def init(self, k: int) -> MeanSquareState:
        """See `Observer`."""
        return MeanSquareState(jnp.zeros((k,), jnp.float32), jnp.zeros((), jnp.float32))

    def update(self, state: MeanSquareState, x: jax.Array) -> MeanSquareState:
        """See `Observer`."""
        rows = max(x.shape[0], 1)
        here = MeanSquareState(jnp.sum(x * x, axis=0) / rows, jnp.float32(x.shape[0]))
        return self.merge(state, here)

    def merge(self, a: MeanSquareState, b: MeanSquareState) -> MeanSquareState:
        """See `Observer`."""
        return MeanSquareState(_mean(a.mean, a.rows, b.mean, b.rows), a.rows + b.rows)

    def finish(self, state: MeanSquareState) -> np.ndarray:
        """Returns float32 `[K]`."""
        return np.asarray(state.mean)


class HessianSum(NamedTuple):
    """`mean` is `X^T X / rows`, float32 `[K, K]`."""

    mean: Any
    rows: Any


@dataclasses.dataclass(frozen=True)
class Hessian(Observer):
    """The mean of outer products of the inputs, `H = X^T X / rows`: half the Hessian of `||X W - X Q||^2 / rows`.

    `[K, K]` float32: collect it for a few products at a time (`paths`). O(rows * K^2), at highest precision.
    """

    def init(self, k: int) -> HessianSum:
        """See `Observer`."""
        return HessianSum(jnp.zeros((k, k), jnp.float32), jnp.zeros((), jnp.float32))

    def update(self, state: HessianSum, x: jax.Array) -> HessianSum:
        """See `Observer`."""
        rows = max(x.shape[0], 1)
        here = HessianSum(jnp.matmul(x.T, x, precision="highest") / rows, jnp.float32(x.shape[0]))
        return self.merge(state, here)

    def merge(self, a: HessianSum, b: HessianSum) -> HessianSum:
        """See `Observer`."""
        return HessianSum(_mean(a.mean, a.rows, b.mean, b.rows), a.rows + b.rows)

    def finish(self, state: HessianSum) -> HessianSum:
        """Returns the mean `[K, K]` and the number of rows."""
        return HessianSum(np.asarray(state.mean), int(state.rows))


@dataclasses.dataclass(frozen=True)
class MinMax(Observer):
    """The smallest and the largest number, of each input or of all.

    Args:
        per_channel: a range for each of the K inputs.
    """

    per_channel: bool = False

    def init(self, k: int) -> tuple[jax.Array, jax.Array]:
        """See `Observer`."""
        shape = (k,) if self.per_channel else ()
        return jnp.full(shape, jnp.inf, jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32)

    def update(self, state: State, x: jax.Array) -> State:
        """See `Observer`."""
        axis = 0 if self.per_channel else None
        low = jnp.min(x, axis=axis, initial=jnp.inf)
        return self.merge(state, (low, jnp.max(x, axis=axis, initial=-jnp.inf)))

    def merge(self, a: State, b: State) -> State:
        """See `Observer`."""
        return jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])

    def finish(self, state: State) -> Range:
        """Returns the range.

        Raises:
            QuantizationError: no data was seen.
        """
        low, high = (np.asarray(end) for end in state)
        if np.any(low > high):
            raise QuantizationError("MinMax: no rows were seen; give at least one batch.")
        return Range(low, high)


def _mean(a: jax.Array, rows_a: jax.Array, b: jax.Array, rows_b: jax.Array) -> jax.Array:
    rows = jnp.maximum(rows_a + rows_b, 1)
    return a * (rows_a / rows) + b * (rows_b / rows)
