"""Attention for TPUs by Pallas-Mosaic, forward and backward. Oracle: `oracle.py`.

    forward   grid (B, N, query blocks, key blocks), the last one in turn: output, maximum and sum stay in VMEM
    dq        the same grid, each tile computed again from the log-sum-exp; dq stays in VMEM
    dk, dv    grid (B, K, key blocks, G, query blocks), the last two in turn; dk and dv stay in VMEM

Operands are laid out `[B, N, T, H]`: a block is then whole tiles of memory. What goes with a query (positions,
segments, log-sum-exp) is a column `[B, N or 1, T, 1]`, what goes with a key a row `[B, 1, S]`. Where the visible blocks
begin and end is prefetched to SMEM: blocks that no query of a block sees are neither computed nor fetched. What lies
beyond T and S is garbage in VMEM: keys are hidden, values and rows zeroed before they meet anything. Accumulation is
float32. The gradient of a bias is written for every head and batch before it is summed: O(T * S) memory.

Not yet measured on a TPU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import block_mask
from kernels_pallas.attention import spec as float8
from kernels_pallas.attention.blocks import positions, runs, segments, visible_blocks
from kernels_pallas.attention.facts import tuned
from kernels_pallas.attention.spec import (
    HIDDEN,
    NO_KEY,
    NOTHING,
    added,
    capped,
    kept,
    masked_bias,
    row_numbers,
    seen,
    uncapped,
)
from kernels_pallas.dispatch import Target, no_mosaic_tpu, no_sizes

LARGEST = 256  # head size
TILE = (16, 128)  # queries and keys of a tile are multiples of these, or whole axes
LISTS = 2**18  # bytes of lists of blocks in SMEM


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The block sizes of one kernel."""

    queries: int
    keys: int


def refusal(target: Target, call: Any) -> str:
    """Returns why these kernels cannot compute a call there; "" where they can."""
    ops = call.ops
    if reason := no_mosaic_tpu(target):
        return reason
    sizes = (*ops.query.shape, *ops.key.shape, ops.value.shape[3])
    if reason := no_sizes(sizes):
        return reason
    if ops.query.dtype.name not in ("float32", "bfloat16", *float8.FLOAT8):
        return f"it takes float32, bfloat16 and float8, not {ops.query.dtype}."
    widest = max(ops.query.shape[3], ops.value.shape[3])
    if widest > LARGEST:
        return f"head size {widest} is above {LARGEST}."
    if ops.relative is not None:
        return "it has no relative positions; give them as a bias."
    return "" if call.spec.blocks is None else _no_lists(call)


def _no_lists(call: Any) -> str:
    ops, lengths = call.ops, (call.ops.query.shape[1], call.ops.key.shape[1])
    tile = (2 * TILE[0], TILE[1]) if ops.query.dtype.itemsize == 1 else TILE
    for name, block, length, unit in zip(("queries", "keys"), call.spec.blocks, lengths, tile, strict=True):
        if block < length and block % unit:
            return f"blocks of {block} {name} in the block mask are no multiple of {unit}."
    direction = "forward" if call.cotangent is None else "backward"
    blocks = _fitted(call, blocks_of(call, direction))
    rows, columns = pl.cdiv(lengths[0], blocks.queries), pl.cdiv(lengths[1], blocks.keys)
    most = min(columns, ops.block_indices.shape[3] * pl.cdiv(call.spec.blocks[1], blocks.keys))
    lists = max(rows * (1 + most), columns * (1 + rows) if direction == "backward" else 0)
    size = 4 * (ops.query.shape[0] if _by_row(call) else 1) * ops.block_counts.shape[1] * lists
    if size > LISTS:
        return f"the block mask's lists take {size} bytes of SMEM, above {LISTS}; larger blocks have shorter ones."
    return ""


def _by_row(call: Any) -> bool:
    """Whether lists differ by row of the batch: by themselves, or with positions and segments."""
    ops = call.ops
    given = ops.query_positions, ops.key_positions, ops.query_segments
    return ops.block_counts.shape[0] > 1 or any(x is not None for x in given)


