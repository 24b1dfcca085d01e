"""Decode attention for NVIDIA and AMD GPUs by Pallas-Triton. Oracle: `oracle.py`.

    grid (splits * row blocks, K, B): the rows of one key head through one split of the cache, block by block of slots

A split gives an output and a log-sum-exp of its own, `[B, K, splits, ...]` in float32; XLA merges them (Dao et al.,
Flash-Decoding, 2023). There are as many splits as give PROGRAMS programs, each of at least SHORTEST slots. Blocks of
slots that no row of the program sees, by its length and the window, are not visited. A block lies in one page. Rows
are filled up to 16, head sizes to a power of two, as Triton's products want; what lies beyond R, H and S is masked
where it is loaded and stored. Codes become numbers in registers. Accumulation is float32.

Not yet measured on a GPU; block sizes are not tuned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import _compat
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
    merged,
    products,
    refusal_of_shapes,
    split_rows,
    weighted,
)
from kernels_pallas.dispatch import Target, no_triton

LARGEST = 256  # channels of a part
PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100 or H200
SHORTEST = 256  # slots of a split


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows and slots of a tile, splits of the cache, and the warps and stages of the loop's pipeline."""

    rows: int
    slots: int
    splits: int
    warps: int = 4
    stages: int = 2


def refusal(target: Target, call: Call) -> str:
    """Returns why these kernels cannot compute a call there; "" where they can."""
    ops = call.ops
    if reason := no_triton(target):
        return reason
    if reason := refusal_of_shapes(call, ("float32", "bfloat16", "float16"), LARGEST):
        return reason
    if ops.pages is not None and call.page % 16:
        return f"pages of {call.page} slots are no multiple of 16."
    return ""


