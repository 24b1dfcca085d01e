"""`fp8_dot`: a product of which all three, forward and both backward, take 8-bit floats.

    y  = xq wq / (sx sw)         xq = float8(x sx), wq = float8(w sw)
    dx = gq wq^T / (sg sw)       gq = float8(g sg)
    dw = xq^T gq / (sx sg)

The operands of each `dot_general` are float8 arrays, its result float32: GPUs and TPUs that have such units use them,
others widen. Quantization itself has the identity for a gradient (straight through, also where it clipped), as in
Transformer Engine. Under `BlockScaling` the contraction goes block by block, each block's sums scaled in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from trustcore.errors import QuantizationError
from trustcore.quant.training.fp8 import (
    E4M3,
    BlockScaling,
    DelayedScaling,
    Fp8State,
    Recipe,
    amax_scale,
    measure,
    to_float8,
)


def fp8_dot(
    x: Float[Array, "*rows K"], w: Float[Array, "K N"], state: Fp8State | None = None, *, recipe: Recipe
) -> Float[Array, "*rows N"]:
    """Returns `x @ w` in the dtype of x, computed from float8 operands with float32 sums.

    Args:
        x: activations.
        w: weights.
        state: of delayed scaling; None with the other recipes.
        recipe: how scales are found.

    Raises:
        QuantizationError: the recipe and the state do not belong together, or the shapes do not fit.

    Differentiable in x and w as the header says. The gradient of `state.measured` is what this step measured; pass it
    to `trustcore.quant.training.fp8.updated`. All other gradients of the state are zero (`allow_int=True`: some of its
    leaves are counts).
    """
    if w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise QuantizationError(f"fp8_dot: x {list(x.shape)} and w {list(w.shape)} do not fit: K must agree.")
    if isinstance(recipe, DelayedScaling) != (state is not None):
        need = "needs a state: pass fp8.started(w, recipe)" if state is None else "has no state: pass None"
        raise QuantizationError(f"fp8_dot: {type(recipe).__name__} {need}.")
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(recipe, BlockScaling):
        y: jax.Array = _blockwise(recipe, rows, w)
    else:
        y = _per_tensor(recipe, rows, w, state)
    return y.reshape(*x.shape[:-1], w.shape[1])


# ---- one scale a tensor ----------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _per_tensor(recipe: Any, x: jax.Array, w: jax.Array, state: Fp8State | None) -> jax.Array:
    return _per_tensor_forward(recipe, x, w, state)[0]


def _per_tensor_forward(recipe: Any, x: jax.Array, w: jax.Array, state: Fp8State | None) -> Any:
    sx, sw = (_scale(recipe, i, a, state) for i, a in enumerate((x, w)))
    xq, wq = to_float8(x, sx, recipe.dtypes[0]), to_float8(w, sw, recipe.dtypes[1])
    y = _dot(xq, wq, 1, 0) * (1.0 / sx * (1.0 / sw))
    seen = None
    if state is not None:
        seen = jnp.stack([measure(a, s, d) for a, s, d in zip((x, w), (sx, sw), recipe.dtypes, strict=False)])
    # Empty arrays carry the dtypes of x and w to the backward pass.
    return y.astype(x.dtype), (xq, wq, sx, sw, seen, state, jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype))


def _per_tensor_backward(recipe: Any, saved: Any, g: jax.Array) -> Any:
    xq, wq, sx, sw, seen, state, like_x, like_w = saved
    sg, dtype = _scale(recipe, 2, g, state), recipe.dtypes[2]
    gq = to_float8(g, sg, dtype)
    dx = _dot(gq, wq, 1, 1) * (1.0 / sg * (1.0 / sw))
    dw = _dot(xq, gq, 0, 0) * (1.0 / sx * (1.0 / sg))
    gradient = None
    if state is not None:
        gradient = Fp8State(
            history=jnp.zeros_like(state.history),
            scale=jnp.zeros_like(state.scale),
            step=_no_gradient(state.step),
            overflow=_no_gradient(state.overflow),
            underflow=_no_gradient(state.underflow),
            measured=jnp.concatenate([seen, measure(g, sg, dtype)[None]]),
        )
    return dx.astype(like_x.dtype), dw.astype(like_w.dtype), gradient


_per_tensor.defvjp(_per_tensor_forward, _per_tensor_backward)


def _scale(recipe: Any, tensor: int, x: jax.Array, state: Fp8State | None) -> jax.Array:
    if state is not None:
        return state.scale[tensor]
    return amax_scale(jnp.max(jnp.abs(x.astype(jnp.float32))), recipe.dtypes[tensor], recipe.margin)


def _no_gradient(count: jax.Array) -> Any:
    return np.zeros(count.shape, jax.dtypes.float0)


def _dot(a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
    """Returns the product of two float8 matrices over axis i of a and j of b, float32."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