def _fitted(call: Any, blocks: Blocks) -> Blocks:
    """The blocks, made smaller where those of a block mask are no whole number of them."""
    if call.spec.blocks is None:
        return blocks
    lengths = call.ops.query.shape[1], call.ops.key.shape[1]
    pairs = zip((blocks.queries, blocks.keys), call.spec.blocks, lengths, strict=True)
    return Blocks(*(tile if block >= length else math.gcd(tile, block) for tile, block, length in pairs))


def blocks_of(call: Any, direction: str) -> Blocks:
    """Returns the block sizes for a call: multiples of 128, or all of a shorter axis."""
    length, span = call.ops.query.shape[1], call.ops.key.shape[1]
    queries, keys = (256, 512) if direction == "forward" else (256, 256)
    return Blocks(min(queries, length), min(keys, span))


def tuned_blocks(target: Target, call: Any, direction: str) -> Blocks | None:
    """Returns the block sizes that were found for a call; None where none were."""
    found = tuned(target, call, direction, "mosaic_tpu")
    if "queries" not in found:
        return None
    return Blocks(min(found["queries"], call.ops.query.shape[1]), min(found["keys"], call.ops.key.shape[1]))


def forward(target: Target, call: Any, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns the output `[B, T, N, Hv]` and the log-sum-exp `[B, N, T]`."""
    blocks = _fitted(call, blocks or tuned_blocks(target, call, "forward") or blocks_of(call, "forward"))
    made = _Made(call, blocks, of_keys=False)
    made.add_all(("query", "key", "value"))
    ops = call.ops
    batch, length, heads, _ = ops.query.shape
    value_size = ops.value.shape[3]
    shapes = [
        jax.ShapeDtypeStruct((batch, heads, length, value_size), float8.working_dtype(ops)),
        jax.ShapeDtypeStruct((batch, heads, length, 1), jnp.float32),
    ]
    rows = made.blocks.queries
    scratch = [pltpu.VMEM((rows, n), jnp.float32) for n in (value_size, 1, 1)]
    out, lse = made.run(_forward_kernel, "attention_forward", shapes, ("head", "row"), scratch, interpret)
    return [out.transpose(0, 2, 1, 3), lse[..., 0]]


def backward(target: Target, call: Any, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns the gradients of query, key, value and of each of `call.wanted` (no "relative")."""
    blocks = _fitted(call, blocks or tuned_blocks(target, call, "backward") or blocks_of(call, "backward"))
    ops = call.ops
    batch, length, heads, size = ops.query.shape
    span, kv_heads = ops.key.shape[1:3]
    call = call._replace(lse=jnp.where(jnp.isneginf(call.lse), jnp.float32(NO_KEY), call.lse))
    names = ("query", "key", "value", "cotangent", "lse", "delta")

    rows = _Made(call, blocks, of_keys=False)
    rows.add_all(names)
    shapes = [jax.ShapeDtypeStruct((batch, heads, length, size), ops.query.dtype)]
    kinds, scratch = ["head"], [pltpu.VMEM((blocks.queries, size), jnp.float32)]
    if "slopes" in call.wanted:
        shapes.append(jax.ShapeDtypeStruct((batch, heads, length, 1), jnp.float32))
        kinds.append("row")
        scratch.append(pltpu.VMEM((blocks.queries, 1), jnp.float32))
    if "bias" in call.wanted:
        shapes.append(jax.ShapeDtypeStruct((batch, heads, length, span), jnp.float32))
        kinds.append("tile")
    dq, *more = rows.run(_dq_kernel, "attention_dq", shapes, tuple(kinds), scratch, interpret)

    columns = _Made(call, blocks, of_keys=True)
    columns.add_all(names)
    sizes = size, ops.value.shape[3]
    shapes = [jax.ShapeDtypeStruct((batch, kv_heads, span, n), ops.key.dtype) for n in sizes]
    scratch = [pltpu.VMEM((blocks.keys, n), jnp.float32) for n in sizes]
    dk, dv = columns.run(_dkv_kernel, "attention_dkv", shapes, ("key", "key"), scratch, interpret)

    found = {}
    if "slopes" in call.wanted:
        found["slopes"] = jnp.sum(more.pop(0), axis=(2, 3))
    if "bias" in call.wanted:
        spread = tuple(i for i, n in enumerate(ops.bias.shape) if n == 1)
        of_bias = block_mask.visited(call.spec, ops, blocks.queries, blocks.keys, more.pop(0))
        found["bias"] = jnp.sum(of_bias, axis=spread, keepdims=True)
    return [*(x.transpose(0, 2, 1, 3) for x in (dq, dk, dv)), *(found[name] for name in call.wanted)]


class _Made:
    """Collects the operands of one kernel with their block specs, and runs it."""

    def __init__(self, call: Any, blocks: Blocks, *, of_keys: bool) -> None:
        ops = call.ops
        self.call, self.blocks, self.of_keys = call, blocks, of_keys
        self.batch, self.length, self.heads, self.size = ops.query.shape
        self.span, self.kv_heads = ops.key.shape[1:3]
        self.groups = self.heads // self.kv_heads
        self.blocks_q, self.blocks_k = pl.cdiv(self.length, blocks.queries), pl.cdiv(self.span, blocks.keys)
        self.names: list[str] = []
        self.arrays: list[jax.Array] = []
        self.specs: list[pl.BlockSpec] = []

        if call.spec.blocks is not None:
            pairs, most = block_mask.tiles(call.spec, ops, blocks.queries, blocks.keys)
            pairs, most = (pairs.swapaxes(2, 3), pairs.shape[2]) if of_keys else (pairs, most)
            counts, indices = block_mask.lists(pairs, most)
            self.lists, self.turns = counts.shape, indices.shape[3]  # [B or 1, N or 1, blocks]
            self.runs = counts.reshape(-1), indices.reshape(-1)
            return
        self.lists, self.turns = None, self.blocks_q if of_keys else self.blocks_k
        queries, keys = self.blocks_q * blocks.queries, self.blocks_k * blocks.keys
        here, there = positions(ops, queries, keys)
        pairs = visible_blocks(call.spec, here, there, segments(ops, queries, keys), blocks.queries, blocks.keys)
        self.runs = runs(pairs.swapaxes(1, 2) if of_keys else pairs)  # int32 [B or 1, blocks]

    def at(self, *given: Any) -> tuple[Any, Any, Any, Any, Any]:
        """Batch, query head, key head, query block and key block of a grid's step; blocks that are seen alone."""
        *ids, begins, ends = given
        fixed = ids[2]
        _, moving = self.visit(ids, begins, ends)
        if self.of_keys:
            return ids[0], ids[1] * self.groups + ids[3], ids[1], moving, fixed
        return ids[0], ids[1], jax.lax.div(ids[1], jnp.int32(self.groups)), fixed, moving

    def visit(self, ids: Any, begins: Any, ends: Any) -> tuple[Any, Any]:
        """Whether a step visits a block, and which one; where it does not, that of a step near by."""
        turn, fixed = ids[-1], ids[2]
        if self.lists is None:
            b = 0 if begins.shape[0] == 1 else ids[0]
            begin, end = begins[b, fixed], ends[b, fixed]
            return (turn >= begin) & (turn < end), jnp.minimum(jnp.maximum(turn, begin), jnp.maximum(end - 1, 0))
        batch, heads, blocks = self.lists
        head = ids[1] * self.groups + ids[3] if self.of_keys else ids[1]
        row = ((ids[0] if batch > 1 else 0) * heads + (head if heads > 1 else 0)) * blocks + fixed
        count = begins[row]
        return turn < count, ends[row * self.turns + jnp.minimum(turn, jnp.maximum(count - 1, 0))]

    def spec(self, kind: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        block_q, block_k = self.blocks.queries, self.blocks.keys

        def at(*ids: Any) -> Any:
            b, n, k, i, j = self.at(*ids)
            return {
                "head": (b, n, i, 0),
                "row": (b, n if shape[1] > 1 else 0, i, 0),
                "key": (b, k, j, 0),
                "column": (b, 0, j),
                "bias": (b if shape[0] > 1 else 0, n if shape[1] > 1 else 0, i if shape[2] > 1 else 0, j),
                "tile": (b, n, i, ids[3] if self.lists is None else j),
            }[kind]

        block = {
            "head": (None, None, block_q, shape[-1]),
            "row": (None, None, block_q, 1),
            "key": (None, None, block_k, shape[-1]),
            "column": (None, 1, block_k),
            "bias": (None, None, block_q if len(shape) == 4 and shape[2] > 1 else 1, block_k),
            "tile": (None, None, block_q, block_k),
        }[kind]
        return pl.BlockSpec(block, at)

    def add(self, name: str, array: jax.Array, kind: str) -> None:
        self.names.append(name)
        self.arrays.append(array)
        scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
        self.specs.append(scalars if kind == "scalars" else self.spec(kind, array.shape))

    def add_all(self, names: tuple[str, ...]) -> None:
        """Adds arrays by head, and what the call adds to scores or hides of them."""
        ops, call = self.call.ops, self.call
        arrays = {**ops._asdict(), "lse": call.lse, "delta": call.delta, "cotangent": call.cotangent}
        for name in names:
            if name in ("lse", "delta"):
                self.add(name, arrays[name][..., None], "row")
            else:
                self.add(name, arrays[name].transpose(0, 2, 1, 3), "key" if name in ("key", "value") else "head")
        for name in ("query_positions", "query_segments"):
            if arrays[name] is not None:
                self.add(name, arrays[name][:, None, :, None], "row")
        for name in ("key_positions", "key_segments"):
            if arrays[name] is not None:
                self.add(name, arrays[name][:, None, :], "column")
        bias = masked_bias(ops)
        if bias is not None:
            self.add("bias", bias, "bias")
        for name, x in zip(("factor", "value_factor"), float8.factors(ops) or (), strict=False):
            self.add(name, x.reshape(-1), "scalars")
        for name in ("slopes", "sinks"):
            if arrays[name] is not None:
                self.add(name, arrays[name].astype(jnp.float32), "scalars")
        if ops.seed is not None:
            self.add("seed", jax.lax.bitcast_convert_type(ops.seed, jnp.int32), "scalars")

    def run(
        self,
        kernel: Any,
        name: str,
        shapes: list[jax.ShapeDtypeStruct],
        kinds: tuple[str, ...],
        scratch: list[Any],
        interpret: bool,
    ) -> list[jax.Array]:
        if self.of_keys:
            grid = self.batch, self.kv_heads, self.blocks_k, self.groups, self.turns
        else:
            grid = self.batch, self.heads, self.blocks_q, self.turns

        def body(begins: Any, ends: Any, *refs: Any) -> None:
            inputs = dict(zip(self.names, refs[: len(self.names)], strict=True))
            kernel(_Step(self, inputs, begins, ends), *refs[len(self.names) :])

        turns: list[Any] = ["parallel"] * 3 + ["arbitrary"] * (len(grid) - 3)
        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=grid,
                in_specs=self.specs,
                out_specs=[self.spec(k, s.shape) for k, s in zip(kinds, shapes, strict=True)],
                scratch_shapes=scratch,
            ),
            out_shape=shapes,
            compiler_params=pltpu.CompilerParams(dimension_semantics=tuple(turns)),
            interpret=interpret,
            name=name,
        )(*self.runs, *self.arrays)


