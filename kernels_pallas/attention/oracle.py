"""The plain, slow truth of attention: every score in float32, one einsum a line. O(T * S) memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention_oracle(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Returns attention outputs `[B, T, N, H]` in float32.

        scores = soft_cap * tanh(scale * q . k / soft_cap) + slope * (key position - query position)
        visible: key position <= query position, and > query position - window
        weights = exp(scores) / (sum of exp(scores) over visible keys + exp(sink))

    Args:
        query: `[B, T, N, H]`.
        key: `[B, S, K, H]`; query head n attends with key head `n // (N // K)`.
        value: `[B, S, K, H]`; its heads may have another size than those of the keys, which is the output's then.
        query_positions: int `[B, T]`; None: 0 .. T - 1.
        key_positions: int `[B, S]`; None: 0 .. S - 1. A negative position is never visible.
        causal: False lets every query see every key (and ignores `window`).
        window: keys a query sees, itself included; None: all before it.
        scale: None is `H ** -0.5`.
        soft_cap: None applies none.
        slopes: `[N]`, of ALiBi (Press et al., arXiv 2108.12409); None: scores do not depend on the distance.
        sinks: `[N]`, a score of each head that takes part in the softmax and has no value; None: none.

    A query that sees no key gives zeros.
    """
    batch, length, heads, size = query.shape
    span, kv_heads = key.shape[1:3]
    query_positions = default_positions(query_positions, batch, length)[:, :, None]
    key_positions = default_positions(key_positions, batch, span)[:, None, :]
    visible = jnp.broadcast_to(key_positions >= 0, (batch, length, span))
    if causal:
        visible = visible & (key_positions <= query_positions)
        if window is not None:
            visible = visible & (key_positions > query_positions - window)

    groups = heads // kv_heads
    q = query.astype(jnp.float32)
    k = jnp.repeat(key.astype(jnp.float32), groups, axis=2)
    v = jnp.repeat(value.astype(jnp.float32), groups, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * (size**-0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if slopes is not None:
        distance = (key_positions - query_positions).astype(jnp.float32)  # [B, T, S]
        scores = scores + slopes.astype(jnp.float32)[None, :, None, None] * distance[:, None]
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, None, None], (*scores.shape[:3], 1))
        shares = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
        return jnp.einsum("bnts,bsnh->btnh", shares, v, precision="highest")
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(visible[:, None], jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")


def default_positions(positions: jax.Array | None, batch: int, length: int) -> jax.Array:
    """Returns `positions`, or for None 0 to `length - 1` in each row, int32 `[batch, length]`."""
    if positions is None:
        return jnp.broadcast_to(jax.lax.broadcasted_iota(jnp.int32, (1, length), 1), (batch, length))
    return positions
