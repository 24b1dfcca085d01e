"""Decode attention in plain XLA: split by split of the cache, forward and backward. Oracle: `oracle.py`.

A loop goes through the splits that some row sees, from the first to the last, and keeps the output, the maximum and the
sum of each row (Milakov and Gimelshein, arXiv 1805.02867): what is unpacked and held at once is one split, and slots
beyond the longest row cost nothing. Rows of all heads go together while a tile of their scores is small; beyond that
(prompts) it is a *cell* at a time, one key head and a block of queries. The backward pass keeps operands, output and
log-sum-exp, and computes each tile again. Sums are float32, float64 of such.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.spec import HIDDEN, NO_KEY, NOTHING
from kernels_pallas.decode.spec import (
    Call,
    by_row,
    capped,
    first_seen,
    hidden,
    joined_numbers,
    joined_rows,
    products,
    split_rows,
    weighted,
)

SPLIT = 512  # slots of a split
TOKENS = 256  # queries of a cell
TOGETHER = {"cpu": 2**19}  # scores of a tile up to which all heads go together
TOGETHER_ELSEWHERE = 2**26
_NOTHING_GIVEN: Mapping[str, Any] = MappingProxyType({})


def forward(call: Call, platform: str, given: Mapping[str, Any] = _NOTHING_GIVEN) -> list[jax.Array]:
    """Returns the output `[B, T, N, Hv]` and the log-sum-exp `[B, N, T]`; `given`: tuned values, see `plan_of`."""
    plan = plan_of(call, platform, given)
    wide = plan.wide
    # On the CPU narrow products are slower than float32 ones; elsewhere the matrix units take them as they are.
    narrow = wide if platform == "cpu" else call.ops.query.dtype
    query = plan.padded(split_rows(call, call.ops.query, call.sizes[0]).astype(narrow))
    slopes, sinks = _heads(call, call.ops.slopes), _heads(call, call.ops.sinks)

    def one(i: Any) -> tuple[jax.Array, jax.Array]:
        cell = plan.cell(i)
        here, positions, slope = plan.rows(query, cell), plan.positions(cell), plan.heads(slopes, cell)
        q = tuple(here[:, :, i] for i in range(call.spec.parts))
        shape = here.shape[0], here.shape[1], here.shape[3]
        top, total = jnp.full(shape, HIDDEN, wide), jnp.zeros(shape, wide)
        if sinks is not None:
            top, total = jnp.broadcast_to(plan.heads(sinks, cell)[..., 0], shape), jnp.ones(shape, wide)
        outs = tuple(jnp.zeros((*shape, call.sizes[1]), wide) for _ in range(call.spec.parts))

        def split(j: Any, carry: Any) -> Any:
            outs, top, total = carry
            tile = plan.tile(cell, j)
            scores = plan.scores(q, tile, positions, slope)
            higher = jnp.maximum(top, jnp.max(scores, axis=-1))
            floor = jnp.maximum(higher, NOTHING)
            weights = jnp.exp(scores - floor[..., None])
            less = jnp.exp(top - floor)
            parts = weighted(call.spec, plan.dot, weights, tile.values, tile.value_scale, narrow)
            outs = tuple(x * less[..., None] + part for x, part in zip(outs, parts, strict=True))
            return outs, higher, total * less + jnp.sum(weights, axis=-1)

        outs, top, total = plan.over_splits(positions, split, (outs, top, total))
        some = total > 0
        total = jnp.where(some, total, 1.0)
        out = jnp.stack([x / total[..., None] for x in outs], 2)
        return out, jnp.where(some, top + jnp.log(total), -jnp.inf)

    if plan.cells == 1:
        out, lse = one(0)
    else:
        out, lse = jax.lax.map(one, jnp.arange(plan.cells, dtype=jnp.int32))
        parts, size = call.spec.parts, call.sizes[1]
        out = out.reshape(call.batch, call.kv_heads, plan.blocks, parts, -1, size).swapaxes(2, 3)
        out = out.reshape(call.batch, call.kv_heads, parts, -1, size)[:, :, :, : call.rows]
        lse = lse.reshape(call.batch, call.kv_heads, -1)[:, :, : call.rows]
    return [joined_rows(call, out).astype(call.ops.query.dtype), joined_numbers(call, lse)]


def backward(call: Call, platform: str) -> list[jax.Array]:
    """Returns the gradients of `call.wanted`; those of slopes and sinks for each row of the batch, `[B, N]`."""
    ops, spec, plan = call.ops, call.spec, plan_of(call, platform)
    assert call.results is not None
    out, lse, of_out, of_lse = call.results
    wide = plan.wide
    delta = jnp.einsum("btnh,btnh->bnt", out.astype(wide), of_out.astype(wide))
    delta = delta - jnp.where(jnp.isneginf(lse), 0.0, of_lse)
    lse = jnp.where(jnp.isneginf(lse), NO_KEY, lse)
    kept = [plan.padded(_as_rows(call, x)[:, :, None, :, None]) for x in (lse, delta)]
    query = plan.padded(split_rows(call, ops.query, call.sizes[0]).astype(wide))
    cotangent = plan.padded(split_rows(call, of_out, call.sizes[1]).astype(wide))
    slopes = _heads(call, ops.slopes)
    shapes: dict[str, tuple[int, ...]] = {n: x.shape for n, x in ops._asdict().items() if x is not None}
    shapes |= {"query": query.shape, "slopes": (call.batch, call.kv_heads, call.rows)}
    found = {n: jnp.zeros(shapes[n], wide) for n in call.wanted if n != "sinks"}

    def one(i: Any, found: dict[str, jax.Array]) -> dict[str, jax.Array]:
        cell = plan.cell(i)
        positions, slope = plan.positions(cell), plan.heads(slopes, cell)
        slope = None if slope is None else jnp.broadcast_to(slope, (positions.shape[0], *slope.shape[1:]))
        q, do = plan.rows(query, cell), plan.rows(cotangent, cell)
        row_lse, row_delta = (plan.rows(x, cell)[:, :, 0] for x in kept)

        def split(j: Any, found: dict[str, jax.Array]) -> dict[str, jax.Array]:
            tile = plan.tile(cell, j)

            def scores_of(given: dict[str, Any]) -> jax.Array:
                rows = given.get("query", q)
                parts = tuple(rows[:, :, i] for i in range(spec.parts))
                here = tile._replace(**{n: given[n] for n in ("keys", "key_scale") if n in given})
                return plan.scores(parts, here, positions, given.get("slopes", slope))

            def sum_of(given: dict[str, Any]) -> tuple[jax.Array, ...]:
                values, scale = given.get("values", tile.values), given.get("value_scale", tile.value_scale)
                return weighted(spec, plan.dot, given["weights"], values, scale, wide)

            given = {"query": q, "slopes": slope, "keys": tile.keys, "key_scale": tile.key_scale}
            scores, pull_scores = jax.vjp(scores_of, {n: x for n, x in given.items() if n in found})
            weights = jnp.exp(scores - row_lse)
            given = {"values": tile.values, "value_scale": tile.value_scale}
            given = {n: x for n, x in given.items() if n in found} | {"weights": weights}
            (parts,) = jax.vjp(sum_of, given)[1](tuple(do[:, :, i] for i in range(spec.parts)))
            parts |= pull_scores(weights * (parts.pop("weights") - row_delta))[0]
            return {n: plan.added(found[n], parts[n], n, cell, j) for n in found}

        return plan.over_splits(positions, split, found)

    found = one(0, found) if plan.cells == 1 else jax.lax.fori_loop(0, plan.cells, one, found)
    if "query" in found:
        found["query"] = joined_rows(call, found["query"][:, :, :, : call.rows])
    if "slopes" in found:
        by_group = found["slopes"].reshape(call.batch, call.kv_heads, call.length, call.groups)
        found["slopes"] = jnp.sum(by_group, axis=2).reshape(call.batch, -1)
    if "sinks" in call.wanted:
        share = jnp.exp(ops.sinks.astype(wide)[None, :, None] - lse)
        found["sinks"] = -jnp.sum(share * delta, axis=2)
    return [found[n].astype(getattr(ops, n).dtype) for n in call.wanted]


class _Cell(NamedTuple):
    """The rows that go together: from batch row, key head and token on."""

    row: Any
    head: Any
    token: Any


class _Tile(NamedTuple):
    """What of a cache belongs to a cell and a split."""

    keys: jax.Array  # [b, k, h, C]
    values: jax.Array  # [b, k, C, h]
    key_scale: tuple[jax.Array, ...]  # each [b, k, 1, C]
    value_scale: tuple[jax.Array, ...]
    slots: jax.Array  # int32 [b or 1, 1, 1, C], negative: not there


def plan_of(call: Call, platform: str, given: Mapping[str, Any] = _NOTHING_GIVEN) -> _Plan:
    """Returns how the call is cut; all of it at once where sizes are symbols. `given`: {"split": slots}, or {}."""
    ops, slots = call.ops, call.slots
    wanted = given.get("split", SPLIT)
    if not all(isinstance(n, int) for n in (*ops.query.shape, *ops.keys.shape, slots)):
        return _Plan(call, slots, 1, call.length, 1, whole=True)
    split = min(wanted, slots)
    if ops.pages is not None:
        split = min(max(1, wanted // call.page), ops.pages.shape[1]) * call.page
    whole = split == slots
    if call.batch * call.kv_heads * call.rows * split <= TOGETHER.get(platform, TOGETHER_ELSEWHERE):
        return _Plan(call, split, 1, call.length, 1, whole)
    tokens = min(call.length, TOKENS)
    blocks = -(-call.length // tokens)
    return _Plan(call, split, call.batch * call.kv_heads * blocks, tokens, blocks, whole)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a call is cut: slots of a split, cells, tokens of a cell and blocks of such; `whole`: there is one split."""

    call: Call
    split: Any
    cells: int
    tokens: Any
    blocks: int
    whole: bool

    @property
    def wide(self) -> Any:
        """The dtype of sums."""
        return jnp.float64 if self.call.ops.query.dtype == jnp.float64 else jnp.float32

    @property
    def count(self) -> Any:
        """Rows of a cell and key head."""
        return self.tokens * self.call.groups

    def dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """The product of two tiles."""
        return jnp.matmul(a, b, preferred_element_type=self.wide)

    def cell(self, i: Any) -> _Cell:
        """The cell of a number."""
        if self.cells == 1:
            return _Cell(0, 0, 0)
        head, block = jnp.divmod(i, self.blocks)
        row, head = jnp.divmod(head, self.call.kv_heads)
        return _Cell(row, head, block * self.tokens)

    def positions(self, cell: _Cell) -> jax.Array:
        """Of the cell's rows, int32 `[b, 1, r, 1]`; those beyond the last query see nothing."""
        token = cell.token + jax.lax.broadcasted_iota(jnp.int32, (1, self.count), 1) // self.call.groups
        lengths = self.call.ops.lengths
        lengths = lengths if self.cells == 1 else jax.lax.dynamic_slice_in_dim(lengths, cell.row, 1, 0)
        positions = lengths[:, None] - self.call.length + token
        return jnp.where(token < self.call.length, positions, -1)[:, None, :, None]

    def padded(self, x: jax.Array) -> jax.Array:
        """`[B, K, parts, R, h]` with as many rows as the cells have."""
        if self.cells == 1 or self.blocks * self.count == self.call.rows:
            return x
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.blocks * self.count - self.call.rows), (0, 0)))

    def rows(self, x: jax.Array, cell: _Cell) -> jax.Array:
        """Of padded rows the cell's."""
        if self.cells == 1:
            return x
        starts = cell.row, cell.head, 0, cell.token * self.call.groups, 0
        return jax.lax.dynamic_slice(x, starts, (1, 1, x.shape[2], self.count, x.shape[4]))

    def heads(self, x: jax.Array | None, cell: _Cell) -> Any:
        """Of numbers of heads, `[K, R]`, the cell's `[1, k, r, 1]`: those of any tokens, for they repeat."""
        if x is None or self.cells == 1:
            return None if x is None else x[None, :, :, None]
        return jax.lax.dynamic_slice(x, (cell.head, 0), (1, self.count))[None, :, :, None]

    def start(self, j: Any) -> Any:
        """The first slot of a split's tile: the last one begins earlier where S is no multiple of it."""
        return 0 if self.whole else jnp.minimum(j * self.split, self.call.slots - self.split)

    def tile(self, cell: _Cell, j: Any) -> _Tile:
        """What the cell and the split have of the cache."""
        ops = self.call.ops
        number = jax.lax.broadcasted_iota(jnp.int32, (1, self.split), 1)
        if ops.pages is None:
            start = self.start(j)
            slots = jnp.where(start + number >= j * self.split, start + number, -1)
            taken = self._sliced(cell, start)
        else:
            table, there = self.table(cell, j)
            slots = jnp.where(jnp.repeat(there, self.call.page, axis=1), j * self.split + number, -1)
            taken = self._gathered(cell, table)
        key_scale, value_scale = (_as_tile(x, taken) for x in (ops.key_scale, ops.value_scale))
        return _Tile(taken(ops.keys, 3), taken(ops.values, 2), key_scale, value_scale, slots[:, None, None, :])

    def table(self, cell: _Cell, j: Any) -> tuple[jax.Array, jax.Array]:
        """Which pages the split is made of, `[b, pages]`, and whether they are there."""
        ops = self.call.ops
        each, last, count = self.split // self.call.page, ops.pages.shape[1], ops.keys.shape[0]
        places = j * each + jax.lax.broadcasted_iota(jnp.int32, (1, each), 1)
        table = ops.pages if self.cells == 1 else jax.lax.dynamic_slice_in_dim(ops.pages, cell.row, 1, 0)
        table = jnp.take(table, jnp.minimum(places, last - 1)[0], axis=1)
        return jnp.clip(table, 0, count - 1), (table >= 0) & (table < count) & (places < last)

    def _sliced(self, cell: _Cell, start: Any) -> Callable[[Any, int], jax.Array]:
        def taken(x: Any, axis: int) -> jax.Array:
            if self.cells == 1:
                return x if self.whole else jax.lax.dynamic_slice_in_dim(x, start, self.split, axis)
            starts: list[Any] = [cell.row, cell.head, *[0] * (x.ndim - 2)]
            sizes = [1, 1, *x.shape[2:]]
            starts[axis], sizes[axis] = start, self.split
            return jax.lax.dynamic_slice(x, starts, sizes)

        return taken

    def _gathered(self, cell: _Cell, table: jax.Array) -> Callable[[Any, int], jax.Array]:
        def taken(x: Any, axis: int) -> jax.Array:
            if self.cells == 1:
                pages = jnp.moveaxis(x[table], 1, axis)  # [b, each, K, ...]: `each` to where the slots are
            else:
                pages = jnp.moveaxis(jnp.expand_dims(x[table, cell.head], 2), 1, axis)
            shape = pages.shape
            return pages.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])

        return taken

    def scores(self, q: tuple[jax.Array, ...], tile: _Tile, positions: jax.Array, slope: Any) -> jax.Array:
        """Of a tile, `[b, k, r, C]`."""
        spec = self.call.spec
        found = products(spec, self.dot, q, tile.keys, tile.key_scale)
        return hidden(spec, capped(spec, found), positions, tile.slots, slope)

    def over_splits(self, positions: jax.Array, step: Callable[[Any, Any], Any], carry: Any) -> Any:
        """Runs `step` for each split that some of the rows see."""
        if self.whole:
            return step(0, carry)
        count = -(-self.call.slots // self.split)
        end = jnp.minimum(jnp.maximum(jnp.max(positions) + self.split, 0) // self.split, count)
        begin = jnp.int32(0)
        # Of the rows that see something: the others stand before all slots.
        first = first_seen(self.call.spec, jnp.min(jnp.where(positions >= 0, positions, 2**30)))
        if first is not None:
            begin = jnp.minimum(jnp.maximum(first, 0) // self.split, end)
        return jax.lax.fori_loop(begin, end, step, carry)

    def added(self, whole: jax.Array, part: Any, name: str, cell: _Cell, j: Any) -> jax.Array:
        """Returns a gradient with a tile's part added where it belongs."""
        if name in ("key_scale", "value_scale"):
            part = part[0][:, :, 0] if len(part) == 1 else jnp.concatenate(part, 2)
        part = part[..., 0].astype(whole.dtype) if name == "slopes" else part.astype(whole.dtype)
        starts: list[Any] = [cell.row, cell.head, *[0] * (whole.ndim - 2)]
        if name == "query":
            starts[3] = cell.token * self.call.groups
        elif name != "slopes":  # that of a head is the same for any tokens
            axis = {"keys": 3, "values": 2}.get(name, whole.ndim - 1)
            if self.call.ops.pages is not None:
                table, there = self.table(cell, j)
                pages = part.reshape(*part.shape[:axis], -1, self.call.page, *part.shape[axis + 1 :])
                pages = jnp.moveaxis(pages, axis, 1)  # [b, each, k, ...]
                table = jnp.where(there, table, whole.shape[0])  # which is dropped
                if self.cells == 1:
                    return whole.at[table].add(pages, mode="drop")
                return whole.at[table, cell.head].add(pages[:, :, 0], mode="drop")
            starts[axis] = self.start(j)
        if part.shape == whole.shape:
            return whole + part
        held = jax.lax.dynamic_slice(whole, starts, part.shape)
        return jax.lax.dynamic_update_slice(whole, held + part, starts)


def _as_tile(scale: Any, taken: Callable[[Any, int], jax.Array]) -> tuple[jax.Array, ...]:
    if scale is None:
        return ()
    part = taken(scale, scale.ndim - 1).astype(jnp.float32)
    return (part[:, :, None],) if part.ndim == 3 else (part[:, :, :1], part[:, :, 1:])


def _heads(call: Call, x: jax.Array | None) -> jax.Array | None:
    """Numbers of heads, `[N]`, as `[K, R]` in the dtype of sums."""
    return None if x is None else by_row(call, x).astype(plan_of(call, "cpu").wide)


def _as_rows(call: Call, x: jax.Array) -> jax.Array:
    """`[B, N, T]` as `[B, K, R]`."""
    x = x.reshape(call.batch, call.kv_heads, call.groups, call.length)
    return x.transpose(0, 1, 3, 2).reshape(call.batch, call.kv_heads, call.rows)
