"""Attention over a key-value cache, in plain XLA.

Heads stay grouped: the G = N / K query heads that share a key head are rows of one product, so keys and values are
never repeated. Queries are taken `QUERY_BLOCK` at a time, so the scores held at once are O(QUERY_BLOCK * S), forward
and backward (each block is recomputed in its backward pass). Scores and sums are float32.

The cache holds keys with their positions innermost, `[B, K, H, S]`, and values `[B, K, S, H]`: in both products of a
decode step the longest axis that is not summed over is then contiguous in memory. Slot s of a row holds position s.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.attention.oracle import default_positions

QUERY_BLOCK = 512
_MASKED = -1e30  # far below any score, and finite: a row that sees nothing gives no NaN


def cached_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    *,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Returns causal attention of T tokens over a cache that already holds them, `[B, T, N, H]`.

    Args:
        query: `[B, T, N, H]`; token t of row b has position `start[b] + t`.
        keys: `[B, K, H, S]`, float.
        values: `[B, K, S, H]`, float.
        start: int32 `[B]`.
        window, scale, soft_cap, slopes, sinks: as in `attention_oracle`.
    """
    batch, length = query.shape[:2]
    _check(query, keys.shape[0], keys.shape[1], keys.shape[2], "keys [B, K, H, S]", keys.shape)
    positions = start[:, None] + jax.lax.broadcasted_iota(jnp.int32, (1, length), 1)
    slots = default_positions(None, batch, keys.shape[3])
    scale = size_scale(query, scale)
    return _by_blocks(query, keys, values, positions, slots, window, scale, soft_cap, slopes, sinks)


def extend_cache(cache: jax.Array, tokens: jax.Array, start: jax.Array, *, axis: int) -> jax.Array:
    """Returns `cache` with `tokens` written from slot `start[b]` on; what would lie beyond the end is dropped.

    Args:
        cache: `[B, ...]`, slots along `axis`.
        tokens: the same shape but for T slots, T at most those of the cache.
        start: int32 `[B]`.
        axis: of the slots, counted with the batch axis.
    """
    span, length = cache.shape[axis], tokens.shape[axis]
    tokens = tokens.astype(cache.dtype)
    if length > span:
        raise ValueError(f"extend_cache: {length} tokens do not fit a cache of {span} slots.")

    # Row by row and in place: a batched update would become a scatter, which XLA runs element by element on the CPU.
    for b in range(cache.shape[0]):
        # A slice that would cross the end is moved back by XLA: move its contents along and keep what was there.
        held = jnp.minimum(start[b], span - length)
        shift = start[b] - held
        at = [jnp.zeros((), held.dtype)] * cache.ndim
        at[0], at[axis] = jnp.full((), b, held.dtype), held
        before = jax.lax.dynamic_slice(cache, at, (1, *tokens.shape[1:]))
        slot = jax.lax.broadcasted_iota(jnp.int32, before.shape, axis)
        part = jnp.where(slot >= shift, jnp.roll(tokens[b : b + 1], shift, axis), before)
        cache = jax.lax.dynamic_update_slice(cache, part, at)
    return cache


def size_scale(query: jax.Array, scale: float | None) -> float:
    """Returns the factor of the scores: `scale`, or `H ** -0.5`."""
    return query.shape[-1] ** -0.5 if scale is None else scale


def _check(query: jax.Array, batch: int, kv_heads: int, size: int, name: str, shape: Any) -> None:
    if query.shape[0] != batch or query.shape[3] != size or query.shape[2] % kv_heads:
        raise ValueError(
            f"attention: query [B, T, N, H] {list(query.shape)} does not fit {name} {list(shape)}: B and H must agree "
            "and K must divide N."
        )


def _by_blocks(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    window: int | None,
    scale: float,
    soft_cap: float | None,
    slopes: jax.Array | None,
    sinks: jax.Array | None,
) -> jax.Array:
    batch, length, heads, size = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, size)
    one = functools.partial(_attend, keys=keys, values=values, key_positions=key_positions)
    slopes, sinks = (None if x is None else x.reshape(kv_heads, -1) for x in (slopes, sinks))
    one = functools.partial(one, window=window, scale=scale, soft_cap=soft_cap, slopes=slopes, sinks=sinks)
    if length <= QUERY_BLOCK:
        out = one(grouped, query_positions)
    else:
        blocks = -(-length // QUERY_BLOCK)
        pad = blocks * QUERY_BLOCK - length
        q = jnp.pad(grouped, ((0, 0), (0, pad), (0, 0), (0, 0), (0, 0)))
        p = jnp.pad(query_positions, ((0, 0), (0, pad)))
        q = jnp.moveaxis(q.reshape(batch, blocks, QUERY_BLOCK, *grouped.shape[2:]), 1, 0)
        p = jnp.moveaxis(p.reshape(batch, blocks, QUERY_BLOCK), 1, 0)
        out = jax.lax.map(jax.checkpoint(lambda qp: one(*qp)), (q, p))
        out = jnp.moveaxis(out, 0, 1).reshape(batch, blocks * QUERY_BLOCK, *out.shape[3:])[:, :length]
    return out.reshape(*query.shape[:3], values.shape[3]).astype(query.dtype)


def _attend(
    query: jax.Array,  # [B, T, K, G, H]
    positions: jax.Array,  # [B, T]
    *,
    keys: jax.Array,  # [B, K, H, S]
    values: jax.Array,  # [B, K, S, H]
    key_positions: jax.Array,  # [B, S]
    window: int | None,
    scale: float,
    soft_cap: float | None,
    slopes: jax.Array | None,  # [K, G]
    sinks: jax.Array | None,  # [K, G]
) -> jax.Array:
    # Sums of float64 stay float64. On the CPU narrow products are slower than float32 ones; elsewhere the matrix units
    # take them as they are.
    wide = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    narrow = wide if jax.default_backend() == "cpu" else query.dtype
    q, k, v = query.astype(narrow), keys.astype(narrow), values.astype(narrow)
    scores = jnp.einsum("btkgh,bkhs->bkgts", q, k, preferred_element_type=wide) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    here, there = positions[:, :, None], key_positions[:, None, :]
    visible = (there <= here) & (there >= 0)
    if window is not None:
        visible = visible & (there > here - window)
    if slopes is not None:
        distance = (there - here).astype(wide)[:, None, None]
        scores = scores + slopes.astype(wide)[None, :, :, None, None] * distance
    visible = visible[:, None, None]  # [B, 1, 1, T, S]
    scores = jnp.where(visible, scores, _MASKED)
    top = jnp.max(scores, axis=-1, keepdims=True)
    sink = None if sinks is None else sinks.astype(wide)[None, :, :, None, None]
    top = top if sink is None else jnp.maximum(top, sink)
    weights = jnp.where(visible, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=-1)  # [B, K, G, T]
    total = total if sink is None else total + jnp.exp(sink - top)[..., 0]
    out = jnp.einsum("bkgts,bksh->btkgh", weights.astype(narrow), v, preferred_element_type=wide)
    return out / jnp.maximum(total, 1e-30).transpose(0, 3, 1, 2)[..., None]