class _Step:
    """One step of a grid: where it is, what it may see, its operands with zeros beyond their ends, and its tile."""

    def __init__(self, made: _Made, refs: dict[str, Any], begins: Any, ends: Any) -> None:
        self.made, self.refs = made, refs
        self.spec, self.dtype = made.call.spec, float8.working_dtype(made.call.ops)
        ids = [pl.program_id(i) for i in range(5 if made.of_keys else 4)]
        self.batch, self.turn = ids[0], ids[-1]
        self.visible, moving = made.visit(ids, begins, ends)
        moving = self.turn if made.lists is None else moving
        if made.of_keys:
            self.head = ids[1] * made.groups + ids[3]
            self.first = (ids[3] == 0) & (self.turn == 0)
            self.last = (ids[3] == made.groups - 1) & (self.turn == made.turns - 1)
            i, j = moving, ids[2]
        else:
            self.head, self.first, self.last = ids[1], self.turn == 0, self.turn == made.turns - 1
            i, j = ids[2], moving
        iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32)
        self.query = i * made.blocks.queries + iota((made.blocks.queries, 1), 0)
        self.key = j * made.blocks.keys + iota((1, made.blocks.keys), 1)
        self.key_rows = j * made.blocks.keys + iota((made.blocks.keys, 1), 0)

    def rows(self, name: str) -> jax.Array:
        """Of queries, `[Q, H]` or `[Q, 1]`."""
        return self.ended(self.numbers(name), self.query, self.made.length, self.made.blocks.queries)

    def columns(self, name: str) -> jax.Array:
        """Of keys, `[C, H]`."""
        return self.ended(self.numbers(name), self.key_rows, self.made.span, self.made.blocks.keys)

    def numbers(self, name: str) -> jax.Array:
        """What a block holds; float8 codes become bfloat16, exactly."""
        x = self.refs[name][...]
        return x.astype(self.dtype) if x.dtype.itemsize == 1 else x

    def factor(self, name: str, x: jax.Array) -> jax.Array:
        """x times what goes with float8 codes, "factor" or "value_factor"; as it is for other operands."""
        return x * self.refs[name][self.batch * self.made.heads + self.head] if name in self.refs else x

    def ended(self, x: jax.Array, number: jax.Array, end: int, block: int) -> jax.Array:
        return x if end % block == 0 else jnp.where(number < end, x, jnp.zeros((), x.dtype))

    def dot(self, a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
        """The float32 product of two tiles, summed over an axis of each."""
        precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        dims = ((over[0],), (over[1],)), ((), ())
        return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)

    def scores(self, product: jax.Array) -> Any:
        """`(scores, capped scores, distance, dropout weights)` of the tile."""
        refs, made = self.refs, self.made
        here = refs["query_positions"][...] if "query_positions" in refs else self.query
        there = refs["key_positions"][...] if "key_positions" in refs else self.key
        if made.span % made.blocks.keys:
            there = jnp.where(self.key < made.span, there, -1)
        packed = None
        if "query_segments" in refs:
            packed = refs["query_segments"][...], refs["key_segments"][...]
        slope = refs["slopes"][self.head] if "slopes" in refs else None
        bias = refs["bias"][...] if "bias" in refs else None
        distance = there - here
        bent = capped(self.spec, product)
        scores = added(bent, distance, slope=slope, bias=bias, relative=None)
        visible = jnp.broadcast_to(seen(self.spec, there, distance, packed, None), scores.shape)
        scores = jnp.where(visible, scores, jnp.float32(HIDDEN))
        keep = None
        if "seed" in refs:
            words = [refs["seed"][i].astype(jnp.uint32) for i in range(2)]
            row = row_numbers(self.batch * made.heads + self.head, made.length, self.query)
            keep = kept(self.spec, words, row, self.key.astype(jnp.uint32))
        return scores, bent, distance, keep

    def gradients(self) -> Any:
        """Weights as they met the values, the scores' gradient, that of the products, and the distance."""
        q, k, v, do = self.rows("query"), self.columns("key"), self.columns("value"), self.rows("cotangent")
        scores, bent, distance, keep = self.scores(self.dot(q, k, (1, 1)))
        weights = jnp.exp(scores - self.rows("lse"))
        if self.made.length % self.made.blocks.queries:
            weights = jnp.where(self.query < self.made.length, weights, 0.0)
        dw = self.dot(do, v, (1, 1))
        dw = dw if keep is None else dw * keep
        ds = weights * (dw - self.rows("delta"))
        dropped = weights if keep is None else weights * keep
        return dropped.astype(self.dtype), ds, uncapped(self.spec, bent, ds).astype(self.dtype), distance


