"""The plain rotation, pair by pair: the truth that `rope` is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope_oracle(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Returns x `[B, T, N, H]` with R channels of each head turned, in the dtype of x.

        (a, b) -> (a cos - b sin, a sin + b cos)

    Su et al., arXiv 2104.09864, eq. 34.

    Args:
        x: `[B, T, N, H]`.
        cos, sin: `[B or 1, T, R / 2]`, of each token and pair; the H - R channels that follow pass.
        interleaved: pairs are channels 2 i and 2 i + 1; otherwise i and i + R / 2.

    Products are float32 (float64 of such).
    """
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    pairs = cos.shape[-1]
    turned = x[..., : 2 * pairs].astype(wide)
    cos, sin = cos.astype(wide)[:, :, None], sin.astype(wide)[:, :, None]
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(pairs), slice(pairs, None))
    a, b = turned[..., first], turned[..., second]
    found = jnp.zeros_like(turned).at[..., first].set(a * cos - b * sin).at[..., second].set(a * sin + b * cos)
    return jnp.concatenate([found.astype(x.dtype), x[..., 2 * pairs :]], axis=-1)
