"""Activations by the names that configurations give them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from trustcore.errors import ModelError


def quick_gelu(x: jax.Array) -> jax.Array:
    """Returns `x * sigmoid(1.702 x)`. Hendrycks and Gimpel, arXiv 1606.08415, section 2."""
    return x * jax.nn.sigmoid(x * jnp.asarray(1.702, x.dtype))


def squared_relu(x: jax.Array) -> jax.Array:
    """Returns `max(x, 0) ** 2`. So et al., arXiv 2109.08668, section 3.1."""
    return jnp.square(jax.nn.relu(x))


_TANH_GELU = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "relu2": squared_relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
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
