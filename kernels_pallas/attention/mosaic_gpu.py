"""Attention for NVIDIA's Hopper GPUs by Pallas-Mosaic-GPU, forward and backward. Oracle: `oracle.py`.

    forward   grid (N, B, query tiles): a tile's keys and values stream through shared memory
    dq        the same grid, each block of scores computed again from the log-sum-exp
    dk, dv    grid (K, B, key tiles): the queries and cotangents of all G heads stream through shared memory

A block of threads is three warpgroups. One moves: it copies blocks by TMA into a ring of `stages` buffers and waits
until they were read. Two compute, each 64 rows of the tile, by wgmma with float32 sums in registers. In the forward
pass they take turns: while one computes exponentials, the other's products keep the tensor cores busy (Shah et al.,
arXiv 2407.08608, section 3.1). Exponentials are powers of two.

TMA fills what lies beyond T and S with zeros and drops what is written there, so operands are padded in memory only to
whole rows of 8 tokens, which its tiles want, and log-sum-exp and delta to whole blocks. Keys beyond S are hidden;
blocks that no row of a tile sees are skipped; blocks that all rows see whole take a loop without masks. The longest
tiles of a causal mask start first.

Masks: causal and windows, of positions that count up. Operands bfloat16 or float16. The blocks of `blocks_of` compile
for sm_90a without spilling (`make aot`); nothing here has been run on a GPU. The three kernels stand in one file: they
share the ring, the order of blocks and the masks, which is most of it.
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
from kernels_pallas.attention.blocks import padded
from kernels_pallas.attention.facts import tuned
from kernels_pallas.attention.spec import NO_KEY
from kernels_pallas.dispatch import ANY_CHIP, Target, no_sizes

SIZES = (64, 128, 192, 256)  # head sizes: multiples of the 64 numbers that a swizzled row of shared memory holds
WIDEST_BACKWARD = 128  # dK and dV of a wider head do not fit the registers beside the scores
NARROW = 64  # in the backward pass, with a window back or a soft cap: beyond, dK and dV spill
CAPABILITY = 9.0
ROWS = 64  # of a warpgroup: what wgmma multiplies at once
WORKERS = 2
LOG2E = math.log2(math.e)
LOWEST = -1e30  # starts a row's largest score: finite, so that a row without keys gives no NaN
VERIFIED = ((0, 11), (0, 12))  # jax releases whose interpreter agreed with the oracle (tests/kernels_pallas)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The length of the streamed blocks (keys; in dk and dv queries), and how many of them are in flight."""

    length: int
    stages: int = 2


def refusal(target: Target, call: Any) -> str:
    """Returns why these kernels cannot compute a call there; "" where they can."""
    if target.platform != "cuda":
        return f"it runs on cuda, not on {target.platform}."
    if target.architecture is None:
        return "the chip is not known; lower under kernels_pallas.abstract_device(kind, platform)."
    if target.architecture != ANY_CHIP and target.capability != CAPABILITY:
        return f"it needs compute capability {CAPABILITY} (Hopper's wgmma) and the chip has {target.architecture}."
    ops, spec = call.ops, call.spec
    sizes = (*ops.query.shape, *ops.key.shape, ops.value.shape[3])
    if reason := no_sizes(sizes):
        return reason
    if ops.query.dtype.name not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {ops.query.dtype}."
    for size in (ops.query.shape[3], ops.value.shape[3]):
        if size not in SIZES:
            return f"head size {size} is none of {', '.join(map(str, SIZES))}."
        if call.cotangent is not None and size > WIDEST_BACKWARD:
            return f"head size {size} is above {WIDEST_BACKWARD} in the backward pass."
        if call.cotangent is not None and size > NARROW and (spec.left is not None or spec.soft_cap is not None):
            return f"head size {size} is above {NARROW} in the backward pass with a window or a soft cap."
    if spec.scale <= 0:
        return f"scale is {spec.scale}, and it takes positive ones."
    if spec.dropout:
        return "it has no dropout."
    given = [n for n, x in ops._asdict().items() if x is not None and n not in ("query", "key", "value", "sinks")]
    return f"it has no {given[0].replace('_', ' ')}." if given else ""


def reserve(target: Target, call: Any) -> str:
    """Returns why these kernels are taken only where they are asked for by name; "" where that is not needed."""
    if any(_compat.JAX_VERSION[: len(v)] == v for v in VERIFIED):
        return ""
    known = ", ".join(".".join(map(str, v)) for v in VERIFIED)
    return f"verified on jax {known}, and this is {jax.__version__}: name it to take it."


