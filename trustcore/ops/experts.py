"""Mixture of experts as pure functions: which experts a token goes to, and products of rows that lie sorted by expert.

    route -> (experts, shares) [R, k]     by_expert -> rows sorted by expert, their number for each
    grouped_linear(rows, w [E, K, N])     row r of expert e: rows[r] @ w[e]

No expert has a capacity: every token reaches the k experts that its router chose, whatever the others chose.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import grouped_matmul
from trustcore.dtypes import accumulation_dtype
from trustcore.ops.linear import linear
from trustcore.ops.weight import Weight

Scoring = Literal["softmax", "sigmoid", "chosen"]


def route(
    logits: Float[Array, "R E"],
    *,
    active: int,
    scoring: Scoring = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    selection_bias: Float[Array, " E"] | None = None,
    groups: int = 1,
    active_groups: int = 1,
    group_score: Literal["max", "top2"] = "max",
) -> tuple[Int[Array, "R k"], Float[Array, "R k"]]:
    """Returns the experts of each row, and the shares of their outputs.

    Args:
        logits: of the router.
        active: k, experts a row goes to.
        scoring: "softmax" and "sigmoid" score all experts; "chosen" takes the softmax over the k chosen alone.
        normalize: whether the k shares are made to add up to one.
        scale: of the shares, after that.
        selection_bias: added to the scores for the choice alone (DeepSeek-V3, arXiv 2412.19437, eq. 16).
        groups: into which the experts fall, in order. Experts are chosen from the best `active_groups` of them.
        active_groups: see `groups`; 1 of 1 is no limit.
        group_score: of a group: its best expert's, or the sum of its best two.

    Shares are float32 (float64 for float64). Differentiable in the logits through the shares. O(R * E).
    """
    wide = logits.astype(accumulation_dtype(logits.dtype))
    scores = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid, "chosen": lambda x: x}[scoring](wide)
    ranked = scores if active_groups < groups else wide  # logits, which rank alike, do not saturate
    if selection_bias is not None:
        ranked = scores + jnp.broadcast_to(selection_bias.astype(wide.dtype), wide.shape)
    if active_groups < groups:
        by_group = ranked.reshape(ranked.shape[0], groups, -1)  # [R, G, E / G]
        best = jax.lax.top_k(by_group, 2 if group_score == "top2" else 1)[0].sum(-1)
        kept = jax.lax.top_k(best, active_groups)[1]  # [R, active_groups]
        among = jnp.any(kept[:, :, None] == jnp.arange(groups, dtype=kept.dtype)[None, None], axis=1)  # [R, G]
        ranked = jnp.where(among[:, :, None], by_group, -jnp.inf).reshape(ranked.shape)
    experts = jax.lax.top_k(ranked, active)[1]
    shares = jnp.take_along_axis(scores, experts, axis=-1)
    if scoring == "chosen":
        shares = jax.nn.softmax(shares, axis=-1)
    if normalize:
        shares = shares / (jnp.sum(shares, axis=-1, keepdims=True) + 1e-20)
    return experts, shares * scale


def by_expert(experts: Int[Array, "R k"], count: int) -> tuple[Int[Array, " Rk"], Int[Array, " E"]]:
    """Returns the places `row * k + choice` sorted by expert, and how many each of `count` experts has."""
    flat = experts.reshape(-1)
    sizes = jnp.sum(flat[:, None] == jnp.arange(count, dtype=flat.dtype)[None], axis=0, dtype=jnp.int32)
    return jnp.argsort(flat, stable=True), sizes


def grouped_linear(
    x: Float[Array, "R K"], w: Float[Array, "E K N"] | Weight, sizes: Int[Array, " E"]
) -> Float[Array, "R N"]:
    """Returns `x[r] @ w[e]`, where the first `sizes[0]` rows are of expert 0, the next of expert 1, and so on.

    Accumulates in float32; the result has the dtype of x. Differentiable in x and float leaves of w, in reverse mode. A
    float stack goes to `kernels_pallas.grouped_matmul`, whose time does not depend on E, under vmap as well. A packed
    stack stays packed: rows go through `linear` a few at a time, each time with the codes of their one expert, so that
    experts without rows are not read, and a product of one row decodes nothing; under vmap this is a loop.
    """
    return _by_pieces(x, w, sizes) if isinstance(w, Weight) else grouped_matmul(x, w.astype(x.dtype), sizes)


# Rows of one product. Fewer, and codes are read and decoded more often; more, and rows of other experts are multiplied
# for nothing.
_PIECE = 64


def _by_pieces(x: jax.Array, w: Weight, sizes: jax.Array) -> jax.Array:
    """Pieces of at most `piece` rows, none of two experts.

    Expert e with n rows has ceil(n / piece) pieces, so there are at most (R + G * (piece - 1)) / piece of them, where
    G = min(E, R) experts have any; the loop is that long and what lies beyond the last piece does nothing.
    """
    rows, count = x.shape[0], sizes.shape[0]
    n = w.shape[-1]
    if rows == 0:
        return jnp.zeros((0, n), x.dtype)
    piece = min(_PIECE, max(1, rows // count))
    pieces = -(-sizes // piece)  # of each expert
    last = jnp.cumsum(pieces)  # of each expert, one past
    ends = jnp.cumsum(sizes)
    padded = jnp.pad(x, ((0, piece - 1), (0, 0)))

    def multiply(y: jax.Array, i: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(last, i, side="right").astype(jnp.int32)
        start = ends[expert] - sizes[expert] + (i - (last[expert] - pieces[expert])) * piece
        one = jax.tree.map(lambda field: jax.lax.dynamic_index_in_dim(field, expert, 0, keepdims=False), w)
        part = linear(jax.lax.dynamic_slice_in_dim(padded, start, piece, 0), one)
        own = start + jax.lax.broadcasted_iota(jnp.int32, (piece, 1), 0) < ends[expert]
        there = jax.lax.dynamic_slice_in_dim(y, start, piece, 0)
        return jax.lax.dynamic_update_slice_in_dim(y, jnp.where(own, part, there), start, 0)

    @jax.checkpoint  # or the gradient would keep the codes of every piece
    def step(y: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.cond(i < last[-1], multiply, lambda y, i: y, y, i), None

    most = (rows + min(count, rows) * (piece - 1)) // piece
    y = jnp.zeros((rows + piece - 1, n), x.dtype)
    return jax.lax.scan(step, y, jnp.arange(most, dtype=jnp.int32))[0][:rows]
