"""The three kernels of Mosaic-GPU's attention, over a tile engine. Oracle: `oracle.py`.

    forward   a tile of queries: its keys and values stream by in blocks
    dq        the same tile, each block of scores computed again from the log-sum-exp
    dk, dv    a tile of keys: the queries and cotangents of all G heads stream by

One algorithm for all chips; an engine (`mosaic_hopper.py`, `mosaic_ampere.py`, `mosaic_blackwell.py`) says how blocks
come into shared memory, how two matrices are multiplied, and which thread holds which number. A block of scores is
`[rows, length]`: the rows of one worker (a warpgroup), the length of the streamed blocks. Exponentials are powers of
two.

Keys beyond S are hidden; blocks that no row of a tile sees are skipped; blocks that all rows see whole take a loop
without masks. The longest tiles of a causal mask start first.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import _compat

LOG2E = math.log2(math.e)
LOWEST = -1e30  # starts a row's largest score: finite, so that a row without keys gives no NaN


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The length of the streamed blocks (keys; in dk and dv queries), how many of them are in flight, and the rows of
    the tile that one warpgroup holds."""

    length: int
    stages: int = 2
    rows: int = 64


class Made:
    """The static part of a kernel: sizes, and how it is run."""

    def __init__(self, call: Any, blocks: Blocks, workers: int, interpret: bool, *, of_queries: bool = True) -> None:
        ops = call.ops
        self.spec, self.blocks, self.interpret, self.of_queries = call.spec, blocks, interpret, of_queries
        self.dtype, self.workers = ops.query.dtype, workers
        self.batch, self.length, self.heads, self.size = ops.query.shape
        self.span, self.kv_heads, self.value_size = ops.value.shape[1:]
        self.groups = self.heads // self.kv_heads
        self.tile = workers * blocks.rows
        self.extent, self.tiled_heads = (self.length, self.heads) if of_queries else (self.span, self.kv_heads)
        self.tiles = pl.cdiv(self.extent, self.tile)

    def filled(self, length: int, *, queries: bool) -> int:
        """The length of an operand by query, or by key, in whole tiles or streamed blocks."""
        step = self.tile if queries == self.of_queries else self.blocks.length
        return pl.cdiv(length, step) * step

    def run(
        self,
        engine: Callable[..., Engine],
        kernel: Callable[[Any], None],
        name: str,
        inputs: dict[str, jax.Array],
        shapes: list[jax.ShapeDtypeStruct],
        scratch: dict[str, Any],
        **more: Any,
    ) -> list[jax.Array]:
        """Runs a kernel over all tiles, heads and batches."""
        plgpu = _compat.mosaic_gpu()

        def body(*refs: Any) -> None:
            given = dict(zip(inputs, refs, strict=False))
            outs = refs[len(inputs) : len(inputs) + len(shapes)]
            place = dict(zip(scratch, refs[len(inputs) + len(shapes) :], strict=True))
            kernel(engine(self, given, outs, place))

        body.__name__ = body.__qualname__ = name
        return plgpu.kernel(
            body,
            out_type=shapes,
            scratch_types=list(scratch.values()),
            grid=(self.tiled_heads, self.batch, self.tiles),
            grid_names=("head", "batch", "tile"),
            compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
            **more,
        )(*inputs.values())


