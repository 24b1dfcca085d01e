"""Feed-forward layers."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from trustcore.nn.linear import Linear, project
from trustcore.ops.activate import ACTIVATIONS, gated


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`: SwiGLU with "silu", GeGLU with "gelu". Shazeer, arXiv 2002.05202, eq. 6.

    Args:
        features: D.
        hidden: F.
        activation: a name in `trustcore.ops.activate.ACTIVATIONS`.
        bias: whether the three products have one.
        dtype: of the parameters.
        rngs: None leaves them abstract.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        activation: str = "silu",
        bias: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.gate = Linear(features, hidden, bias=bias, dtype=dtype, rngs=rngs)
        self.up = Linear(features, hidden, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, features, bias=bias, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Returns the layer's output, in the dtype of x."""
        gate, up = project(x, self.gate, self.up)
        return self.down(gated(gate, up, self.activation))


class MLP(nnx.Module):
    """`down(activation(up(x)))`. Vaswani et al., arXiv 1706.03762, eq. 2; arguments as of `GatedMLP`."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        activation: str = "gelu",
        bias: bool = True,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.up = Linear(features, hidden, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, features, bias=bias, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Returns the layer's output, in the dtype of x."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))
