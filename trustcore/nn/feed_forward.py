"""Feed-forward layers with any activation, plain or gated."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from trustcore.nn.activation import activation
from trustcore.nn.linear import Linear, project


class FeedForward(nnx.Module):
    """`down(act(up(x)))`; gated, `down(act(gate(x)) * up(x))`. Shazeer, arXiv 2002.05202.

    Args:
        features: D.
        hidden: F.
        activation: its name; see `trustcore.nn.activation`.
        gated: whether there is a gate.
        bias: whether the products have one.
        dtype: of the parameters.
        rngs: None leaves them abstract.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        made = {"bias": bias, "dtype": dtype, "rngs": rngs}
        self.gate = Linear(features, hidden, **made) if gated else None
        self.up = Linear(features, hidden, **made)
        self.down = Linear(hidden, features, **made)
        self.activation = activation

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Returns the layer's output, in the dtype of x."""
        act = activation(self.activation)
        if self.gate is None:
            return self.down(act(self.up(x)))
        gate, up = project(x, self.gate, self.up)
        return self.down(act(gate) * up)
