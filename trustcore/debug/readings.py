"""Everything that was measured in one call, found by equation and turn, in the order in which it was computed."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from trustcore.debug.statistics import Statistics, of
from trustcore.debug.tap import Flag, Hits, Page, StatisticsTap, is_float, pages, scaled
from trustcore.graph import Node, Origin, Program, Scope, aval, origins
from trustcore.graph.observe import Sheets, index_of
from trustcore.ops.statistics import FLOATS


class Place(NamedTuple):
    """One output of one equation in one turn of the loops around, on one shard."""

    node: Node
    output: int
    turns: tuple[int, ...]
    shard: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Sorts places in the order in which they are computed."""
        return _order(self.node, self.turns)

    @property
    def index(self) -> tuple[int, ...]:
        """The turns in the order of what the loops walk over."""
        return index_of(self.node, self.turns)


NAN, POSITIVE, NEGATIVE, ZEROS = (len(FLOATS) + i for i in (1, 2, 3, 0))
HUGE = len(FLOATS) + 6


class Readings:
    """Statistics of a call.

    Args:
        program: what ran.
        tap: what measured.
        sheets: what it gave, on the host.
        arguments: statistics of each input of the program; None for what holds no floats.
        results: the same of its outputs.
    """

    def __init__(
        self,
        program: Program,
        tap: StatisticsTap,
        sheets: Sheets,
        arguments: Sequence[Statistics | None],
        results: Sequence[Statistics | None],
    ):
        self.program, self.tap = program, tap
        self.arguments, self.results = tuple(arguments), tuple(results)
        found, self.counted = pages(tap, program, sheets)
        self.pages: list[Page] = found
        self._pages: dict[int, dict[tuple[Any, Any], Page]] = {}
        for page in found:
            self._pages.setdefault(page.scope.number, {})[page.turns, page.shard] = page
        self._slots = {
            (slot.node.number, slot.output): i for slots in tap.slots.values() for i, slot in enumerate(slots)
        }
        self._decoded: dict[Any, Statistics] = {}

    def measured(self) -> Iterator[tuple[Page, int, Place]]:
        """Yields every measured output with its page and its row there, in no particular order."""
        for page in self.pages:
            for i, slot in enumerate(self.tap.slots[page.scope.number]):
                yield page, i, Place(slot.node, slot.output, page.turns, page.shard)

    def first(self, column: int, *more: int) -> list[Place]:
        """Returns the first place of every equation at which one of these words is not 0, in order."""
        best: dict[tuple[int, int], Place] = {}
        for page in self.pages:
            slots = self.tap.slots[page.scope.number]
            wrong = np.flatnonzero(page.words[:, [column, *more]].any(axis=1)) if len(slots) else ()
            for i in wrong:
                place = Place(slots[i].node, slots[i].output, page.turns, page.shard)
                key = (slots[i].node.number, slots[i].output)
                if key not in best or (place.order, place.shard) < (best[key].order, best[key].shard):
                    best[key] = place
        return sorted(best.values(), key=lambda place: (place.order, place.shard))

    def of(self, place: Place) -> Statistics | None:
        """Returns the statistics of a place; None where it was not measured."""
        found = self.at(Origin(place.node, place.output, place.turns), place.shard)
        return found[0][1] if found else None

    def at(self, origin: Origin, shard: tuple[int, ...]) -> list[tuple[Place | int | None, Statistics]]:
        """Returns the statistics of what gave a value, each with its place or the number of the argument.

        Several where the value is made of many turns or shards; none where nothing was measured.
        """
        if origin.argument is not None:
            stats = self.arguments[origin.argument]
            return [(origin.argument, stats)] if stats is not None else []
        node = origin.node
        if node is None:
            stats = _constant(origin.value)
            return [(None, stats)] if stats is not None else []
        if node.number in self.tap.moved:
            return self._moved(origin, node, shard)
        row = self._slots.get((node.number, origin.output))
        if row is None:
            return []
        own = self._pages.get(node.scope.number, {})
        places = [Place(node, origin.output, *key) for key in self._keys(own, node.scope, origin.turns, shard)]
        return [(place, self._read(own[place.turns, place.shard], row, place)) for place in places]

    def inputs(self, place: Place) -> list[list[tuple[Place | int | None, Statistics]]]:
        """Returns for each input of an equation what gave it, and the statistics of that."""
        found = []
        for atom in place.node.eqn.invars:
            here = []
            if is_float(atom.aval):
                for origin in origins(place.node.scope, atom, place.turns):
                    here += self.at(origin, place.shard)
            found.append(here)
        return found

    def hits(self, flag_of: Any) -> Iterator[tuple[Place, int, bool]]:
        """Yields where the flags that `flag_of` selects were raised, how often, and whether in that turn alone."""
        for page in self.pages:
            loops = [scope for scope in page.scope.around if scope.kind in ("while", "test")]
            if loops:
                continue
            for flag, raised in zip(self.tap.flags[page.scope.number], page.flags, strict=True):
                if raised and flag_of(flag):
                    yield Place(flag.slot.node, flag.slot.output, page.turns, page.shard), 1, True
        for counted in self.counted:
            yield from _counted(self.tap.flags[counted.scope.number], counted, flag_of)

    def _moved(self, origin: Origin, node: Node, shard: tuple[int, ...]) -> list[tuple[Place | int | None, Statistics]]:
        turns = tuple(origin.turns)
        found = [o for o in origins(node.scope, node.eqn.invars[0], turns)]
        shape = aval(node.eqn.outvars[0]).shape
        return [(where, scaled(stats, shape)) for o in found for where, stats in self.at(o, shard)]

    def _keys(
        self, own: dict[tuple[Any, Any], Page], scope: Scope, turns: Sequence[int | None], shard: tuple[int, ...]
    ) -> list[tuple[Any, Any]]:
        shards = sum(s.kind == "shard" for s in scope.around)
        exact = (tuple(turns), tuple(shard[:shards]))
        if exact in own:
            return [exact]
        found = [key for key in own if _fits(key[0], turns) and key[1][: len(shard)] == shard[: len(key[1])]]
        if any(turn == -1 for turn in turns):
            last = max((key[0] for key in found), default=())
            found = [key for key in found if key[0] == last]
        if not found and any(s.kind in ("while", "test") for s in scope.around):
            found = self._nearest(own, tuple(turns), shard)
        return found

    def _nearest(
        self, own: dict[tuple[Any, Any], Page], turns: tuple[int | None, ...], shard: tuple[int, ...]
    ) -> list[tuple[Any, Any]]:
        """The last page kept of a `while` up to a turn: what was bad in it is so from then on."""
        if any(turn is None or turn < 0 for turn in turns):
            return []
        found = [key for key in own if key[0] <= turns and key[1][: len(shard)] == shard[: len(key[1])]]
        last = max((key[0] for key in found), default=())
        return [key for key in found if key[0] == last]

    def _read(self, page: Page, row: int, place: Place) -> Statistics:
        key = (place.node.number, place.output, page.turns, page.shard)
        if key not in self._decoded:
            kind = aval(place.node.eqn.outvars[place.output])
            self._decoded[key] = Statistics.from_words(page.words[row], kind.shape, kind.dtype)
        return self._decoded[key]


