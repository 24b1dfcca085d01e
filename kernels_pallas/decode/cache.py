"""Writing tokens into a key-value cache, in place where it is donated."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
