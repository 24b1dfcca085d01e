"""Rotary positions in plain jax: one fusion, with what is around it."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def turned(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool) -> jax.Array:
    """Returns x `[B, T, N, H]` turned by cosines and sines `[B, T, 1, R / 2]`; channels beyond R pass. Plain jax."""
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    cos, sin = cos.astype(wide), sin.astype(wide)
    part, passed = jnp.split(x.astype(wide), [2 * cos.shape[-1]], axis=-1)
    if interleaved:
        pairs = part.reshape(*part.shape[:-1], -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        part = jnp.stack((a * cos - b * sin, a * sin + b * cos), axis=-1).reshape(part.shape)
    else:
        a, b = jnp.split(part, 2, axis=-1)
        part = jnp.concatenate((a * cos - b * sin, a * sin + b * cos), axis=-1)
    return jnp.concatenate((part, passed), axis=-1).astype(x.dtype)
