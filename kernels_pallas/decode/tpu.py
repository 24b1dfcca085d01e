"""Decode attention for TPUs by Pallas-Mosaic. Oracle: `oracle.py`.

    grid (B, K, row blocks, slot blocks), the last one in turn: output, maximum and sum stay in VMEM

A core goes through its grid in turn, so splits of the cache would gain nothing: blocks of slots are the splits, and
are merged as they come. Lengths and page tables are prefetched to SMEM; blocks that no row sees are neither computed
nor fetched, and with pages a block is a page, fetched from where it lies. Rows are the G * T queries of a key head.
What lies beyond R and S is garbage in VMEM: scores of such slots are hidden, their values and scales zeroed. Codes
become numbers in registers. Accumulation is float32.

Not yet measured on a TPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.spec import HIDDEN, NOTHING
from kernels_pallas.decode.facts import tuned
from kernels_pallas.decode.spec import (
    Call,
    by_row,
    capped,
    first_seen,
    hidden,
    joined_numbers,
    joined_rows,
    products,
    refusal_of_shapes,
    split_rows,
    weighted,
)
from kernels_pallas.dispatch import Target, no_mosaic_tpu

LARGEST = 1024  # channels of a part


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows and slots of a tile; with pages a tile is one."""

    rows: int
    slots: int


def refusal(target: Target, call: Call) -> str:
    """Returns why these kernels cannot compute a call there; "" where they can."""
    ops = call.ops
    if reason := no_mosaic_tpu(target):
        return reason
    if reason := refusal_of_shapes(call, ("float32", "bfloat16"), LARGEST):
        return reason
    if ops.pages is not None and (call.page % 128 or call.page > 4096):
        # libtpu 0.0.42 copies whole pools of shorter pages into another layout at each call.
        return f"pages of {call.page} slots are no multiple of 128 up to 4096."
    return ""


def blocks_of(call: Call) -> Blocks:
    """Returns the block sizes for a call: multiples of 128 slots, or all of a shorter axis."""
    return Blocks(min(256, call.rows), min(512, call.slots))


def tuned_blocks(target: Target, call: Call) -> Blocks | None:
    """Returns the block sizes that were found for a call; None where none were."""
    found = tuned(target, call, "mosaic_tpu")
    return Blocks(min(256, call.rows), min(found["slots"], call.slots)) if "slots" in found else None


