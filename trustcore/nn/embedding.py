"""Token embedding, from a float or a packed table; the same table, transposed, may serve as output layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from trustcore.errors import ModelError
from trustcore.nn.parameter import parameter
from trustcore.ops.linear import linear
from trustcore.ops.weight import Weight


class Embedding(nnx.Module):
    """A table of V rows of D numbers.

    Args:
        vocab_size: V.
        features: D.
        padding: a row that starts as zeros and whose gradient is exactly zero; None: there is none.
        dtype: of the table.
        rngs: None leaves the table abstract.

    Raises:
        ModelError: padding is no row of the table.
    """

    def __init__(
        self,
        vocab_size: int,
        features: int,
        *,
        padding: int | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        if padding is not None and not 0 <= padding < vocab_size:
            raise ModelError(f"embedding: padding is row {padding} of a table of {vocab_size} rows.")

        def drawn(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            table = jax.nn.initializers.normal(0.02)(key, shape, dtype)
            return table if padding is None else table.at[padding].set(0)

        self.table = parameter(drawn, (vocab_size, features), dtype, rngs)
        self.padding = padding

    def __call__(self, tokens: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        """Returns the rows of `tokens`; an index outside the table takes the nearest row. Packed rows are decoded."""
        table = self.table.get_value()
        rows = table.take(tokens) if isinstance(table, Weight) else jnp.take(table, tokens, axis=0, mode="clip")
        if self.padding is None:
            return rows
        padded = jnp.clip(tokens, 0, table.shape[0] - 1) == self.padding
        return jnp.where(padded[..., None], jax.lax.stop_gradient(rows), rows)

    def unembed(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Returns `x @ table.T`: the output layer of a model that ties it to its embedding."""
        table = self.table.get_value()
        logits = linear(x, table.T)
        if self.padding is None:
            return logits
        frozen = jax.tree.map(jax.lax.stop_gradient, table)  # of one row: x has its gradient, the row has none
        row = frozen.take(jnp.asarray([self.padding])) if isinstance(table, Weight) else frozen[self.padding][None]
        return logits.at[..., self.padding].set(linear(x, row.astype(x.dtype).T)[..., 0])
