"""`SparseArray`: a weight matrix of which n of every m inputs count for each output, standing where an array stands.

    w[m g + index[g, i], o] = values[g, i, o]    for i < n;    all other weights are zero

values `[..., K / m, n, N]` and indices are array leaves; m is static. Indices take 1, 2, 4 or 8 bits each, as many as
m - 1 needs, and lie side by side in bytes: 2:4 of float32 weights takes 16 + 1 of 32 bits a weight, of bfloat16 8 + 1
of 16. Mishra et al., arXiv 2104.08378.

Products go through the matrix by tiles of its inputs, each decoded while it lies in the cache: a whole decoded matrix
is never in memory. XLA reaches no sparse units, so what is won is memory and not time. x of 1, 32 and 256 rows times
[2048, 8192], float32, 2 cores of an AMD EPYC (Zen 5), jax 0.10.2, lowest of six calls in turn, a machine not quiet:

    decoded as a whole, 134 to 201 MB    250, 282, 341 ms
    by tiles, 8 to 13 MB                  14,  21,  71 ms
    a dense matrix                         3,  29, 100 ms

Tiles of twice as many numbers took 17, 25 and 111 ms. Going through groups one by one and choosing the x of each
index (no decoding) took 12 ms for one row and 38 for four, and depends on a loop whose speed differs between jax
releases: not taken. Values are differentiable, so that a pruned model can be trained on; which weights count is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from trustcore.dtypes import accumulation_dtype
from trustcore.errors import ImplementationError, ModelError
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
        """Returns `x @ w` for each weight.

        Args:
            x: `[..., K]`.
            weights: matrices `[K, N]`.
            implementation: "tiles"; "dot" decodes the whole matrix and multiplies as `linear` does by arrays; None is
                "tiles". A matrix of a single tile is decoded as a whole.

        Raises:
            ImplementationError: there is no implementation of that name.
        """
        if implementation not in (None, "tiles", "dot"):
            raise ImplementationError(
                f"linear: implementation {implementation!r} is not one of a sparse weight; choose tiles or dot, or "
                "pass None."
            )
        if implementation == "dot":
            return tuple(linear(x, weight.dequantize()) for weight in weights)
        return tuple(_by_tiles(x, weight) for weight in weights)

    def __repr__(self) -> str:
        return f"SparseArray({self.n}:{self.m}, {self.dtype}{list(self.shape)})"

    def _places(self) -> jax.Array:
        """bool `[..., K / m, n, m, N]`: where in its group each value stands."""
        *lead, groups, n, outputs = self.values.shape
        index = _unpack(self.indices, self.m, groups * n).reshape(*lead, groups, n, 1, outputs)
        return index == jax.lax.broadcasted_iota(jnp.uint8, (*lead, groups, n, self.m, outputs), len(lead) + 2)


# Numbers of a decoded tile: 4 MB of float32.
_TILE = 1 << 20


def _by_tiles(x: jax.Array, w: Any) -> jax.Array:
    """x [..., K] @ w [K, N], accumulated in float32; tiles are decoded again in the backward pass."""
    groups, n, outputs = w.values.shape
    bits, wide = _bits(w.m), accumulation_dtype(x.dtype)
    whole = 8 // math.gcd(8, n * bits)  # groups whose indices fill up bytes
    tile = max(_TILE // max(1, w.m * outputs) // whole, 1) * whole
    count = groups // tile
    if count < 2:
        return linear(x, w.dequantize())
    rows = x.reshape(-1, x.shape[-1])
    split, size = count * tile, tile * n * bits // 8

    def product(x: jax.Array, values: jax.Array, indices: jax.Array) -> jax.Array:
        dense = SparseArray(values, indices, w.m).dequantize().astype(x.dtype)
        return jax.lax.dot_general(x, dense, (((1,), (0,)), ((), ())), preferred_element_type=wide)

    @jax.checkpoint
    def step(y: jax.Array, part: Any) -> tuple[jax.Array, None]:
        return y + product(*part), None

    parts = (
        jnp.moveaxis(rows[:, : split * w.m].reshape(-1, count, tile * w.m), 1, 0),
        w.values[:split].reshape(count, tile, n, outputs),
        w.indices[: count * size].reshape(count, size, outputs),
    )
    y, _ = jax.lax.scan(step, jnp.zeros((rows.shape[0], outputs), wide), parts)
    if split < groups:
        y = y + product(rows[:, split * w.m :], w.values[split:], w.indices[count * size :])
    return y.astype(x.dtype).reshape(*x.shape[:-1], outputs)


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
