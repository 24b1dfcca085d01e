"""Attention for NVIDIA and AMD GPUs by Pallas-Triton, forward and backward. Oracle: `oracle.py`.

    forward   grid (query blocks, N, B): one block of queries through the blocks of keys it sees
    dq        the same grid, each tile computed again from the log-sum-exp
    dk, dv    grid (key blocks, K, B): one block of keys through the G query heads and the query blocks that see it

Tiles are `[block of queries, block of keys]`, powers of two as Triton wants them; head sizes are filled up to one. What
lies beyond T, S or H is masked where it is loaded and stored, so no operand is padded in memory. Accumulation is
float32; products take the operands' dtype (float32 ones are not rounded to TF32). The gradient of a bias goes through
all tiles and is written for every head and batch before it is summed: O(T * S) memory.

Pallas-Triton is deprecated from jax 0.11 on: everything of it that this file uses comes from `_compat.triton()`.
Not yet measured on a GPU; block sizes are chosen so that nothing spills (`make aot`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import _compat
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
from kernels_pallas.dispatch import Target, no_sizes, no_triton

SIZES = (1, 256)  # head sizes
FLOAT8 = 8.9  # compute capability from which there are products of float8
SMALLEST = 16  # rows and columns of a tile, as Triton's products want them


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The block sizes of one kernel, its warps and the stages of its loop's pipeline."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


def refusal(target: Target, call: Any) -> str:
    """Returns why these kernels cannot compute a call there; "" where they can."""
    ops = call.ops
    if reason := no_triton(target):
        return reason
    sizes = (*ops.query.shape, *ops.key.shape, ops.value.shape[3])
    if reason := no_sizes(sizes):
        return reason
    if reason := _no_dtype(target, call):
        return reason
    widest = max(ops.query.shape[3], ops.value.shape[3])
    if widest > SIZES[1]:
        return f"head size {widest} is above {SIZES[1]}."
    if ops.relative is not None:
        return "it has no relative positions; give them as a bias."
    lengths = ops.query.shape[1], ops.key.shape[1]
    for name, block, length in zip(("queries", "keys"), call.spec.blocks or lengths, lengths, strict=True):
        if block < length and block % SMALLEST:
            return f"blocks of {block} {name} in the block mask are no multiple of {SMALLEST}."
    return ""


def _no_dtype(target: Target, call: Any) -> str:
    dtype, size = call.ops.query.dtype, call.ops.query.shape[3]
    if dtype.name not in float8.FLOAT8:
        known = dtype.name in ("float32", "bfloat16", "float16")
        return "" if known else f"it takes float32, bfloat16, float16 and float8, not {dtype}."
    if target.platform == "rocm":
        return f"it has no products of {dtype} on AMD's chips."
    if target.capability is not None and target.capability < FLOAT8:
        return f"products of float8 need compute capability {FLOAT8} and the chip has {target.capability}."
    return "" if size > 16 else f"head size {size} is below the 17 that products of float8 want."


# (queries, keys) of a tile by direction, bytes of an operand's number and filled-up head size, for eight warps: the
# largest of those tried that do not spill (float32: up to 128 bytes) and fit a block's shared memory, as assembled for
# A100, A10, H100 and B200. Chips that are not ROOMY take the second pair.
_TILES = {
    ("forward", 1): {128: ((128, 64), (128, 64)), 256: ((64, 64), (64, 32))},
    ("forward", 2): {128: ((128, 64), (128, 64)), 256: ((64, 64), (64, 32))},
    ("forward", 4): {32: ((64, 64), (64, 64)), 64: ((64, 32), (64, 32)), 256: ((16, 32), (16, 32))},
    ("backward", 2): {
        32: ((64, 32), (32, 32)),
        64: ((64, 32), (64, 32)),
        128: ((64, 64), (64, 64)),
        256: ((32, 32), (16, 32)),
    },
    ("backward", 4): {64: ((32, 32), (32, 32)), 128: ((16, 32), (16, 32)), 256: ((16, 16), (16, 16))},
}
ROOMY = (8.0, 8.7, 9.0, 10.0, 10.3)  # compute capabilities with 163 KB and more of shared memory for a block


def blocks_of(call: Any, direction: str, target: Target) -> Blocks:
    """Returns the block sizes for a call on a chip; one that is not known counts as a small one."""
    size = max(_power(call.ops.query.shape[3]), _power(call.ops.value.shape[3]))
    pairs = _TILES[direction, call.ops.query.dtype.itemsize]
    queries, keys = next(pair for widest, pair in pairs.items() if size <= widest)[target.capability not in ROOMY]
    more = call.spec.soft_cap is not None or any(x is not None for x in call.ops[3:])  # positions, biases, ...
    if direction == "backward" and more:  # takes more registers
        keys = min(keys, 32)
    length, span = call.ops.query.shape[1], call.ops.key.shape[1]
    queries, keys = min(queries, _power(length)), min(keys, _power(span))
    return Blocks(queries, keys, 8 if queries * keys > 512 else 4)


def tuned_blocks(target: Target, call: Any, direction: str) -> Blocks | None:
    """Returns the block sizes that were found for a call; None where none were."""
    found = tuned(target, call, direction, "triton")
    if "queries" not in found:
        return None
    length, span = call.ops.query.shape[1], call.ops.key.shape[1]
    queries, keys = min(found["queries"], _power(length)), min(found["keys"], _power(span))
    return Blocks(queries, keys, found["warps"], found["stages"])


def _power(n: int) -> int:
    """The power of two that holds n, at least the 16 that Triton's products want."""
    return max(SMALLEST, 1 << (n - 1).bit_length())


