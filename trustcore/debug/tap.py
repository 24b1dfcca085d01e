"""The tap that takes statistics: what it measures inside the program, and the readings that come of it on the host.

    leaf equation -> words of each float output [80], a flag for each watch with a condition that fits; within a
                     `while`, which keeps few of its turns, a flag for not finite, too
    scope         -> one sheet: words, a list of [80]; flags [F]      stacked and carried by `trustcore.graph.observe`
    sheets        -> pages: one for each turn (shard, branch) that ran, words [outputs, 80]

What only moves or copies elements is not measured: its readings are those of its input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustcore import _jax
from trustcore.debug.statistics import Statistics
from trustcore.debug.watch import Watch
from trustcore.graph import Node, Program, Scope, aval
from trustcore.graph.observe import Record, Sheet, Sheets, leading
from trustcore.ops.statistics import WORDS, native_refusal, statistics, worst_bits

# Primitives whose output holds exactly the elements of their first input, each equally often.
MOVES = frozenset(
    {
        "broadcast_in_dim",
        "copy",
        "copy_p",
        "expand_dims",
        "name",
        "pvary",
        "reshape",
        "reshard",
        "rev",
        "sharding_constraint",
        "squeeze",
        "stop_gradient",
        "transpose",
    }
)


def is_float(kind: Any) -> bool:
    """Returns whether statistics can be taken of values of a type."""
    dtype = getattr(kind, "dtype", None)
    return dtype is not None and dtype != jax.dtypes.float0 and jnp.issubdtype(dtype, jnp.inexact)


def is_array(kind: Any) -> bool:
    """Returns whether values of a type are plain arrays: no keys, no references."""
    dtype = getattr(kind, "dtype", None)
    return dtype is not None and dtype != jax.dtypes.float0 and not jnp.issubdtype(dtype, jax.dtypes.extended)


class Slot(NamedTuple):
    """An output of an equation within a sheet."""

    node: Node
    output: int


class Flag(NamedTuple):
    """What a flag of a sheet says: a slot is not finite (watch None), or a watch holds of it."""

    slot: Slot
    watch: int | None


class StatisticsTap:
    """See `trustcore.graph.Tap`.

    Attributes:
        slots: for each scope, the measured outputs in the order of its sheet's words.
        flags: for each scope, what its flags say.
    """

    def __init__(self, program: Program, watches: Sequence[Watch], *, native: bool):
        self.watches, self.native = tuple(watches), native
        self.slots: dict[int, list[Slot]] = {}
        self.flags: dict[int, list[Flag]] = {}
        self.fits: dict[int, tuple[int, ...]] = {}
        for node in program.nodes:
            found = tuple(i for i, watch in enumerate(self.watches) if node.address.matches(watch.pattern))
            if found and not node.bodies:
                self.fits[node.number] = found
        self.moved = {n for n in self.fits if self._is_moved(program, program.nodes[n])}

    def _is_moved(self, program: Program, node: Node) -> bool:
        if node.eqn.primitive.name not in MOVES or any(self.watches[i].condition for i in self.fits[node.number]):
            return False
        source = node.eqn.invars[0]
        if hasattr(source, "val") or aval(source).dtype != aval(node.eqn.outvars[0]).dtype:
            return False
        if source in node.scope.producers:
            before = node.scope.producers[source][0]
            return before.number in self.fits and not before.bodies
        return node.scope is program.root

    def wants(self, node: Node) -> bool:
        """See `Tap`."""
        if node.number not in self.fits or node.number in self.moved:
            return False
        conditional = any(self.watches[i].condition for i in self.fits[node.number])
        return any(is_float(var.aval) or (conditional and is_array(var.aval)) for var in node.eqn.outvars)

    def see(self, node: Node, inputs: Sequence[Any], outputs: Sequence[Any]) -> Record:
        """See `Tap`."""
        words, bad, hits = {}, {}, {}
        for i, x in enumerate(outputs):
            kind = aval(node.eqn.outvars[i])
            if is_float(kind):
                words[i] = self.words(x)
                if any(scope.kind in ("while", "test") for scope in node.scope.around):
                    bad[i] = self.is_bad(node, words[i], inputs)
            for w in self.fits[node.number]:
                condition = self.watches[w].condition
                if condition is not None and is_array(kind):
                    hits[i, w] = condition(x)
        return {"words": words, "bad": bad, "hits": hits}

    def is_bad(self, node: Node, words: jax.Array, inputs: Sequence[Any]) -> jax.Array:
        """Returns whether an output has NaN, or Inf that no input has."""
        nan, inf = words[7] > 0, jnp.any(words[8:10] > 0)
        for x, var in zip(inputs, node.eqn.invars, strict=True):
            if is_float(var.aval):
                inf = jnp.logical_and(inf, worst_bits(jnp.asarray(x)) < np.uint32(0x7F800000))
        return jnp.logical_or(nan, inf)

    def words(self, x: jax.Array) -> jax.Array:
        """Returns the statistics of an array as words."""
        native = self.native and not _jax.varying(x) and not native_refusal(x.dtype)
        return statistics(x, implementation="native" if native else "xla")

    def sheet(self, scope: Scope, records: dict[int, Record]) -> Sheet:
        """See `Tap`."""
        slots, flags, words, raised = [], [], [], []
        nodes = {node.number: node for node in scope.nodes}
        for number, record in records.items():
            for i, vector in record["words"].items():
                slot = Slot(nodes[number], i)
                slots.append(slot)
                words.append(vector)
                if i in record["bad"]:
                    flags.append(Flag(slot, None))
                    raised.append(record["bad"][i])
            for (i, w), hit in record["hits"].items():
                flags.append(Flag(Slot(nodes[number], i), w))
                raised.append(hit)
        self.slots[scope.number], self.flags[scope.number] = slots, flags
        # Words are not joined: XLA's CPU compiler takes minutes for a concatenation of a thousand arrays.
        return {"words": words} | ({"flags": jnp.stack(raised).astype(jnp.uint8)} if raised else {})

    def keep(self, scope: Scope, turn: jax.Array) -> None:
        """See `Tap`: every turn is kept."""
        return None


@dataclasses.dataclass(frozen=True)
class Page:
    """The sheet of a scope in one turn of the loops around.

    Attributes:
        scope: whose sheet it is.
        turns: of the loops around, outermost first, in the order in which they ran.
        shard: the device's place for each `shard_map` around.
        words: `[slots, WORDS]`.
        flags: `[F]`.
    """

    scope: Scope
    turns: tuple[int, ...]
    shard: tuple[int, ...]
    words: np.ndarray
    flags: np.ndarray


@dataclasses.dataclass(frozen=True)
class Hits:
    """How often a flag was raised within a `while`, which keeps no page for each turn."""

    scope: Scope
    turns: tuple[int, ...]
    shard: tuple[int, ...]
    count: np.ndarray
    first_turn: np.ndarray


def pages(tap: StatisticsTap, program: Program, sheets: Sheets) -> tuple[list[Page], list[Hits]]:
    """Returns the pages of all sheets (on the host), and the counts of the loops that keep few of them."""
    found: list[Page] = []
    counted: list[Hits] = []
    for number, sheet in sheets.items():
        scope = program.scopes[number]
        for turns, shard, part, hits in _opened(leading(scope), sheet, (), ()):
            if hits is not None:
                counted.append(Hits(scope, turns, shard, *hits))
            elif int(part["ran"]):
                words = np.stack(part["words"]) if part["words"] else np.zeros((0, WORDS), np.uint32)
                flags = np.asarray(part.get("flags", np.zeros(0, np.uint8)))
                found.append(Page(scope, turns, shard, words, flags))
    return found, counted


def _opened(
    around: Sequence[Scope], sheet: Any, turns: tuple[int, ...], shard: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Any, Any]]:
    if not around:
        yield turns, shard, sheet, None
        return
    scope, rest = around[0], around[1:]
    if scope.kind == "scan":
        assert scope.owner is not None
        length, backwards = scope.owner.eqn.params["length"], scope.owner.eqn.params["reverse"]
        for turn in range(length):
            at = length - 1 - turn if backwards else turn
            yield from _opened(rest, _at(sheet, at), (*turns, turn), shard)
    elif scope.kind == "shard":
        for device in range(len(jax.tree.leaves(sheet)[0])):
            yield from _opened(rest, _at(sheet, device), turns, (*shard, device))
    else:
        count = int(np.asarray(sheet["turns"]))
        if not count:
            return
        first = -1
        if "count" in sheet:
            yield turns, shard, None, (np.asarray(sheet["count"]), np.asarray(sheet["first_turn"]))
            first = min((int(t) for t in np.reshape(sheet["first_turn"], -1) if t >= 0), default=-1)
        if 0 <= first < count - 1:
            yield from _opened(rest, sheet["first"], (*turns, first), shard)
        yield from _opened(rest, sheet["last"], (*turns, count - 1), shard)


def _at(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], tree)


def scaled(stats: Statistics, shape: tuple[int, ...]) -> Statistics:
    """Returns the statistics of the same elements, each equally often, in another shape."""
    before = stats.size
    after = int(np.prod(shape, dtype=np.int64)) * (2 if stats.dtype.startswith("complex") else 1)
    times = after // before if before else 0
    counts = ("zeros", "nan", "inf", "negative_inf", "subnormal", "tiny", "huge")
    return dataclasses.replace(
        stats,
        shape=shape,
        norm=None if stats.norm is None else stats.norm * times**0.5,
        dead_units=None,
        zero_rows=None,
        histogram=tuple(b * times for b in stats.histogram),
        **{name: getattr(stats, name) * times for name in counts},
    )