def blocks_of(call: Any, kernel: str) -> Blocks:
    """Returns the blocks of `kernel`: "forward", "dq" or "dkv"."""
    size = max(call.ops.query.shape[3], call.ops.value.shape[3])
    if kernel == "forward":
        return Blocks(128, 3 if size == 64 else 2) if size <= 128 else Blocks(64, 2)
    return Blocks(64, 3 if size == 64 else 2)


def tuned_blocks(target: Target, call: Any, direction: str) -> Blocks | None:
    """Returns the blocks that were found for a call, of all kernels of a direction; None where none were."""
    found = tuned(target, call, direction, "mosaic_gpu")
    return Blocks(found["length"], found["stages"]) if "length" in found else None


def forward(target: Target, call: Any, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns the output `[B, T, N, Hv]` and the log-sum-exp `[B, N, T]`."""
    blocks = blocks or tuned_blocks(target, call, "forward") or blocks_of(call, "forward")
    made = _Made(call, blocks, interpret)
    ops = call.ops
    shapes = [
        jax.ShapeDtypeStruct((made.batch, _eights(made.length), made.heads, made.value_size), ops.query.dtype),
        jax.ShapeDtypeStruct((made.batch, made.heads, made.rows), jnp.float32),
    ]
    scratch = {
        "query": made.tiles(WORKERS, ROWS, made.size),
        **({} if made.value_size == made.size else {"out": made.tiles(WORKERS, ROWS, made.value_size)}),
        "lse": made.numbers(WORKERS, ROWS),
        "ready": made.barriers(WORKERS),
        "turns": made.barriers(1, arrivals=WORKERS),
        **made.ring(key=made.size, value=made.value_size),
    }
    inputs = {n: _whole(getattr(ops, n)) for n in ("query", "key", "value")}
    inputs |= {} if ops.sinks is None else {"sinks": ops.sinks.astype(jnp.float32)}
    out, lse = made.run(_forward_kernel, "attention_forward", inputs, shapes, scratch, made.heads, made.rows)
    return [out[:, : made.length], lse[:, :, : made.length]]


def backward(target: Target, call: Any, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns the gradients of query, key and value."""
    ops = call.ops
    blocks = blocks or tuned_blocks(target, call, "backward")
    lse = jnp.where(jnp.isneginf(call.lse), jnp.float32(NO_KEY), call.lse * jnp.float32(LOG2E))

    def inputs(made: _Made) -> dict[str, jax.Array]:
        rows = {
            "lse": padded(lse, 2, made.queries, constant_values=NO_KEY),
            "delta": padded(call.delta, 2, made.queries),
        }
        arrays = {"query": ops.query, "key": ops.key, "value": ops.value, "cotangent": call.cotangent}
        return {**{name: _whole(x) for name, x in arrays.items()}, **rows}

    made = _Made(call, blocks or blocks_of(call, "dq"), interpret)
    scratch = {
        "query": made.tiles(WORKERS, ROWS, made.size),
        "cotangent": made.tiles(WORKERS, ROWS, made.value_size),
        "lse": made.numbers(WORKERS, ROWS),
        "delta": made.numbers(WORKERS, ROWS),
        "ready": made.barriers(WORKERS, arrivals=4),
        **made.ring(key=made.size, value=made.value_size),
    }
    shapes = [_like(ops.query)]
    (dq,) = made.run(_dq_kernel, "attention_dq", inputs(made), shapes, scratch, made.heads, made.rows)

    made = _Made(call, blocks or blocks_of(call, "dkv"), interpret, of_queries=False)
    scratch = {
        "key": made.tiles(WORKERS, ROWS, made.size),
        "value": made.tiles(WORKERS, ROWS, made.value_size),
        "ready": made.barriers(WORKERS, arrivals=2),
        **made.ring(query=made.size, cotangent=made.value_size, lse=0, delta=0),
    }
    shapes = [_like(ops.key), _like(ops.value)]
    dk, dv = made.run(_dkv_kernel, "attention_dkv", inputs(made), shapes, scratch, made.kv_heads, made.span)
    return [dq[:, : made.length], dk[:, : made.span], dv[:, : made.span]]


def _eights(length: int) -> int:
    return pl.cdiv(length, 8) * 8


def _whole(x: jax.Array) -> jax.Array:
    """`[B, T, N, H]` with T filled up to a multiple of 8."""
    return padded(x, 1, _eights(x.shape[1]))


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x.shape[0], _eights(x.shape[1]), *x.shape[2:]), x.dtype)


