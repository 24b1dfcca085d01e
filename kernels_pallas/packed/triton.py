"""Products with packed weights for NVIDIA and AMD GPUs by Pallas-Triton. Oracle: `packed_oracle`.

    few rows    grid (column blocks, 1, splits of K): a unit of weights is unpacked in registers, multiplied by x and
                added to sums `[unit, columns]` of each row, which are reduced once at the end, in float32 throughout.
                The matrix units are left out: they would take 16 rows
    many rows   grid (column blocks, row blocks, splits of K): a unit is unpacked in registers, rounded to x's dtype,
                and enters a product of tiles

Each split writes float32 sums of its own, `[splits, R, N]`; XLA adds them. There are as many splits as give PROGRAMS
programs. What lies beyond R, N and the last block is masked where it is loaded and stored. Weights are float32 until
they meet x; sums are float32, and float32 products are not rounded to TF32.

Not yet measured on a GPU; block sizes are not tuned.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import _compat
from kernels_pallas.dispatch import Target, no_sizes, no_triton
from kernels_pallas.packed import layout as layouts
from kernels_pallas.packed.layout import Plane, laid_out, unit_weights
from kernels_pallas.packed.spec import Call

FEW = 4  # rows up to which x is multiplied without the matrix units
PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100 or H200


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows and columns of a tile, blocks of K in one step, splits of K, and the warps and stages of the pipeline."""

    rows: int
    columns: int
    blocks: int
    splits: int
    warps: int = 4
    stages: int = 3


def refusal(target: Target, call: Call) -> str:
    """Returns why these kernels cannot compute a call there; "" where they can."""
    if reason := no_triton(target):
        return reason
    if reason := no_sizes((*call.x.shape, call.columns)):
        return reason
    if call.x.dtype.name not in ("float32", "bfloat16", "float16"):
        return f"it takes float32, bfloat16 and float16, not {call.x.dtype}."
    return layouts.refusal(call.layout)