def _forward_kernel(step: _Step, out_ref: Any, lse_ref: Any, out: Any, top: Any, total: Any) -> None:
    @pl.when(step.first)
    def _start() -> None:
        out[...] = jnp.zeros_like(out)
        if "sinks" in step.refs:
            top[...] = jnp.full(top.shape, step.refs["sinks"][step.head])
            total[...] = jnp.ones_like(total)
        else:
            top[...] = jnp.full_like(top, HIDDEN)
            total[...] = jnp.zeros_like(total)

    @pl.when(step.visible)
    def _tile() -> None:
        v = step.columns("value")
        product = step.dot(step.rows("query"), step.columns("key"), (1, 1))
        scores, _, _, keep = step.scores(step.factor("factor", product))
        higher = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
        floor = jnp.maximum(higher, NOTHING)
        weights = jnp.exp(scores - floor)
        less = jnp.exp(top[...] - floor)
        total[...] = total[...] * less + jnp.sum(weights, axis=1, keepdims=True)
        weights = weights if keep is None else weights * keep
        out[...] = out[...] * less + step.dot(weights.astype(step.dtype), v, (1, 0))
        top[...] = higher

    @pl.when(step.last)
    def _end() -> None:
        some = total[...] > 0
        sums = jnp.where(some, total[...], 1.0)
        out_ref[...] = step.factor("value_factor", out[...] / sums).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(some, top[...] + jnp.log(sums), -jnp.inf)