# ---- a scale for each block of the contraction -----------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(recipe: BlockScaling, x: jax.Array, w: jax.Array) -> jax.Array:
    return block_product(x, w, recipe, square=True).astype(x.dtype)


def _blockwise_backward(recipe: BlockScaling, saved: Any, g: jax.Array) -> Any:
    x, w = saved
    dx = block_product(g, w.T, recipe, square=True)
    dw = block_product(x.T, g, recipe, square=False)  # neither side is a weight: runs along the rows of x and g
    return dx.astype(x.dtype), dw.astype(w.dtype)


_blockwise.defvjp(lambda recipe, x, w: (_blockwise(recipe, x, w), (x, w)), _blockwise_backward)


def block_product(a: jax.Array, b: jax.Array, recipe: BlockScaling, *, square: bool) -> jax.Array:
    """Returns `a @ b`, float32 `[M, N]`, from float8 operands.

    Args:
        a: float `[M, K]`: a scale for each row and `recipe.block` of K.
        b: float `[K, N]`: a scale for each block of K and, if `square`, of N, else for each column.
        recipe: of the scales.
        square: see b.

    K is filled up with zeros to whole blocks.
    """
    size, (m, k), n = recipe.block, a.shape, b.shape[1]
    blocks = -(-k // size)
    a = jnp.pad(a.astype(jnp.float32), ((0, 0), (0, blocks * size - k))).reshape(m, blocks, size)
    b = jnp.pad(b.astype(jnp.float32), ((0, blocks * size - k), (0, 0))).reshape(blocks, size, n)
    sa = amax_scale(jnp.max(jnp.abs(a), axis=2), E4M3, powers=recipe.powers)  # [M, blocks]
    if square:
        sb = jnp.repeat(square_scales(b.reshape(-1, n), recipe), size, axis=1)[:, :n]  # [blocks, N]
    else:
        sb = amax_scale(jnp.max(jnp.abs(b), axis=1), E4M3, powers=recipe.powers)
    aq, bq = to_float8(a, sa[:, :, None], E4M3), to_float8(b, sb[:, None, :], E4M3)

    def add(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
        aq, bq, sa, sb = part
        return total + _dot(aq, bq, 1, 0) * (1.0 / sa)[:, None] * (1.0 / sb)[None, :], None

    parts = (aq.swapaxes(0, 1), bq, sa.T, sb)
    return jax.lax.scan(add, jnp.zeros((m, n)), parts)[0]


def square_scales(w: jax.Array, recipe: BlockScaling) -> jax.Array:
    """Returns the scales of the square blocks of w `[K, N]`, `[ceil(K / block), ceil(N / block)]`."""
    size, (k, n) = recipe.block, w.shape
    w = jnp.pad(jnp.abs(w.astype(jnp.float32)), ((0, -k % size), (0, -n % size)))
    tops = jnp.max(w.reshape(w.shape[0] // size, size, w.shape[1] // size, size), axis=(1, 3))
    return amax_scale(tops, E4M3, powers=recipe.powers)