def blocks_of(target: Target, call: Call) -> Blocks:
    """Returns the block sizes for a call: smaller ones on Ampere, whose products take registers alone."""
    layout, count = call.layout, call.x.shape[0]
    few = count <= FEW
    # Float32 products and layouts of many units want more registers; a pipeline holds x of every unit in shared memory.
    wide, many = call.x.dtype.itemsize == 4 and not few, layout.units > 4
    small = target.capability is not None and target.capability < 9
    least = wide or (small and (layout.number == "table" or layout.units > 8))
    rows = count if few else min(16 if least else 32 if small else 64, max(16, _power(count)))
    columns = min(
        32 if wide or (small and not few) or (few and many) or layout.units > 8 else 64, max(16, _power(call.columns))
    )
    blocks = max(1, (32 if few or wide or many else 64) // layout.unit)
    stages = 1 if wide or many else 2 if layout.units > 2 or layout.number == "table" else 3
    if layout.run:  # the blocks of a step lie under one scale
        while layout.run % (blocks * layout.block):
            blocks //= 2
    steps = pl.cdiv(call.blocks, blocks)
    programs = pl.cdiv(call.columns, columns) * pl.cdiv(count, rows)
    splits = max(1, min(pl.cdiv(PROGRAMS, programs), steps // 4))
    return Blocks(rows, columns, blocks, splits, 8 if rows == 64 else 4, stages)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def forward(target: Target, call: Call, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns `x @ w`, float32 `[R, N]`."""
    blocks = blocks or blocks_of(target, call)
    layout, count, columns = call.layout, call.x.shape[0], call.columns
    few = count <= FEW
    steps = pl.cdiv(call.blocks, blocks.blocks)
    each = pl.cdiv(steps, blocks.splits)
    splits = pl.cdiv(steps, each)
    padded = steps * blocks.blocks
    x = laid_out(layout, call.x, padded)
    row_blocks = 1 if few else pl.cdiv(count, blocks.rows)
    names = list(layout.fields)
    arrays = [call.fields[n] for n in names]

    def whole(a: Any) -> pl.BlockSpec:
        """A field's columns of the program; all of its rows."""
        if a.ndim == 2:
            return pl.BlockSpec((a.shape[0], blocks.columns), lambda n, r, s: (0, n))
        return pl.BlockSpec((a.shape[0], a.shape[1], blocks.columns), lambda n, r, s: (0, 0, n))

    def body(x_ref: Any, *refs: Any) -> None:
        tile = _Tile(call, blocks, x_ref, dict(zip(names, refs, strict=False)))
        step = tile.few if few else tile.many
        begin = pl.program_id(2) * each
        total = jax.lax.fori_loop(begin, jnp.minimum(begin + each, steps), step, tile.zeros(few))
        tile.store(refs[-1], total, few)

    out = pl.pallas_call(
        body,
        grid=(pl.cdiv(columns, blocks.columns), row_blocks, splits),
        in_specs=[
            pl.BlockSpec((layout.units, blocks.rows, x.shape[2]), lambda n, r, s: (0, r, 0)),
            *map(whole, arrays),
        ],
        out_specs=pl.BlockSpec((None, blocks.rows, blocks.columns), lambda n, r, s: (s, r, n)),
        out_shape=jax.ShapeDtypeStruct((splits, count, columns), jnp.float32),
        compiler_params=_compat.triton().CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="packed_matmul_few" if few else "packed_matmul_many",
    )(x, *arrays)
    return [jnp.sum(out, axis=0) if splits > 1 else out[0]]


class _Tile:
    """What a program reads and writes: its columns, rows and steps."""

    def __init__(self, call: Call, blocks: Blocks, x_ref: Any, refs: dict[str, Any]) -> None:
        self.call, self.blocks, self.x, self.refs = call, blocks, x_ref, refs
        self.layout, self.span = call.layout, blocks.blocks * call.layout.unit
        column = pl.program_id(0) * blocks.columns + jnp.arange(blocks.columns, dtype=jnp.int32)
        self.columns = column < call.columns
        row = pl.program_id(1) * blocks.rows + jnp.arange(blocks.rows if call.x.shape[0] > FEW else 16, dtype=jnp.int32)
        self.rows = row < call.x.shape[0]

    def load(self, ref: Any, keep: jax.Array) -> jax.Array:
        other = 0.0 if jnp.issubdtype(ref.dtype, jnp.floating) else 0
        return _compat.triton().load(ref, mask=keep, other=other)

    def weights(self, j: Any, unit: int) -> jax.Array:
        """A unit of the blocks of step j, float32 `[span, columns]`."""
        count = self.blocks.blocks
        first = j * count
        inside = first + jnp.arange(count, dtype=jnp.int32) < self.call.blocks
        blocks = pl.ds(first, count)

        def rows(plane: Plane, start: int, size: int) -> jax.Array:
            keep = jnp.broadcast_to(inside[:, None, None] & self.columns[None, None, :], (count, size, len_columns))
            return self.load(self.refs[plane.name].at[blocks, pl.ds(start, size), :], keep)

        def row(name: str, i: int) -> jax.Array:
            ref = self.refs[name]
            if self.layout.run and len(ref.shape) == 2:
                at = jax.lax.div(first * self.layout.block, jnp.int32(self.layout.run))
                return self.load(ref.at[at, :], self.columns)[None, None, :]
            keep = inside[:, None] & self.columns[None, :]
            return self.load(ref.at[blocks, :] if len(ref.shape) == 2 else ref.at[blocks, jnp.int32(i), :], keep)[
                :, None
            ]

        len_columns = self.blocks.columns
        found = unit_weights(self.layout, unit, rows, row)
        return found.reshape(self.span, len_columns)

    def zeros(self, few: bool) -> Any:
        if few:
            return tuple(jnp.zeros((self.span, self.blocks.columns), jnp.float32) for _ in range(self.blocks.rows))
        return jnp.zeros((self.blocks.rows, self.blocks.columns), jnp.float32)

    def few(self, j: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Adds the products of step j to each row's sums, elementwise."""
        place = pl.ds(j * self.span, self.span)
        for unit in range(self.layout.units):
            w = self.weights(j, unit)
            xs = [self.x[jnp.int32(unit), jnp.int32(r), place] for r in range(self.blocks.rows)]
            totals = tuple(t + w * x.astype(jnp.float32)[:, None] for t, x in zip(totals, xs, strict=True))
        return totals

    def many(self, j: Any, total: jax.Array) -> jax.Array:
        """Adds the product of tiles of step j."""
        place = pl.ds(j * self.span, self.span)
        precision = jax.lax.Precision.HIGHEST if self.x.dtype == jnp.float32 else None
        for unit in range(self.layout.units):
            keep = jnp.broadcast_to(self.rows[:, None], (self.blocks.rows, self.span))
            x = self.load(self.x.at[jnp.int32(unit), :, place], keep)
            w = self.weights(j, unit).astype(x.dtype)
            total = total + jnp.dot(x, w, precision=precision, preferred_element_type=jnp.float32)
        return total

    def store(self, ref: Any, total: Any, few: bool) -> None:
        if not few:
            _compat.triton().store(ref, total, mask=self.rows[:, None] & self.columns[None, :])
            return
        for r, t in enumerate(total):
            _compat.triton().store(ref.at[jnp.int32(r), :], jnp.sum(t, axis=0), mask=self.columns)
