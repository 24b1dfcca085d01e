"""Attention in plain XLA: blocks of queries times blocks of keys with an online softmax. Runs on every platform.

Heads stay grouped: the G = N / K query heads that share a key head are rows of one product, so keys and values are
never repeated. A block of queries goes through the blocks of keys it sees with the running maximum m, the running sum l
and the running output (Dao, arXiv 2307.08691, algorithm 1); the backward pass computes each tile again from the
log-sum-exp (algorithm 2), keys outside, so that all of dK and dV is written once. Beyond operands and results both hold
one tile a head, O(T) in all. Scores and sums are float32, float64 for float64.

On the CPU one head is computed after the other, so that a tile stays in the cache; elsewhere all at once. Of a block
mask the listed tiles are visited, those of any query head of a group; what another one lists is hidden in the tile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention import block_mask
from kernels_pallas.attention.blocks import padded, positions, runs, segments, visible_blocks
from kernels_pallas.attention.spec import (
    HIDDEN,
    NO_KEY,
    NOTHING,
    Operands,
    Spec,
    added,
    capped,
    factors,
    kept,
    row_numbers,
    seen,
    uncapped,
    working_dtype,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a tile, and how many key heads (of all batches) are computed at once."""

    block_q: int
    block_k: int
    heads: int


# Scores of a tile on the CPU: 256 queries by 512 keys of one head are 0.5 MB. Of 128 to 512 by 256 to 1024, the
# smallest and largest took up to twice as long (B=1 T=2048 N=8 H=64 causal, forward and backward, 2 cores, 2026-11).
BLOCK = {"cpu": (256, 512), "other": (512, 512)}
FEWEST_QUERIES = 64
# Up to this length of both, one head is one tile: as fast (4.7 and 4.6 ms at T=512), and without a loop to compile.
ONE_TILE = 512


