"""Grouped products for TPUs by Pallas-Mosaic. Oracle: `oracle.py`.

    rows   grid (column blocks, visits): a visit is a block of rows and a segment that has some of them (`visits.py`).
           Visits of one block follow each other, so the block stays in VMEM while each segment writes its rows
    sums   grid (blocks of K, blocks of N, visits): visits of one segment follow each other, its sum stays in VMEM

Which block and which matrix a visit has is prefetched to SMEM, so a matrix is fetched once for all blocks of its
segment that follow each other, and those of empty segments never. Rows of K numbers are taken whole. Accumulation is
float32.

Bytes moved for R rows of K and matrices of K x N: R K for each block of columns, R N once, each matrix once: what a
dense product of as many rows moves. Compiled by libtpu; not measured on a TPU, and block sizes are not tuned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.dispatch import Target, no_mosaic_tpu
from kernels_pallas.grouped_matmul.facts import tuned
from kernels_pallas.grouped_matmul.visits import covered, refusal_of_shapes, visits

DEEPEST = 16384  # K: a matrix's block of 128 columns is then 8 MB of float32


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows of a visit, and the block of a matrix: `deep` of K (sums alone) by `wide` of N."""

    rows: int
    deep: int
    wide: int


def refusal(target: Target, call: Any) -> str:
    """Returns why these kernels cannot compute a call there; "" where they can."""
    if reason := no_mosaic_tpu(target):
        return reason
    return refusal_of_shapes(call, ("float32", "bfloat16"), DEEPEST)


def blocks_of(call: Any) -> Blocks:
    """Returns the block sizes for a call: multiples of 128, or all of a shorter axis."""
    rows, depth, width = call.x.shape[0], call.x.shape[1], call.width
    if call.direction == "sums":
        return Blocks(min(rows, 256), min(depth, 512), min(width, 512))
    wide = max(128, 2**21 // (depth * call.x.dtype.itemsize) // 128 * 128)  # 2 MB of a matrix
    return Blocks(min(rows, 128), depth, min(width, wide, 1024))


def tuned_blocks(target: Target, call: Any) -> Blocks | None:
    """Returns the block sizes that were found for a call; None where none were."""
    found = tuned(target, call, "mosaic_tpu")
    return fitting_blocks(call, found) if "rows" in found else None


def fitting_blocks(call: Any, found: Mapping[str, Any]) -> Blocks:
    """Returns blocks of those sizes, cut to the call; rows of K numbers are whole where they are multiplied."""
    rows, depth, width = call.x.shape[0], call.x.shape[1], call.width
    deep = min(depth, found["deep"]) if call.direction == "sums" else depth
    return Blocks(min(rows, found["rows"]), deep, min(width, found["wide"]))


def rows(target: Target, call: Any, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns `x[r] @ w[e]`, `[R, N]`."""
    blocks = blocks or tuned_blocks(target, call) or blocks_of(call)
    (length, depth), width = call.x.shape, call.width
    made = visits(call.starts, call.sizes, length, blocks.rows, empty=False)
    matrices = call.second.shape[0]
    block_w = (None, blocks.wide, depth) if call.transposed else (None, depth, blocks.wide)

    def at_w(j: Any, v: Any, block: Any, segment: Any, *_: Any) -> Any:
        matrix = jax.lax.rem(segment[v], jnp.int32(matrices))
        return (matrix, j, 0) if call.transposed else (matrix, 0, j)

    def kernel(block: Any, segment: Any, count: Any, starts: Any, sizes: Any, x: Any, w: Any, y: Any) -> None:
        v = pl.program_id(1)

        @pl.when(v < count[0])
        def _visit() -> None:
            s = segment[v]
            part = _dot(x[...], w[...], (1, 1 if call.transposed else 0))
            row = block[v] * blocks.rows + jax.lax.broadcasted_iota(jnp.int32, (blocks.rows, 1), 0)
            own = (row >= starts[s]) & (row < starts[s] + sizes[s])
            y[...] = jnp.where(own, part.astype(y.dtype), y[...])

    y = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(pl.cdiv(width, blocks.wide), made.block.shape[0]),
            in_specs=[
                pl.BlockSpec((blocks.rows, depth), lambda j, v, block, *_: (block[v], 0)),
                pl.BlockSpec(block_w, at_w),
            ],
            out_specs=pl.BlockSpec((blocks.rows, blocks.wide), lambda j, v, block, *_: (block[v], j)),
        ),
        out_shape=jax.ShapeDtypeStruct((length, width), call.x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="grouped_matmul_rows",
    )(*made, call.starts, call.sizes, call.x, call.second)
    return [jnp.where(covered(call.starts, call.sizes, length)[:, None], y, jnp.zeros((), y.dtype))]


def sums(target: Target, call: Any, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns the sum over the rows of each segment of `x[r] y[r]^T`, `[S, K, N]`."""
    blocks = blocks or tuned_blocks(target, call) or blocks_of(call)
    (length, depth), width, count = call.x.shape, call.width, call.sizes.shape[0]
    made = visits(call.starts, call.sizes, length, blocks.rows, empty=True)
    shape = (blocks.deep, blocks.wide)

    def kernel(
        block: Any, segment: Any, count: Any, starts: Any, sizes: Any, x: Any, y: Any, d: Any, total: Any
    ) -> None:
        v = pl.program_id(2)
        s = segment[v]
        inside = v < count[0]
        first = (v == 0) | (segment[jnp.maximum(v - 1, 0)] != s)
        last = (v == count[0] - 1) | (segment[jnp.minimum(v + 1, pl.num_programs(2) - 1)] != s)

        @pl.when(inside & first)
        def _start() -> None:
            total[...] = jnp.zeros_like(total)

        @pl.when(inside & (sizes[s] > 0))
        def _visit() -> None:
            row = block[v] * blocks.rows + jax.lax.broadcasted_iota(jnp.int32, (blocks.rows, 1), 0)
            own = (row >= starts[s]) & (row < starts[s] + sizes[s])
            left, right = (jnp.where(own, z[...], jnp.zeros((), z.dtype)) for z in (x, y))
            total[...] += _dot(left, right, (0, 0))

        @pl.when(inside & last)
        def _end() -> None:
            d[...] = total[...].astype(d.dtype)

    d = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(pl.cdiv(depth, blocks.deep), pl.cdiv(width, blocks.wide), made.block.shape[0]),
            in_specs=[
                pl.BlockSpec((blocks.rows, blocks.deep), lambda i, j, v, block, *_: (block[v], i)),
                pl.BlockSpec((blocks.rows, blocks.wide), lambda i, j, v, block, *_: (block[v], j)),
            ],
            out_specs=pl.BlockSpec((None, *shape), lambda i, j, v, block, segment, *_: (segment[v], i, j)),
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((count, depth, width), call.x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="grouped_matmul_sums",
    )(*made, call.starts, call.sizes, call.x, call.second)
    return [d]


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = ((over[0],), (over[1],)), ((), ())
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
