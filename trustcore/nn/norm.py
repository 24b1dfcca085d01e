"""Normalization layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from trustcore.nn.parameter import parameter
from trustcore.ops.norm import rms_norm


class RMSNorm(nnx.Module):
    """`weight * x / sqrt(mean(x ** 2) + eps)`; see `trustcore.ops.norm.rms_norm`."""

    def __init__(self, features: int, *, eps: float = 1e-6, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        self.weight = parameter(jax.nn.initializers.ones, (features,), dtype, rngs)
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Returns the normalized rows, in the dtype of x."""
        return rms_norm(x, self.weight.get_value(), eps=self.eps)
