"""Layer normalization, with or without scale and bias."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from trustcore.dtypes import accumulation_dtype
from trustcore.nn.parameter import parameter


def layer_norm(
    x: Float[Array, "*rows D"],
    weight: Float[Array, " D"] | None,
    bias: Float[Array, " D"] | None,
    *,
    eps: float = 1e-5,
) -> Float[Array, "*rows D"]:
    """Returns `weight * (x - mean(x)) / sqrt(var(x) + eps) + bias` in the dtype of x.

    Differentiable in x, weight and bias; statistics are float32, float64 for float64. Ba et al., arXiv 1607.06450.
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * jnp.broadcast_to(weight.astype(wide.dtype), wide.shape)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(wide.dtype), wide.shape)
    return y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalization over the last axis; see `layer_norm`.

    Args:
        features: D.
        eps: added to the variance.
        scale: whether there is a weight.
        bias: whether there is one.
        dtype: of the parameters.
        rngs: None leaves them abstract.
    """

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-5,
        scale: bool = True,
        bias: bool = True,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.weight = parameter(jax.nn.initializers.ones, (features,), dtype, rngs) if scale else None
        self.bias = parameter(jax.nn.initializers.zeros, (features,), dtype, rngs) if bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Returns the normalized rows, in the dtype of x."""
        weight = None if self.weight is None else self.weight.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        return layer_norm(x, weight, bias, eps=self.eps)
