"""Activations of feed-forward layers."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float


def swiglu(gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"]) -> Float[Array, "*rows F"]:
    """Returns `silu(gate) * up`. Shazeer, arXiv 2002.05202, eq. 5."""
    return jax.nn.silu(gate) * up
