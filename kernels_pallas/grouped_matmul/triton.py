"""Grouped products for NVIDIA and AMD GPUs by Pallas-Triton. Oracle: `oracle.py`.

    rows   grid (pieces, column blocks), through K in a loop: a piece is a block of rows of one segment, which begins
           where the segment does or the piece before it ends
    sums   grid (segments, blocks of K, blocks of N), through the rows of the segment in a loop

Operands are seen whole; what lies beyond a segment, K or N is masked where it is loaded and stored. Accumulation is
float32; float32 operands are not rounded to TF32. Of R rows and S segments there are at most R / block + S pieces,
those beyond the last do nothing: a row is multiplied once, and by no matrix but its own.

Lowered for cuda and rocm; not measured on a GPU, and block sizes are not tuned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import _compat
from kernels_pallas.dispatch import Target, no_triton
from kernels_pallas.grouped_matmul.facts import tuned
from kernels_pallas.grouped_matmul.visits import covered, refusal_of_shapes


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows, K and N of a tile: powers of two of at least 16; warps and stages of the loop's pipeline."""

    rows: int
    deep: int
    wide: int
    warps: int = 4
    stages: int = 3


def refusal(target: Target, call: Any) -> str:
    """Returns why these kernels cannot compute a call there; "" where they can."""
    if reason := no_triton(target):
        return reason
    return refusal_of_shapes(call, ("float32", "bfloat16", "float16"), 2**30)


