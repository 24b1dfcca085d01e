"""From readings to issues: where each thing that is wrong came into being, and what it led to.

A place is an origin of something (NaN, Inf, values above 1e6, ...) if its output has it and none of its inputs has.
What an origin led to is found backwards: from the results that have it, through every input that has it. An origin from
which nothing bad reaches a result is no more than information: programs that mask it out are healthy. Constants that
the program itself holds (a mask of -Inf or -1e9) are no origins.

What is large or small for a few operations of one module and then is not, as the squares in a norm and masks of large
numbers are, is no issue at all.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trustcore.debug.issues import Input, Issue, Severity, cause_of
from trustcore.debug.readings import HUGE, NAN, NEGATIVE, POSITIVE, ZEROS, Place, Readings
from trustcore.debug.statistics import Statistics
from trustcore.graph import Address, aval, origins
from trustcore.graph.program import described

Has = Callable[[Statistics], bool]
Node = Place | int  # a place, or the number of an argument

MOST_VISITED = 20_000
PASSING = 8  # equations through which a value may be large and come back; a norm has five: x^2, sum, / n, + eps, rsqrt
DEAD = 0.5  # of the units of a layer: a dead one in two
FEW_ROWS = 8  # below these, a unit that is zero in all rows may be so by chance
UNUSUAL = 10.0  # times the baseline's root mean square

# What makes zeros of values that are none: by underflow, or because everything was cut off.
_ZEROING = ("max", "dot_general", "gather", "exp", "exp2", "logistic", "mul", "div", "integer_pow", "pow", "square")

_SUMS = ("add", "add_any", "cumsum", "psum", "reduce_sum", "sub")

# What may hold elements of its inputs unchanged, such as a mask of -1e9.
_TAKING_OVER = ("select_n", "concatenate", "pad", "max", "min", "clamp", "scatter", "dynamic_update_slice", "copy")


def has_nan(s: Statistics) -> bool:
    """Returns whether there is a NaN."""
    return s.nan > 0


def has_inf(s: Statistics) -> bool:
    """Returns whether there is an infinity."""
    return s.inf + s.negative_inf > 0


def has_huge(s: Statistics) -> bool:
    """Returns whether something finite is above 1e6 in magnitude."""
    return s.huge > 0


def vanishes(s: Statistics) -> bool:
    """Returns whether all is below 1e-7 in magnitude, and not all zero."""
    return s.size > 1 and 0 < s.largest < 1e-7 and not s.bad


class Diagnosis:
    """Finds the issues of one call.

    Args:
        readings: what was measured.
        results: a name for each output of the program.
        baseline: statistics by address that are usual, as `Report.baseline` gives them.
    """

    def __init__(
        self, readings: Readings, results: Sequence[str], baseline: Mapping[str, Mapping[str, Any]] | None = None
    ):
        self.readings, self.results, self.baseline = readings, tuple(results), baseline
        self.forward = _forward(readings)
        self._onward: dict[Has, dict[Place, list[Place]]] = {}

    def issues(self) -> list[Issue]:
        """Returns all issues, worst first, those alike in the order of the program."""
        found: list[tuple[Any, Issue]] = [
            *self._nan(),
            *self._inf(),
            *self._exploding(),
            *self._vanishing(),
            *self._zeros(),
            *self._unusual(),
        ]
        found.sort(key=lambda pair: (-pair[1].severity, pair[0]))
        return [issue for _, issue in found]

    # ---- what may be wrong -------------------------------------------------------------------------------------------

    def _nan(self) -> Iterable[tuple[Any, Issue]]:
        reached, reaches = self._led_to(has_nan)
        for place in self.readings.first(NAN):
            if not self._has(place, has_nan):
                bad = place in reached
                chain = self._chain(place, has_inf)
                level = Severity.CRITICAL if bad else self._masked_or_unseen(has_nan)
                yield self._made("nan", level, place, reaches if bad else (), chain)
        yield from self._given("nan", has_nan, reached, reaches, Severity.CRITICAL, Severity.WARNING)

    def _inf(self) -> Iterable[tuple[Any, Issue]]:
        reached, reaches = self._led_to(has_inf)
        nan_reached, nan_reaches = self._led_to(has_nan)
        to_nan = self._back([p for p in nan_reached if isinstance(p, Place) and not self._has(p, has_nan)], has_inf)
        for place in self.readings.first(POSITIVE, NEGATIVE):
            if self._has(place, has_inf) or self._has(place, has_nan):
                continue
            bad = place in reached or place in to_nan
            names = (*(reaches if place in reached else ()), *(nan_reaches if place in to_nan else ()))
            level = Severity.ERROR if bad else self._masked_or_unseen(has_inf)
            yield self._made("inf", level, place, tuple(dict.fromkeys(names)))
        yield from self._given("inf", has_inf, {**reached, **to_nan}, reaches, Severity.ERROR, Severity.INFO)

    def _exploding(self) -> Iterable[tuple[Any, Issue]]:
        reached, reaches = self._led_to(has_huge)
        overflows = [p for p in self.readings.first(POSITIVE, NEGATIVE, NAN) if not self._has(p, _is_bad)]
        to_bad = self._back([p for p in overflows if p in self._led_to(_is_bad)[0]], has_huge)
        for place in self.readings.first(HUGE):
            if not self._grew(place) and not self._has(place, _is_bad):
                bad = place in reached or place in to_bad
                if bad or not (self._is_mask(place) or self._passes(place, has_huge)):
                    level = Severity.WARNING if bad else Severity.INFO
                    yield self._made("exploding", level, place, reaches if bad else ())
        yield from self._given("exploding", has_huge, {**reached, **to_bad}, reaches, Severity.WARNING, Severity.INFO)

    def _vanishing(self) -> Iterable[tuple[Any, Issue]]:
        reached, reaches = self._led_to(vanishes)
        done = set()
        for page, row, place in sorted(self.readings.measured(), key=lambda found: found[2].order):
            key = (place.node.number, place.output)
            floats = page.words[row, :2].view(np.float32)
            if key in done or not 0 < max(-floats[0], floats[1]) < 1e-7:
                continue
            stats = self.readings.of(place)
            backward = place.node.address.stage == "backward"
            underflow = stats is not None and stats.subnormal > 0.5 * max(stats.size - stats.zeros, 1)
            if stats is None or not vanishes(stats) or self._has(place, vanishes) or not (backward or underflow):
                continue
            done.add(key)
            bad = place in reached or (underflow and not backward)
            if self._cancels(place, stats) or (not bad and self._passes(place, vanishes)):
                continue
            cause = f"{stats.subnormal} of {stats.size} are subnormal" if underflow else ""
            yield self._made("vanishing", Severity.WARNING if bad else Severity.INFO, place, reaches, cause=cause)

    def _zeros(self) -> Iterable[tuple[Any, Issue]]:
        done = set()
        for page, row, place in sorted(self.readings.measured(), key=lambda found: found[2].order):
            key = (place.node.number, place.output)
            name = place.node.eqn.primitive.name
            if key in done or name not in _ZEROING or not page.words[row, ZEROS]:
                continue
            stats = self.readings.of(place)
            if stats is None or stats.size < 2:
                continue
            told = self.readings.inputs(place)[: 1 if name in ("max", "gather") else None]
            inputs = [s for found in told for _, s in found]
            shapes = [aval(atom).shape for atom in place.node.eqn.invars]
            parts = any(s.shape != shape for found, shape in zip(told, shapes, strict=False) for _, s in found)
            kind, cause = "zeros", ""
            dead = (stats.dead_units or 0) / stats.shape[-1] if stats.shape else 0.0
            rows = stats.size // stats.shape[-1] if stats.shape else 0
            if name == "gather" and stats.zero_rows and inputs and inputs[0].zero_rows and not inputs[0].all_zero:
                cause = f"{stats.zero_rows} of the {rows} rows taken are rows of zeros"
            elif name == "max" and rows >= FEW_ROWS and dead >= DEAD:
                kind, cause = "dead", f"{stats.dead_units} of {stats.shape[-1]} units are zero in all {rows} rows"
            elif stats.all_zero and name != "gather" and inputs and not parts and not any(s.all_zero for s in inputs):
                cause = (
                    "its inputs are not zero: they are cut off"
                    if name == "max"
                    else "its inputs are not: it underflows"
                )
            else:
                continue
            done.add(key)
            yield self._made(kind, Severity.WARNING, place, (), cause=cause)
        yield from self._unreached()

    def _unreached(self) -> Iterable[tuple[Any, Issue]]:
        """Gradients that are a constant zero: nothing that was differentiated depends on these arguments."""
        root = self.readings.program.root
        if not self.readings.program.differentiated:
            return
        for name, atom, stats in zip(self.results, root.jaxpr.jaxpr.outvars, self.readings.results, strict=True):
            if stats is None or not stats.all_zero or stats.size < 2:
                continue
            found = origins(root, atom, ())
            for origin in found:
                node = origin.node
                if (
                    node is None
                    or node.eqn.primitive.name != "broadcast_in_dim"
                    or not hasattr(node.eqn.invars[0], "val")
                ):
                    continue
                place = Place(node, 0, (), ())
                cause = f"{name} is a constant zero: nothing that was differentiated depends on it"
                yield self._made("zeros", Severity.WARNING, place, (name,), cause=cause, stats=stats)

    def _unusual(self) -> Iterable[tuple[Any, Issue]]:
        if self.baseline is None:
            return
        for page, _, place in sorted(self.readings.measured(), key=lambda found: found[2].order):
            usual = self.baseline.get(_key(place))
            stats = self.readings.of(place)
            if usual is None or stats is None or stats.bad or page.shard:
                continue
            before, now = usual.get("rms"), stats.rms
            if not before or now is None or 1 / UNUSUAL <= now / before <= UNUSUAL:
                continue
            if any(self._far(where) for found in self.readings.inputs(place) for where, _ in found):
                continue
            cause = f"its root mean square is {now:.4g}; in the baseline it is {before:.4g}"
            yield self._made("unusual", Severity.WARNING, place, (), cause=cause)

    def _far(self, where: Any) -> bool:
        """Whether a place is far from the baseline, too."""
        if not isinstance(where, Place) or self.baseline is None:
            return False
        usual = self.baseline.get(_key(where), {}).get("rms")
        stats = self.readings.of(where)
        if not usual or stats is None or stats.rms is None:
            return False
        return not 1 / UNUSUAL <= stats.rms / usual <= UNUSUAL

    # ---- what leads to what ------------------------------------------------------------------------------------------

    def _has(self, place: Place, what: Has) -> bool:
        """Whether an input of a place has something."""
        return any(what(stats) for found in self.readings.inputs(place) for _, stats in found)

    def _grew(self, place: Place) -> bool:
        """Whether an input is above 1e6 already; a constant counts only where it is taken over as it is."""
        takes_over = place.node.eqn.primitive.name in _TAKING_OVER
        inputs = [found for of_one in self.readings.inputs(place) for found in of_one]
        return any(has_huge(stats) for where, stats in inputs if where is not None or takes_over)

    def _masked_or_unseen(self, what: Has) -> Severity:
        """How bad it is that something reaches no result as far as was watched: likely, where a result has it, too."""
        whole = any(watch.pattern == "*" for watch in self.readings.tap.watches)
        seen = whole or not any(stats is not None and what(stats) for stats in self.readings.results)
        return Severity.INFO if seen else Severity.WARNING

    def _cancels(self, place: Place, made: Statistics) -> bool:
        """Whether a sum is small because its summands are not: the gradient of keys' bias is rounding alone."""
        inputs = [stats.largest for found in self.readings.inputs(place) for _, stats in found]
        return place.node.eqn.primitive.name in _SUMS and made.largest < 1e-2 * max(inputs, default=0.0)

    def _is_mask(self, place: Place) -> bool:
        """Whether a value is a large negative constant, taken or not, as (1 - mask) * -1e9 is."""
        made = self.readings.of(place)
        if made is None or (made.max or 0.0) > 0 or made.zeros + made.huge < made.size:
            return False
        constants = [stats for found in self.readings.inputs(place) for where, stats in found if where is None]
        return any(has_huge(c) and made.largest <= c.largest for c in constants)

    def _passes(self, place: Place, what: Has) -> bool:
        """Whether all that has something because of a place lies in its own module, a few equations away."""
        if what not in self._onward:
            self._onward[what] = self._users(what)
        path = place.node.address.path
        seen, left = {place}, [place]
        while left:
            for user in self._onward[what].get(left.pop(), ()):
                if user not in seen:
                    seen.add(user)
                    left.append(user)
                    if user.node.address.path[: len(path)] != path or len({p.node for p in seen}) > PASSING:
                        return False
        return True

    def _users(self, what: Has) -> dict[Place, list[Place]]:
        """What takes each value that has something and has it, too."""
        found: dict[Place, list[Place]] = {}
        for page in self.readings.pages:
            floats = page.words[:, :2].view(np.float32)
            largest = np.maximum(-floats[:, 0], floats[:, 1])
            rows = page.words[:, HUGE] > 0 if what is has_huge else (largest > 0) & (largest < 1e-7)
            slots = self.readings.tap.slots[page.scope.number]
            for row in np.flatnonzero(rows):
                user = Place(slots[row].node, slots[row].output, page.turns, page.shard)
                for given in self.readings.inputs(user):
                    for where, stats in given:
                        if isinstance(where, Place) and what(stats):
                            found.setdefault(where, []).append(user)
        return found

    def _led_to(self, what: Has) -> tuple[dict[Node, Node | None], tuple[str, ...]]:
        """All places and arguments from which something reaches a result, and the results that have it."""
        root = self.readings.program.root
        starts: list[Node] = []
        names = []
        for name, atom, stats in zip(self.results, root.jaxpr.jaxpr.outvars, self.readings.results, strict=True):
            if stats is None or not what(stats):
                continue
            names.append(name)
            for origin in origins(root, atom, ()):
                starts += [where for where, s in self.readings.at(origin, ()) if where is not None and what(s)]
        return self._back(starts, what), tuple(names)

    def _back(self, starts: Iterable[Node], what: Has) -> dict[Node, Node | None]:
        """Everything that has something and leads to the given places; each with what it leads to."""
        seen: dict[Node, Node | None] = dict.fromkeys(starts)
        left = collections.deque(seen)
        while left and len(seen) < MOST_VISITED:
            place = left.popleft()
            if not isinstance(place, Place):
                continue
            for found in self.readings.inputs(place):
                for where, stats in found:
                    if where is not None and where not in seen and what(stats):
                        seen[where] = place
                        left.append(where)
        return seen

    def _chain(self, place: Place, what: Has) -> tuple[str, ...]:
        """The way to a place from where something came into being that led to it; only the place if nothing did."""
        seen = self._back([place], what)
        made = [p for p in seen if p != place and (not isinstance(p, Place) or not self._has(p, what))]
        if not made:
            return (self._named(place),)
        first = min(made, key=lambda p: (0, ()) if not isinstance(p, Place) else (1, p.order))
        way: list[str] = []
        step: Node | None = first
        while step is not None:
            way.append(self._named(step))
            step = seen[step]
        return tuple(way)

    # ---- issues ------------------------------------------------------------------------------------------------------

    def _named(self, where: Node | None) -> str:
        if where is None:
            return "a constant"
        if not isinstance(where, Place):
            return f"argument {self.readings.program.arguments[where]}"
        shard = f" on shard {', '.join(map(str, where.shard))}" if where.shard else ""
        return described(where.node.address, where.index) + shard

    def _made(
        self,
        kind: str,
        severity: Severity,
        place: Place,
        reaches: Sequence[str],
        chain: tuple[str, ...] = (),
        *,
        cause: str = "",
        stats: Statistics | None = None,
    ) -> tuple[Any, Issue]:
        """An issue that an equation made."""
        stats = stats or self.readings.of(place)
        assert stats is not None
        inputs = tuple(
            Input(*((self._named(found[0][0]), max((s for _, s in found), key=_badness)) if found else ("?", None)))
            for found in self.readings.inputs(place)
        )
        shapes = [aval(atom).shape for atom in place.node.eqn.invars]
        whole = [  # what a scan walks over is measured as one
            i.statistics if i.statistics is not None and i.statistics.shape == shape else None
            for i, shape in zip(inputs, shapes, strict=True)
        ]
        cause = cause or cause_of(place.node.eqn.primitive.name, kind, stats, whole)
        address = place.node.address
        forward = self.forward.get((address.frame, address.library, address.path), ())
        return place.order, Issue(
            kind,
            severity,
            address,
            None,
            place.index,
            place.shard,
            stats,
            inputs=inputs,
            cause=cause,
            chain=chain or (self._named(place),),
            forward=forward if address.stage == "backward" else (),
            reaches=tuple(reaches),
        )

    def _given(
        self,
        kind: str,
        what: Has,
        reached: Mapping[Node, Any],
        reaches: tuple[str, ...],
        bad: Severity,
        else_: Severity,
    ) -> Iterable[tuple[Any, Issue]]:
        """Issues that came in with the arguments."""
        for number, stats in enumerate(self.readings.arguments):
            if stats is None or not what(stats):
                continue
            user = self._first_use(number)
            leads = number in reached
            yield (
                (),
                Issue(
                    kind,
                    bad if leads else else_,
                    None,
                    self.readings.program.arguments[number],
                    (),
                    (),
                    stats,
                    cause=f"it is first used by {user.address}" if user is not None else "",
                    chain=(f"argument {self.readings.program.arguments[number]}",),
                    reaches=reaches if leads else (),
                ),
            )

    def _first_use(self, number: int) -> Any:
        """The first equation that computes with an argument and does not only move it."""
        for node in self.readings.program.nodes:
            if node.bodies or node.number in self.readings.tap.moved:
                continue
            for atom in node.eqn.invars:
                if hasattr(atom, "val"):
                    continue
                turns = tuple(0 for _ in node.scope.loops)
                if any(number in _arguments(self.readings, o) for o in origins(node.scope, atom, turns)):
                    return node
        return None


def _arguments(readings: Readings, origin: Any) -> set[int]:
    while origin.node is not None and origin.node.number in readings.tap.moved:
        found = origins(origin.node.scope, origin.node.eqn.invars[0], origin.turns)
        if len(found) != 1:
            return set()
        (origin,) = found
    return set() if origin.argument is None else {origin.argument}


def _forward(readings: Readings) -> dict[Any, tuple[Address, ...]]:
    found: dict[Any, list[Address]] = {}
    for node in readings.program.nodes:
        if node.address.stage != "backward" and not node.bodies and node.address.frame is not None:
            found.setdefault((node.address.frame, node.address.library, node.address.path), []).append(node.address)
    return {key: tuple(addresses[:2]) for key, addresses in found.items()}


def _key(place: Place) -> str:
    """As a baseline names a value."""
    return f"{described(place.node.address, place.index)}:{place.output}"


def _is_bad(s: Statistics) -> bool:
    return s.bad > 0


def _badness(s: Statistics) -> tuple[int, int, float]:
    return s.nan, s.bad, s.largest
