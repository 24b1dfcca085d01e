"""What a call of attention is made of, and the arithmetic of one tile of scores that every implementation shares.

`Spec` holds what is static, `Operands` the arrays. A tile is a block of scores `[..., R, C]` of R queries and C keys;
what is added to it, or hides a part of it, comes as arrays of the same rank that broadcast to it. The functions of a
tile are plain elementwise jax, so they run inside Pallas kernels as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

HIDDEN = -1e30  # the score of a key that is not seen: far below any other, and finite, so that no NaN comes of it
NOTHING = -5e29  # a largest score below this says that the row sees no key
NO_KEY = 1e30  # stands for the log-sum-exp of such a row in the backward pass: exp(score - NO_KEY) is 0


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static part of a call.

    Key s is seen by query t where `-left <= key position - query position <= right`; None bounds nothing.
    """

    scale: float
    left: int | None = None
    right: int | None = None
    soft_cap: float | None = None
    dropout: float = 0.0
    blocks: tuple[int, int] | None = None  # queries and keys of a block of the block mask


class Operands(NamedTuple):
    """The arrays of a call; B0, N0 and T0 are B, N and T, or 1."""

    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, S, K, H]
    value: jax.Array  # [B, S, K, Hv]
    query_positions: jax.Array | None = None  # int32 [B, T]
    key_positions: jax.Array | None = None  # int32 [B, S], negative: never seen
    query_segments: jax.Array | None = None  # int32 [B, T]
    key_segments: jax.Array | None = None  # int32 [B, S]
    mask: jax.Array | None = None  # bool [B0, N0, T0, S]
    bias: jax.Array | None = None  # [B0, N0, T0, S]
    slopes: jax.Array | None = None  # [N]
    relative: jax.Array | None = None  # [N, 2 R + 1]
    sinks: jax.Array | None = None  # [N]
    seed: jax.Array | None = None  # uint32 [2], of the dropout
    block_counts: jax.Array | None = None  # int32 [B0, N0, Tb], see block_mask.py
    block_indices: jax.Array | None = None  # int32 [B0, N0, Tb, M]
    query_scale: jax.Array | None = None  # float32 [B0, N0], with float8 as the two that follow
    key_scale: jax.Array | None = None  # float32 [B0, K0]
    value_scale: jax.Array | None = None  # float32 [B0, K0]


FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


def working_dtype(ops: Operands) -> Any:
    """Returns the dtype of outputs, and of weights and values where they meet in a kernel: bfloat16 for float8."""
    return jnp.dtype(jnp.bfloat16) if ops.query.dtype.name in FLOAT8 else ops.query.dtype


def factors(ops: Operands) -> tuple[jax.Array, jax.Array] | None:
    """Returns what products of float8 codes and sums of values are multiplied by, float32 `[B, N]` each; else None."""
    if ops.query_scale is None or ops.key_scale is None or ops.value_scale is None:
        return None
    batch, _, heads, _ = ops.query.shape
    kv_heads = ops.key.shape[2]

    def by_head(x: jax.Array, count: int) -> jax.Array:
        return jnp.repeat(jnp.broadcast_to(x, (batch, count)), heads // count, axis=1)

    products = by_head(ops.query_scale, heads) * by_head(ops.key_scale, kv_heads)
    return products, by_head(ops.value_scale, kv_heads)


def masked_bias(ops: Operands) -> jax.Array | None:
    """Returns the bias with -inf where the mask hides a key, for kernels that take one array of both."""
    bias = ops.bias
    if ops.mask is None:
        return bias
    zero = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)
    shape = ops.mask.shape if bias is None else jnp.broadcast_shapes(ops.mask.shape, bias.shape)
    return jnp.where(jnp.broadcast_to(ops.mask, shape), jnp.broadcast_to(zero, shape), jnp.float32(-jnp.inf))


def capped(spec: Spec, product: jax.Array) -> jax.Array:
    """Returns scores before anything is added: `scale * product`, bent by the soft cap."""
    scores = product * spec.scale
    return scores if spec.soft_cap is None else spec.soft_cap * jnp.tanh(scores / spec.soft_cap)


def uncapped(spec: Spec, scores: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns the gradient of `product` over `spec.scale`, given that of the capped scores."""
    return gradient if spec.soft_cap is None else gradient * (1.0 - jnp.square(scores / spec.soft_cap))


def added(
    scores: jax.Array,
    distance: jax.Array,
    *,
    slope: jax.Array | None,
    bias: jax.Array | None,
    relative: jax.Array | None,
) -> jax.Array:
    """Returns scores with what a call adds to them; `distance` is key position - query position."""
    if slope is not None:
        scores = scores + slope.astype(scores.dtype) * distance.astype(scores.dtype)
    for part in (bias, relative):
        scores = scores if part is None else scores + part.astype(scores.dtype)
    return scores


def seen(
    spec: Spec,
    key_positions: jax.Array,
    distance: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    mask: jax.Array | None,
) -> jax.Array:
    """Returns which keys each query of a tile sees, bool."""
    visible = key_positions >= 0
    if spec.right is not None:
        visible = visible & (distance <= spec.right)
    if spec.left is not None:
        visible = visible & (distance >= -spec.left)
    if segments is not None:
        visible = visible & (segments[0] == segments[1])
    return visible if mask is None else visible & mask


def kept(spec: Spec, seed: Any, row: jax.Array, column: jax.Array) -> jax.Array:
    """Returns `1 / (1 - dropout)` where a weight is kept and 0 where it is dropped, float32.

    A weight's fate is a hash of the two words of the seed, its row (of all batches, heads and queries) and its key: any
    tile of it can be computed anywhere, so nothing is stored for the backward pass. The hash is the 32-bit finalizer
    "lowbias32" (C. Wellons, hash-prospector), once over the row and once over row and key.

    Args:
        spec: its `dropout` is the share that is dropped, in steps of 2**-24.
        seed: uint32 `[2]`, or two scalars.
        row, column: uint32, broadcasting to the tile.
    """
    bits = _mixed(_mixed(row ^ seed[0]) + column * jnp.uint32(0x9E3779B9) ^ seed[1])
    drop = (bits >> jnp.uint32(8)).astype(jnp.int32) < jnp.int32(round(spec.dropout * 2**24))
    return jnp.where(drop, jnp.float32(0.0), jnp.float32(1.0 / (1.0 - spec.dropout)))


def row_numbers(batch_head: jax.Array, length: int, query: jax.Array) -> jax.Array:
    """Returns the number of a row in `kept`: of batch * N + head, T and query."""
    return (batch_head * length).astype(jnp.uint32) + query.astype(jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    x = x ^ (x >> jnp.uint32(16))
    x = x * jnp.uint32(0x7FEB352D)
    x = x ^ (x >> jnp.uint32(15))
    x = x * jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))
