"""Token embedding, from a float or a packed table; the same table, transposed, may serve as output layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from trustcore.nn.parameter import parameter
from trustcore.ops.linear import linear
from trustcore.ops.weight import Weight


class Embedding(nnx.Module):
    """A table of V rows of D numbers.

    Args:
        vocab_size: V.
        features: D.
        dtype: of the table.
        rngs: None leaves the table abstract.
    """

    def __init__(self, vocab_size: int, features: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        self.table = parameter(jax.nn.initializers.normal(0.02), (vocab_size, features), dtype, rngs)

    def __call__(self, tokens: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        """Returns the rows of `tokens`; an index outside the table takes the nearest row. Packed rows are decoded."""
        table = self.table.get_value()
        return table.take(tokens) if isinstance(table, Weight) else jnp.take(table, tokens, axis=0, mode="clip")

    def unembed(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Returns `x @ table.T`: the output layer of a model that ties it to its embedding."""
        return linear(x, self.table.get_value().T)
