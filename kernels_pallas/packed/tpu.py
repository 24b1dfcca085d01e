"""Products with packed weights for TPUs by Pallas-Mosaic. Oracle: `packed_oracle`.

    grid (row blocks, column blocks, steps of K), the last one in turn: sums stay in VMEM

One kernel serves few rows and many: a product of few rows waits for its bytes, and the matrix unit takes the rows it
has. Codes come to VMEM packed and are unpacked there, unit by unit; a step has so many blocks that a unit of them is a
multiple of 128 weights, which is what x is cut by. Scales of 16-bit floats, which TPUs lack, become float32 before the
kernel, and scales of long runs are repeated for each block. What lies beyond the last block is zeroed. Weights are
rounded to x's dtype; sums are float32.

Not yet measured on a TPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.dispatch import Target, no_mosaic_tpu, no_sizes
from kernels_pallas.packed import layout as layouts
from kernels_pallas.packed.layout import Plane, laid_out, unit_weights
from kernels_pallas.packed.spec import Call


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows and columns of a tile, and blocks of K in one step."""

    rows: int
    columns: int
    blocks: int


def refusal(target: Target, call: Call) -> str:
    """Returns why these kernels cannot compute a call there; "" where they can."""
    if reason := no_mosaic_tpu(target):
        return reason
    if reason := no_sizes((*call.x.shape, call.columns)):
        return reason
    if call.x.dtype.name not in ("float32", "bfloat16"):
        return f"it takes float32 and bfloat16, not {call.x.dtype}."
    return layouts.refusal(call.layout)


def blocks_of(call: Call) -> Blocks:
    """Returns the block sizes for a call: multiples of 128, or all of a shorter axis."""
    return Blocks(min(256, call.x.shape[0]), min(256, call.columns), 128 // call.layout.unit)


def forward(target: Target, call: Call, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns `x @ w`, float32 `[R, N]`."""
    blocks = blocks or blocks_of(call)
    layout, count, columns = call.layout, call.x.shape[0], call.columns
    steps = pl.cdiv(call.blocks, blocks.blocks)
    x = laid_out(layout, call.x, steps * blocks.blocks)
    fields = {n: _readied(call, call.fields[n]) for n in layout.fields}
    names = list(fields)

    def body(x_ref: Any, *refs: Any) -> None:
        _kernel(call, blocks, x_ref, dict(zip(names, refs, strict=False)), *refs[-2:])

    out = pl.pallas_call(
        body,
        grid=(pl.cdiv(count, blocks.rows), pl.cdiv(columns, blocks.columns), steps),
        in_specs=[
            pl.BlockSpec((layout.units, blocks.rows, blocks.blocks * layout.unit), lambda r, n, s: (0, r, s)),
            *(
                pl.BlockSpec((blocks.blocks, a.shape[1], blocks.columns), lambda r, n, s: (s, 0, n))
                for a in fields.values()
            ),
        ],
        out_specs=pl.BlockSpec((blocks.rows, blocks.columns), lambda r, n, s: (r, n)),
        out_shape=jax.ShapeDtypeStruct((count, columns), jnp.float32),
        scratch_shapes=[pltpu.VMEM((blocks.rows, blocks.columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="packed_matmul",
    )(x, *fields.values())
    return [out]


def _readied(call: Call, field: jax.Array) -> jax.Array:
    """A field as `[K / block, rows, N]`, its floats float32."""
    if jnp.issubdtype(field.dtype, jnp.floating):
        field = field.astype(jnp.float32)
    if field.ndim == 3:
        return field
    return jnp.repeat(field, call.blocks // field.shape[0], axis=0)[:, None]


def _kernel(call: Call, blocks: Blocks, x_ref: Any, refs: dict[str, Any], out_ref: Any, total: Any) -> None:
    layout, turn = call.layout, pl.program_id(2)

    @pl.when(turn == 0)
    def _start() -> None:
        total[...] = jnp.zeros_like(total)

    def rows(plane: Plane, start: int, size: int) -> jax.Array:
        return refs[plane.name][:, start : start + size, :]

    def row(name: str, i: int) -> jax.Array:
        return refs[name][:, i : i + 1, :]

    dtype = x_ref.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    for unit in range(layout.units):
        w = unit_weights(layout, unit, rows, row)
        if call.blocks % blocks.blocks:  # garbage, which zeros of x would not hide
            block = turn * blocks.blocks + jax.lax.broadcasted_iota(jnp.int32, w.shape, 0)
            w = jnp.where(block < call.blocks, w, 0.0)
        w = w.reshape(-1, w.shape[2]).astype(dtype)
        total[...] += jnp.dot(x_ref[unit], w, precision=precision, preferred_element_type=jnp.float32)

    @pl.when(turn == pl.num_programs(2) - 1)
    def _end() -> None:
        out_ref[...] = total[...]