def plan_of(
    ops: Operands,
    platform: str,
    tuned: Mapping[str, Any] = MappingProxyType({}),
    blocks: tuple[int, int] | None = None,
) -> Plan:
    """Returns the plan for a call, by its shapes and the platform.

    Tuned values say how large its blocks may be; those of a block mask, `blocks`, are whole numbers of its own.
    """
    if blocks is not None:
        return _listed_plan(ops, platform, blocks)
    batch, length, heads, _ = ops.query.shape
    span, kv_heads = ops.key.shape[1:3]
    rows, groups = batch * kv_heads, heads // kv_heads
    if not (isinstance(length, int) and isinstance(span, int) and isinstance(rows, int)):
        return Plan(length, span, rows)  # a symbolic length: one tile
    block_q, block_k = BLOCK.get(platform, BLOCK["other"])
    block_q, block_k = tuned.get("block_q", block_q), tuned.get("block_k", block_k)
    if platform != "cpu":
        return Plan(_even(length, block_q), _even(span, block_k), rows)
    most = block_q * block_k
    if "block_q" in tuned:  # queries of one head, so many rows of a tile as there are heads in a group
        block_q, block_k = _even(length, block_q), _even(span, block_k)
    elif groups * length <= ONE_TILE and span <= ONE_TILE:
        block_q, block_k = length, span
    else:
        block_q, block_k = _even(length, max(FEWEST_QUERIES, block_q // groups)), _even(span, block_k)
    tile = groups * block_q * block_k
    if rows * tile <= most:
        return Plan(block_q, block_k, rows)
    at_once = 1
    while rows % (2 * at_once) == 0 and 2 * at_once * tile <= most:
        at_once *= 2
    return Plan(block_q, block_k, at_once)


def _listed_plan(ops: Operands, platform: str, blocks: tuple[int, int]) -> Plan:
    """Tiles that divide the blocks of a mask; lists differ by head, so on the CPU it is one head after the other."""
    length, heads = ops.query.shape[1:3]
    span, kv_heads = ops.key.shape[1:3]
    block_q, block_k = BLOCK.get(platform, BLOCK["other"])
    if platform == "cpu":
        block_q = max(FEWEST_QUERIES, block_q // (heads // kv_heads))
    block_q = block_mask.fitted(_even(length, block_q), blocks[0], length)
    block_k = block_mask.fitted(_even(span, block_k), blocks[1], span)
    return Plan(block_q, block_k, 1 if platform == "cpu" else ops.query.shape[0] * kv_heads)


def same(a: Any, b: Any) -> bool:
    """Returns whether two sizes are equal; they may be symbolic, and one object only by chance."""
    return a is b or a == b


def _even(length: int, block: int) -> int:
    """The size of equal blocks, none above `block`, that cover a length with little to spare."""
    if length <= block:
        return length
    count = -(-length // block)
    return -(-length // (16 * count)) * 16


class _Head(NamedTuple):
    """What one key head needs of the operands: T and S filled up to whole blocks."""

    query: jax.Array  # [G, T, H]
    key: jax.Array  # [S, H]
    value: jax.Array  # [S, Hv]
    slopes: jax.Array | None  # [G]
    relative: jax.Array | None  # [G, W]
    sinks: jax.Array | None  # [G]
    factor: jax.Array | None  # [G], of products of float8 codes
    value_factor: jax.Array | None  # [G]


class _Visits(NamedTuple):
    """Tiles that are visited, by key head: those that any of its query heads lists."""

    listed: jax.Array  # bool [B or 1, K or 1, G or 1, query blocks, key blocks]
    counts: jax.Array  # [B or 1, K or 1, blocks]
    indices: jax.Array  # [B or 1, K or 1, blocks, M]


class _Shared(NamedTuple):
    """What is picked by batch and head where a tile is computed."""

    here: jax.Array  # [B or 1, T]
    there: jax.Array  # [B or 1, S]
    segments: tuple[jax.Array, jax.Array] | None
    mask: jax.Array | None  # [B or 1, K or 1, G or 1, T or 1, S]
    bias: jax.Array | None
    seed: jax.Array | None
    begin: jax.Array | None  # [B or 1, blocks]
    end: jax.Array | None
    visits: _Visits | None  # in the place of begin and end, where a call has a block mask


class _Prepared(NamedTuple):
    heads: _Head  # with a leading axis B * K
    shared: _Shared
    queries: int  # T filled up
    keys: int


def forward(spec: Spec, ops: Operands, *, platform: str, plan: Plan | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns attention outputs `[B, T, N, Hv]` in the query's dtype and the log-sum-exp, `[B, N, T]`.

    The log-sum-exp is -inf where a query sees neither a key nor a sink.
    """
    batch, length, heads, _ = ops.query.shape
    if _empty(ops):
        wide = _dtypes(ops.query, platform)[0]
        sinks = jnp.full(heads, -jnp.inf, wide) if ops.sinks is None else ops.sinks.astype(wide)
        out = jnp.zeros((batch, length, heads, ops.value.shape[3]), working_dtype(ops))
        return out, jnp.broadcast_to(sinks[None, :, None], (batch, heads, length))
    plan = plan or plan_of(ops, platform, blocks=spec.blocks)
    made = _prepared(spec, ops, plan, platform, transposed=False)
    one = functools.partial(_forward_head, spec, plan, ops, made.shared)
    out, lse = _over_heads(one, made.heads, plan)  # [B K, G, T, Hv], [B K, G, T]
    out = out[:, :, :length].reshape(batch, heads, length, -1).transpose(0, 2, 1, 3)
    return out.astype(working_dtype(ops)), lse[:, :, :length].reshape(batch, heads, length)


def backward(
    spec: Spec,
    ops: Operands,
    lse: jax.Array,
    delta: jax.Array,
    cotangent: jax.Array,
    *,
    wanted: tuple[str, ...] = (),
    platform: str,
    plan: Plan | None = None,
) -> tuple[jax.Array, ...]:
    """Returns the gradients of query, key, value, and of each of `wanted`.

    Args:
        spec, ops: of the call.
        lse: `[B, N, T]`, as `forward` gave it.
        delta: `[B, N, T]`, sum of output * cotangent, minus the cotangent of the log-sum-exp.
        cotangent: of the output, `[B, T, N, Hv]`.
        wanted: of "slopes" (given by batch, `[B, N]`), "relative" (`[B, N, W]`) and "bias" (of its shape, float32).
        platform, plan: where and how it is computed.
    """
    batch, length, heads, size = ops.query.shape
    span, kv_heads = ops.key.shape[1:3]
    if _empty(ops):
        wide, shapes = lse.dtype, {"slopes": (batch, heads)}
        shapes |= {} if ops.relative is None else {"relative": (batch, *ops.relative.shape)}
        shapes |= {} if ops.bias is None else {"bias": ops.bias.shape}
        return *(jnp.zeros_like(x) for x in ops[:3]), *(jnp.zeros(shapes[name], wide) for name in wanted)
    plan = plan or plan_of(ops, platform, blocks=spec.blocks)
    made = _prepared(spec, ops, plan, platform, transposed=True)
    wide, narrow = _dtypes(ops.query, platform)
    groups = heads // kv_heads
    lse = jnp.where(jnp.isneginf(lse), jnp.asarray(NO_KEY, lse.dtype), lse)

    def by_head(x: jax.Array, **how: Any) -> jax.Array:  # [B, N, T, ...] -> [B K, G, T, ...]
        return padded(x.reshape(batch * kv_heads, groups, *x.shape[2:]), 2, made.queries, **how)

    rows = (
        by_head(lse.astype(wide), constant_values=NO_KEY),
        by_head(delta.astype(wide)),
        by_head(cotangent.transpose(0, 2, 1, 3).astype(narrow)),
    )
    one = functools.partial(_backward_head, spec, plan, ops, made.shared, wanted)
    bias = None
    if "bias" in wanted:  # one buffer that all heads add to
        assert made.shared.bias is not None
        bias = jnp.zeros(made.shared.bias.shape, wide)
        (dq, dk, dv, more), bias = _through_heads(one, (made.heads, rows), bias)
    else:
        dq, dk, dv, more = _over_heads(lambda number, part: one(number, part, None)[0], (made.heads, rows), plan)
    dq = dq[:, :, :length].reshape(batch, heads, length, size).transpose(0, 2, 1, 3)
    dk, dv = (x[:, :span].reshape(batch, kv_heads, span, -1).transpose(0, 2, 1, 3) for x in (dk, dv))
    if bias is not None:
        assert ops.bias is not None
        t, s = ops.bias.shape[2:]
        more["bias"] = bias[..., :t, :s].reshape(ops.bias.shape)
    for name in ("slopes", "relative"):
        if name in more:
            more[name] = more[name].reshape(batch, heads, *more[name].shape[2:])
    return (
        dq.astype(ops.query.dtype),
        dk.astype(ops.key.dtype),
        dv.astype(ops.value.dtype),
        *(more[name] for name in wanted),
    )


def _empty(ops: Operands) -> bool:
    """Whether there are no queries, no keys or no rows, so that nothing is seen."""
    sizes = (*ops.query.shape[:2], ops.key.shape[1])
    return any(isinstance(n, int) and n == 0 for n in sizes)


def _dtypes(query: jax.Array, platform: str) -> tuple[Any, Any]:
    """The dtype of sums, and that of the factors of products: on the CPU, narrow products are the slower ones."""
    wide = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    narrow = jnp.bfloat16 if query.dtype.itemsize == 1 else query.dtype
    return wide, wide if platform == "cpu" else narrow


def _prepared(spec: Spec, ops: Operands, plan: Plan, platform: str, *, transposed: bool) -> _Prepared:
    batch, length, heads, size = ops.query.shape
    span, kv_heads = ops.key.shape[1:3]
    groups = heads // kv_heads
    _, narrow = _dtypes(ops.query, platform)
    single = same(plan.block_q, length) and same(plan.block_k, span)
    queries = length if same(plan.block_q, length) else -(-length // plan.block_q) * plan.block_q
    keys = span if same(plan.block_k, span) else -(-span // plan.block_k) * plan.block_k

    def by_head(x: jax.Array, to: Any) -> jax.Array:  # [B, S, K, H] -> [B K, S, H]
        return padded(x.astype(narrow).transpose(0, 2, 1, 3).reshape(batch * kv_heads, *x.shape[1::2]), 1, to)

    query = ops.query.astype(narrow).reshape(batch, length, kv_heads, groups, size).transpose(0, 2, 3, 1, 4)
    query = padded(query.reshape(batch * kv_heads, groups, length, size), 2, queries)
    per_head = [
        None if x is None else jnp.tile(x.reshape(kv_heads, groups, *x.shape[1:]), (batch, *[1] * x.ndim))
        for x in (ops.slopes, ops.relative, ops.sinks)
    ]

    of_codes = factors(ops)
    per_head += [None] * 2 if of_codes is None else [x.reshape(batch * kv_heads, groups) for x in of_codes]

    def by_group(x: jax.Array | None) -> jax.Array | None:  # [B0, N0, T0, S] -> [B0, K0, G0, T0, S]
        if x is None:
            return None
        split = (kv_heads, groups) if x.shape[1] == heads and heads > 1 else (1, 1)
        x = padded(x.reshape(x.shape[0], *split, *x.shape[2:]), 4, keys)
        return x if x.shape[3] == 1 and length != 1 else padded(x, 3, queries)

    here, there = positions(ops, queries, keys)
    packed = segments(ops, queries, keys)
    begin = end = visits = None
    if spec.blocks is not None:
        visits = _visits(spec, ops, plan, (kv_heads, groups), transposed=transposed)
    elif not single:
        pairs = visible_blocks(spec, here, there, packed, plan.block_q, plan.block_k)
        begin, end = runs(pairs.swapaxes(1, 2) if transposed else pairs)
        if plan.heads > 1:  # computed together: what any of them sees
            begin, end = jnp.min(begin, axis=0, keepdims=True), jnp.max(end, axis=0, keepdims=True)
    shared = _Shared(here, there, packed, by_group(ops.mask), by_group(ops.bias), ops.seed, begin, end, visits)
    made = _Head(query, by_head(ops.key, keys), by_head(ops.value, keys), *per_head)
    return _Prepared(made, shared, queries, keys)


def _visits(spec: Spec, ops: Operands, plan: Plan, split: tuple[int, int], *, transposed: bool) -> _Visits:
    listed, most = block_mask.tiles(spec, ops, plan.block_q, plan.block_k)
    groups = split if listed.shape[1] == split[0] * split[1] else (1, 1)
    listed = listed.reshape(listed.shape[0], *groups, *listed.shape[2:])
    some = jnp.any(listed, axis=2)
    if transposed:
        counts, indices = block_mask.lists(some.swapaxes(2, 3), some.shape[2])
    else:
        counts, indices = block_mask.lists(some, min(some.shape[3], most * groups[1]))
    return _Visits(listed, counts, indices)


def _visited(shared: _Shared, kv_heads: int, number: jax.Array, row: Any) -> tuple[Any, Any, Callable[[Any], Any]]:
    """Begin and end of a loop over what row `row` of blocks sees, and which block a turn of it is."""
    b, k = number // kv_heads, number % kv_heads
    if shared.visits is None:
        assert shared.begin is not None and shared.end is not None
        begin, end = (_picked(_picked(x, b), row) for x in (shared.begin, shared.end))
        return begin, end, _itself
    count, indices = (_picked(_picked(_picked(x, b), k), row) for x in shared.visits[1:])
    return 0, count, lambda turn: _picked(indices, turn)


def _over_heads(one: Callable[..., Any], operands: Any, plan: Plan) -> Any:
    """Returns `one(number, operands of one head)` of all heads, `plan.heads` computed at a time."""
    count = jax.tree.leaves(operands)[0].shape[0]
    numbers = jax.lax.broadcasted_iota(jnp.int32, (count,), 0)
    if same(plan.heads, count):
        return jax.vmap(one)(numbers, operands)
    if plan.heads == 1:
        return jax.lax.map(lambda xs: one(*xs), (numbers, operands))
    groups = jax.tree.map(lambda x: x.reshape(-1, plan.heads, *x.shape[1:]), (numbers, operands))
    results = jax.lax.map(lambda xs: jax.vmap(one)(*xs), groups)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), results)


def _through_heads(one: Callable[..., Any], operands: Any, carried: jax.Array) -> Any:
    """Returns `one(number, operands of one head, carried) -> result, carried` of one head after the other."""
    count = jax.tree.leaves(operands)[0].shape[0]

    def step(carry: Any, xs: Any) -> Any:
        result, carry = one(*xs, carry)
        return carry, result

    carried, results = jax.lax.scan(step, carried, (jax.lax.broadcasted_iota(jnp.int32, (count,), 0), operands))
    return results, carried


class _Tile(NamedTuple):
    scores: jax.Array  # [G, Q, C], HIDDEN where not seen
    bent: jax.Array  # capped, with nothing added
    distance: jax.Array  # [1, Q, C]
    keep: jax.Array | None  # of the dropout


def _tile(
    spec: Spec, ops: Operands, shared: _Shared, head: _Head, number: jax.Array, product: jax.Array, t: Any, s: Any
) -> _Tile:
    """The scores of queries t, t + 1 .. and keys s, s + 1 .. of one key head, of their products `[G, Q, C]`."""
    groups, block_q, block_k = product.shape
    kv_heads = ops.key.shape[2]
    b, k = number // kv_heads, number % kv_heads

    def along(x: jax.Array, start: Any, size: Any) -> jax.Array:  # [B or 1, T]
        return _sliced(_picked(x, b), 0, start, size)

    here = along(shared.here, t, block_q)[None, :, None]
    there = along(shared.there, s, block_k)[None, None, :]
    distance = there - here
    packed = None
    if shared.segments is not None:
        q_segments, k_segments = shared.segments
        packed = along(q_segments, t, block_q)[None, :, None], along(k_segments, s, block_k)[None, None, :]

    def block(x: jax.Array | None) -> jax.Array | None:  # [B0, K0, G0, T0, S] -> [G0, T0 or Q, C]
        if x is None:
            return None
        x = _sliced(_picked(_picked(x, b), k), 2, s, block_k)
        return x if x.shape[1] == 1 else _sliced(x, 1, t, block_q)

    mask = block(shared.mask)
    if shared.visits is not None:
        listed = _picked(_picked(shared.visits.listed, b), k)  # [G0, query blocks, key blocks]
        listed = _picked(_picked(listed.transpose(1, 2, 0), t // block_q), s // block_k)[:, None, None]
        mask = listed if mask is None else mask & listed
    relative = None
    if head.relative is not None:
        relative = jnp.take(head.relative, _places(head.relative, distance[0]), axis=1)
    slope = None if head.slopes is None else head.slopes[:, None, None]
    bent = capped(spec, product)
    scores = added(bent, distance, slope=slope, bias=block(shared.bias), relative=relative)
    scores = jnp.where(seen(spec, there, distance, packed, mask), scores, jnp.asarray(HIDDEN, scores.dtype))
    keep = None
    if shared.seed is not None:
        iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32)
        heads = number * groups + iota((groups, 1, 1), 0)
        row = row_numbers(heads, ops.query.shape[1], iota((1, block_q, 1), 1) + t)
        keep = kept(spec, shared.seed, row, (iota((1, 1, block_k), 2) + s).astype(jnp.uint32)).astype(scores.dtype)
    return _Tile(scores, bent, distance, keep)


def _itself(turn: Any) -> Any:
    return turn


def _places(table: jax.Array, distance: jax.Array) -> jax.Array:
    reach = table.shape[-1] // 2
    return jnp.clip(distance, -reach, reach) + reach


def _picked(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.squeeze(x, 0) if x.shape[0] == 1 else jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def _sliced(x: jax.Array, axis: int, start: Any, size: Any) -> jax.Array:
    if same(x.shape[axis], size):
        return x
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _forward_head(
    spec: Spec, plan: Plan, ops: Operands, shared: _Shared, number: jax.Array, head: _Head
) -> tuple[jax.Array, jax.Array]:
    """Output `[G, T, Hv]` and log-sum-exp `[G, T]` of one key head."""
    groups, queries, _ = head.query.shape
    keys, value_size = head.value.shape
    wide = jnp.float64 if ops.query.dtype == jnp.float64 else jnp.float32

    def products(q: jax.Array, s: Any) -> tuple[jax.Array, jax.Array]:  # q [G Q, H]
        k, v = (_sliced(x, 0, s, plan.block_k) for x in (head.key, head.value))
        scores = jnp.einsum("qh,sh->qs", q, k, preferred_element_type=wide).reshape(groups, plan.block_q, -1)
        return scores if head.factor is None else scores * head.factor[:, None, None], v

    def block(i: Any) -> tuple[jax.Array, jax.Array]:
        t = i * plan.block_q
        q = _sliced(head.query, 1, t, plan.block_q).reshape(groups * plan.block_q, -1)

        def step(j: Any, carry: Any) -> Any:
            out, top, total = carry
            s = at(j) * plan.block_k
            product, v = products(q, s)
            tile = _tile(spec, ops, shared, head, number, product, t, s)
            higher = jnp.maximum(top, jnp.max(tile.scores, axis=-1))
            weights = jnp.exp(tile.scores - jnp.maximum(higher, NOTHING)[..., None])
            less = jnp.exp(top - jnp.maximum(higher, NOTHING))
            total = total * less + jnp.sum(weights, axis=-1)
            weights = weights if tile.keep is None else weights * tile.keep
            weights = weights.reshape(groups * plan.block_q, -1).astype(v.dtype)
            part = jnp.einsum("qs,sh->qh", weights, v, preferred_element_type=wide)
            return out * less.reshape(-1, 1) + part, higher, total

        out = jnp.zeros((groups * plan.block_q, value_size), wide)
        if head.sinks is None:
            top = jnp.full((groups, plan.block_q), HIDDEN, wide)
            total = jnp.zeros((groups, plan.block_q), wide)
        else:
            top = jnp.broadcast_to(head.sinks.astype(wide)[:, None], (groups, plan.block_q))
            total = jnp.ones((groups, plan.block_q), wide)
        if same(plan.block_k, keys):
            at = _itself
            out, top, total = step(0, (out, top, total))
        else:
            begin, end, at = _visited(shared, ops.key.shape[2], number, i)
            out, top, total = jax.lax.fori_loop(begin, end, step, (out, top, total))
        some = total > 0
        out = (out / jnp.where(some, total, 1.0).reshape(-1, 1)).reshape(groups, plan.block_q, value_size)
        out = out if head.value_factor is None else out * head.value_factor[:, None, None]
        lse = jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
        return out, lse

    if same(plan.block_q, queries):
        return block(0)
    out, lse = jax.lax.map(block, jax.lax.broadcasted_iota(jnp.int32, (queries // plan.block_q,), 0))
    return out.swapaxes(0, 1).reshape(groups, queries, value_size), lse.swapaxes(0, 1).reshape(groups, queries)


def _backward_head(
    spec: Spec,
    plan: Plan,
    ops: Operands,
    shared: _Shared,
    wanted: tuple[str, ...],
    number: jax.Array,
    operands: tuple[_Head, tuple[jax.Array, jax.Array, jax.Array]],
    bias: jax.Array | None,
) -> Any:
    """`(dq [G, T, H], dk [S, H], dv [S, Hv], {slopes [G], relative [G, W]}), bias` of one key head."""
    head, (lse, delta, cotangent) = operands
    groups, queries, size = head.query.shape
    keys, value_size = head.value.shape
    wide = jnp.float64 if ops.query.dtype == jnp.float64 else jnp.float32
    rows = groups * plan.block_q
    kv_heads = ops.key.shape[2]

    def rows_of(x: jax.Array, t: Any) -> jax.Array:
        return _sliced(x, 1, t, plan.block_q)

    dot = functools.partial(jnp.einsum, preferred_element_type=wide)

    def tile_gradients(t: Any, s: Any, k: jax.Array, v: jax.Array, carry: Any) -> Any:
        """Adds to dk, dv and the rest; returns dq of these rows as well."""
        dk, dv, more, bias = carry
        q, do = (rows_of(x, t).reshape(rows, -1) for x in (head.query, cotangent))
        product = dot("qh,sh->qs", q, k).reshape(groups, plan.block_q, -1)
        tile = _tile(spec, ops, shared, head, number, product, t, s)
        weights = jnp.exp(tile.scores - rows_of(lse, t)[..., None])
        dropped = weights if tile.keep is None else weights * tile.keep
        dv = dv + dot("qh,qs->hs", do, dropped.reshape(rows, -1).astype(do.dtype))
        dw = dot("qh,sh->qs", do, v).reshape(weights.shape)
        dw = dw if tile.keep is None else dw * tile.keep
        ds = weights * (dw - rows_of(delta, t)[..., None])
        if "slopes" in wanted:
            more = {**more, "slopes": more["slopes"] + jnp.sum(ds * tile.distance.astype(wide), axis=(1, 2))}
        if "relative" in wanted:
            places = _places(more["relative"], tile.distance[0])
            more = {**more, "relative": more["relative"].at[:, places].add(ds)}
        if bias is not None:
            bias = _added_block(bias, ds, (number // kv_heads, number % kv_heads), t, s)
        ds = uncapped(spec, tile.bent, ds).reshape(rows, -1).astype(q.dtype)
        dk = dk + dot("qh,qs->hs", q, ds)
        return dot("qs,sh->qh", ds, k), (dk, dv, more, bias)

    more: dict[str, jax.Array] = {}
    if "slopes" in wanted:
        more["slopes"] = jnp.zeros((groups,), wide)
    if "relative" in wanted:
        assert head.relative is not None
        more["relative"] = jnp.zeros(head.relative.shape, wide)

    # dk and dv are summed as [H, keys]: XLA's CPU product turns its smaller factor around, not the tile (128 and 318
    # microseconds for 256 queries, 512 keys, H=64).
    def empty() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((size, plan.block_k), wide), jnp.zeros((value_size, plan.block_k), wide)

    if same(plan.block_q, queries) and same(plan.block_k, keys):
        dq, (dk, dv, more, bias) = tile_gradients(0, 0, head.key, head.value, (*empty(), more, bias))
        return (dq.reshape(groups, queries, size) * spec.scale, dk.T * spec.scale, dv.T, more), bias

    blocks_q, blocks_k = queries // plan.block_q, keys // plan.block_k

    def column(carry: Any, j: Any) -> Any:
        dq, more, bias = carry
        begin, end, at = _visited(shared, kv_heads, number, j)
        s = j * plan.block_k
        k, v = (_sliced(x, 0, s, plan.block_k) for x in (head.key, head.value))

        def step(turn: Any, inner: Any) -> Any:
            i = at(turn)
            dq, *rest = inner
            part, rest = tile_gradients(i * plan.block_q, s, k, v, tuple(rest))
            part = part + jax.lax.dynamic_index_in_dim(dq, i, 0, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(dq, part, i, 0), *rest

        dq, dk, dv, more, bias = jax.lax.fori_loop(begin, end, step, (dq, *empty(), more, bias))
        return (dq, more, bias), (dk.T * spec.scale, dv.T)

    dq = jnp.zeros((blocks_q, rows, size), wide)
    numbers = jax.lax.broadcasted_iota(jnp.int32, (blocks_k,), 0)
    (dq, more, bias), (dk, dv) = jax.lax.scan(column, (dq, more, bias), numbers)
    dq = dq.reshape(blocks_q, groups, plan.block_q, size).swapaxes(0, 1).reshape(groups, queries, size) * spec.scale
    return (dq, dk.reshape(keys, size), dv.reshape(keys, value_size), more), bias


def _added_block(whole: jax.Array, part: jax.Array, at: tuple[jax.Array, jax.Array], t: Any, s: Any) -> jax.Array:
    """`whole` [B0, K0, G0, T0, S] with the block `part` [G, Q, C] added in its place, summed over axes that are 1."""
    batch, heads, groups, length, _ = whole.shape
    part = part if groups > 1 or part.shape[0] == 1 else jnp.sum(part, axis=0, keepdims=True)
    part = part if length > 1 or part.shape[1] == 1 else jnp.sum(part, axis=1, keepdims=True)
    zero = jnp.zeros((), jnp.int32)
    b, k = at[0] if batch > 1 else zero, at[1] if heads > 1 else zero
    start = (b, k, zero, jnp.asarray(t, jnp.int32) if length > 1 else zero, jnp.asarray(s, jnp.int32))
    before = jax.lax.dynamic_slice(whole, start, (1, 1, *part.shape))
    return jax.lax.dynamic_update_slice(whole, before + part[None, None], start)
