"""Activations of feed-forward layers, by the names that configurations use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from trustcore.errors import ModelError


def quick_gelu(x: jax.Array) -> jax.Array:
    """Returns `x * sigmoid(1.702 x)`. Hendrycks and Gimpel, arXiv 1606.08415, section 2."""
    return x * jax.nn.sigmoid(x * jnp.asarray(1.702, x.dtype))


def squared_relu(x: jax.Array) -> jax.Array:
    """Returns `max(x, 0) ** 2`. So et al., arXiv 2109.08668, section 3.1."""
    return jnp.square(jax.nn.relu(x))


_GELU_TANH = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": _GELU_TANH,
    "gelu_new": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "relu2": squared_relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "linear": lambda x: x,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns the function of that name.

    Raises:
        ModelError: there is none.
    """
    if name not in ACTIVATIONS:
        raise ModelError(f"activation {name!r} is not known; choose from {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def swiglu(gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"]) -> Float[Array, "*rows F"]:
    """Returns `silu(gate) * up`. Shazeer, arXiv 2002.05202, eq. 5."""
    return gated(gate, up, "silu")


def gated(gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"], activation: str) -> Float[Array, "*rows F"]:
    """Returns `activation(gate) * up`; `activation` is a name in `ACTIVATIONS`. Shazeer, arXiv 2002.05202, eq. 5."""
    return ACTIVATIONS[activation](gate) * up


def clipped_swiglu(
    gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"], *, limit: float, alpha: float
) -> Float[Array, "*rows F"]:
    """Returns `g sigmoid(alpha g) (u + 1)`, where g is at most `limit` and u lies within it.

    What gpt-oss has for SwiGLU (OpenAI, gpt-oss model card, arXiv 2508.10925).
    """
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)
