"""`SparseArray`: a weight matrix of which n of every m inputs count for each output, standing where an array stands.

    w[m g + index[g, i], o] = values[g, i, o]    for i < n;    all other weights are zero

values `[..., K / m, n, N]` and indices are array leaves; m is static. Indices take 1, 2, 4 or 8 bits each, as many as
m - 1 needs, and lie side by side in bytes: 2:4 of float32 weights takes 16 + 1 of 32 bits a weight, of bfloat16 8 + 1
of 16. Mishra et al., arXiv 2104.08378.

Products decode the matrix and multiply: XLA reaches no sparse units, so what is won is memory and not time. Values are
differentiable, so that a pruned model can be trained on; which weights count is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from trustcore.dtypes import accumulation_dtype
from trustcore.errors import ModelError
from trustcore.ops.linear import linear
from trustcore.ops.weight import Weight


@jax.tree_util.register_pytree_with_keys_class
class SparseArray(Weight):
    """A matrix `[..., K, N]` with n of every m inputs.

    Args:
        values: `[..., K / m, n, N]`.
        indices: uint8 `[..., B, N]`, the n * K / m indices of a column in ascending order of their groups, packed from
            the low bits of each byte on; zeros fill the last one up.
        m: inputs of a group.
    """

    __slots__ = ("indices", "m", "values")

    def __init__(self, values: Any, indices: Any, m: int):
        self.values, self.indices, self.m = values, indices, m

    @classmethod
    def prune(cls, weights: Float[Array, "*lead K N"], pattern: str, *, importance: Any = None) -> SparseArray:
        """Returns the weights with the n of each m that matter most.

        Args:
            weights: float.
            pattern: "n:m", such as "2:4" or "1:4".
            importance: what a weight of size one is worth, `[K]` or `[K, N]` (norms of the inputs, as in Wanda, Sun et
                al., arXiv 2306.11695); None: all the same, so that the largest stay.

        Raises:
            ModelError: the pattern is none, or K is no multiple of m.
        """
        n, m = parse_pattern(pattern)
        weights = jnp.asarray(weights)
        score = jnp.abs(weights).astype(accumulation_dtype(weights.dtype))
        if importance is not None:
            given = jnp.asarray(importance, score.dtype)
            score = score * jnp.broadcast_to(given[:, None] if given.ndim == 1 else given, score.shape)
        kept = jnp.sort(jnp.argsort(_groups(score, m), axis=-2, descending=True)[..., :n, :], axis=-2)
        return cls(jnp.take_along_axis(_groups(weights, m), kept, axis=-2), _pack(kept, m), m)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], int]:
        """Leaves are values and indices, under their names."""
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in ("values", "indices")], self.m

    @classmethod
    def tree_unflatten(cls, m: int, leaves: Sequence[Any]) -> SparseArray:
        """The inverse of flattening; leaves may be anything that a transform puts there."""
        values, indices = leaves
        return cls(values, indices, m)

    @property
    def n(self) -> int:
        """Inputs of a group that count."""
        return self.values.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of the whole matrix."""
        *lead, groups, _, outputs = self.values.shape
        return (*lead, groups * self.m, outputs)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Weights, zeros included."""
        return int(np.prod(self.shape))

    @property
    def dtype(self) -> Any:
        """Of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of values and indices."""
        return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in (self.values, self.indices))

    @property
    def mask(self) -> Bool[Array, "*lead K N"]:
        """Which weights count."""
        return jnp.any(self._places(), axis=-3).reshape(self.shape)

    def dequantize(self) -> jax.Array:
        """Returns the whole matrix in the dtype of the values."""
        zero = jnp.zeros((), self.values.dtype)
        dense = jnp.sum(jnp.where(self._places(), self.values[..., :, None, :], zero), axis=-3, dtype=self.dtype)
        return dense.reshape(self.shape)

    def take(self, indices: jax.Array) -> jax.Array:
        """Returns rows along the first axis, `[*indices.shape, N]`; an index outside takes the nearest row."""
        if self.ndim != 2:
            raise ModelError(f"take: rows of one matrix are looked up, and this is {self!r}.")
        return jnp.take(self.dequantize(), indices, axis=0, mode="clip")

    @classmethod
    def products(
        cls, x: jax.Array, weights: Sequence[Weight], *, implementation: str | None = None
    ) -> tuple[jax.Array, ...]:
        """Returns `x @ w` for each weight: decoded, then as `linear` multiplies by arrays."""
        return tuple(linear(x, weight.dequantize(), implementation=implementation) for weight in weights)

    def __repr__(self) -> str:
        return f"SparseArray({self.n}:{self.m}, {self.dtype}{list(self.shape)})"

    def _places(self) -> jax.Array:
        """bool `[..., K / m, n, m, N]`: where in its group each value stands."""
        *lead, groups, n, outputs = self.values.shape
        index = _unpack(self.indices, self.m, groups * n).reshape(*lead, groups, n, 1, outputs)
        return index == jax.lax.broadcasted_iota(jnp.uint8, (*lead, groups, n, self.m, outputs), len(lead) + 2)


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Returns n and m of "n:m".

    Raises:
        ModelError: it is no such pattern, or n is not below m, or m is over 256.

    >>> parse_pattern("2:4")
    (2, 4)
    """
    n, _, m = pattern.partition(":")
    if not (n.isdecimal() and m.isdecimal() and len(m) < 4 and 0 < int(n) < int(m) <= 256):
        raise ModelError(f"sparse: {pattern!r} is no pattern; write '2:4' to keep two weights of every four.")
    return int(n), int(m)


def _groups(weights: jax.Array, m: int) -> jax.Array:
    """[..., K, N] -> [..., K / m, m, N]."""
    *lead, inputs, outputs = weights.shape
    if inputs % m:
        raise ModelError(f"sparse: {inputs} inputs do not fall into groups of {m}.")
    return weights.reshape(*lead, inputs // m, m, outputs)


def _bits(m: int) -> int:
    return next(bits for bits in (1, 2, 4, 8) if m <= 1 << bits)


def _pack(indices: jax.Array, m: int) -> jax.Array:
    """[..., K / m, n, N] -> uint8 [..., B, N]."""
    bits = _bits(m)
    *lead, groups, n, outputs = indices.shape
    count = 8 // bits
    flat = indices.astype(jnp.uint8).reshape(*lead, groups * n, outputs)
    flat = jnp.pad(flat, [(0, 0)] * len(lead) + [(0, -(groups * n) % count), (0, 0)])
    parts = flat.reshape(*lead, -1, count, outputs)
    shifts = (jnp.arange(count, dtype=jnp.uint8) * bits)[:, None]
    shifted = jnp.left_shift(parts, jnp.broadcast_to(shifts, parts.shape))
    return jnp.sum(shifted, axis=-2, dtype=jnp.uint8)  # no two share a bit


def _unpack(packed: jax.Array, m: int, count: int) -> jax.Array:
    """uint8 [..., B, N] -> uint8 [..., count, N]."""
    bits = _bits(m)
    *lead, rows, outputs = packed.shape
    shape = (*lead, rows, 8 // bits, outputs)
    shifts = jax.lax.broadcasted_iota(jnp.uint8, shape, len(lead) + 1) * jnp.uint8(bits)
    parts = jnp.right_shift(jnp.broadcast_to(packed[..., :, None, :], shape), shifts) & jnp.uint8((1 << bits) - 1)
    return parts.reshape(*lead, -1, outputs)[..., :count, :]
