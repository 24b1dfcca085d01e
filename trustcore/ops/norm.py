"""Normalization over the last axis, accumulated in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from trustcore.dtypes import accumulation_dtype


def rms_norm(x: Float[Array, "*rows D"], weight: Float[Array, " D"], *, eps: float = 1e-6) -> Float[Array, "*rows D"]:
    """Returns `weight * x / sqrt(mean(x ** 2) + eps)` in the dtype of x.

    Differentiable in x and weight. Zhang and Sennrich, arXiv 1910.07467, eq. 4.
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * jnp.broadcast_to(weight.astype(wide.dtype), wide.shape)).astype(x.dtype)
