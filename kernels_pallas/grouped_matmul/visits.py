"""Which blocks of rows meet which segments, for kernels whose grid goes through the pairs.

Segments are in order, so the pairs (block, segment) that share a row are at most blocks + segments - 1. They are
numbered by segment, then block: those of one block follow each other, as do those of one segment.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import no_sizes


class Visits(NamedTuple):
    """Of pair v: `block[v]` and `segment[v]`, int32 `[V]`; `count[0]` of them are pairs, the others repeat the last."""

    block: jax.Array
    segment: jax.Array
    count: jax.Array


def visits(starts: jax.Array, sizes: jax.Array, rows: int, block: int, *, empty: bool) -> Visits:
    """Returns the pairs of blocks of that many rows and segments; with `empty`, segments without rows have one, too."""
    first = jnp.minimum(starts, rows - 1) // block
    spread = jnp.where(sizes > 0, (starts + sizes - 1) // block - first + 1, 1 if empty else 0)
    last = jnp.cumsum(spread, dtype=jnp.int32)
    count = last[-1]
    most = -(-rows // block) + sizes.shape[0]
    v = jnp.minimum(jnp.arange(most, dtype=jnp.int32), jnp.maximum(count - 1, 0))
    segment = jnp.minimum(jnp.searchsorted(last, v, side="right").astype(jnp.int32), sizes.shape[0] - 1)
    at = first[segment] + v - (last[segment] - spread[segment])
    return Visits(jnp.clip(at, 0, -(-rows // block) - 1).astype(jnp.int32), segment, count[None])


def covered(starts: jax.Array, sizes: jax.Array, rows: int) -> jax.Array:
    """Returns which rows are of a segment, bool `[rows]`."""
    steps = jnp.zeros((rows + 1,), jnp.int32).at[starts].add(1, mode="drop").at[starts + sizes].add(-1, mode="drop")
    return jnp.cumsum(steps)[:rows] > 0


def refusal_of_shapes(call: Any, dtypes: tuple[str, ...], deepest: int) -> str:
    """Returns why a kernel cannot compute a call whatever the chip; "" where it can."""
    sizes = (*call.x.shape, *call.second.shape, *call.sizes.shape)
    if reason := no_sizes(sizes):
        return reason
    if call.x.dtype.name not in dtypes:
        return f"it takes {', '.join(dtypes[:-1])} and {dtypes[-1]}, not {call.x.dtype}."
    if call.x.shape[1] > deepest:
        return f"rows of {call.x.shape[1]} are longer than {deepest}."
    return ""
