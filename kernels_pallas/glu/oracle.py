"""The plain activations: the truth that `glu` and `bias_activation` are tested against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


# By the names that configurations use.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {"relu": jax.nn.relu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": jax.nn.silu, "tanh": jnp.tanh}
)


def glu_oracle(gate: jax.Array, up: jax.Array, *, activation: str = "silu") -> jax.Array:
    """Returns `activation(gate) * up` `[..., F]`, computed in float32 (float64 for float64), in the dtype of gate.

    Shazeer, arXiv 2002.05202, eq. 5 and 6: "silu" is SwiGLU, "gelu" and "gelu_tanh" are GeGLU, "relu" is ReGLU.
    """
    wide = jnp.float64 if gate.dtype == jnp.float64 else jnp.float32
    return (ACTIVATIONS[activation](gate.astype(wide)) * up.astype(wide)).astype(gate.dtype)


def bias_activation_oracle(x: jax.Array, bias: jax.Array | None = None, *, activation: str = "gelu") -> jax.Array:
    """Returns `activation(x + bias)` `[..., F]`, computed in float32 (float64 for float64), in the dtype of x.

    Args:
        x: `[..., F]`.
        bias: `[F]` or None.
        activation: a name in `ACTIVATIONS`. "gelu" is the exact one (Hendrycks and Gimpel, arXiv 1606.08415).
    """
    wide = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    if bias is not None:
        wide = wide + jnp.broadcast_to(bias.astype(wide.dtype), wide.shape)
    return ACTIVATIONS[activation](wide).astype(x.dtype)
