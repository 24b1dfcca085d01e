"""What was seen in one call: issues, statistics, hits of watches, the operations that ran.

Nothing is fetched from the device before it is asked for. `print(report)` and rich show tables, `to_json` plain data,
`to_html` one page that needs nothing else. Notebooks show that page, its tree drawn by treescope where that is there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trustcore.debug.diagnosis import Diagnosis
from trustcore.debug.issues import Issue, Severity
from trustcore.debug.readings import Place, Readings
from trustcore.debug.statistics import Statistics
from trustcore.debug.tap import StatisticsTap
from trustcore.debug.watch import Watch
from trustcore.errors import DebugError
from trustcore.graph import Address
from trustcore.graph.modules import Traced
from trustcore.graph.observe import as_numpy, index_of
from trustcore.graph.program import described

if TYPE_CHECKING:
    from trustcore.debug.snapshot import Snapshot
    from trustcore.debug.stepping import Times


@dataclasses.dataclass(frozen=True)
class Reading:
    """The statistics of one output of an equation in one turn.

    Attributes:
        address: of the equation.
        output: which of its outputs.
        turns: of the loops around, in the order of what they walk over.
        shard: of the `shard_map`s around, which device.
        statistics: of the value.
    """

    address: Address
    output: int
    turns: tuple[int, ...]
    shard: tuple[int, ...]
    statistics: Statistics

    @property
    def where(self) -> str:
        """Address with turns and shard."""
        shard = f" on shard {', '.join(map(str, self.shard))}" if self.shard else ""
        return described(self.address, self.turns) + shard


@dataclasses.dataclass(frozen=True)
class Hit:
    """How often a watch held.

    Attributes:
        watch: the watch.
        count: in how many places, turns and shards.
        first: where first, in the order of the program; "" without a hit.
    """

    watch: Watch
    count: int
    first: str


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation that ran.

    Attributes:
        address: of its equation.
        turns: of the loops around, in the order of what they walk over.
        inputs, outputs: dtype and shape of each.
        seconds: how long it took alone; None where that was not measured.
    """

    address: Address
    turns: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    seconds: float | None = None

    def __str__(self) -> str:
        time = "" if self.seconds is None else f"  {self.seconds * 1e3:.3f} ms"
        return f"{described(self.address, self.turns)}: {', '.join(self.inputs)} -> {', '.join(self.outputs)}{time}"


