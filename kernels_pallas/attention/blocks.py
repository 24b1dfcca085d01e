"""Which blocks of keys a block of queries sees: what lies outside need not be computed.

Positions and segments of a block lie between bounds; two blocks whose bounds exclude each other share no visible score.
The visible blocks of a row are taken as one run, from the first to the last. With positions that count up and a causal
mask that is the lower triangle, with a window a band, with packed segments a staircase.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.attention.spec import Operands, Spec

_FAR = 2**30


def padded(x: jax.Array, axis: int, length: int, **how: Any) -> jax.Array:
    """Returns x filled up to `length` along an axis; x itself where it is as long."""
    if x.shape[axis] == length:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, **how)


def positions(ops: Operands, queries: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """Returns int32 positions of queries `[B or 1, queries]` and keys `[B or 1, keys]`, filled up to those lengths.

    None counts up from 0. Keys beyond the last have the position -1, which no query sees.
    """
    length, span = ops.query.shape[1], ops.key.shape[1]
    here, there = ops.query_positions, ops.key_positions
    here = jax.lax.broadcasted_iota(jnp.int32, (1, length), 1) if here is None else here
    there = jax.lax.broadcasted_iota(jnp.int32, (1, span), 1) if there is None else there
    return padded(here, 1, queries, mode="edge"), padded(there, 1, keys, constant_values=-1)


def segments(ops: Operands, queries: int, keys: int) -> tuple[jax.Array, jax.Array] | None:
    """Returns the segments of queries and keys, filled up; None where a call has none."""
    if ops.query_segments is None or ops.key_segments is None:
        return None
    return (
        padded(ops.query_segments, 1, queries, mode="edge"),
        padded(ops.key_segments, 1, keys, mode="edge"),
    )


def visible_blocks(
    spec: Spec,
    here: jax.Array,
    there: jax.Array,
    packed: tuple[jax.Array, jax.Array] | None,
    block_q: int,
    block_k: int,
) -> jax.Array:
    """Returns which pairs of blocks may hold a visible score, bool `[B or 1, query blocks, key blocks]`."""
    low, high = _bounds(here, block_q)
    low, high = low[:, :, None], high[:, :, None]
    first, last = _bounds(jnp.where(there < 0, _FAR, there), block_k)[0], _bounds(there, block_k)[1]
    first, last = first[:, None, :], last[:, None, :]
    pairs = jnp.broadcast_to(last >= 0, (max(low.shape[0], last.shape[0]), low.shape[1], last.shape[2]))
    if spec.right is not None:
        pairs = pairs & (first - spec.right <= high)
    if spec.left is not None:
        pairs = pairs & (last + spec.left >= low)
    if packed is not None:
        (q_low, q_high), (k_low, k_high) = _bounds(packed[0], block_q), _bounds(packed[1], block_k)
        overlap = (k_low[:, None, :] <= q_high[:, :, None]) & (k_high[:, None, :] >= q_low[:, :, None])
        pairs = pairs & overlap
    return pairs


def runs(pairs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns where the visible blocks of each row of the last axis begin and end, int32; equal if there are none."""
    count = pairs.shape[-1]
    number = jax.lax.broadcasted_iota(jnp.int32, pairs.shape, pairs.ndim - 1)
    end = jnp.max(jnp.where(pairs, number + 1, 0), axis=-1)
    begin = jnp.min(jnp.where(pairs, number, count), axis=-1)
    return jnp.minimum(begin, end), end


def _bounds(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    x = x.reshape(x.shape[0], x.shape[1] // block, block)
    return jnp.min(x, axis=-1), jnp.max(x, axis=-1)