class _Made:
    """The static part of a kernel: sizes, scratch memory, and how it is run."""

    def __init__(self, call: Any, blocks: Blocks, interpret: bool, *, of_queries: bool = True) -> None:
        ops = call.ops
        self.spec, self.blocks, self.interpret, self.of_queries = call.spec, blocks, interpret, of_queries
        self.dtype = ops.query.dtype
        self.batch, self.length, self.heads, self.size = ops.query.shape
        self.span, self.kv_heads, self.value_size = ops.value.shape[1:]
        self.groups = self.heads // self.kv_heads
        self.tile = WORKERS * ROWS
        self.rows = pl.cdiv(self.length, self.tile) * self.tile
        self.queries = pl.cdiv(self.rows, blocks.length) * blocks.length

    def tiles(self, count: int, rows: int, size: int) -> Any:
        """Matrices in shared memory, as TMA writes and wgmma reads them."""
        plgpu = _compat.mosaic_gpu()
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM((count, rows, size), self.dtype, transforms=transforms)

    def numbers(self, count: int, rows: int) -> Any:
        return _compat.mosaic_gpu().SMEM((count, rows), jnp.float32)

    def barriers(self, count: int, arrivals: int = 1) -> Any:
        return _compat.mosaic_gpu().Barrier(num_barriers=count, num_arrivals=arrivals)

    def ring(self, **sizes: int) -> dict[str, Any]:
        """Buffers of `stages` blocks: matrices of that many columns, 0 one number a row; each with its barriers."""
        stages, length = self.blocks.stages, self.blocks.length
        scratch: dict[str, Any] = {}
        for name, size in sizes.items():
            scratch[f"ring {name}"] = self.tiles(stages, length, size) if size else self.numbers(stages, length)
            scratch[f"full {name}"] = self.barriers(stages)
            scratch[f"free {name}"] = self.barriers(stages, arrivals=WORKERS)
        return scratch

    def run(
        self,
        kernel: Callable[..., None],
        name: str,
        inputs: dict[str, jax.Array],
        shapes: list[jax.ShapeDtypeStruct],
        scratch: dict[str, Any],
        heads: int,
        extent: int,
    ) -> list[jax.Array]:
        plgpu = _compat.mosaic_gpu()
        count = pl.cdiv(extent, self.tile)

        def body(*refs: Any) -> None:
            given = dict(zip(inputs, refs, strict=False))
            outs = refs[len(inputs) : len(inputs) + len(shapes)]
            place = dict(zip(scratch, refs[len(inputs) + len(shapes) :], strict=True))
            kernel(_Block(self, given, outs, place, count))

        body.__name__ = body.__qualname__ = name
        return plgpu.kernel(
            body,
            out_type=shapes,
            scratch_types=list(scratch.values()),
            grid=(heads, self.batch, count),
            grid_names=("head", "batch", "tile"),
            num_threads=WORKERS + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
        )(*inputs.values())