def _fitted(call: Any, blocks: Blocks) -> Blocks:
    """The blocks, made smaller where those of a block mask are no whole number of them."""
    if call.spec.blocks is None:
        return blocks
    (of_q, of_k), (length, span) = call.spec.blocks, (call.ops.query.shape[1], call.ops.key.shape[1])
    queries = blocks.queries if of_q >= length else min(blocks.queries, of_q & -of_q)
    keys = blocks.keys if of_k >= span else min(blocks.keys, of_k & -of_k)
    return dataclasses.replace(blocks, queries=queries, keys=keys)


def forward(target: Target, call: Any, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns the output `[B, T, N, Hv]` and the log-sum-exp `[B, N, T]`."""
    blocks = _fitted(call, blocks or tuned_blocks(target, call, "forward") or blocks_of(call, "forward", target))
    batch, length, heads, _ = call.ops.query.shape
    operands = _Operands(call, blocks)
    operands.add_all(("query", "key", "value"))
    operands.add_runs(transposed=False)
    value_size = call.ops.value.shape[3]
    shapes = [
        jax.ShapeDtypeStruct((batch, length, heads, value_size), float8.working_dtype(call.ops)),
        jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
    ]
    return operands.run(_forward_kernel, "attention_forward", shapes, ("head", "row"), interpret)


def backward(target: Target, call: Any, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns the gradients of query, key, value and of each of `call.wanted` (no "relative")."""
    blocks = _fitted(call, blocks or tuned_blocks(target, call, "backward") or blocks_of(call, "backward", target))
    ops = call.ops
    batch, length, heads, _ = ops.query.shape
    span = ops.key.shape[1]
    lse = jnp.where(jnp.isneginf(call.lse), jnp.float32(NO_KEY), call.lse)
    call = call._replace(lse=lse)

    rows = _Operands(call, blocks)
    rows.add_all(("query", "key", "value", "cotangent", "lse", "delta"))
    rows.add_runs(transposed=False)
    shapes = [jax.ShapeDtypeStruct(ops.query.shape, ops.query.dtype)]
    kinds = ["head"]
    if "slopes" in call.wanted:
        shapes.append(jax.ShapeDtypeStruct((batch, heads, pl.cdiv(length, blocks.queries)), jnp.float32))
        kinds.append("block")
    if "bias" in call.wanted:
        shapes.append(jax.ShapeDtypeStruct((batch, heads, length, span), jnp.float32))
        kinds.append("tile")
    dq, *more = rows.run(_dq_kernel, "attention_dq", shapes, tuple(kinds), interpret)

    columns = _Operands(call, blocks, of_keys=True)
    columns.add_all(("query", "key", "value", "cotangent", "lse", "delta"))
    columns.add_runs(transposed=True)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (ops.key, ops.value)]
    dk, dv = columns.run(_dkv_kernel, "attention_dkv", shapes, ("key", "key"), interpret)

    found = {}
    if "slopes" in call.wanted:
        found["slopes"] = jnp.sum(more.pop(0), axis=2)
    if "bias" in call.wanted:
        spread = tuple(i for i, n in enumerate(ops.bias.shape) if n == 1)
        of_bias = block_mask.visited(call.spec, ops, blocks.queries, blocks.keys, more.pop(0))
        found["bias"] = jnp.sum(of_bias, axis=spread, keepdims=True)
    return [dq, dk, dv, *(found[name] for name in call.wanted)]


