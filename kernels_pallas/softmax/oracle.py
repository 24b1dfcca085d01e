"""The plain masked softmax: the truth that `softmax` is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def softmax_oracle(x: jax.Array, mask: jax.Array | None = None, *, scale: float = 1.0) -> jax.Array:
    """Returns `exp(scale x) / sum(exp(scale x))` over what the mask leaves, zeros elsewhere; in the dtype of x.

    Sums are float32 (float64 for float64). A row of which the mask leaves nothing is zeros, and its gradient is.

    Args:
        x: `[..., D]`.
        mask: bool, as x; None hides nothing.
        scale: of x.
    """
    wide = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32) * scale
    if mask is None:
        return jax.nn.softmax(wide, axis=-1).astype(x.dtype)
    some = jnp.any(mask, axis=-1, keepdims=True)
    y = jax.nn.softmax(jnp.where(mask | ~some, wide, -jnp.inf), axis=-1)
    return jnp.where(mask, y, 0).astype(x.dtype)
