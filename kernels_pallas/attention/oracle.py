"""The plain, slow truth of attention: every score in float32, one einsum a line. O(T * S) memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.attention.block_mask import BlockMask
from kernels_pallas.attention.spec import Spec, kept, row_numbers


def attention_oracle(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    mask: jax.Array | None = None,
    block_mask: BlockMask | None = None,
    bias: jax.Array | None = None,
    slopes: jax.Array | None = None,
    relative: jax.Array | None = None,
    sinks: jax.Array | None = None,
    causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
    query_scale: jax.Array | None = None,
    key_scale: jax.Array | None = None,
    value_scale: jax.Array | None = None,
    return_lse: bool = False,
) -> Any:
    """Returns attention outputs `[B, T, N, Hv]` in float32.

        distance = key position - query position
        scores = soft_cap * tanh(scale * q . k / soft_cap) + slope * distance + bias + relative[clip(distance)]
        weights = exp(scores) / (sum of exp(scores) over visible keys + exp(sink))

    Args:
        query: `[B, T, N, H]`.
        key: `[B, S, K, H]`; query head n attends with key head `n // (N // K)`.
        value: `[B, S, K, Hv]`.
        query_positions: int `[B, T]`; None: 0 .. T - 1.
        key_positions: int `[B, S]`; None: 0 .. S - 1. A negative position is never visible.
        query_segments, key_segments: int `[B, T]` and `[B, S]`: a query sees the keys of its own segment; None: of all.
        mask: bool, `[B, N, T, S]`, each but the last axis may be 1: True where a key is visible; None: everywhere.
        block_mask: lists of the blocks of keys that each block of queries sees; None: all.
        bias: of the scores, of a shape like the mask's; None adds nothing.
        slopes: `[N]`, of ALiBi (Press et al., arXiv 2108.12409); None: scores do not depend on the distance.
        relative: `[N, 2 R + 1]`, added by distance from -R to R; beyond, the ends count. None adds nothing.
        sinks: `[N]`, a score of each head that takes part in the softmax and has no value; None: none.
        causal: a query sees no key of a later position.
        window: keys a query sees on a side, itself included; a pair gives how far it sees back and ahead, itself not
            included, None as far as there are keys. None: all.
        scale: None is `H ** -0.5`.
        soft_cap: None applies none.
        dropout: share of the weights that is dropped, after the softmax; what is kept is divided by `1 - dropout`.
        dropout_key: of `jax.random`, says which.
        query_scale, key_scale, value_scale: float32 scales of float8 codes, `[]`, or `[B, N]` and `[B, K]`, where each
            axis may be 1: a number is code * scale. None: 1.
        return_lse: returns the pair of output and log-sum-exp of the scores (and sink), float32 `[B, N, T]`, as well;
            -inf where nothing is seen.

    A query that sees no key gives zeros.
    """
    batch, length, heads, size = query.shape
    span, kv_heads = key.shape[1:3]
    query_positions = default_positions(query_positions, batch, length)[:, :, None]
    key_positions = default_positions(key_positions, batch, span)[:, None, :]
    distance = key_positions - query_positions  # [B, T, S]
    left, right = window_bounds(causal, window)
    visible = jnp.broadcast_to(key_positions >= 0, distance.shape)
    if right is not None:
        visible = visible & (distance <= right)
    if left is not None:
        visible = visible & (distance >= -left)
    if query_segments is not None and key_segments is not None:
        visible = visible & (query_segments[:, :, None] == key_segments[:, None, :])
    visible = visible[:, None] if mask is None else visible[:, None] & mask
    if block_mask is not None:
        visible = visible & block_mask.elementwise(length, span)

    groups = heads // kv_heads
    q = scaled(query, query_scale)
    k = jnp.repeat(scaled(key, key_scale), groups, axis=2)
    v = jnp.repeat(scaled(value, value_scale), groups, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * (size**-0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if slopes is not None:
        scores = scores + slopes.astype(jnp.float32)[None, :, None, None] * distance.astype(jnp.float32)[:, None]
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if relative is not None:
        reach = relative.shape[1] // 2
        table = relative.astype(jnp.float32)[:, jnp.clip(distance, -reach, reach) + reach]  # [N, B, T, S]
        scores = scores + table.swapaxes(0, 1)
    visible = jnp.broadcast_to(visible, scores.shape)
    scores = jnp.where(visible, scores, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, None, None], (*scores.shape[:3], 1))
        everything = jnp.concatenate([scores, sink], axis=-1)
    else:
        everything = scores
    top = jnp.max(everything, axis=-1, keepdims=True, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(jnp.exp(everything - top), axis=-1, keepdims=True)
    weights = jnp.where(visible, jnp.exp(scores - top), 0.0) / jnp.where(total > 0, total, 1.0)
    if dropout:
        weights = weights * dropout_weights(dropout, dropout_key, *scores.shape)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")
    if not return_lse:
        return out
    lse = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + top, -jnp.inf)
    return out, lse[..., 0]


def scaled(codes: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Returns the numbers `[B, T, N, H]` of codes with scales by row and head, float32."""
    x = codes.astype(jnp.float32)
    if scale is None:
        return x
    return x * (scale.reshape(1, 1, 1, 1) if scale.ndim == 0 else scale[:, None, :, None])


def dropout_weights(
    dropout: float, dropout_key: jax.Array | None, batch: int, heads: int, length: int, span: int
) -> jax.Array:
    """Returns what each weight is multiplied by, float32 `[B, N, T, S]`: 0 or `1 / (1 - dropout)`."""
    iota = jax.lax.broadcasted_iota
    row = row_numbers(iota(jnp.int32, (batch * heads, 1, 1), 0), length, iota(jnp.int32, (1, length, 1), 1))
    column = iota(jnp.uint32, (1, 1, span), 2)
    keep = kept(Spec(1.0, dropout=dropout), dropout_seed(dropout_key), row, column)
    return keep.reshape(batch, heads, length, span)


def dropout_seed(key: jax.Array | None) -> jax.Array:
    """Returns the two words, uint32 `[2]`, that a dropout is made from."""
    if key is None:
        raise ValueError("attention: dropout needs a dropout_key, and None was given.")
    return jax.random.bits(key, (2,), jnp.uint32)


def window_bounds(causal: bool, window: int | tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    """Returns how far a query sees back and ahead, itself not included; None is as far as there are keys."""
    left, right = window if isinstance(window, tuple) else (window, window)
    if window is not None and not isinstance(window, tuple):
        left = right = window - 1
    return left, 0 if causal else right


def default_positions(positions: jax.Array | None, batch: int, length: int) -> jax.Array:
    """Returns `positions`, or for None 0 to `length - 1` in each row, int32 `[batch, length]`."""
    if positions is None:
        return jnp.broadcast_to(jax.lax.broadcasted_iota(jnp.int32, (1, length), 1), (batch, length))
    return positions