def _fits(turns: tuple[int, ...], wanted: Sequence[int | None]) -> bool:
    return all(w is None or w in (-1, t) for t, w in zip(turns, wanted, strict=True))


def _counted(flags: Sequence[Flag], counted: Hits, flag_of: Any) -> Iterator[tuple[Place, int, bool]]:
    count = counted.count.reshape(-1, len(flags)).sum(0)
    first = counted.first_turn.reshape(-1, len(flags))
    for i, flag in enumerate(flags):
        if count[i] and flag_of(flag):
            depth = len(counted.scope.loops) - len(counted.turns) - 1
            turn = min(int(t) for t in first[:, i] if t >= 0)
            yield (
                Place(flag.slot.node, flag.slot.output, (*counted.turns, turn, *[0] * depth), counted.shard),
                int(count[i]),
                False,
            )


def _order(node: Node, turns: Sequence[int]) -> tuple[int, ...]:
    key: list[int] = []
    left = list(turns)
    for scope in node.scope.around[1:]:
        assert scope.owner is not None
        key.append(scope.owner.index)
        if scope.kind in ("scan", "while", "test"):
            key.append(left.pop(0))
        key.append(scope.branch)
    return (*key, node.index)


def _constant(value: Any) -> Statistics | None:
    if value is None or not is_float(getattr(value, "aval", None) or np.asarray(value)):
        return None
    return _of_constant(_Constant(value))


class _Constant:
    """A constant, told from others by being the same object."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constant) and other.value is self.value


@functools.lru_cache(maxsize=256)
def _of_constant(constant: _Constant) -> Statistics:
    return of(np.asarray(constant.value) if np.ndim(constant.value) == 0 else constant.value)
