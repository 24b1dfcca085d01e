"""Normalization layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from trustcore.nn.parameter import parameter
from trustcore.ops.norm import layer_norm, rms_norm


class RMSNorm(nnx.Module):
    """`weight * x / sqrt(mean(x ** 2) + eps)`; see `trustcore.ops.norm.rms_norm`."""

    def __init__(self, features: int, *, eps: float = 1e-6, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        self.weight = parameter(jax.nn.initializers.ones, (features,), dtype, rngs)
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Returns the normalized rows, in the dtype of x."""
        return rms_norm(x, self.weight.get_value(), eps=self.eps)


class LayerNorm(nnx.Module):
    """`weight * (x - mean(x)) / sqrt(var(x) + eps) + bias`; see `trustcore.ops.norm.layer_norm`.

    Args:
        features: D.
        groups: N where each head of `[..., N, D]` has a gain of its own; None: one for all.
        scale: whether there is a weight.
        bias: whether there is one.
        eps: keeps a constant row finite.
        dtype: of the parameters.
        rngs: None leaves them abstract.
    """

    def __init__(
        self,
        features: int,
        *,
        groups: int | None = None,
        scale: bool = True,
        bias: bool = True,
        eps: float = 1e-5,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        shape = (features,) if groups is None else (groups, features)
        self.weight = parameter(jax.nn.initializers.ones, shape, dtype, rngs) if scale else None
        self.bias = parameter(jax.nn.initializers.zeros, shape, dtype, rngs) if bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Returns the normalized rows, in the dtype of x."""
        weight = None if self.weight is None else self.weight.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        return layer_norm(x, weight, bias, eps=self.eps)
