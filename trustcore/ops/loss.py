"""Losses. Cross-entropy of a large vocabulary by chunks of it: `kernels_pallas.cross_entropy` computes it."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float, Int

import kernels_pallas
import kernels_pallas.cross_entropy as kernels
from trustcore.errors import ImplementationError
from trustcore.ops.weight import Weight


def cross_entropy(
    hidden: Float[Array, "*rows D"],
    table: Float[Array, "D V"] | Weight,
    labels: Int[Array, "*rows"],
    *,
    bias: Float[Array, " V"] | None = None,
    transposed: bool = False,
    scale: float = 1.0,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    chunk: int | None = None,
    axis: str | tuple[str, ...] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Returns the loss of each row, `logsumexp(hidden @ table) - logit of the label`, without the logits in memory.

    O(R * C) memory beyond operands and results for R rows and chunks of C columns; losses are float32 (float64 for
    float64). Differentiable (in reverse, once) in hidden, bias and a table of floats. A packed table is decoded chunk
    by chunk and has no gradient; where the table has none, the gradient of hidden costs one product more than the
    losses.

    Args:
        hidden: what the output layer takes.
        table: its weight `[D, V]`, or `[V, D]` where `transposed`: float of the dtype of hidden, or packed.
        labels: the right columns. A row whose label is `ignore_index` has loss 0 and no gradient; one whose label is
            no column has the loss NaN.
        bias: of the output layer.
        transposed: whether the table is an embedding's.
        scale: of the logits.
        soft_cap: bounds logits by `soft_cap * tanh(logits / soft_cap)`.
        label_smoothing: share of the target that is spread over all columns. Szegedy et al., arXiv 1512.00567.
        z_loss: weight of `lse ** 2`.
        ignore_index: which label means that a row does not count.
        chunk: C; None chooses.
        axis: inside of `jax.shard_map`, the axis of the mesh over whose devices the columns are split; labels are
            numbers of all columns. Losses are alike on all of its devices.
        return_lse: the pair of losses and log-sum-exp.
        implementation: "xla" or None.

    Raises:
        ValueError: the shapes do not fit each other.
        ImplementationError: there is no implementation of that name.
    """
    options = {
        "bias": bias, "scale": scale, "soft_cap": soft_cap, "label_smoothing": label_smoothing, "z_loss": z_loss,
        "ignore_index": ignore_index, "chunk": chunk, "axis": axis, "return_lse": return_lse,
        "implementation": implementation,
    }  # fmt: skip
    try:
        if isinstance(table, Weight):
            rows: Any = table if transposed else table.T  # pyright: ignore[reportAttributeAccessIssue]
            return kernels.cross_entropy(hidden, rows, labels, take=_take, **options)
        return kernels.cross_entropy(hidden, table, labels, transposed=transposed, **options)
    except kernels_pallas.ImplementationError as error:
        raise ImplementationError(str(error)) from error


def _take(table: Weight, indices: jax.Array) -> jax.Array:
    return table.take(indices)
