"""The truth that decode attention is tested against: the whole cache in floats, scores of all of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.attention.oracle import attention_oracle


def decode_oracle(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    lengths: jax.Array,
    *,
    key_scale: jax.Array | None = None,
    value_scale: jax.Array | None = None,
    pages: jax.Array | None = None,
    window: int | None = None,
    chunk: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
) -> Any:
    """Returns the outputs `[B, T, N, Hv]` in float32, O(B * N * T * S) memory.

    Args:
        query: `[B, T, N, H]`; token t of row b has the position `lengths[b] - T + t`, below 0 it sees nothing.
        keys: `[B, K, H, S]`: floats, int8 or float8_e4m3fn; int4 codes are uint8 `[B, K, H / 2, S]`, channels h and
            h + H / 2 in the low and the high half of a byte. Slot s holds position s.
        values: `[B, K, S, Hv]`, alike.
        lengths: int32 `[B]`: tokens of each row, those of the query included.
        key_scale, value_scale: `[B, K, S]` with codes of 8 bits, channel = code * scale; with int4 `[B, K, 2, S]`,
            channel = code * scale + minimum.
        pages: int32 `[B, M]`: the cache's first axis counts pages, and page m of row b is the one of that number; one
            that is not there holds nothing. None: the first axis is B.
        window: keys a query sees, itself included; None: all before it.
        chunk: positions fall into chunks of this many, and queries see keys of their own one alone; None: of all.
        scale: None is `H ** -0.5`.
        soft_cap: scores become `soft_cap * tanh(score / soft_cap)`.
        slopes: `[N]`, times the key's position less the query's.
        sinks: `[N]`, a further score of each head, which takes its share of the weights.
        return_lse: the pair of output and log-sum-exp, `[B, N, T]`.
    """
    there = None
    if pages is not None:
        count, slots = keys.shape[0], keys.shape[3]
        there = jnp.repeat((pages >= 0) & (pages < count), slots, axis=1)
        keys, values = _in_rows(keys, pages, 3), _in_rows(values, pages, 2)
        key_scale, value_scale = (None if x is None else _in_rows(x, pages, -1) for x in (key_scale, value_scale))
    k, v = decoded(keys, key_scale, 2), decoded(values, value_scale, 3)
    k, v = k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3)
    places = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2])
    places = places if there is None else jnp.where(there, places, -1)
    count = query.shape[1]
    positions = lengths[:, None] - count + jnp.arange(count, dtype=jnp.int32)[None, :]
    chunks: dict[str, Any] = {}
    if chunk is not None:
        chunks = {"query_segments": positions // chunk, "key_segments": places // chunk}
    return attention_oracle(
        query, k, v, query_positions=positions, key_positions=places, window=window, scale=scale, soft_cap=soft_cap,
        slopes=slopes, sinks=sinks, return_lse=return_lse, **chunks,
    )  # fmt: skip


def _in_rows(pool: jax.Array, pages: jax.Array, axis: int) -> jax.Array:
    """Returns `[B, ...]` of pages `[P, ...]`, slots along `axis`."""
    axis = axis % pool.ndim
    taken = jnp.moveaxis(pool, axis, 1)[jnp.clip(pages, 0, pool.shape[0] - 1)]  # [B, M, page, ...]
    joined = taken.reshape(pages.shape[0], -1, *taken.shape[3:])
    return jnp.moveaxis(joined, 1, axis)


def decoded(codes: jax.Array, scale: jax.Array | None, axis: int) -> jax.Array:
    """Returns channels along `axis` as floats."""
    if scale is None:
        return codes
    wide = scale.astype(jnp.float32)
    if codes.dtype != jnp.uint8:
        return codes.astype(jnp.float32) * jnp.expand_dims(wide, axis)
    pair = codes.astype(jnp.int32)
    step, least = (jnp.expand_dims(wide[:, :, i], axis) for i in range(2))
    return jnp.concatenate([pair & 15, pair >> 4], axis).astype(jnp.float32) * step + least