def forward(target: Target, call: Call, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns the output `[B, T, N, Hv]` and the log-sum-exp `[B, N, T]`."""
    blocks = blocks or tuned_blocks(target, call) or blocks_of(call)
    if call.ops.pages is not None:
        blocks = dataclasses.replace(blocks, slots=call.page)
    ops, parts = call.ops, call.spec.parts
    size, value_size = call.sizes
    names, arrays, specs = [], [], []

    def at(b: Any, k: Any, i: Any, j: Any, lengths: Any, *pages: Any) -> tuple[Any, Any]:
        """The cache's first axis and the block along its slots, of those that are seen alone."""
        begin, end = _run(call, blocks, lengths[b], i)
        moving = jnp.minimum(jnp.maximum(j, begin), jnp.maximum(end - 1, 0))
        if not pages:
            return b, moving
        return jnp.minimum(jnp.maximum(pages[0][b, moving], 0), ops.keys.shape[0] - 1), 0

    def add(name: str, array: Any, block: tuple[int | None, ...], place: Any) -> None:
        names.append(name)
        arrays.append(array)
        specs.append(pl.BlockSpec(block, place))

    def along(*ids: Any) -> tuple[Any, ...]:  # slots innermost
        first, block = at(*ids)
        return first, ids[1], 0, block

    def across(*ids: Any) -> tuple[Any, ...]:
        first, block = at(*ids)
        return first, ids[1], block, 0

    def rows(b: Any, k: Any, i: Any, *_: Any) -> tuple[Any, ...]:
        return b, k, 0, i, 0

    add("query", split_rows(call, ops.query, size), (None, None, parts, blocks.rows, size), rows)
    add("keys", ops.keys, (None, None, size, blocks.slots), along)
    add("values", ops.values, (None, None, blocks.slots, value_size), across)
    for name in ("key_scale", "value_scale"):
        x = getattr(ops, name)
        if x is not None:
            x = x[:, :, None] if x.ndim == 3 else x
            add(name, x, (None, None, x.shape[2], blocks.slots), along)
    for name in ("slopes", "sinks"):
        if getattr(ops, name) is not None:
            x = by_row(call, getattr(ops, name)).astype(jnp.float32)[..., None]
            add(name, x, (None, blocks.rows, 1), lambda b, k, i, *_: (k, i, 0))
    scalars = [ops.lengths] if ops.pages is None else [ops.lengths, ops.pages]

    def body(*refs: Any) -> None:
        prefetched, refs = refs[: len(scalars)], refs[len(scalars) :]
        _kernel(_Step(call, blocks, dict(zip(names, refs, strict=False)), *prefetched), *refs[len(names) :])

    out, lse = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(call.batch, call.kv_heads, pl.cdiv(call.rows, blocks.rows), pl.cdiv(call.slots, blocks.slots)),
            in_specs=specs,
            out_specs=[
                pl.BlockSpec((None, None, parts, blocks.rows, value_size), rows),
                pl.BlockSpec((None, None, blocks.rows, 1), lambda b, k, i, *_: (b, k, i, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((parts, blocks.rows, value_size), jnp.float32),
                pltpu.VMEM((blocks.rows, 1), jnp.float32),
                pltpu.VMEM((blocks.rows, 1), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((call.batch, call.kv_heads, parts, call.rows, value_size), ops.query.dtype),
            jax.ShapeDtypeStruct((call.batch, call.kv_heads, call.rows, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention",
    )(*scalars, *arrays)
    return [joined_rows(call, out), joined_numbers(call, lse[..., 0])]


def _run(call: Call, blocks: Blocks, length: Any, i: Any) -> tuple[Any, Any]:
    """The first block of slots that a row of block i sees, and the one after the last."""
    start, groups, size = length - call.length, jnp.int32(call.groups), jnp.int32(blocks.slots)
    last = start + jax.lax.div(jnp.minimum((i + 1) * blocks.rows, call.rows) - 1, groups)
    end = jnp.minimum(jax.lax.div(jnp.maximum(last + blocks.slots, 0), size), pl.cdiv(call.slots, blocks.slots))
    first = first_seen(call.spec, start + jax.lax.div(i * blocks.rows, groups))
    if first is None:
        return jnp.int32(0), end
    return jnp.minimum(jax.lax.div(jnp.maximum(first, 0), size), end), end


class _Step:
    """One step of the grid: where it is, what it may see, and its operands."""

    def __init__(self, call: Call, blocks: Blocks, refs: dict[str, Any], lengths: Any, pages: Any = None) -> None:
        self.call, self.blocks, self.refs = call, blocks, refs
        b, i, self.turn = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        length = lengths[b]
        begin, end = _run(call, blocks, length, i)
        self.visible = (self.turn >= begin) & (self.turn < end)
        if pages is not None:
            number = pages[b, self.turn]
            self.visible = self.visible & (number >= 0) & (number < call.ops.keys.shape[0])
        iota = jax.lax.broadcasted_iota
        row = i * blocks.rows + iota(jnp.int32, (blocks.rows, 1), 0)
        position = length - call.length + jax.lax.div(row, jnp.full_like(row, call.groups))
        self.positions = jnp.where(row < call.rows, position, -1)
        slots = self.turn * blocks.slots + iota(jnp.int32, (1, blocks.slots), 1)
        self.tail = call.ops.pages is None and call.slots % blocks.slots != 0
        self.slots = jnp.where(slots < call.slots, slots, -1) if self.tail else slots
        self.slot_rows = self.turn * blocks.slots + iota(jnp.int32, (blocks.slots, 1), 0)

    def query(self) -> tuple[jax.Array, ...]:
        """Its parts, `[R, h]`."""
        return tuple(self.refs["query"][i] for i in range(self.call.spec.parts))

    def values(self) -> jax.Array:
        """`[C, h]`."""
        x = self.refs["values"][...]
        if self.tail and self.call.spec.kind == "float":
            x = jnp.where(self.slot_rows < self.call.slots, x, jnp.zeros((), x.dtype))
        return x

    def scale(self, name: str) -> tuple[jax.Array, ...]:
        """Nothing, or the scale, or scale and minimum, each `[1, C]`."""
        if name not in self.refs:
            return ()
        x = self.refs[name][...].astype(jnp.float32)
        x = jnp.where(self.slots >= 0, x, 0.0) if self.tail else x
        return tuple(x[i : i + 1] for i in range(x.shape[0]))

    def dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _kernel(step: _Step, out_ref: Any, lse_ref: Any, out: Any, top: Any, total: Any) -> None:
    spec = step.call.spec

    @pl.when(step.turn == 0)
    def _start() -> None:
        out[...] = jnp.zeros_like(out)
        if "sinks" in step.refs:
            top[...] = step.refs["sinks"][...]
            total[...] = jnp.ones_like(total)
        else:
            top[...] = jnp.full_like(top, HIDDEN)
            total[...] = jnp.zeros_like(total)

    @pl.when(step.visible)
    def _tile() -> None:
        q = step.query()
        slope = step.refs["slopes"][...] if "slopes" in step.refs else None
        found = products(spec, step.dot, q, step.refs["keys"][...], step.scale("key_scale"))
        scores = hidden(spec, capped(spec, found), step.positions, step.slots, slope)
        higher = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
        floor = jnp.maximum(higher, NOTHING)
        weights = jnp.exp(scores - floor)
        less = jnp.exp(top[...] - floor)
        total[...] = total[...] * less + jnp.sum(weights, axis=1, keepdims=True)
        parts = weighted(spec, step.dot, weights, step.values(), step.scale("value_scale"), q[0].dtype)
        for i, part in enumerate(parts):
            out[i] = out[i] * less + part
        top[...] = higher

    @pl.when(step.turn == pl.num_programs(3) - 1)
    def _end() -> None:
        some = total[...] > 0
        sums = jnp.where(some, total[...], 1.0)
        for i in range(spec.parts):
            out_ref[i] = (out[i] / sums).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(some, top[...] + jnp.log(sums), -jnp.inf)