class Report:
    """See the head of this file.

    Attributes:
        traced: the function's program.
        history: the operations that ran, if they were asked for; the first `limit` of them.
    """

    def __init__(
        self,
        traced: Traced,
        tap: StatisticsTap,
        measured: Any,
        *,
        baseline: Mapping[str, Mapping[str, Any]] | None,
        limit: int,
        watches: Sequence[Watch] = (),
        times: Times | None = None,
        leaves: Sequence[Any] | None = None,
    ):
        self.traced, self._tap, self._measured = traced, tap, measured
        self._baseline, self._limit = baseline, limit
        self._watches, self._times, self._leaves = tuple(watches), times, leaves

    @property
    def pending(self) -> Any:
        """What is still on the device, or on its way there; None once it was read."""
        return self._measured

    @functools.cached_property
    def readings(self) -> Readings:
        """Everything that was measured, on the host."""
        from trustcore.debug.inspector import measured_statistics

        sheets, arguments, results = as_numpy(self._measured)
        inner = self.traced.program.jaxpr.jaxpr
        self._measured = None
        return Readings(
            self.traced.program,
            self._tap,
            sheets,
            measured_statistics(arguments, [var.aval for var in inner.invars]),
            measured_statistics(results, [var.aval for var in inner.outvars]),
        )

    @functools.cached_property
    def all_issues(self) -> tuple[Issue, ...]:
        """All issues, worst first; those of severity INFO too."""
        found = Diagnosis(self.readings, self.traced.out_names, self._baseline).issues()
        return tuple(found[: self._limit])

    @property
    def issues(self) -> tuple[Issue, ...]:
        """The issues that are likely faults (WARNING and above), worst first."""
        return tuple(issue for issue in self.all_issues if issue.severity >= Severity.WARNING)

    @functools.cached_property
    def statistics(self) -> tuple[Reading, ...]:
        """The statistics of every watched value, in the order of the program."""
        readings = self.readings
        places = [place for _, _, place in readings.measured()]
        where = {(p.scope.number, p.turns, p.shard) for p in readings.pages}
        for number in self._tap.moved:
            node = readings.program.nodes[number]
            for scope, turns, shard in where:
                if scope == node.scope.number:
                    places.append(Place(node, 0, turns, shard))
            if node.scope.owner is None and not any(scope == 0 for scope, _, _ in where):
                places.append(Place(node, 0, (), ()))
        found = []
        for place in sorted(places, key=lambda place: (place.order, place.shard)):
            stats = readings.of(place)
            if stats is not None:
                found.append(Reading(place.node.address, place.output, place.index, place.shard, stats))
        return tuple(found)

    @property
    def arguments(self) -> dict[str, Statistics]:
        """The statistics of the arguments that hold floats."""
        return {n: s for n, s in zip(self.traced.program.arguments, self.readings.arguments, strict=True) if s}

    @property
    def results(self) -> dict[str, Statistics]:
        """The statistics of the results that hold floats."""
        return {n: s for n, s in zip(self.traced.out_names, self.readings.results, strict=True) if s}

    def find(self, pattern: str) -> list[Reading]:
        """Returns the statistics of the values whose addresses fit a glob."""
        return [reading for reading in self.statistics if reading.address.matches(pattern)]

    @functools.cached_property
    def hits(self) -> tuple[Hit, ...]:
        """How often each watch with a condition held, and where first."""
        found = []
        for i, watch in enumerate(self._watches):
            if watch.condition is None:
                continue
            if watch.condition.seconds is not None and self._times is not None:
                count, node, turns = self._times.slow.get(i, (0, None, ()))
                found.append(Hit(watch, count, described(node.address, index_of(node, turns)) if node else ""))
                continue
            places = [(p, n) for p, n, _ in self.readings.hits(lambda flag, i=i: flag.watch == i)]
            places.sort(key=lambda pair: (pair[0].order, pair[0].shard))
            first = described(places[0][0].node.address, places[0][0].index) if places else ""
            found.append(Hit(watch, sum(n for _, n in places), first))
        return tuple(found)

    def first_stop(self) -> tuple[Watch, Place] | None:
        """Returns the first hit of a watch that stops, and the watch; None without one."""
        stops = {i for i, watch in enumerate(self._watches) if watch.stop}
        if not stops:
            return None
        best: tuple[Any, Watch, Place] | None = None
        for i, watch in enumerate(self._watches):
            if watch.stop and self._times is not None and i in self._times.slow:
                _, node, turns = self._times.slow[i]
                place = Place(node, 0, turns, ())
                if best is None or place.order < best[0][0]:
                    best = ((place.order, ()), watch, place)
        for i in stops:
            for place, _, _ in self.readings.hits(lambda flag, i=i: flag.watch == i):
                if best is None or (place.order, place.shard) < best[0]:
                    best = ((place.order, place.shard), self._watches[i], place)
        return None if best is None else best[1:]

    @functools.cached_property
    def history(self) -> tuple[Operation, ...]:
        """The operations that ran, in their order; empty unless `trace` asked for them."""
        if self._times is not None:
            return tuple(self._times.history)
        if self._leaves is None:
            return ()
        ran = sorted({(p.order, p.node.number, p.turns) for _, _, p in self.readings.measured()})[: self._limit]
        nodes = self.traced.program.nodes
        return tuple(operation(nodes[n], Place(nodes[n], 0, turns, ()).index) for _, n, turns in ran)

    def replay(self, pattern: str = "*", *, limit: int | None = None) -> list[Snapshot]:
        """Returns the operations that fit a glob, run again one by one, each with its inputs and outputs on the host.

        Args:
            pattern: over addresses.
            limit: how many, in the order in which they run; None: the limit of `inspect`.

        Raises:
            DebugError: the call was not traced (`inspect(trace=True)`), or an argument was donated since.
        """
        from trustcore.debug.inspector import check_arguments
        from trustcore.debug.stepping import replayed

        if self._leaves is None:
            raise DebugError("replay: the arguments were not kept; trace the call with inspect(fn, trace=True).")
        check_arguments(self._leaves, self.traced.program.arguments)
        return replayed(self.traced.program, self._leaves, pattern, self._limit if limit is None else limit)

    def baseline(self) -> dict[str, dict[str, Any]]:
        """Returns what is usual, for `inspect(baseline=...)`: plain data by address, turn and output."""
        return {
            f"{described(r.address, r.turns)}:{r.output}": {
                "rms": r.statistics.rms,
                "mean": r.statistics.mean,
                "std": r.statistics.std,
            }
            for r in self.statistics
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain data."""
        return {
            "issues": [issue.to_dict() for issue in self.all_issues],
            "watches": [{"watch": str(h.watch), "count": h.count, "first": h.first} for h in self.hits],
            "arguments": {name: s.to_dict() for name, s in self.arguments.items()},
            "results": {name: s.to_dict() for name, s in self.results.items()},
            "statistics": [
                {"where": r.where, "path": r.address.at(r.turns), "output": r.output, **r.statistics.to_dict()}
                for r in self.statistics
            ],
            "history": [str(op) for op in self.history],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """Returns all of it as JSON, and writes it if a path is given."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, default=_plain)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """Returns a page that needs nothing else, and writes it if a path is given."""
        from trustcore.debug.show import page

        text = page(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def tree(self) -> dict[str, Any]:
        """Returns the statistics as nested dicts by path, one level for each scope."""
        from trustcore.debug.show import tree

        return tree(self)

    def __rich__(self) -> Any:
        from trustcore.debug.show import tables

        return tables(self)

    def __str__(self) -> str:
        from trustcore.debug.show import plain

        return plain(self)

    def __repr__(self) -> str:
        return f"<Report: {len(self.issues)} issues, {len(self.statistics)} values>"

    def _repr_html_(self) -> str:
        from trustcore.debug.interactive import has_treescope, tree_html
        from trustcore.debug.show import fragment

        return fragment(self, tree_html(self) if has_treescope() else None)


def operation(node: Any, index: tuple[int, ...], seconds: float | None = None) -> Operation:
    """Returns what a history says of an equation."""
    kinds = [tuple(_kind(atom.aval) for atom in atoms) for atoms in (node.eqn.invars, node.eqn.outvars)]
    return Operation(node.address, index, kinds[0], kinds[1], seconds)


def _kind(aval: Any) -> str:
    return aval.str_short() if hasattr(aval, "str_short") else str(aval)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
