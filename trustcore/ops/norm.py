"""Normalization over the last axis, accumulated in float32 (float64 for float64)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from trustcore.dtypes import accumulation_dtype


def rms_norm(
    x: Float[Array, "*rows D"], weight: Float[Array, " D"] | None = None, *, eps: float = 1e-6
) -> Float[Array, "*rows D"]:
    """Returns `weight * x / sqrt(mean(x ** 2) + eps)` in the dtype of x; a weight of None is one.

    Differentiable in x and weight. Zhang and Sennrich, arXiv 1910.07467, eq. 4.
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    y = wide * scale
    if weight is not None:
        y = y * jnp.broadcast_to(weight.astype(wide.dtype), wide.shape)
    return y.astype(x.dtype)


def layer_norm(
    x: Float[Array, "*rows D"],
    weight: Float[Array, "*groups D"] | None = None,
    bias: Float[Array, "*groups D"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Array, "*rows D"]:
    """Returns `weight * (x - mean(x)) / sqrt(var(x) + eps) + bias` in the dtype of x.

    Args:
        x: rows that are normalized each on its own.
        weight: a gain for each channel, or `[N, D]`, one for each head of an x that ends in `[N, D]`; None: one.
        bias: the same shape; None: zero.
        eps: keeps a constant row finite.

    Differentiable in x, weight and bias. Ba et al., arXiv 1607.06450, eq. 4.
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    y = centred * scale
    if weight is not None:
        y = y * jnp.broadcast_to(weight.astype(wide.dtype), wide.shape)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(wide.dtype), wide.shape)
    return y.astype(x.dtype)
