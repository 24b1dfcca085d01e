"""Activations of feed-forward layers, by the names that configurations use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al., arXiv 2109.08668
}


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