def blocks_of(call: Any) -> Blocks:
    """Returns the block sizes for a call: fewer rows where segments are short."""
    mean = max(1, call.x.shape[0] // call.sizes.shape[0])
    rows = min(128, max(16, 1 << (mean - 1).bit_length()))
    if call.direction == "sums":
        return Blocks(min(rows, 32), 64, 128)
    return Blocks(rows, 32, 128 if rows < 128 else 64, warps=4)


def tuned_blocks(target: Target, call: Any) -> Blocks | None:
    """Returns the block sizes that were found for a call; None where none were."""
    found = tuned(target, call, "triton")
    return fitting_blocks(call, found) if "rows" in found else None


def fitting_blocks(call: Any, found: Mapping[str, Any]) -> Blocks:
    """Returns blocks of those sizes, cut to the call."""
    depth, width = (max(16, 1 << (n - 1).bit_length()) for n in (call.x.shape[1], call.width))
    return Blocks(found["rows"], min(found["deep"], depth), min(found["wide"], width), found["warps"], found["stages"])


def rows(target: Target, call: Any, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns `x[r] @ w[e]`, `[R, N]`."""
    blocks = blocks or tuned_blocks(target, call) or blocks_of(call)
    (length, depth), width = call.x.shape, call.width
    count, matrices = call.sizes.shape[0], call.second.shape[0]
    pieces = -(-call.sizes // blocks.rows)
    last = jnp.cumsum(pieces, dtype=jnp.int32)
    most = pl.cdiv(length, blocks.rows) + count
    p = jnp.arange(most, dtype=jnp.int32)
    segment = jnp.searchsorted(last, p, side="right").astype(jnp.int32)  # count: none
    safe = jnp.minimum(segment, count - 1)
    begin = call.starts[safe] + (p - last[safe] + pieces[safe]) * blocks.rows
    end = jnp.where(segment < count, call.starts[safe] + call.sizes[safe], 0)
    matrix = jax.lax.rem(safe, jnp.full_like(safe, matrices))
    triton = _compat.triton()

    def kernel(begin_ref: Any, end_ref: Any, matrix_ref: Any, x: Any, w: Any, y: Any) -> None:
        i, column = pl.program_id(0), pl.program_id(1) * blocks.wide
        begin, end, matrix = begin_ref[i], end_ref[i], matrix_ref[i]
        own = begin + jnp.arange(blocks.rows, dtype=jnp.int32) < end
        inside = column + jnp.arange(blocks.wide, dtype=jnp.int32) < width

        def step(t: Any, total: jax.Array) -> jax.Array:
            k = t * blocks.deep
            deep = k + jnp.arange(blocks.deep, dtype=jnp.int32) < depth
            left = triton.load(
                x.at[pl.ds(begin, blocks.rows), pl.ds(k, blocks.deep)], mask=own[:, None] & deep[None, :], other=0.0
            )
            across, down = (pl.ds(column, blocks.wide), inside), (pl.ds(k, blocks.deep), deep)
            first, second = (across, down) if call.transposed else (down, across)
            right = triton.load(
                w.at[matrix, first[0], second[0]], mask=first[1][:, None] & second[1][None, :], other=0.0
            )
            return total + _dot(left, right, (1, 1 if call.transposed else 0))

        total = jnp.zeros((blocks.rows, blocks.wide), jnp.float32)
        # Not a `where`: of two numbers it becomes a tensor, which is no bound of a loop.
        total = jax.lax.fori_loop(0, (begin < end).astype(jnp.int32) * pl.cdiv(depth, blocks.deep), step, total)
        place = y.at[pl.ds(begin, blocks.rows), pl.ds(column, blocks.wide)]
        triton.store(place, total.astype(y.dtype), mask=own[:, None] & inside[None, :])

    y = pl.pallas_call(
        kernel,
        grid=(most, pl.cdiv(width, blocks.wide)),
        out_shape=jax.ShapeDtypeStruct((length, width), call.x.dtype),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="grouped_matmul_rows",
    )(begin, end, matrix, call.x, call.second)
    return [jnp.where(covered(call.starts, call.sizes, length)[:, None], y, jnp.zeros((), y.dtype))]


def sums(target: Target, call: Any, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns the sum over the rows of each segment of `x[r] y[r]^T`, `[S, K, N]`."""
    blocks = blocks or tuned_blocks(target, call) or blocks_of(call)
    depth, width, count = call.x.shape[1], call.width, call.sizes.shape[0]
    triton = _compat.triton()

    def kernel(starts: Any, sizes: Any, x: Any, y: Any, d: Any) -> None:
        s, i, j = pl.program_id(0), pl.program_id(1) * blocks.deep, pl.program_id(2) * blocks.wide
        begin, size = starts[s], sizes[s]
        deep = i + jnp.arange(blocks.deep, dtype=jnp.int32) < depth
        wide = j + jnp.arange(blocks.wide, dtype=jnp.int32) < width

        def step(t: Any, total: jax.Array) -> jax.Array:
            first = t * blocks.rows
            own = (first + jnp.arange(blocks.rows, dtype=jnp.int32) < size)[:, None]
            here = pl.ds(begin + first, blocks.rows)
            left = triton.load(x.at[here, pl.ds(i, blocks.deep)], mask=own & deep[None, :], other=0.0)
            right = triton.load(y.at[here, pl.ds(j, blocks.wide)], mask=own & wide[None, :], other=0.0)
            return total + _dot(left, right, (0, 0))

        total = jnp.zeros((blocks.deep, blocks.wide), jnp.float32)
        total = jax.lax.fori_loop(jnp.int32(0), pl.cdiv(size, jnp.int32(blocks.rows)), step, total)
        place = d.at[s, pl.ds(i, blocks.deep), pl.ds(j, blocks.wide)]
        triton.store(place, total.astype(d.dtype), mask=deep[:, None] & wide[None, :])

    d = pl.pallas_call(
        kernel,
        grid=(count, pl.cdiv(depth, blocks.deep), pl.cdiv(width, blocks.wide)),
        out_shape=jax.ShapeDtypeStruct((count, depth, width), call.x.dtype),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="grouped_matmul_sums",
    )(call.starts, call.sizes, call.x, call.second)
    return [d]


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = ((over[0],), (over[1],)), ((), ())
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