class _Block:
    """What the kernels share: the roles of warpgroups, the ring of buffers, and the arithmetic of a block of scores."""

    def __init__(self, made: _Made, refs: dict[str, Any], outs: Any, place: dict[str, Any], count: int) -> None:
        self.made, self.refs, self.outs, self.place = made, refs, outs, place
        self.spec, self.plgpu = made.spec, _compat.mosaic_gpu()
        self.head, self.batch = lax.axis_index("head"), lax.axis_index("batch")
        self.worker = lax.axis_index("warpgroup")
        tile = lax.axis_index("tile")
        backwards = made.of_queries and self.spec.right is not None  # so that the longest of a causal mask come first
        self.tile = (count - 1 - tile if backwards else tile) * made.tile

    def roles(self, move: Callable[[], None], work: Callable[[], None]) -> None:
        """Runs `work` in the computing warpgroups and `move` in the other, with the registers that each needs."""

        @pl.when(self.worker < WORKERS)
        def _() -> None:
            self.plgpu.set_max_registers(240, action="increase")
            work()

        @pl.when(self.worker == WORKERS)
        def _() -> None:
            self.plgpu.set_max_registers(24, action="decrease")
            move()

    def stream(self, first: Any, steps: Any, sources: dict[str, Callable[[Any], Any]]) -> None:
        """Copies the blocks `first` .. of each source into the ring, in order, as buffers become free."""

        stages = self.made.blocks.stages

        def turn(i: Any, _: None) -> None:
            slot = lax.rem(i, stages)
            for name, source in sources.items():
                pl.when(i >= stages)(functools.partial(self.plgpu.barrier_wait, self.place[f"free {name}"].at[slot]))
                full, buffer = self.place[f"full {name}"].at[slot], self.place[f"ring {name}"].at[slot]

                @pl.when(i < steps)
                def _(source: Any = source, buffer: Any = buffer, full: Any = full) -> None:
                    self.plgpu.copy_gmem_to_smem(source(first + i), buffer, full)

        lax.fori_loop(0, steps + stages, turn, None)  # the last turns wait until all was read

    def wait(self, name: str, step: Any) -> Any:
        """Returns the buffer of a step once it is filled."""
        slot = lax.rem(step, self.made.blocks.stages)
        self.plgpu.barrier_wait(self.place[f"full {name}"].at[slot])
        return self.place[f"ring {name}"].at[slot]

    def free(self, name: str, step: Any) -> None:
        """Says that this warpgroup has read the buffer of a step."""
        self.plgpu.barrier_arrive(self.place[f"free {name}"].at[lax.rem(step, self.made.blocks.stages)])

    def mine(self, name: str) -> Any:
        """This warpgroup's part of a scratch buffer."""
        return self.place[name].at[self.worker]

    def fetch(self, sources: dict[str, Any]) -> None:
        """Copies this warpgroup's own parts, and waits until all are there."""
        ready = self.place["ready"].at[self.worker]
        for name, source in sources.items():
            self.plgpu.copy_gmem_to_smem(source, self.mine(name), ready)
        self.plgpu.barrier_wait(ready)

    def row_numbers(self, name: str, axis: int, buffer: Any = None) -> jax.Array:
        """A number of each row (axis 1 is summed away) or column (axis 0) of a block of scores, in registers."""
        buffer = self.mine(name) if buffer is None else buffer
        return _compat.load_numbers(buffer, self.plgpu.Layout.WGMMA.reduce(axis))

    def full(self, shape: tuple[int, ...], value: Any) -> jax.Array:
        layout = self.plgpu.Layout.WGMMA if len(shape) == 2 else self.plgpu.Layout.WGMMA.reduce(1)
        return self.plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def product(self, a: Any, b: Any, meanwhile: Callable[[], None] = lambda: None) -> jax.Array:
        """The float32 product `a b^T` of two matrices in shared memory; `meanwhile` runs before it is waited for."""

        def compute(sums: Any) -> jax.Array:
            self.plgpu.wgmma(sums, a, _compat.transposed(b))
            meanwhile()
            return sums[...]

        return pl.run_scoped(compute, self.plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def added(self, sums: jax.Array, a: Any, b: Any) -> jax.Array:
        """`sums + a b` of registers or a matrix in shared memory, and one in shared memory."""
        if not self.made.interpret:
            return pl.run_state(lambda ref: self.plgpu.wgmma(ref, a, b))(self.plgpu.ACC.init(sums))
        # The interpreter has no accumulators that start from a value, and no operand in registers.
        return sums + jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

    def started(self, start: jax.Array, a: Any, b: Any, axis: int) -> jax.Array:
        """`a b^T`, plus a number of each row (axis 0) or column (axis 1)."""
        start = lax.broadcast_in_dim(start, (a.shape[0], b.shape[0]), [axis])
        return self.added(start, a, _compat.transposed(b))

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
        iota = functools.partial(self.plgpu.broadcasted_iota, jnp.int32, x.shape, layout=self.plgpu.Layout.WGMMA)
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
        return self.refs[name].at[self.batch, pl.ds(start, count), head]

    def store(self, x: jax.Array, buffer: Any, out: Any, start: Any, head: Any) -> None:
        """Writes a matrix of registers through shared memory to the rows of an output; the copy goes on."""
        buffer[...] = x.astype(self.made.dtype)
        self.plgpu.commit_smem()
        self.plgpu.copy_smem_to_gmem(buffer, out.at[self.batch, pl.ds(start, ROWS), head])


def _ordered(begin: Any, first: Any, whole: Any, end: Any) -> tuple[Any, Any, Any, Any]:
    """The four numbers in their order, begin <= first <= whole <= end; None stays where no mask is needed."""
    begin = lax.min(begin, end)
    first = None if first is None else lax.min(lax.max(first, begin), end)
    whole = None if whole is None else lax.min(lax.max(whole, begin if first is None else first), end)
    return begin, first, whole, end


def _spread(x: jax.Array, like: jax.Array, axis: int = 0) -> jax.Array:
    """A number of each row (axis 0) or column (axis 1), over a matrix."""
    return lax.broadcast_in_dim(x, like.shape, [axis])


def _through(ranges: tuple[Any, Any, Any, Any], step: Callable[..., Any], carry: Any) -> Any:
    """Folds `step(block, carry, masked=)` over the blocks: with masks before and after those that are seen whole."""
    begin, first, whole, end = ranges
    if first is not None:
        carry = lax.fori_loop(begin, first, functools.partial(step, masked=True), carry)
        begin = first
    carry = lax.fori_loop(begin, end if whole is None else whole, functools.partial(step, masked=False), carry)
    return carry if whole is None else lax.fori_loop(whole, end, functools.partial(step, masked=True), carry)


def _forward_kernel(block: _Block) -> None:
    made, plgpu = block.made, block.plgpu
    head, start = block.head, block.tile + block.worker * ROWS
    kv_head, ranges = lax.div(head, made.groups), block.keys_of_tile()
    begin, length = ranges[0], made.blocks.length

    def take_turns() -> None:
        turns = block.place["turns"].at[0]
        plgpu.barrier_arrive(turns)
        plgpu.barrier_wait(turns)

    def move() -> None:
        block.stream(begin, ranges[3] - begin, {
            n: lambda j, n=n: block.key_rows(n, j * length, length, kv_head) for n in ("key", "value")
        })  # fmt: skip

    def step(j: Any, carry: Any, masked: bool) -> Any:
        out, top, total = carry
        i = j - begin
        product = block.product(block.mine("query"), block.wait("key", i), take_turns)
        block.free("key", i)
        scores, factor = block.bent(product)
        if masked:
            scores = block.masked(scores, start, j * length, 0, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(scores, axis=1) * factor)
        less = jnp.exp2(top - higher)
        weights = jnp.exp2(scores * factor - _spread(higher, scores))
        total = total * less + jnp.sum(weights, axis=1)
        out = out * _spread(less, out)
        out, higher, total, narrow = lax.optimization_barrier((out, higher, total, weights.astype(made.dtype)))
        values = block.wait("value", i)
        take_turns()
        out = block.added(out, narrow, values)
        block.free("value", i)
        return out, higher, total

    def work() -> None:
        block.fetch({"query": block.query_rows("query", start, ROWS, head)})
        top, total = block.full((ROWS,), LOWEST), block.full((ROWS,), 0.0)
        if "sinks" in block.refs:
            top, total = block.full((ROWS,), block.refs["sinks"][head] * LOG2E), block.full((ROWS,), 1.0)
        pl.when(block.worker == 1)(take_turns)
        carry = block.full((ROWS, made.value_size), 0.0), top, total
        out, top, total = _through(ranges, step, carry)
        pl.when(block.worker == 0)(take_turns)
        some = total > 0.0
        safe = jnp.where(some, total, 1.0)
        lse = jnp.where(some, top / LOG2E + jnp.log(safe), -jnp.inf)
        block.mine("lse")[...] = lse
        buffer = block.mine("out" if "out" in block.place else "query")
        block.store(out * _spread(1.0 / safe, out), buffer, block.outs[0], start, head)
        plgpu.copy_smem_to_gmem(block.mine("lse"), block.outs[1].at[block.batch, head, pl.ds(start, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    block.roles(move, work)


def _same(x: jax.Array) -> jax.Array:
    return x


def _weights(
    block: _Block, a: Any, b: Any, lse: jax.Array, mask: Callable[[jax.Array], jax.Array], axis: int
) -> tuple[jax.Array, jax.Array]:
    """Weights of `a b^T`, and weights times the derivative of the soft cap; the log-sum-exp lies along `axis`.

    A sum starts from what is to be subtracted, where it can: so that it takes no registers of its own.
    """
    if block.spec.soft_cap is None:
        factor = block.spec.scale * LOG2E
        weights = mask(jnp.exp2(block.started(lse * (-1.0 / factor), a, b, axis) * factor))
        return weights, weights
    bent, factor = block.bent(block.product(a, b))
    weights = mask(jnp.exp2(bent * factor - _spread(lse, bent, axis)))
    return weights, weights * (1.0 - bent * bent)


def _dq_kernel(block: _Block) -> None:
    made, head = block.made, block.head
    start, length = block.tile + block.worker * ROWS, made.blocks.length
    kv_head, ranges = lax.div(head, made.groups), block.keys_of_tile()
    begin = ranges[0]

    def move() -> None:
        block.stream(begin, ranges[3] - begin, {
            n: lambda j, n=n: block.key_rows(n, j * length, length, kv_head) for n in ("key", "value")
        })  # fmt: skip

    def work() -> None:
        names = ("query", "cotangent", "lse", "delta")
        block.fetch({n: block.query_rows(n, start, ROWS, head) for n in names})
        lse, delta = (block.row_numbers(n, 1) for n in ("lse", "delta"))

        def step(j: Any, dq: jax.Array, masked: bool) -> jax.Array:
            i = j - begin
            keys = block.wait("key", i)
            mask = functools.partial(block.masked, query=start, key=j * length, query_axis=0, hidden=0.0)
            _, steep = _weights(block, block.mine("query"), keys, lse, mask if masked else _same, 0)
            dw = block.started(-delta, block.mine("cotangent"), block.wait("value", i), 0)
            block.free("value", i)
            dq = block.added(dq, (steep * dw).astype(made.dtype), keys)
            block.free("key", i)
            return dq

        dq = _through(ranges, step, block.full((ROWS, made.size), 0.0))
        block.store(dq * made.spec.scale, block.mine("query"), block.outs[0], start, head)
        block.plgpu.wait_smem_to_gmem(0)

    block.roles(move, work)


def _dkv_kernel(block: _Block) -> None:
    made, kv_head = block.made, block.head
    start, length = block.tile + block.worker * ROWS, made.blocks.length
    begin, first, whole, end = block.queries_of_tile()
    steps = end - begin  # of each head of the group
    names = ("query", "cotangent", "lse", "delta")

    def move() -> None:
        def source(name: str, i: Any) -> Any:
            g = lax.div(i, lax.max(steps, 1))
            return block.query_rows(name, (begin + i - g * steps) * length, length, kv_head * made.groups + g)

        block.stream(jnp.int32(0), steps * made.groups, {n: functools.partial(source, n) for n in names})

    def work() -> None:
        block.fetch({n: block.key_rows(n, start, ROWS, kv_head) for n in ("key", "value")})

        def step(q: Any, carry: Any, masked: bool, g: Any) -> Any:
            dk, dv = carry
            i = g * steps + q - begin
            queries = block.wait("query", i)
            lse = block.row_numbers("lse", 0, block.wait("lse", i))
            block.free("lse", i)
            mask = functools.partial(block.masked, query=q * length, key=start, query_axis=1, hidden=0.0)
            weights, steep = _weights(block, block.mine("key"), queries, lse, mask if masked else _same, 1)
            cotangents = block.wait("cotangent", i)
            narrow = weights.astype(made.dtype)
            if made.spec.soft_cap is None:
                steep = narrow.astype(jnp.float32)  # half the registers, until the cotangents' product is there
            dv = block.added(dv, narrow, cotangents)
            delta = block.row_numbers("delta", 0, block.wait("delta", i))
            block.free("delta", i)
            dw = block.started(-delta, block.mine("value"), cotangents, 1)
            block.free("cotangent", i)
            dk = block.added(dk, (steep * dw).astype(made.dtype), queries)
            block.free("query", i)
            return dk, dv

        def group(g: Any, carry: Any) -> Any:
            return _through((begin, first, whole, end), functools.partial(step, g=g), carry)

        sums = block.full((ROWS, made.size), 0.0), block.full((ROWS, made.value_size), 0.0)
        dk, dv = lax.fori_loop(0, made.groups, group, sums)
        block.store(dk * made.spec.scale, block.mine("key"), block.outs[0], start, kv_head)
        block.store(dv, block.mine("value"), block.outs[1], start, kv_head)
        block.plgpu.wait_smem_to_gmem(0)

    block.roles(move, work)
