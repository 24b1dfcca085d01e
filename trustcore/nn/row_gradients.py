"""Gradients of a table for the rows that were looked up, and updates of those rows alone.

    value, gradients = row_value_and_grad(loss, table, tokens)      gradients: U rows of V, [U, D]
    table, momentum = update_rows(step, gradients, table, momentum)

A batch looks up T tokens of a vocabulary of V; the plain gradient of the table has all V rows, most of them zero, and
an optimizer reads and writes them all. Here no array of V rows is made: the distinct rows are gathered, the loss looks
its tokens up among them, and the update gathers and scatters the same rows. Rows that are not touched keep their
momentum as it is ("lazy" optimizers), which is not what a dense optimizer with momentum does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from trustcore.errors import ModelError
from trustcore.ops.weight import Weight


class RowGradients(NamedTuple):
    """A pytree.

    Attributes:
        rows: int32 `[U]`, distinct rows in ascending order; where there are fewer than U, V at the end.
        gradients: `[U, D]` of those rows; zero where `rows` is V.
    """

    rows: Int[Array, " U"]
    gradients: Float[Array, "U D"]


_SOME = "a product with a table reads all of its rows, and these are some of them; untie the output layer."


@jax.tree_util.register_pytree_node_class
class TouchedRows(Weight):
    """Some rows of a table, standing where the table stood: rows that are not there cannot be looked up.

    Args:
        rows: int32 `[U]`, which ones, ascending.
        values: `[U, D]`.
        count: V, rows of the whole table.
    """

    def __init__(self, rows: Any, values: Any, count: int):
        self.rows, self.values, self.count = rows, values, count

    def tree_flatten(self) -> tuple[tuple[Any, Any], int]:
        """Rows and values are leaves."""
        return (self.rows, self.values), self.count

    @classmethod
    def tree_unflatten(cls, count: int, leaves: Sequence[Any]) -> TouchedRows:
        """The inverse of flattening."""
        rows, values = leaves
        return cls(rows, values, count)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of the whole table."""
        return (self.count, self.values.shape[-1])

    @property
    def dtype(self) -> Any:
        """Of the values."""
        return self.values.dtype

    @property
    def T(self) -> Any:
        """Refused, as `products` is."""
        raise ModelError(_SOME)

    def take(self, indices: jax.Array) -> jax.Array:
        """Returns the rows `[*indices.shape, D]`; an index outside the table takes its nearest row."""
        wanted = jnp.clip(indices, 0, self.count - 1).astype(self.rows.dtype)
        return jnp.take(self.values, jnp.searchsorted(self.rows, wanted), axis=0, mode="clip")

    @classmethod
    def products(
        cls, x: jax.Array, weights: Sequence[Weight], *, implementation: str | None = None
    ) -> tuple[jax.Array, ...]:
        """Refused.

        Raises:
            ModelError: always: a product reads all rows.
        """
        raise ModelError(_SOME)

    def dequantize(self) -> jax.Array:
        """Refused, as `products` is."""
        raise ModelError(_SOME)


def row_value_and_grad(
    loss: Callable[..., Any],
    table: Float[Array, "V D"],
    tokens: Int[Array, "*shape"],
    *args: Any,
    padding: int | None = None,
    has_aux: bool = False,
) -> tuple[Any, RowGradients]:
    """Returns `loss(rows, *args)` and its gradient in the rows of a table that `tokens` name.

    Args:
        loss: gets what stands for the table: put it where the table is, an `Embedding` looks it up. It may look up
            `tokens` and no others.
        table: float.
        tokens: all that the loss looks up.
        args: of the loss; not differentiated.
        padding: a row whose gradient is zero; None: there is none.
        has_aux: whether the loss returns something beside the number.

    O(T log T + T * D) time and memory beside the loss, T the number of tokens; V does not enter.
    """
    count = table.shape[0]
    flat = jnp.clip(tokens.reshape(-1), 0, count - 1).astype(jnp.int32)
    rows = jnp.unique(flat, size=flat.shape[0], fill_value=count)
    values = jnp.take(table, rows, axis=0, mode="clip")

    def of_values(values: jax.Array) -> Any:
        return loss(TouchedRows(rows, values, count), *args)

    value, gradients = jax.value_and_grad(of_values, has_aux=has_aux)(values)
    if padding is not None:
        gradients = jnp.where((rows == padding)[:, None], jnp.zeros_like(gradients), gradients)
    return value, RowGradients(rows, gradients)


def update_rows(step: Callable[..., Any], gradients: RowGradients, *tables: Float[Array, "V _"]) -> tuple[Any, ...]:
    """Returns tables in which the touched rows are what `step(gradients, *rows)` makes of them.

    Args:
        step: from `[U, D]` gradients and the rows of each table to those rows anew, as a tuple (one table: an array).
        gradients: see `row_value_and_grad`.
        tables: the weights, and what an optimizer keeps for each row.

    Donate the tables (`jax.jit(..., donate_argnums=...)`): they are then written in place, U rows of them.
    """
    rows = [jnp.take(table, gradients.rows, axis=0, mode="clip") for table in tables]
    made = step(gradients.gradients, *rows)
    made = made if isinstance(made, tuple) else (made,)
    if len(made) != len(tables):
        raise ModelError(f"update_rows: step made rows of {len(made)} tables, and there are {len(tables)}.")
    # Rows that are none are numbered on from V, so that no two are the same; they are dropped.
    places = jnp.arange(gradients.rows.shape[0], dtype=gradients.rows.dtype)
    options: dict[str, Any] = {"mode": "drop", "unique_indices": True, "indices_are_sorted": True}
    written = []
    for table, new in zip(tables, made, strict=True):
        rows = jnp.where(gradients.rows < table.shape[0], gradients.rows, table.shape[0] + places)
        written.append(table.at[rows].set(new.astype(table.dtype), **options))
    return tuple(written)
