"""Blocks whose weights lie on disk: run like a `Stack`, each block's weights fetched when its turn comes.

    for each layer in turn:  weights = shelf.inside(layer);  x, state = call(block(weights), x, state)

The module has no arrays of its own. Layers of equal structure share one traced block and a loop, as in
`trustcore.nn.stack`; a block's weights are temporaries of the loop's body, so that a program holds those of one layer
and the system's page cache those that are read ahead. Weights are constants to derivatives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from trustcore.memory.shelf import Shelf
from trustcore.nn.stack import Call, Stack, groups_of


class ShelvedStack(Stack):
    """See the head of this file.

    Args:
        shelf: holds the blocks.
        numbers: of the blocks there, first to last.
    """

    def __init__(self, shelf: Shelf, numbers: Sequence[int]):
        self.shelf, self.numbers = shelf, tuple(numbers)
        kinds = [_kind(shelf.shapes(number)) for number in numbers]
        groups = groups_of([kinds.index(kind) for kind in kinds])
        self.periods = tuple(period for period, _ in groups)
        self.repeats = tuple(repeats for _, repeats in groups)
        self.groups: Any = nnx.List([])  # no weights here
        self.remat, self.unroll = False, 1

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Any]:
        """Yields the blocks, first to last, each read when it is asked for."""
        for number in self.numbers:
            yield jax.tree.map(jnp.array, self.shelf.fetch(number))

    def states(self, layers: Sequence[Any]) -> tuple[Any, ...]:
        """See `Stack`."""
        made, start = [], 0
        for period, repeats in zip(self.periods, self.repeats, strict=True):
            for i in range(period):
                own = layers[start + i : start + period * repeats : period]
                made.append(jax.tree.map(lambda *x: jnp.stack(x), *own) if repeats > 1 else own[0])
            start += period * repeats
        return tuple(made)

    def layer_states(self, states: Sequence[Any]) -> tuple[Any, ...]:
        """See `Stack`."""
        made, start = [], 0
        for period, repeats in zip(self.periods, self.repeats, strict=True):
            own = states[start : start + period]
            for i in range(repeats):
                made += [s if repeats == 1 else jax.tree.map(lambda leaf, i=i: leaf[i], s) for s in own]
            start += period
        return tuple(made)

    def run(self, call: Call, x: Any, states: Sequence[Any] | None) -> tuple[Any, tuple[Any, ...]]:
        """See `Stack`."""
        after: list[Any] = []
        first = start = 0
        for period, repeats in zip(self.periods, self.repeats, strict=True):
            own = None if states is None else tuple(states[start : start + period])
            x, own = self._group(call, first, period, repeats, x, own)
            after += own
            start, first = start + period, first + period * repeats
        return x, tuple(after)

    def _group(
        self, call: Call, first: int, period: int, repeats: int, x: Any, states: Any
    ) -> tuple[Any, tuple[Any, ...]]:
        numbers = jnp.asarray(self.numbers, jnp.int32)

        def turn(x: Any, repeat: Any, states: Any) -> tuple[Any, tuple[Any, ...]]:
            after = []
            for j in range(period):
                layer = first + repeat * period + j
                following = (layer + 1) % len(self.numbers)  # behind the last, the first: the next token wants it
                block = self.shelf.inside(numbers[layer], self.numbers[first + j], x, numbers[following])
                x, state = call(block, x, None if states is None else states[j])
                after.append(state)
            return x, tuple(after)

        if repeats == 1:
            return turn(x, 0, states)
        places = jnp.arange(repeats, dtype=jnp.int32)
        if states is None:
            return jax.lax.scan(lambda x, i: turn(x, i, None), x, places)

        def step(carry: Any, i: Any) -> tuple[Any, None]:
            x, states = carry
            here = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), states)
            x, here = turn(x, i, here)
            put = jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0), states, here)
            return (x, put), None

        (x, states), _ = jax.lax.scan(step, (x, states), places)
        return x, states


def _kind(shapes: Any) -> Any:
    leaves, structure = jax.tree.flatten(shapes)
    return structure, tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves)
