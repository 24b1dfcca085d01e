"""Feed-forward layers, plain or gated."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from trustcore.nn.linear import Linear, project
from trustcore.ops.activate import activation as activation_of
from trustcore.ops.activate import gated as times_gate


class MLP(nnx.Module):
    """`down(activation(up(x)))`, Vaswani et al., arXiv 1706.03762, eq. 2; gated, `down(activation(gate(x)) * up(x))`.

    Gated it is SwiGLU with "silu", GeGLU with "gelu", ReGLU with "relu": Shazeer, arXiv 2002.05202, eq. 6.

    Args:
        features: D.
        hidden: F.
        activation: a name in `trustcore.ops.activate.ACTIVATIONS`.
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
        activation_of(activation)  # refuses names that are none
        self.gate = Linear(features, hidden, bias=bias, dtype=dtype, rngs=rngs) if gated else None
        self.up = Linear(features, hidden, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, features, bias=bias, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Returns the layer's output, in the dtype of x."""
        if self.gate is None:
            return self.down(activation_of(self.activation)(self.up(x)))
        gate, up = project(x, self.gate, self.up)
        return self.down(times_gate(gate, up, self.activation))
