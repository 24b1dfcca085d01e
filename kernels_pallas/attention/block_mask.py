"""Which blocks of keys each block of queries visits, as lists: block-sparse attention.

    counts   [B0, N0, Tb]      how many blocks of keys a block of queries visits
    indices  [B0, N0, Tb, M]   which ones; what follows the first `counts` of a row is not read

Block i holds the queries i * block_q and following, Tb is T / block_q, rounded up. B0 and N0 are B and N, or 1. A block
that is listed twice counts once, one beyond the last not at all. A key is seen where its block is listed and every
other mask of the call (causal, window, segments, `mask`, ...) lets it be seen. The cost of a call is that of the blocks
that are listed and that the other masks do not exclude as a whole.

Implementations compute in tiles that divide these blocks. Their lists are made here, outside of the kernels, by plain
jax: those of a block of queries, and for the gradients of keys and values the transposed ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from kernels_pallas.attention.blocks import positions, segments, visible_blocks
from kernels_pallas.attention.spec import Operands, Spec


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["counts", "indices"], meta_fields=["block_q", "block_k"]
)
@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Lists of the blocks that are visited, see the head of this file; a pytree whose block sizes are static.

    Args:
        block_q, block_k: queries and keys of a block.
        counts: int32 `[B0, N0, Tb]`.
        indices: int32 `[B0, N0, Tb, M]`.
    """

    block_q: int
    block_k: int
    counts: jax.Array
    indices: jax.Array

    @staticmethod
    def from_dense(pairs: Any, block_q: int, block_k: int, *, most: int | None = None) -> BlockMask:
        """Returns the lists of a mask by blocks.

        Args:
            pairs: bool `[Tb, Sb]` or `[B0, N0, Tb, Sb]`: True where a block of queries visits a block of keys.
            block_q, block_k: queries and keys of a block.
            most: M, at least the longest row's; None: the longest row's where `pairs` is a concrete array, else Sb.

        Raises:
            ValueError: `pairs` has neither two nor four axes, or `most` is too small.
        """
        if pairs.ndim not in (2, 4):
            raise ValueError(
                f"BlockMask: pairs has the shape {list(pairs.shape)} and must have [Tb, Sb] or [B0, N0, Tb, Sb]."
            )
        pairs = pairs.reshape((1,) * (4 - pairs.ndim) + pairs.shape)
        if not isinstance(pairs, Tracer):
            with jax.ensure_compile_time_eval():
                longest = int(jnp.max(jnp.sum(jnp.asarray(pairs, bool), axis=-1), initial=0))
            if most is not None and most < longest:
                raise ValueError(f"BlockMask: most is {most}, and a row visits {longest} blocks.")
            most = longest if most is None else most
        counts, indices = lists(jnp.asarray(pairs, bool), pairs.shape[-1] if most is None else most)
        return BlockMask(block_q, block_k, counts, indices)

    @staticmethod
    def from_function(
        function: Callable[[jax.Array, jax.Array], Any], length: int, span: int, block_q: int, block_k: int
    ) -> BlockMask:
        """Returns the lists of the blocks in which a function of positions is true for any pair.

        A block of which it is true in part is visited as a whole: where its edges do not go with blocks, give them by
        `causal`, `window`, segments or `mask` as well.

        Args:
            function: of int32 arrays of query and key numbers, `[Q, 1]` and `[1, S]`, bool broadcasting to `[Q, S]`.
            length, span: T and S.
            block_q, block_k: queries and keys of a block.
        """
        columns = -(-span // block_k)
        with jax.ensure_compile_time_eval():
            keys, rows = jnp.arange(span, dtype=jnp.int32)[None, :], []
            for start in range(0, length, block_q):
                queries = jnp.arange(start, min(start + block_q, length), dtype=jnp.int32)[:, None]
                shape = queries.shape[0], span
                seen = jnp.any(jnp.broadcast_to(jnp.asarray(function(queries, keys), bool), shape), axis=0)
                seen = jnp.pad(seen, (0, columns * block_k - span))
                rows.append(jnp.any(seen.reshape(columns, block_k), axis=1))
            pairs = jnp.stack(rows) if rows else jnp.zeros((0, columns), bool)
        return BlockMask.from_dense(pairs, block_q, block_k)

    def dense(self, span: int) -> jax.Array:
        """Returns which block of queries visits which of keys, bool `[B0, N0, Tb, Sb]`; `span`: S."""
        return _dense(self.counts, self.indices, -(-span // self.block_k))

    def elementwise(self, length: int, span: int) -> jax.Array:
        """Returns the mask of every query and key, bool `[B0, N0, T, S]`: O(T * S) memory."""
        pairs = self.dense(span)
        whole = jnp.repeat(jnp.repeat(pairs, self.block_q, axis=2), self.block_k, axis=3)
        return whole[:, :, :length, :span]


def checked(mask: BlockMask, batch: int, heads: int, length: Any, span: Any) -> tuple[jax.Array, jax.Array]:
    """Returns counts and indices of a mask that fits a call.

    Raises:
        ValueError: it does not fit.
    """
    if not (isinstance(length, int) and isinstance(span, int)):
        raise ValueError("attention: block_mask needs numbers for T and S, and one of them is symbolic.")
    if mask.block_q < 1 or mask.block_k < 1:
        raise ValueError(f"attention: block_mask has blocks of {mask.block_q} by {mask.block_k}; both are at least 1.")
    rows = -(-length // mask.block_q)
    counts, indices = mask.counts, mask.indices
    fits = len(counts.shape) == 3 and counts.shape[0] in (1, batch) and counts.shape[1] in (1, heads)
    if not fits or counts.shape[2] != rows:
        raise ValueError(
            f"attention: the counts of block_mask have the shape {list(counts.shape)} and must have "
            f"{[batch, heads, rows]}, where the first two may be 1: {length} queries in blocks of {mask.block_q}."
        )
    if len(indices.shape) != 4 or tuple(indices.shape[:3]) != tuple(counts.shape):
        raise ValueError(
            f"attention: the indices of block_mask have the shape {list(indices.shape)} and must have "
            f"{[*counts.shape, 'M']}."
        )
    if not all(jnp.issubdtype(x.dtype, jnp.integer) for x in (counts, indices)):
        raise ValueError(f"attention: block_mask has {counts.dtype} and {indices.dtype}; both must be integers.")
    return counts, indices


def lists(pairs: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Returns counts `[...]` and indices `[..., max(most, 1)]`, int32, of the true ones along the last axis.

    Behind the last one an index is 0. No row may have more than `most`.
    """
    order = jnp.argsort(jnp.logical_not(pairs), axis=-1, stable=True).astype(jnp.int32)
    counts = jnp.sum(pairs, axis=-1, dtype=jnp.int32)
    order = order[..., :most]
    if order.shape[-1] == 0:
        order = jnp.zeros((*order.shape[:-1], 1), jnp.int32)
    number = jax.lax.broadcasted_iota(jnp.int32, order.shape, order.ndim - 1)
    return counts, jnp.where(number < counts[..., None], order, 0)


def _dense(counts: jax.Array, indices: jax.Array, blocks: int) -> jax.Array:
    """Returns bool `[..., blocks]`, true where an index of the first `counts` of a row says so."""
    flat = indices.reshape(-1, indices.shape[-1]).astype(jnp.int32)
    number = jax.lax.broadcasted_iota(jnp.int32, flat.shape, 1)
    listed = (number < counts.reshape(-1)[:, None]) & (flat >= 0)
    flat = jnp.where(listed, flat, blocks)  # beyond the end: dropped
    row = jax.lax.broadcasted_iota(jnp.int32, flat.shape, 0)
    found = jnp.zeros((flat.shape[0], blocks), bool).at[row, flat].set(True, mode="drop")
    return found.reshape(*counts.shape, blocks)


def tiles(spec: Spec, ops: Operands, block_q: int, block_k: int) -> tuple[jax.Array, int]:
    """Returns which tiles of a call with a block mask are visited, and how many of a row at most.

    Args:
        spec, ops: of the call.
        block_q, block_k: queries and keys of a tile; each divides that of the mask, or the mask has one block.

    Returns:
        bool `[B or 1, N or 1, tiles of queries, tiles of keys]`: listed, and not excluded by the other masks.
    """
    assert spec.blocks is not None and ops.block_counts is not None and ops.block_indices is not None
    length, span = ops.query.shape[1], ops.key.shape[1]
    pairs = _dense(ops.block_counts, ops.block_indices, -(-span // spec.blocks[1]))
    count_q, count_k = -(-length // block_q), -(-span // block_k)
    at_q = [min(i * block_q // spec.blocks[0], pairs.shape[2] - 1) for i in range(count_q)]
    at_k = [min(i * block_k // spec.blocks[1], pairs.shape[3] - 1) for i in range(count_k)]
    pairs = jnp.take(pairs, jnp.asarray(at_q, jnp.int32), axis=2)
    pairs = jnp.take(pairs, jnp.asarray(at_k, jnp.int32), axis=3)
    here, there = positions(ops, count_q * block_q, count_k * block_k)
    packed = segments(ops, count_q * block_q, count_k * block_k)
    pairs = pairs & visible_blocks(spec, here, there, packed, block_q, block_k)[:, None]
    return pairs, min(count_k, ops.block_indices.shape[3] * -(-spec.blocks[1] // block_k))


def visited(spec: Spec, ops: Operands, block_q: int, block_k: int, whole: jax.Array) -> jax.Array:
    """Returns `whole` `[B, N, T, S]` with zeros where no tile was visited and so nothing written."""
    if spec.blocks is None:
        return whole
    pairs, _ = tiles(spec, ops, block_q, block_k)
    pairs = jnp.repeat(jnp.repeat(pairs, block_q, axis=2), block_k, axis=3)[:, :, : whole.shape[2], : whole.shape[3]]
    return jnp.where(jnp.broadcast_to(pairs, whole.shape), whole, jnp.zeros((), whole.dtype))


def fitted(tile: int, block: int, length: int) -> int:
    """Returns the size of a tile near `tile` that divides a mask's block, for lengths in more than one block."""
    if block >= length or block % tile == 0:
        return tile
    if block <= 2 * tile:
        return block
    divisor = next(n for n in range(tile, 0, -1) if block % n == 0)
    return divisor if 4 * divisor >= tile else block