def _dq_kernel(step: _Step, dq_ref: Any, *others: Any) -> None:
    refs = list(others)
    slopes_ref = refs.pop(0) if "slopes" in step.made.call.wanted else None
    bias_ref = refs.pop(0) if "bias" in step.made.call.wanted else None
    dq, slopes = refs.pop(0), refs.pop(0) if refs else None

    @pl.when(step.first)
    def _start() -> None:
        dq[...] = jnp.zeros_like(dq)
        if slopes is not None:
            slopes[...] = jnp.zeros_like(slopes)

    if bias_ref is not None and step.made.lists is None:

        @pl.when(jnp.logical_not(step.visible))
        def _nothing() -> None:
            bias_ref[...] = jnp.zeros_like(bias_ref)

    @pl.when(step.visible)
    def _tile() -> None:
        _, ds, product, distance = step.gradients()
        if slopes is not None:
            slopes[...] += jnp.sum(ds * distance.astype(jnp.float32), axis=1, keepdims=True)
        if bias_ref is not None:
            bias_ref[...] = ds
        dq[...] += step.dot(product, step.columns("key"), (1, 0))

    @pl.when(step.last)
    def _end() -> None:
        dq_ref[...] = (dq[...] * step.spec.scale).astype(dq_ref.dtype)
        if slopes is not None:
            slopes_ref[...] = slopes[...]  # pyright: ignore[reportOptionalSubscript]


def _dkv_kernel(step: _Step, dk_ref: Any, dv_ref: Any, dk: Any, dv: Any) -> None:
    @pl.when(step.first)
    def _start() -> None:
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    @pl.when(step.visible)
    def _tile() -> None:
        dropped, _, product, _ = step.gradients()
        dk[...] += step.dot(product, step.rows("query"), (0, 0))
        dv[...] += step.dot(dropped, step.rows("cotangent"), (0, 0))

    @pl.when(step.last)
    def _end() -> None:
        dk_ref[...] = (dk[...] * step.spec.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv[...].astype(dv_ref.dtype)
