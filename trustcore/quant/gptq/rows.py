"""The core of GPTQ: the rows of one matrix, rounded one after another.

    minimize ||X W - X Q||^2 = tr((W - Q)^T H (W - Q)),   H = X^T X      W [K, N], a row for each input

Row i is rounded, and its error is made good by the rows that are still free (arXiv 2210.17323, eq. 2 and 3, with U the
upper Cholesky factor of the inverse Hessian, H^-1 = U^T U):

    e_i = (w_i - q_i) / U[i, i];     w_j -= U[i, j] * e_i     for j > i

within a block of rows at once, and for all rows after a block in one product (section 3.3, "lazy batch-updates"). The
paper's columns are our rows: weights are stored [K, N] here.

Scales belong to groups of rows. They are chosen when the first row of a group is reached, on the rows as corrected by
then, and weighted by `1 / U[i, i]^2`, which is what an error in row i costs when the rows after it have made up for it.

Deviations from the paper: inputs that never fired keep their weights (there: zeroed), rounded to nearest; U comes from
the Cholesky factor of the reversed Hessian and a triangular inverse, without forming H^-1, which float32 bears better;
where the factor still fails, the damping is raised tenfold until it does not.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trustcore.errors import QuantizationError
from trustcore.quant.gptq.grids import Grid

_BLOCK = 128  # rows that are corrected one by one before the rest is, as in the paper


class Rounded(NamedTuple):
    """A rounded matrix.

    Attributes:
        codes: float32 `[K, N]`, whole numbers, in the order of `order`.
        params: the grid's parameters, a leading axis for the groups.
        values: float32 `[K, N]`, what the codes stand for, in the order of the matrix.
        order: int32 `[K]`, the row of the matrix that each row of codes holds; None where they are in order.
    """

    codes: jax.Array
    params: Any
    values: jax.Array
    order: jax.Array | None


def round_rows(
    w: jax.Array,
    hessian: jax.Array,
    grid: Grid,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
) -> Rounded:
    """Returns codes of `w` under which `X W` changes little.

    Args:
        w: float `[K, N]`.
        hessian: `X^T X` in any scale, `[K, K]`.
        grid: where codes lie.
        damping: added to the diagonal of the Hessian, as a share of its mean.
        act_order: whether the rows whose inputs fire most are rounded first.
        static_groups: whether groups are those of the matrix and their scales chosen ahead, on the weights as given;
            with `act_order` the result then needs no `order`.

    Raises:
        QuantizationError: shapes do not fit, the Hessian is not finite, or no damping makes it positive definite.

    O(K^2 * N) time; w and the Hessian twice in memory.
    """
    k, n = w.shape
    if hessian.shape != (k, k):
        raise QuantizationError(f"gptq: the Hessian is {list(hessian.shape)}, expected {[k, k]} for weights {[k, n]}.")
    w, hessian = jnp.asarray(w, jnp.float32), jnp.asarray(hessian, jnp.float32)
    order = jnp.argsort(-jnp.diagonal(hessian), stable=True) if act_order else None
    factor = _factor_of(hessian if order is None else hessian[order][:, order], damping)
    group = grid.group(k)
    cost = 1 / jnp.diagonal(factor) ** 2
    place = jnp.arange(k) if order is None else order
    if static_groups:
        own = cost if order is None else jnp.zeros_like(cost).at[order].set(cost)
        params = _all_groups(grid, w, own)
        codes, values = _sweep(grid, static_groups, w[place], factor, cost, params, place)[:2]
        back = jnp.argsort(place)
        return Rounded(codes[back], params, values[back], None)
    empty = jax.eval_shape(grid.start, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((group, n), (group,))))
    params = jax.tree.map(lambda like: jnp.zeros((k // group, *like.shape), like.dtype), empty)
    codes, values, params = _sweep(grid, static_groups, w[place], factor, cost, params, jnp.arange(k))
    return Rounded(codes, params, values[jnp.argsort(place)], order)


def round_to_nearest(w: jax.Array, cost: jax.Array, grid: Grid) -> Rounded:
    """Returns each weight of `w` `[K, N]` rounded by itself, scales searched for errors in row k costing `cost[k]`."""
    params = _all_groups(grid, w, cost)
    codes, values = _nearest(grid, w, params)
    return Rounded(codes, params, values, None)


def output_error(w: jax.Array, q: jax.Array, hessian: jax.Array) -> jax.Array:
    """Returns `tr((W - Q)^T H (W - Q)) / tr(W^T H W)`: the squared error of `X Q` relative to the square of `X W`."""

    def energy(m: jax.Array) -> jax.Array:
        return jnp.sum(m * jnp.matmul(hessian, m, precision="highest"))

    return energy(w - q) / jnp.maximum(energy(w), jnp.finfo(jnp.float32).tiny)


def _factor_of(hessian: jax.Array, damping: float) -> jax.Array:
    if not bool(jnp.all(jnp.isfinite(hessian))):
        raise QuantizationError("gptq: the Hessian holds NaN or infinite numbers: the calibration data overflowed.")
    if not 0 < damping <= 1:
        raise QuantizationError(f"gptq: the damping is {damping}; it must be above 0 and at most 1.")
    while damping <= 10:
        factor = _upper_factor(hessian, damping)
        if bool(jnp.all(jnp.isfinite(factor))):
            return factor
        damping *= 10
    raise QuantizationError("gptq: the Hessian is not positive definite, whatever its damping: it is no X^T X.")


@jax.jit
def _upper_factor(hessian: jax.Array, damping: float) -> jax.Array:
    """Returns upper triangular U with `(H + damping * mean(diag H) * I)^-1 = U^T U`.

    With J the reversal of the rows and J H J = L L^T: H^-1 = (J L^-1 J)^T (J L^-1 J), and J L^-1 J is upper triangular.
    """
    diagonal = jnp.diagonal(hessian)
    mean = jnp.mean(diagonal)
    mean = jnp.where(mean > 0, mean, 1)
    dead = jnp.where(diagonal == 0, mean, 0)  # inputs that never fired
    k = hessian.shape[0]
    damped = hessian / mean + jnp.diag(dead / mean + damping)
    with jax.default_matmul_precision("highest"):
        lower = jnp.linalg.cholesky(damped[::-1, ::-1])
        inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(k, dtype=hessian.dtype), lower=True)
    return inverse[::-1, ::-1]


@functools.partial(jax.jit, static_argnums=0)
def _all_groups(grid: Grid, w: jax.Array, cost: jax.Array) -> Any:
    k, n = w.shape
    group = grid.group(k)
    return jax.lax.map(lambda one: grid.start(*one), (w.reshape(-1, group, n), cost.reshape(-1, group)))


@functools.partial(jax.jit, static_argnums=0)
def _nearest(grid: Grid, w: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
    k, n = w.shape
    group = grid.group(k)

    def one(group_of: tuple[jax.Array, Any]) -> tuple[jax.Array, jax.Array]:
        rows, own = group_of
        return jax.vmap(grid.round, in_axes=(0, None, 0))(rows, own, jnp.arange(group))

    codes, values = jax.lax.map(one, (w.reshape(-1, group, n), params))
    return codes.reshape(k, n), values.reshape(k, n)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2,))
def _sweep(
    grid: Grid,
    static_groups: bool,
    w: jax.Array,
    factor: jax.Array,
    cost: jax.Array,
    params: Any,
    place: jax.Array,
) -> tuple[jax.Array, jax.Array, Any]:
    """Returns codes and values of the rows in the order given, and the parameters of the groups.

    Row i belongs to position `place[i] % group` of group `place[i] // group`.
    """
    k, n = w.shape
    group = grid.group(k)
    block = group if group <= _BLOCK else max(d for d in range(1, _BLOCK + 1) if group % d == 0)
    offset = jnp.arange(block)

    def one_block(b: jax.Array, carry: Any) -> Any:
        w, codes, values, params = carry
        first = b * block
        if not static_groups:
            params = jax.lax.cond(first % group == 0, _started, lambda w, p, _: p, w, params, first)
        rows = jax.lax.dynamic_slice_in_dim(w, first, block, 0)
        here = jax.lax.dynamic_slice(factor, (first, first), (block, block))

        def one_row(i: jax.Array, inner: Any) -> Any:
            rows, codes, values, errors = inner
            at = place[first + i]
            own = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, at // group, 0, keepdims=False), params)
            row = rows[i]
            code, value = grid.round(row, own, at % group)
            error = (row - value) / here[i, i]
            later = jnp.where(offset > i, here[i], 0)
            rows = rows - later[:, None] * error[None, :]
            return rows, codes.at[i].set(code), values.at[i].set(value), errors.at[i].set(error)

        blank = jnp.zeros((block, n), jnp.float32)
        _, c, v, errors = jax.lax.fori_loop(0, block, one_row, (rows, blank, blank, blank))
        strip = jax.lax.dynamic_slice_in_dim(factor, first, block, 0)
        strip = jnp.where(jnp.arange(k)[None, :] >= first + block, strip, 0)  # [block, K], the rows after this block
        w = w - jnp.matmul(strip.T, errors, precision="highest")
        codes = jax.lax.dynamic_update_slice_in_dim(codes, c, first, 0)
        return w, codes, jax.lax.dynamic_update_slice_in_dim(values, v, first, 0), params

    def _started(w: jax.Array, params: Any, first: jax.Array) -> Any:
        rows = jax.lax.dynamic_slice_in_dim(w, first, group, 0)
        started = grid.start(rows, jax.lax.dynamic_slice_in_dim(cost, first, group, 0))
        return jax.tree.map(lambda p, s: jax.lax.dynamic_update_index_in_dim(p, s, first // group, 0), params, started)

    zeros = jnp.zeros((k, n), jnp.float32)
    _, codes, values, params = jax.lax.fori_loop(0, k // block, one_block, (w, zeros, zeros, params))
    return codes, values, params