class Engine:
    """What kernels ask of a chip, and the arithmetic of a block of scores that is the same on all of them.

    `own(name)` is the worker's part of a matrix in shared memory; `wait` gives the buffer of a streamed block, until
    `free`. What a worker sums up over blocks is a *sum*: `zeros`, then `added`, then `summed`.
    """

    layout: Any  # which thread holds which number of a matrix of registers
    alone = False  # a block of threads is one warpgroup

    def __init__(self, made: Made, refs: dict[str, Any], outs: Any, place: dict[str, Any]) -> None:
        self.made, self.refs, self.outs, self.place = made, refs, outs, place
        self.spec, self.rows, self.plgpu = made.spec, made.blocks.rows, _compat.mosaic_gpu()
        self.head, self.batch = lax.axis_index("head"), lax.axis_index("batch")
        tile = lax.axis_index("tile")
        backwards = made.of_queries and self.spec.right is not None  # so that the longest of a causal mask come first
        self.tile = (made.tiles - 1 - tile if backwards else tile) * made.tile
        self.worker: Any = jnp.int32(0) if self.alone else lax.axis_index("warpgroup")
        self.start = self.tile + self.worker * self.rows

    # What an engine brings.

    def roles(self, move: Callable[[], None], work: Callable[[], None]) -> None:
        """Runs what moves blocks and what computes, each where it belongs."""
        raise NotImplementedError

    def stream(self, first: Any, steps: Any, sources: dict[str, Callable[[Any], Any]]) -> None:
        """Brings the blocks `first` .. of each source into shared memory, in order, as buffers become free."""
        raise NotImplementedError

    def wait(self, name: str, step: Any) -> Any:
        """Returns the buffer of a step once it is filled. Each step waits for the sources in their order."""
        raise NotImplementedError

    def free(self, name: str, step: Any) -> None:
        """Says that this worker has read the buffer of a step."""
        raise NotImplementedError

    def fetch(self, sources: dict[str, Any]) -> None:
        """Copies this worker's own parts, and waits until all are there."""
        raise NotImplementedError

    def own(self, name: str) -> Any:
        """This worker's part of a scratch buffer."""
        return self.place[name].at[self.worker]

    def numbers(self, name: str, axis: int, buffer: Any = None) -> jax.Array:
        """A number of each row (axis 1 is summed away) or column (axis 0) of a block of scores, in registers."""
        raise NotImplementedError

    def product(self, a: Any, b: Any) -> jax.Array:
        """The float32 product `a b^T` of two matrices in shared memory."""
        raise NotImplementedError

    def started(self, start: jax.Array, a: Any, b: Any, axis: int) -> jax.Array:
        """`a b^T`, plus a number of each row (axis 0) or column (axis 1)."""
        raise NotImplementedError

    def zeros(self, name: str, size: int) -> Any:
        """A sum `[rows, size]` of nothing yet."""
        return self.full((self.rows, size), 0.0)

    def added(self, name: str, sums: Any, a: jax.Array, b: Any) -> Any:
        """`sums + a b` of a matrix in registers and one in shared memory."""
        raise NotImplementedError

    def shrunk(self, name: str, sums: Any, by: jax.Array) -> Any:
        """Rows of a sum times a number each."""
        return sums * self.spread(by, sums)

    def summed(self, name: str, sums: Any) -> jax.Array:
        """A sum in registers."""
        return sums

    def store(self, x: jax.Array, buffer: Any, out: Any) -> None:
        """Writes a matrix of registers through a buffer to the worker's rows of an output `[B, T, N, H]`."""
        raise NotImplementedError

    def store_numbers(self, x: jax.Array, out: Any) -> None:
        """Writes a number of each row to an output `[B, N, T]`."""
        raise NotImplementedError

    def finish(self) -> None:
        """Waits until all that was stored is written."""

    def turn(self, at: str = "") -> None:
        """Lets the other worker compute, where two take turns; "begin" and "end" even the turns out."""

    # What is the same everywhere.

    def full(self, shape: tuple[int, ...], value: Any) -> jax.Array:
        """A matrix or a number of each row, all alike, in registers."""
        layout = self.layout if len(shape) == 2 else self.layout.reduce(1)
        return self.plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def spread(self, x: jax.Array, like: Any, axis: int = 0) -> jax.Array:
        """A number of each row (axis 0) or column (axis 1), over a matrix."""
        return self.plgpu.layout_cast(lax.broadcast_in_dim(x, like.shape, [axis]), self.layout)

    def bent(self, product: jax.Array) -> tuple[jax.Array, float]:
        """Scores but for a factor, and that factor: of the products themselves, unless they are capped."""
        cap = self.spec.soft_cap
        if cap is None:
            return product, self.spec.scale * LOG2E
        return jnp.tanh(product * (self.spec.scale / cap)), cap * LOG2E

    def masked(self, x: jax.Array, query: Any, key: Any, query_axis: int, hidden: float) -> jax.Array:
        """A block of queries from `query` and keys from `key` on, with `hidden` where a key is not seen.

        One condition after the other: their conjunction as an array of its own takes registers.
        """
        iota = functools.partial(self.plgpu.broadcasted_iota, jnp.int32, x.shape, layout=self.layout)
        left, right = self.spec.left, self.spec.right
        here, there, ahead = iota(query_axis), iota(1 - query_axis), key - query
        if right is not None:
            x = jnp.where(there + (ahead - right) <= here, x, hidden)
        if left is not None:
            x = jnp.where(there + (ahead + left) >= here, x, hidden)
        if query_axis == 0 and self.made.span % self.made.blocks.length:  # dK and dV beyond S are not stored
            x = jnp.where(iota(1) < self.made.span - key, x, hidden)
        return x

    def keys_of_tile(self) -> tuple[Any, Any, Any, Any]:
        """Blocks of keys of the tile's queries: begin, begin and end of those that all rows see whole, end.

        None in the middle: the part before, or after, needs no mask.
        """
        block, (left, right) = self.made.blocks.length, (self.spec.left, self.spec.right)
        last = self.tile + self.made.tile - 1
        begin = jnp.int32(0) if left is None else lax.div(lax.max(self.tile - left, 0), block)
        end = jnp.int32(pl.cdiv(self.made.span, block))
        whole: Any = jnp.int32(self.made.span // block)
        if right is not None:
            end = lax.min(end, lax.div(last + right, block) + 1)
            whole = lax.min(whole, lax.div(self.tile + right + 1, block))
        elif not self.made.span % block:
            whole = None
        first = None if left is None else lax.div(lax.max(last - left, 0) + block - 1, block)
        return _ordered(begin, first, whole, end)

    def queries_of_tile(self) -> tuple[Any, Any, Any, Any]:
        """Blocks of queries that see the tile's keys: as `keys_of_tile`."""
        block, (left, right) = self.made.blocks.length, (self.spec.left, self.spec.right)
        last = self.tile + self.made.tile - 1
        begin = jnp.int32(0) if right is None else lax.div(lax.max(self.tile - right, 0), block)
        first = None if right is None else lax.div(lax.max(last - right, 0) + block - 1, block)
        end, whole = jnp.int32(pl.cdiv(self.made.length, block)), None
        if left is not None:
            end = lax.min(end, lax.div(last + left, block) + 1)
            whole = lax.min(end, lax.div(self.tile + left + 1, block))
        return _ordered(begin, first, whole, end)

    def query_rows(self, name: str, start: Any, count: int, head: Any) -> Any:
        """Rows of an operand by query: of `[B, T, N, H]`, or of numbers `[B, N, T]`."""
        ref, rows = self.refs[name], pl.ds(start, count)
        return ref.at[self.batch, head, rows] if name in ("lse", "delta") else ref.at[self.batch, rows, head]

    def key_rows(self, name: str, start: Any, count: int, head: Any) -> Any:
        """Rows of an operand by key, `[B, S, K, H]`."""
        return self.refs[name].at[self.batch, pl.ds(start, count), head]


def _ordered(begin: Any, first: Any, whole: Any, end: Any) -> tuple[Any, Any, Any, Any]:
    """The four numbers in their order, begin <= first <= whole <= end; None stays where no mask is needed."""
    begin = lax.min(begin, end)
    first = None if first is None else lax.min(lax.max(first, begin), end)
    whole = None if whole is None else lax.min(lax.max(whole, begin if first is None else first), end)
    return begin, first, whole, end


def _through(ranges: tuple[Any, Any, Any, Any], step: Callable[..., Any], carry: Any) -> Any:
    """Folds `step(block, carry, masked=)` over the blocks: with masks before and after those that are seen whole."""
    begin, first, whole, end = ranges
    if first is not None:
        carry = lax.fori_loop(begin, first, functools.partial(step, masked=True), carry)
        begin = first
    carry = lax.fori_loop(begin, end if whole is None else whole, functools.partial(step, masked=False), carry)
    return carry if whole is None else lax.fori_loop(whole, end, functools.partial(step, masked=True), carry)


def forward_kernel(block: Engine) -> None:
    """Writes the output and the log-sum-exp of a tile of queries."""
    made, head = block.made, block.head
    kv_head, ranges = lax.div(head, made.groups), block.keys_of_tile()
    begin, length = ranges[0], made.blocks.length

    def move() -> None:
        block.stream(begin, ranges[3] - begin, {
            n: lambda j, n=n: block.key_rows(n, j * length, length, kv_head) for n in ("key", "value")
        })  # fmt: skip

    def step(j: Any, carry: Any, masked: bool) -> Any:
        out, top, total = carry
        i = j - begin
        product = block.product(block.own("query"), block.wait("key", i))
        block.free("key", i)
        scores, factor = block.bent(product)
        if masked:
            scores = block.masked(scores, block.start, j * length, 0, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(scores, axis=1) * factor)
        less = jnp.exp2(top - higher)
        weights = jnp.exp2(scores * factor - block.spread(higher, scores))
        total = total * less + jnp.sum(weights, axis=1)
        out = block.shrunk("out", out, less)
        out, higher, total, narrow = lax.optimization_barrier((out, higher, total, weights.astype(made.dtype)))
        values = block.wait("value", i)
        block.turn()
        out = block.added("out", out, narrow, values)
        block.free("value", i)
        return out, higher, total

    def work() -> None:
        block.fetch({"query": block.query_rows("query", block.start, block.rows, head)})
        top, total = block.full((block.rows,), LOWEST), block.full((block.rows,), 0.0)
        if "sinks" in block.refs:
            top = block.full((block.rows,), block.refs["sinks"][head] * LOG2E)
            total = block.full((block.rows,), 1.0)
        block.turn("begin")
        out, top, total = _through(ranges, step, (block.zeros("out", made.value_size), top, total))
        block.turn("end")
        some = total > 0.0
        safe = jnp.where(some, total, 1.0)
        block.store_numbers(jnp.where(some, top / LOG2E + jnp.log(safe), -jnp.inf), block.outs[1])
        out = block.summed("out", block.shrunk("out", out, 1.0 / safe))
        block.store(out, block.own("out" if "out" in block.place else "query"), block.outs[0])
        block.finish()

    block.roles(move, work)


def _same(x: jax.Array) -> jax.Array:
    return x


def _weights(
    block: Engine, a: Any, b: Any, lse: jax.Array, mask: Callable[[jax.Array], jax.Array], axis: int
) -> tuple[jax.Array, jax.Array]:
    """Weights of `a b^T`, and weights times the derivative of the soft cap; the log-sum-exp lies along `axis`.

    A sum starts from what is to be subtracted, where it can: so that it takes no registers of its own.
    """
    if block.spec.soft_cap is None:
        factor = block.spec.scale * LOG2E
        weights = mask(jnp.exp2(block.started(lse * (-1.0 / factor), a, b, axis) * factor))
        return weights, weights
    bent, factor = block.bent(block.product(a, b))
    weights = mask(jnp.exp2(bent * factor - block.spread(lse, bent, axis)))
    return weights, weights * (1.0 - bent * bent)


def dq_kernel(block: Engine) -> None:
    """Writes the gradient of a tile of queries."""
    made, head = block.made, block.head
    length = made.blocks.length
    kv_head, ranges = lax.div(head, made.groups), block.keys_of_tile()
    begin = ranges[0]

    def move() -> None:
        block.stream(begin, ranges[3] - begin, {
            n: lambda j, n=n: block.key_rows(n, j * length, length, kv_head) for n in ("key", "value")
        })  # fmt: skip

    def work() -> None:
        names = ("query", "cotangent", "lse", "delta")
        block.fetch({n: block.query_rows(n, block.start, block.rows, head) for n in names})
        lse, delta = (block.numbers(n, 1) for n in ("lse", "delta"))

        def step(j: Any, dq: Any, masked: bool) -> Any:
            i = j - begin
            keys = block.wait("key", i)
            mask = functools.partial(block.masked, query=block.start, key=j * length, query_axis=0, hidden=0.0)
            _, steep = _weights(block, block.own("query"), keys, lse, mask if masked else _same, 0)
            dw = block.started(-delta, block.own("cotangent"), block.wait("value", i), 0)
            block.free("value", i)
            dq = block.added("dq", dq, (steep * dw).astype(made.dtype), keys)
            block.free("key", i)
            return dq

        dq = block.summed("dq", _through(ranges, step, block.zeros("dq", made.size)))
        block.store(dq * made.spec.scale, block.own("query"), block.outs[0])
        block.finish()

    block.roles(move, work)


def dkv_kernel(block: Engine) -> None:
    """Writes the gradients of a tile of keys and of values."""
    made, kv_head = block.made, block.head
    length = made.blocks.length
    begin, first, whole, end = block.queries_of_tile()
    steps = end - begin  # of each head of the group
    names = ("query", "cotangent", "lse", "delta")

    def move() -> None:
        def source(name: str, i: Any) -> Any:
            g = lax.div(i, lax.max(steps, 1))
            return block.query_rows(name, (begin + i - g * steps) * length, length, kv_head * made.groups + g)

        block.stream(jnp.int32(0), steps * made.groups, {n: functools.partial(source, n) for n in names})

    def work() -> None:
        block.fetch({n: block.key_rows(n, block.start, block.rows, kv_head) for n in ("key", "value")})

        def step(q: Any, carry: Any, masked: bool, g: Any) -> Any:
            dk, dv = carry
            i = g * steps + q - begin
            queries = block.wait("query", i)
            lse = block.numbers("lse", 0, block.wait("lse", i))
            block.free("lse", i)
            mask = functools.partial(block.masked, query=q * length, key=block.start, query_axis=1, hidden=0.0)
            weights, steep = _weights(block, block.own("key"), queries, lse, mask if masked else _same, 1)
            cotangents = block.wait("cotangent", i)
            narrow = weights.astype(made.dtype)
            if made.spec.soft_cap is None:
                steep = narrow.astype(jnp.float32)  # half the registers, until the cotangents' product is there
            dv = block.added("dv", dv, narrow, cotangents)
            delta = block.numbers("delta", 0, block.wait("delta", i))
            block.free("delta", i)
            dw = block.started(-delta, block.own("value"), cotangents, 1)
            block.free("cotangent", i)
            dk = block.added("dk", dk, (steep * dw).astype(made.dtype), queries)
            block.free("query", i)
            return dk, dv

        def group(g: Any, carry: Any) -> Any:
            return _through((begin, first, whole, end), functools.partial(step, g=g), carry)

        sums = block.zeros("dk", made.size), block.zeros("dv", made.value_size)
        dk, dv = lax.fori_loop(0, made.groups, group, sums)
        block.store(block.summed("dk", dk) * made.spec.scale, block.own("key"), block.outs[0])
        block.store(block.summed("dv", dv), block.own("value"), block.outs[1])
        block.finish()

    block.roles(move, work)