def blocks_of(call: Call) -> Blocks:
    """Returns the block sizes for a call."""
    wide = call.ops.query.dtype.itemsize // 2 * (1 if call.spec.kind == "float" else call.spec.parts)
    rows = min(_power(call.rows), 64)
    size = _power(max(call.sizes)) * wide
    slots = min(64 if size <= 128 else 32 if size <= 256 else 16, _power(call.slots))
    if call.ops.pages is not None:
        slots = min(slots, call.page & -call.page)
    programs = call.batch * call.kv_heads * pl.cdiv(call.rows, rows)
    splits = max(1, min(pl.cdiv(PROGRAMS, programs), call.slots // SHORTEST))
    return Blocks(rows, slots, splits)


def tuned_blocks(target: Target, call: Call) -> Blocks | None:
    """Returns the block sizes that were found for a call; None where none were."""
    found = tuned(target, call, "triton")
    return fitting_blocks(call, found) if "slots" in found else None


def fitting_blocks(call: Call, found: Mapping[str, Any]) -> Blocks:
    """Returns blocks of that many slots, splits, warps and stages, cut to the call."""
    slots = min(found["slots"], _power(call.slots))
    if call.ops.pages is not None:
        slots = min(slots, call.page & -call.page)
    splits = max(1, min(found["splits"], call.slots // slots))
    return Blocks(min(_power(call.rows), 64), slots, splits, found["warps"], found["stages"])


def _power(n: int) -> int:
    """The power of two that holds n, at least the 16 that Triton's products want."""
    return max(16, 1 << (n - 1).bit_length())


def forward(target: Target, call: Call, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns the output `[B, T, N, Hv]` and the log-sum-exp `[B, N, T]`."""
    blocks = blocks or tuned_blocks(target, call) or blocks_of(call)
    ops, parts = call.ops, call.spec.parts
    row_blocks = pl.cdiv(call.rows, blocks.rows)
    rows = row_blocks * blocks.rows
    names, arrays, specs = [], [], []

    def add(name: str, array: Any, block: tuple[int | None, ...], at: Any) -> None:
        names.append(name)
        arrays.append(array)
        specs.append(pl.BlockSpec(block, at))

    size, value_size = (_power(n) for n in call.sizes)
    add("query", split_rows(call, ops.query, call.sizes[0]), (None, None, parts, rows, size),
        lambda i, k, b: (b, k, 0, 0, 0))  # fmt: skip
    add("lengths", ops.lengths, (1,), lambda i, k, b: (b,))
    if ops.pages is None:
        first, slots, cache = None, pl.cdiv(call.slots, blocks.slots) * blocks.slots, lambda b: b
    else:
        first, slots, cache = ops.keys.shape[0], call.page, lambda b: 0
        add("pages", ops.pages, (None, ops.pages.shape[1]), lambda i, k, b: (b, 0))
    add("keys", ops.keys, (first, None, size, slots), lambda i, k, b: (cache(b), k, 0, 0))
    add("values", ops.values, (first, None, slots, value_size), lambda i, k, b: (cache(b), k, 0, 0))
    for name in ("key_scale", "value_scale"):
        x = getattr(ops, name)
        if x is not None:
            x = x[:, :, None] if x.ndim == 3 else x
            add(name, x, (first, None, x.shape[2], slots), lambda i, k, b: (cache(b), k, 0, 0))
    for name in ("slopes", "sinks"):
        if getattr(ops, name) is not None:
            add(name, by_row(call, getattr(ops, name)), (None, rows), lambda i, k, b: (k, 0))

    def body(*refs: Any) -> None:
        _kernel(_Tiles(call, blocks, dict(zip(names, refs, strict=False))), *refs[-2:])

    def split(i: Any) -> Any:
        return i if row_blocks == 1 else jax.lax.div(i, jnp.int32(row_blocks))

    lead = (call.batch, call.kv_heads, blocks.splits)
    out, lse = pl.pallas_call(
        body,
        grid=(blocks.splits * row_blocks, call.kv_heads, call.batch),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec((None, None, None, parts, rows, value_size), lambda i, k, b: (b, k, split(i), 0, 0, 0)),
            pl.BlockSpec((None, None, None, rows), lambda i, k, b: (b, k, split(i), 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*lead, parts, call.rows, call.sizes[1]), jnp.float32),
            jax.ShapeDtypeStruct((*lead, call.rows), jnp.float32),
        ],
        compiler_params=_compat.triton().CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="decode_attention",
    )(*arrays)
    out, lse = jnp.moveaxis(out, 2, 0), jnp.moveaxis(lse, 2, 0)[:, :, :, None]
    out, lse = merged(out, lse) if blocks.splits > 1 else (out[0], lse[0])
    return [joined_rows(call, out).astype(ops.query.dtype), joined_numbers(call, lse)]


class _Tiles:
    """Where a program is, and its loads, which are masked at the ends."""

    def __init__(self, call: Call, blocks: Blocks, refs: dict[str, Any]) -> None:
        self.call, self.blocks, self.refs = call, blocks, refs
        i = pl.program_id(0)
        row_blocks = pl.cdiv(call.rows, blocks.rows)
        self.split = i if row_blocks == 1 else jax.lax.div(i, jnp.int32(row_blocks))
        self.row = 0 if row_blocks == 1 else (i - self.split * row_blocks) * blocks.rows
        row = self.row + jnp.arange(blocks.rows, dtype=jnp.int32)
        self.inside = row < call.rows
        self.first = refs["lengths"][0] - call.length  # the position of the first query
        self.positions = jnp.where(self.inside, self.first + jax.lax.div(row, jnp.int32(call.groups)), -1)[:, None]

    def load(self, ref: Any, keep: Any, other: float) -> jax.Array:
        return _compat.triton().load(ref, mask=keep, other=other)

    def within(self, width: int, size: int) -> jax.Array:
        return jnp.arange(width, dtype=jnp.int32) < size

    def query(self) -> tuple[jax.Array, ...]:
        """Its parts, `[R, h]`."""
        ref, size = self.refs["query"], self.call.sizes[0]
        keep = self.inside[:, None] & self.within(ref.shape[2], size)[None, :]
        rows = pl.ds(self.row, self.blocks.rows)
        return tuple(self.load(ref.at[jnp.int32(i), rows, :], keep, 0.0) for i in range(self.call.spec.parts))

    def numbers(self, name: str, other: float) -> jax.Array:
        """One number of each row, `[R]`."""
        x = self.load(self.refs[name].at[pl.ds(self.row, self.blocks.rows)], self.inside, other)
        return x.astype(jnp.float32)

    def run(self) -> tuple[Any, Any]:
        """The first block of slots of the split that a row sees, and the one after the last."""
        call, block = self.call, self.blocks.slots
        each = pl.cdiv(pl.cdiv(call.slots, self.blocks.splits), block)  # blocks of a split
        last = self.first + jax.lax.div(jnp.minimum(self.row + self.blocks.rows, call.rows) - 1, jnp.int32(call.groups))
        end = jnp.minimum(jax.lax.div(jnp.maximum(last + block, 0), jnp.int32(block)), (self.split + 1) * each)
        end = jnp.minimum(end, pl.cdiv(call.slots, block))
        begin = self.split * each
        first = first_seen(call.spec, self.first + jax.lax.div(jnp.int32(self.row), jnp.int32(call.groups)))
        if first is not None:
            begin = jnp.maximum(begin, jax.lax.div(jnp.maximum(first, 0), jnp.int32(block)))
        return begin, end

    def block(self, j: Any) -> Any:
        """Of block j the places in the cache's references, and the slots, `[C]`, negative where there are none."""
        call, count = self.call, self.blocks.slots
        slots = j * count + jnp.arange(count, dtype=jnp.int32)
        there = slots < call.slots
        if call.ops.pages is None:
            return (), pl.ds(j * count, count), jnp.where(there, slots, -1)
        page = jax.lax.div(j * count, jnp.int32(call.page))
        number = self.refs["pages"][page]
        pool = call.ops.keys.shape[0]
        there = there & (number >= 0) & (number < pool)
        number = jnp.minimum(jnp.maximum(number, 0), pool - 1)
        return (number,), pl.ds(j * count - page * call.page, count), jnp.where(there, slots, -1)

    def tile(self, name: str, page: Any, place: Any, there: jax.Array) -> jax.Array:
        """Keys `[h, C]` or values `[C, h]` of a block."""
        ref, size = self.refs[name], self.call.sizes[name == "values"]
        other = 0.0 if self.call.spec.kind == "float" else 0
        if name == "keys":
            keep = self.within(ref.shape[-2], size)[:, None] & there[None, :]
            return self.load(ref.at[(*page, slice(None), place)], keep, other)
        keep = there[:, None] & self.within(ref.shape[-1], size)[None, :]
        return self.load(ref.at[(*page, place, slice(None))], keep, other)

    def scale(self, name: str, page: Any, place: Any, there: jax.Array) -> tuple[jax.Array, ...]:
        """Nothing, or the scale, or scale and minimum of a block, each `[1, C]`."""
        if name not in self.refs:
            return ()
        count = 2 if self.call.spec.kind == "int4" else 1
        rows = (self.load(self.refs[name].at[(*page, jnp.int32(i), place)], there, 0.0) for i in range(count))
        return tuple(x.astype(jnp.float32)[None, :] for x in rows)

    def dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _kernel(tiles: _Tiles, out_ref: Any, lse_ref: Any) -> None:
    call, spec = tiles.call, tiles.call.spec
    rows = tiles.blocks.rows
    q = tiles.query()
    slope = tiles.numbers("slopes", 0.0)[:, None] if "slopes" in tiles.refs else None
    top, total = jnp.full((rows,), HIDDEN, jnp.float32), jnp.zeros((rows,), jnp.float32)
    if "sinks" in tiles.refs:  # they count once: in the first split
        first = tiles.split == 0
        top = jnp.where(first, tiles.numbers("sinks", HIDDEN), top)
        total = jnp.where(first, jnp.ones((rows,), jnp.float32), total)
    outs = tuple(jnp.zeros((rows, out_ref.shape[-1]), jnp.float32) for _ in range(spec.parts))

    def step(j: Any, carry: Any) -> Any:
        outs, top, total = carry
        page, place, slots = tiles.block(j)
        there = slots >= 0
        keys, scale = tiles.tile("keys", page, place, there), tiles.scale("key_scale", page, place, there)
        found = products(spec, tiles.dot, q, keys, scale)
        scores = hidden(spec, capped(spec, found), tiles.positions, slots[None, :], slope)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        floor = jnp.maximum(higher, NOTHING)
        weights = jnp.exp(scores - floor[:, None])
        less = jnp.exp(top - floor)
        values, scale = tiles.tile("values", page, place, there), tiles.scale("value_scale", page, place, there)
        parts = weighted(spec, tiles.dot, weights, values, scale, q[0].dtype)
        outs = tuple(x * less[:, None] + part for x, part in zip(outs, parts, strict=True))
        return outs, higher, total * less + jnp.sum(weights, axis=1)

    begin, end = tiles.run()
    outs, top, total = jax.lax.fori_loop(begin, end, step, (outs, top, total))
    some = total > 0
    total = jnp.where(some, total, 1.0)
    keep = tiles.inside[:, None] & tiles.within(out_ref.shape[-1], call.sizes[1])[None, :]
    place = pl.ds(tiles.row, rows)
    for i, out in enumerate(outs):
        _compat.triton().store(out_ref.at[jnp.int32(i), place, :], out / total[:, None], mask=keep)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
    _compat.triton().store(lse_ref.at[place], lse, mask=tiles.inside)