class _Operands:
    """Collects the operands of one kernel with their block specs, and runs it.

    The grid is (block, head, batch). Of every operand a kernel sees the part of its batch and head, whole along T or S.
    """

    def __init__(self, call: Any, blocks: Blocks, *, of_keys: bool = False) -> None:
        ops = call.ops
        self.call, self.blocks, self.of_keys = call, blocks, of_keys
        self.batch, self.length, self.heads, self.size = ops.query.shape
        self.span, self.kv_heads = ops.key.shape[1:3]
        self.groups = self.heads // self.kv_heads
        self.queries = pl.cdiv(self.length, blocks.queries) * blocks.queries
        self.keys = pl.cdiv(self.span, blocks.keys) * blocks.keys
        self.lists_by_group = False
        self.names: list[str] = []
        self.arrays: list[jax.Array] = []
        self.specs: list[pl.BlockSpec] = []

    def add(self, name: str, array: jax.Array, spec: pl.BlockSpec) -> None:
        self.names.append(name)
        self.arrays.append(array)
        self.specs.append(spec)

    def add_all(self, names: tuple[str, ...]) -> None:
        """Adds arrays by head, and what the call adds to scores or hides of them."""
        ops, call = self.call.ops, self.call
        arrays = {**ops._asdict(), "lse": call.lse, "delta": call.delta, "cotangent": call.cotangent}
        for name in names:
            kind = {"key": "key", "value": "key", "lse": "row", "delta": "row"}.get(name, "head")
            self.add(name, arrays[name], self.spec(kind, arrays[name].shape))
        for name, width in (("query_positions", self.queries), ("key_positions", self.keys)):
            if arrays[name] is not None:
                self.add(name, arrays[name], self.by_batch(width))
        if ops.query_segments is not None:
            self.add("query_segments", ops.query_segments, self.by_batch(self.queries))
            self.add("key_segments", ops.key_segments, self.by_batch(self.keys))
        bias = masked_bias(ops)
        if bias is not None:
            self.add("bias", bias, self.by_tile(bias.shape))
        for name, x in zip(("factor", "value_factor"), float8.factors(ops) or (), strict=False):
            self.add(name, x, pl.BlockSpec((None, self.heads), lambda i, n, b: (b, 0)))
        for name in ("slopes", "sinks", "seed"):
            if arrays[name] is not None:
                self.add(name, arrays[name], pl.BlockSpec(arrays[name].shape, lambda i, n, b: (0,)))

    def add_runs(self, *, transposed: bool) -> None:
        """Adds where the visible blocks of each block begin and end, or which ones are listed.

        A bias whose gradient is wanted needs all, or what was not visited taken out afterwards.
        """
        if self.call.spec.blocks is not None:
            return self.add_lists(transposed=transposed)
        here, there = positions(self.call.ops, self.queries, self.keys)
        packed = segments(self.call.ops, self.queries, self.keys)
        pairs = visible_blocks(self.call.spec, here, there, packed, self.blocks.queries, self.blocks.keys)
        pairs = pairs.swapaxes(1, 2) if transposed else pairs
        pairs = jnp.ones_like(pairs) if "bias" in self.call.wanted and not transposed else pairs
        shared = pairs.shape[0] == 1
        for name, x in zip(("begin", "end"), runs(pairs), strict=True):
            spec = pl.BlockSpec((None, x.shape[1]), lambda i, n, b: (0 if shared else b, 0))
            self.add(name, x, spec)

    def add_lists(self, *, transposed: bool) -> None:
        """Adds how many blocks each block visits, and which ones, by head; kernels over keys see all their heads."""
        pairs, most = block_mask.tiles(self.call.spec, self.call.ops, self.blocks.queries, self.blocks.keys)
        pairs, most = (pairs.swapaxes(2, 3), pairs.shape[2]) if transposed else (pairs, most)
        many_b, many_n = pairs.shape[0] > 1, pairs.shape[1] > 1
        self.lists_by_group = self.of_keys and many_n
        group = self.groups if self.lists_by_group else None
        for name, x in zip(("count", "indices"), block_mask.lists(pairs, most), strict=True):

            def at(i: Any, n: Any, b: Any, rank: int = x.ndim) -> Any:
                return (b if many_b else 0, n if many_n else 0, *(0,) * (rank - 2))

            self.add(name, x, pl.BlockSpec((None, group, *x.shape[2:]), at))

    def by_batch(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, width), lambda i, n, b: (b, 0))

    def by_tile(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """Of a bias; kernels over keys see all query heads of theirs."""
        many_b, many_n = shape[0] > 1, shape[1] > 1
        self.bias_axes = shape[2] > 1, self.of_keys and many_n
        return pl.BlockSpec(
            (None, self.groups if self.of_keys and many_n else None, self.queries if shape[2] > 1 else None, self.keys),
            lambda i, n, b: (b if many_b else 0, n if many_n else 0, 0, 0),
        )

    def spec(self, kind: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        groups, of_keys = self.groups, self.of_keys
        group = groups if of_keys else None
        if kind == "key":
            return pl.BlockSpec(
                (None, self.keys, None, _power(shape[3])),
                (lambda i, n, b: (b, 0, n, 0)) if of_keys else (lambda i, n, b: (b, 0, n // groups, 0)),
            )
        if kind == "row":
            return pl.BlockSpec((None, group, self.queries), lambda i, n, b: (b, n, 0))
        if kind == "block":
            return pl.BlockSpec((None, None, shape[2]), lambda i, n, b: (b, n, 0))
        if kind == "tile":
            return pl.BlockSpec((None, None, self.queries, self.keys), lambda i, n, b: (b, n, 0, 0))
        return pl.BlockSpec((None, self.queries, group, _power(shape[3])), lambda i, n, b: (b, 0, n, 0))

    def run(
        self,
        kernel: Callable[..., None],
        name: str,
        shapes: list[jax.ShapeDtypeStruct],
        kinds: tuple[str, ...],
        interpret: bool,
    ) -> list[jax.Array]:
        count = self.keys // self.blocks.keys if self.of_keys else self.queries // self.blocks.queries

        def body(*refs: Any) -> None:
            inputs = dict(zip(self.names, refs[: len(self.names)], strict=True))
            kernel(_Tiles(self, inputs), *refs[len(self.names) :])

        return pl.pallas_call(
            body,
            grid=(count, self.kv_heads if self.of_keys else self.heads, self.batch),
            in_specs=self.specs,
            out_specs=[self.spec(k, s.shape) for k, s in zip(kinds, shapes, strict=True)],
            out_shape=shapes,
            compiler_params=_compat.triton().CompilerParams(num_warps=self.blocks.warps, num_stages=self.blocks.stages),
            interpret=interpret,
            name=name,
        )(*self.arrays)


class _Tiles:
    """What the kernels share: loads and stores that are masked at the ends, and the scores of a tile."""

    def __init__(self, made: _Operands, refs: dict[str, Any]) -> None:
        self.made, self.refs = made, refs
        self.spec, self.blocks = made.call.spec, made.blocks
        self.dtype = float8.working_dtype(made.call.ops)
        self.wanted = made.call.wanted
        self.batch = pl.program_id(2)  # the interpreter knows it outside of loops only

    def rows(self, name: str, t: Any, g: Any = None) -> jax.Array:
        """Queries t .. of `name`, `[Q, H]`, zeros beyond T and H; of query head g where the block has several."""
        ref = self.refs[name]
        size = self.made.call.ops.value.shape[3] if name == "cotangent" else self.made.size
        keep = self.inside(t, self.blocks.queries, self.made.length)[:, None] & self.channels(ref.shape[-1], size)
        rows = pl.ds(t, self.blocks.queries)
        return self.load(ref.at[rows, :] if g is None else ref.at[rows, g, :], keep, 0.0)

    def columns(self, name: str, s: Any) -> jax.Array:
        """Keys s .. of `name`, `[C, H]`, zeros beyond S and H."""
        ref = self.refs[name]
        size = getattr(self.made.call.ops, name).shape[3]
        keep = self.inside(s, self.blocks.keys, self.made.span)[:, None] & self.channels(ref.shape[-1], size)
        return self.load(ref.at[pl.ds(s, self.blocks.keys), :], keep, 0.0)

    def row(self, name: str, t: Any, g: Any, other: float) -> jax.Array:
        """A number of each query, `[Q]`."""
        keep = self.inside(t, self.blocks.queries, self.made.length)
        ref, rows = self.refs[name], pl.ds(t, self.blocks.queries)
        return self.load(ref.at[rows] if g is None else ref.at[g, rows], keep, other)

    def load(self, ref: Any, keep: jax.Array, other: float) -> jax.Array:
        return _compat.triton().load(ref, mask=keep, other=other)

    def store(self, ref: Any, x: jax.Array, keep: jax.Array) -> None:
        _compat.triton().store(ref, x.astype(ref.dtype), mask=keep)

    def store_rows(self, ref: Any, x: jax.Array, start: Any, *, of_keys: bool, size: int) -> None:
        """Writes `[Q, H]` or `[C, H]` where it belongs."""
        block, end = (self.blocks.keys, self.made.span) if of_keys else (self.blocks.queries, self.made.length)
        keep = self.inside(start, block, end)[:, None] & self.channels(x.shape[1], size)
        self.store(ref.at[pl.ds(start, block), :], x, keep)

    def inside(self, start: Any, block: int, end: int) -> jax.Array:
        return start + jnp.arange(block, dtype=jnp.int32) < end

    def channels(self, width: int, size: int) -> jax.Array:
        return (jnp.arange(width, dtype=jnp.int32) < size)[None, :]

    def dot(self, a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
        """The float32 product of two tiles, summed over an axis of each."""
        precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        dims = ((over[0],), (over[1],)), ((), ())
        return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)

    def run(self, i: Any, g: Any = None) -> tuple[Any, Any, Callable[[Any], Any]]:
        """Begin and end of a loop over the blocks that block i sees, and which one a turn of it is.

        `g`: the query head of a block that has several.
        """
        if "count" not in self.refs:
            return self.refs["begin"][i], self.refs["end"][i], lambda turn: turn
        counts, indices = self.refs["count"], self.refs["indices"]
        if self.made.lists_by_group:
            return 0, counts[g, i], lambda turn: indices[g, i, turn]
        return 0, counts[i], lambda turn: indices[i, turn]

    def scores(self, product: jax.Array, t: Any, s: Any, head: Any, g: Any = None) -> Any:
        """`(scores, capped scores, distance, dropout weights)` of a tile of query head `head`, in the block `g`."""
        block_q, block_k = self.blocks.queries, self.blocks.keys
        here, there = (t + jnp.arange(block_q, dtype=jnp.int32), s + jnp.arange(block_k, dtype=jnp.int32))
        query, key = here, there
        inside_q, inside_k = here < self.made.length, there < self.made.span
        if "query_positions" in self.refs:
            here = self.load(self.refs["query_positions"].at[pl.ds(t, block_q)], inside_q, 0)
        if "key_positions" in self.refs:
            there = self.load(self.refs["key_positions"].at[pl.ds(s, block_k)], inside_k, -1)
        else:
            there = jnp.where(inside_k, there, -1)
        here, there = here[:, None], there[None, :]
        packed = None
        if "query_segments" in self.refs:
            packed = (
                self.load(self.refs["query_segments"].at[pl.ds(t, block_q)], inside_q, 0)[:, None],
                self.load(self.refs["key_segments"].at[pl.ds(s, block_k)], inside_k, 0)[None, :],
            )
        slope = self.refs["slopes"][head].astype(jnp.float32) if "slopes" in self.refs else None
        bias = None
        if "bias" in self.refs:
            ref, keep, places = self.refs["bias"], inside_k, (pl.ds(s, block_k),)
            by_query, by_head = self.made.bias_axes
            if by_query:
                keep, places = inside_q[:, None] & inside_k[None, :], (pl.ds(t, block_q), *places)
            bias = self.load(ref.at[(g, *places) if by_head else places], keep, 0.0)
            bias = bias if by_query else bias[None, :]
        distance = there - here
        bent = capped(self.spec, product)
        scores = added(bent, distance, slope=slope, bias=bias, relative=None)
        scores = jnp.where(seen(self.spec, there, distance, packed, None), scores, jnp.float32(HIDDEN))
        keep = None
        if "seed" in self.refs:
            number = self.batch * self.made.heads + head
            row = row_numbers(number, self.made.length, query[:, None])
            keep = kept(self.spec, self.refs["seed"], row, key[None, :].astype(jnp.uint32))
        return scores, bent, distance, keep


def _forward_kernel(tiles: _Tiles, out_ref: Any, lse_ref: Any) -> None:
    i, n = pl.program_id(0), pl.program_id(1)
    t = i * tiles.blocks.queries
    q = tiles.rows("query", t)
    width = tiles.refs["value"].shape[-1]

    begin, end, at = tiles.run(i)

    def step(j: Any, carry: Any) -> Any:
        out, top, total = carry
        s = at(j) * tiles.blocks.keys
        product = tiles.dot(q, tiles.columns("key", s), (1, 1))
        product = product * tiles.refs["factor"][n] if "factor" in tiles.refs else product
        scores, _, _, keep = tiles.scores(product, t, s, n)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        floor = jnp.maximum(higher, NOTHING)
        weights = jnp.exp(scores - floor[:, None])
        less = jnp.exp(top - floor)
        total = total * less + jnp.sum(weights, axis=1)
        weights = weights if keep is None else weights * keep
        part = tiles.dot(weights.astype(tiles.dtype), tiles.columns("value", s).astype(tiles.dtype), (1, 0))
        return out * less[:, None] + part, higher, total

    rows = tiles.blocks.queries
    out = jnp.zeros((rows, width), jnp.float32)
    if "sinks" in tiles.refs:
        top = jnp.full((rows,), tiles.refs["sinks"][n].astype(jnp.float32))
        total = jnp.ones((rows,), jnp.float32)
    else:
        top, total = jnp.full((rows,), HIDDEN, jnp.float32), jnp.zeros((rows,), jnp.float32)
    out, top, total = jax.lax.fori_loop(begin, end, step, (out, top, total))
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = out / total[:, None]
    out = out * tiles.refs["value_factor"][n] if "value_factor" in tiles.refs else out
    tiles.store_rows(out_ref, out, t, of_keys=False, size=tiles.made.call.ops.value.shape[3])
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
    tiles.store(lse_ref.at[pl.ds(t, rows)], lse, tiles.inside(t, rows, tiles.made.length))


def _tile_gradient(tiles: _Tiles, q: Any, k: Any, v: Any, do: Any, t: Any, s: Any, head: Any, g: Any) -> Any:
    """Weights as they met the values, the scores' gradient, that of the products, and the distance."""
    product = tiles.dot(q, k, (1, 1))
    scores, bent, distance, keep = tiles.scores(product, t, s, head, g)
    weights = jnp.exp(scores - tiles.row("lse", t, g, NO_KEY)[:, None])
    dw = tiles.dot(do, v, (1, 1))
    dw = dw if keep is None else dw * keep
    ds = weights * (dw - tiles.row("delta", t, g, 0.0)[:, None])
    dropped = weights if keep is None else weights * keep
    return dropped, ds, uncapped(tiles.spec, bent, ds).astype(tiles.dtype), distance


def _dq_kernel(tiles: _Tiles, dq_ref: Any, *more_refs: Any) -> None:
    i, n = pl.program_id(0), pl.program_id(1)
    more = list(more_refs)
    slopes_ref = more.pop(0) if "slopes" in tiles.wanted else None
    bias_ref = more.pop(0) if "bias" in tiles.wanted else None
    t = i * tiles.blocks.queries
    q, do = tiles.rows("query", t), tiles.rows("cotangent", t)

    begin, end, at = tiles.run(i)

    def step(j: Any, carry: Any) -> Any:
        dq, slopes = carry
        s = at(j) * tiles.blocks.keys
        k, v = tiles.columns("key", s), tiles.columns("value", s)
        _, ds, product, distance = _tile_gradient(tiles, q, k, v, do, t, s, n, None)
        if slopes_ref is not None:
            slopes = slopes + jnp.sum(ds * distance.astype(jnp.float32), axis=1)
        if bias_ref is not None:
            inside = tiles.inside(t, tiles.blocks.queries, tiles.made.length)[:, None]
            inside = inside & tiles.inside(s, tiles.blocks.keys, tiles.made.span)[None, :]
            tiles.store(bias_ref.at[pl.ds(t, tiles.blocks.queries), pl.ds(s, tiles.blocks.keys)], ds, inside)
        return dq + tiles.dot(product, k, (1, 0)), slopes

    start = jnp.zeros(q.shape, jnp.float32), jnp.zeros((tiles.blocks.queries,), jnp.float32)
    dq, slopes = jax.lax.fori_loop(begin, end, step, start)
    tiles.store_rows(dq_ref, dq * tiles.spec.scale, t, of_keys=False, size=tiles.made.size)
    if slopes_ref is not None:
        slopes_ref[i] = jnp.sum(slopes)


def _dkv_kernel(tiles: _Tiles, dk_ref: Any, dv_ref: Any) -> None:
    j, kv = pl.program_id(0), pl.program_id(1)
    s = j * tiles.blocks.keys
    k, v = tiles.columns("key", s), tiles.columns("value", s)

    def step(i: Any, carry: Any, g: Any, at: Callable[[Any], Any]) -> Any:
        dk, dv = carry
        t = at(i) * tiles.blocks.queries
        q, do = tiles.rows("query", t, g), tiles.rows("cotangent", t, g)
        head = kv * tiles.made.groups + g
        dropped, _, product, _ = _tile_gradient(tiles, q, k, v, do, t, s, head, g)
        return dk + tiles.dot(product, q, (0, 0)), dv + tiles.dot(dropped.astype(tiles.dtype), do, (0, 0))

    def group(g: Any, carry: Any) -> Any:
        begin, end, at = tiles.run(j, g)
        return jax.lax.fori_loop(begin, end, functools.partial(step, g=g, at=at), carry)

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, tiles.made.groups, group, start)
    tiles.store_rows(dk_ref, dk * tiles.spec.scale, s, of_keys=True, size=tiles.made.size)
    tiles.store_rows(dv_ref, dv, s, of_keys=True, size=tiles.made.call.ops.value.shape[3])
