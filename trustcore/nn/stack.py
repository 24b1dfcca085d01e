"""Blocks of equal structure as one: their parameters stacked and run by a scan; a program then holds each kind once.

    blocks b0 b1 b2 b3 b4 b5 b6, of kinds A A B A A B A  ->  one group of period 3 (A A B), twice, and one block A

A list of L blocks is traced into L copies of a block, and compiling takes time in proportion. A `Stack` holds groups:
`period` blocks whose leaves have an axis `[R, ...]` in front, R repeats of them being R * period layers that follow
each other. Groups are chosen so that the fewest blocks are traced; equal are blocks that have the same static fields
(window, rotary positions, format of packed weights) and the same shapes. A group that is not repeated has no axis.

    run_blocks(blocks, call, x, states):   x, state = call(block, x, state)   for each block in turn

takes a list as well as a stack. States (caches) are one for each layer, or as a stack returns them: one for each block
that is traced, with the axis of its group. They are carried, so that they are updated in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Remat = bool | Callable[..., Any]
Call = Callable[[Any, Any, Any], tuple[Any, Any]]


class Stack(nnx.Module):
    """Blocks in groups; see the header of this file.

    Args:
        blocks: first to last; arrays or shapes.
        remat: whether what a repeat computes is forgotten after it and computed again in the backward pass; or a policy
            of `jax.checkpoint_policies`, which says what is kept. Chen et al., arXiv 1604.06174.
        unroll: repeats that one step of the loop runs.

    Holds copies of the parameters: the list and the stack together take twice their memory.
    """

    def __init__(self, blocks: Sequence[nnx.Module], *, remat: Remat = False, unroll: int = 1):
        kinds = [_kind(block) for block in blocks]
        groups = groups_of([kinds.index(kind) for kind in kinds])
        made, start = [], 0
        for period, repeats in groups:
            group = [blocks[start + i : start + period * repeats : period] for i in range(period)]
            made.append(nnx.List([_stacked(kind) if repeats > 1 else kind[0] for kind in group]))
            start += period * repeats
        self.groups = nnx.List(made)
        self.repeats = tuple(repeats for _, repeats in groups)
        self.remat, self.unroll = remat, unroll

    def __len__(self) -> int:
        return sum(len(group) * repeats for group, repeats in zip(self.groups, self.repeats, strict=True))

    def __iter__(self) -> Iterator[Any]:
        """Yields the blocks, first to last, each a copy of its part of the stack."""
        for group, repeats in zip(self.groups, self.repeats, strict=True):
            for i in range(repeats):
                for block in group:
                    yield block if repeats == 1 else _piece(block, i)

    def states(self, layers: Sequence[Any]) -> tuple[Any, ...]:
        """Returns states of all layers as those of a stack: one for each block that is traced."""
        made, start = [], 0
        for group, repeats in zip(self.groups, self.repeats, strict=True):
            period = len(group)
            for i in range(period):
                own = layers[start + i : start + period * repeats : period]
                made.append(_stacked(own) if repeats > 1 else own[0])
            start += period * repeats
        return tuple(made)

    def layer_states(self, states: Sequence[Any]) -> tuple[Any, ...]:
        """Returns one state for each layer: the inverse of `states`."""
        made, start = [], 0
        for group, repeats in zip(self.groups, self.repeats, strict=True):
            own = states[start : start + len(group)]
            made += [state if repeats == 1 else _piece(state, i) for i in range(repeats) for state in own]
            start += len(group)
        return tuple(made)

    def run(self, call: Call, x: Any, states: Sequence[Any] | None) -> tuple[Any, tuple[Any, ...]]:
        """Returns what `run_blocks` does; states as a stack has them."""
        after: list[Any] = []
        start = 0
        for group, repeats in zip(self.groups, self.repeats, strict=True):
            own = None if states is None else tuple(states[start : start + len(group)])
            run = self._scan if repeats > 1 else self._once
            x, own = run(call, group, repeats, x, own)
            after += own
            start += len(group)
        return x, tuple(after)

    def _once(self, call: Call, group: Any, repeats: int, x: Any, states: Any) -> tuple[Any, tuple[Any, ...]]:
        return self._remembered(lambda x, group, states: _in_turn(call, group, x, states))(x, tuple(group), states)

    def _scan(self, call: Call, group: Any, repeats: int, x: Any, states: Any) -> tuple[Any, tuple[Any, ...]]:
        if states is None:

            def step(x: Any, blocks: Any) -> tuple[Any, Any]:
                return _in_turn(call, blocks, x, None)

            return jax.lax.scan(self._remembered(step), x, tuple(group), unroll=self.unroll)

        def step_with(carry: Any, at: Any) -> tuple[Any, None]:
            (x, states), (i, blocks) = carry, at
            here = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), states)
            x, here = _in_turn(call, blocks, x, here)
            put = jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0), states, here)
            return (x, put), None

        places = jnp.arange(repeats, dtype=jnp.int32)
        carry = (x, states)
        (x, states), _ = jax.lax.scan(self._remembered(step_with), carry, (places, tuple(group)), unroll=self.unroll)
        return x, states

    def _remembered(self, step: Callable[..., Any]) -> Callable[..., Any]:
        if self.remat is False:
            return step
        return jax.checkpoint(step, prevent_cse=False, policy=None if self.remat is True else self.remat)


def run_blocks(blocks: Any, call: Call, x: Any, states: Sequence[Any] | None = None) -> tuple[Any, tuple[Any, ...]]:
    """Returns what the last block makes of x, and the blocks' states after it.

    Args:
        blocks: a list of blocks, or a `Stack`.
        call: `(block, x, state) -> (x, state)`; x keeps its shape and dtype.
        x: what goes through.
        states: of each layer; with a stack also as it returns them. None: each block gets None.

    In the program each block of a list has the name scope `blocks/3`, however many share one jitted function.
    States come back in the form in which they were given; from a stack that got None, in that of the stack.
    """
    if not isinstance(blocks, Stack):
        return _in_turn(call, blocks, x, states, scope="blocks/")
    by_layer = states is not None and len(states) == len(blocks)
    x, after = blocks.run(call, x, blocks.states(states) if states is not None and by_layer else states)
    return x, blocks.layer_states(after) if by_layer else after


def groups_of(kinds: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """Returns (period, repeats) of groups that follow each other and cover all kinds, with the fewest periods in all.

    >>> groups_of("AABAABA")
    ((3, 2), (1, 1))
    """
    count = len(kinds)
    # best[i]: blocks that are traced, groups, and the groups themselves, for kinds[i:].
    best: list[tuple[int, int, tuple[tuple[int, int], ...]]] = [(0, 0, ())] * (count + 1)
    for start in reversed(range(count)):
        choices = []
        for period in range(1, (count - start) // 2 + 1):
            end = start + period
            while end < count and kinds[end] == kinds[end - period]:
                end += 1
            choices += [(period, repeats) for repeats in range(2, (end - start) // period + 1)]
        found = []
        for period, repeats in (*choices, (1, 1)):
            blocks, groups, rest = best[start + period * repeats]
            found.append((blocks + period, groups + 1, ((period, repeats), *rest)))
        best[start] = min(found, key=lambda choice: (*choice[:2], -choice[2][0][0] * choice[2][0][1]))
    return best[0][2]


def _in_turn(
    call: Call, blocks: Any, x: Any, states: Sequence[Any] | None, scope: str = ""
) -> tuple[Any, tuple[Any, ...]]:
    after = []
    for i, block in enumerate(blocks):
        # Blocks of one kind share a jitted function: the name of a block stands around the call, which keeps it shared.
        with jax.named_scope(f"{scope}{i}") if scope else contextlib.nullcontext():
            x, state = call(block, x, None if states is None else states[i])
        after.append(state)
    return x, tuple(after)


def _kind(block: Any) -> Any:
    leaves, structure = jax.tree.flatten(block)
    return structure, tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves)


def _stacked(trees: Sequence[Any]) -> Any:
    def one(*leaves: Any) -> Any:
        if isinstance(leaves[0], jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
        return jnp.stack(leaves)

    return jax.tree.map(one, *trees)


def _piece(tree: Any, i: int) -> Any:
    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return leaf[i]

    return jax.tree.map(one, tree)
