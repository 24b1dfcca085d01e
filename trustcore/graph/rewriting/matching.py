"""Where a pattern stands in a program.

First loosely: the pattern's graph at its example shapes, the program's at `root`, both without conversions of dtype
and reshapes. That tells which value each operand would be. Then strictly: the pattern is traced anew at those values'
shapes and dtypes, and every operation must agree, with its parameters, shapes and dtypes, up to the order of the
operands of commutative operations, the way in which operands are broadcast to an element-wise operation, and what
`forms` takes as one. Constants must be equal.

What the pattern computes on the way must not be used by anything else; constants may.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from trustcore.errors import ProgramError
from trustcore.graph.rewriting.forms import (
    COMMUTATIVE,
    ELEMENTWISE,
    UNIT,
    constant,
    form,
    is_constant,
    levels,
    same_value,
    skip,
    uniform,
)
from trustcore.graph.rewriting.rule import Match, NearMiss, Rule, aval_of, example_avals, traced
from trustcore.graph.rewriting.terms import Graph, Node, Value

_LOOSE = frozenset({"convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "copy"})
_TRIES = 12  # readings of one place that are tried

Bound = dict[int, Value]


def find_pattern(rule: Rule, graph: Graph, root: Value) -> Match | NearMiss | None:
    """Returns where a rule's pattern ends in `root`; a near miss where it does but must not be replaced."""
    missed: NearMiss | None = None
    for pattern in rule.patterns:
        skeleton = _graph(pattern, example_avals(rule.examples))
        for bound in itertools.islice(_readings(skeleton, root), _TRIES):
            found = _strict(rule, pattern, graph, root, bound)
            if isinstance(found, Match):
                return found
            missed = missed or found
    return missed


@functools.lru_cache(maxsize=512)
def _graph(pattern: Any, avals: tuple[Any, ...]) -> Graph:
    return traced(pattern, avals)


# ---- loosely ---------------------------------------------------------------------------------------------------------


def _readings(skeleton: Graph, root: Value) -> Iterator[Bound]:
    """For each way in which a pattern may lie at `root`, and each level at which an operand may begin: the operands."""
    places = {value: i for i, value in enumerate(skeleton.inputs)}
    for chains in _loose(skeleton.outputs[0], root, places, {}):
        kinds = [list(enumerate(levels)) for levels in chains.values()]
        # The innermost value of each operand first, then outer ones: as few steps out as possible.
        for choice in sorted(itertools.product(*kinds), key=lambda steps: sum(step for step, _ in steps)):
            yield dict(zip(chains, (value for _, value in choice), strict=True))


def _stripped(value: Value) -> tuple[Value, list[Value]]:
    """The value beneath conversions and reshapes, and those on the way, innermost first."""
    levels = [skip(value)]
    while levels[-1].name in _LOOSE:
        levels.append(skip(levels[-1].inputs[0]))
    return levels[-1], levels[::-1]


def _loose(
    pattern: Value, target: Value, places: Mapping[Value, int], bound: dict[int, list[Value]]
) -> Iterator[dict[int, list[Value]]]:
    inner, _ = _stripped(pattern)
    if inner in places:
        base, levels = _stripped(target)
        known = bound.get(places[inner])
        if known is None:
            yield {**bound, places[inner]: levels}
        elif known[0] is base or same_value(known[0], base):
            kept = [value for value in known if any(value is each for each in levels)] or known[:1]
            yield {**bound, places[inner]: kept}
        return
    if is_constant(inner):
        if is_constant(target):
            yield bound
        return
    base, _ = _stripped(target)
    left, right = form(inner), form(base)
    if left is None or right is None or left.name != right.name or len(left.inputs) != len(right.inputs):
        return
    yield from _each(
        left.inputs, right.inputs, left.name in COMMUTATIVE, lambda p, t, b: _loose(p, t, places, b), bound
    )


def _each(lefts: Any, rights: Any, swap: bool, step: Any, bound: Any) -> Iterator[Any]:
    orders = [rights, rights[::-1]] if swap and len(rights) == 2 else [rights]
    for order in orders:
        yield from _all(list(zip(lefts, order, strict=True)), step, bound)


def _all(pairs: list[tuple[Value, Value]], step: Any, bound: Any) -> Iterator[Any]:
    if not pairs:
        yield bound
        return
    for found in step(*pairs[0], bound):
        yield from _all(pairs[1:], step, found)


# ---- strictly --------------------------------------------------------------------------------------------------------


def _strict(rule: Rule, pattern: Any, graph: Graph, root: Value, bound: Bound) -> Match | NearMiss | None:
    if len(bound) != len(rule.examples):
        return None
    numbers = {i: uniform(bound[i]) for i, static in enumerate(rule.statics) if static}
    if any(number is None for number in numbers.values()):
        return None
    avals = [aval_of(rule.examples[i] if i in numbers else bound[i].aval) for i in range(len(rule.examples))]
    try:
        wanted = _graph(pattern, tuple(avals))
    except ProgramError:  # it cannot be written with operands of these shapes and dtypes
        return None
    state = _State({value: i for i, value in enumerate(wanted.inputs)}, rule.statics)
    for found in _agree(wanted.outputs[0], root, state, {}):
        operands = {i: found[value] for value, i in state.places.items() if value in found}
        if any(i not in operands for i in range(len(rule.examples))):
            continue
        return _checked(rule, graph, root, wanted, found, state)
    return None


class _State:
    def __init__(self, places: dict[Value, int], statics: tuple[bool, ...]):
        self.places, self.statics = places, statics


def _agree(
    pattern: Value, target: Value, state: _State, found: dict[Value, Value], out: tuple[int, ...] | None = None
) -> Iterator[dict[Value, Value]]:
    """Yields what each value of a pattern is in the program, where `pattern` is `target`.

    `out`: the shape of the element-wise operation that takes both; how they were brought to it is all one.
    """
    beneath = _stripped(pattern)[0]
    if beneath in state.places and state.statics[state.places[beneath]]:
        number, known = uniform(target), found.get(beneath)
        if number is not None and (known is None or same_value(known, target)):
            yield {**found, beneath: target}
        return
    inner, base = skip(pattern), skip(target)
    if inner in found:
        if found[inner] is base or same_value(found[inner], base):
            yield found
        return
    if inner in state.places:
        if _alike(inner, base):
            yield {**found, inner: base}
        return
    if is_constant(inner):
        if _equal_constants(inner, base):
            yield found
        return
    if out is not None and (inner.name in UNIT or inner.shape != out):
        lowest, axes = levels(inner, out)[-1]
        for level, own in levels(base, out):
            if own == axes:
                yield from _agree(lowest, level, state, found)
        return
    left, right = form(inner), form(base)
    if left is None or right is None or not _alike(inner, base):
        return
    if left.name != right.name or left.params != right.params or len(left.inputs) != len(right.inputs):
        return
    swap, shape = left.name in COMMUTATIVE, inner.shape if left.name in ELEMENTWISE else None
    for more in _each(left.inputs, right.inputs, swap, lambda p, t, b: _agree(p, t, state, b, shape), found):
        yield {**more, inner: base}


def _alike(a: Value, b: Value) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _equal_constants(a: Value, b: Value) -> bool:
    if not is_constant(b):
        return False
    left, right = uniform(a), uniform(b)
    if left is not None and right is not None:
        return a.dtype == b.dtype and bool(left == right)
    x, y = constant(a), constant(b)
    return x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y)


def _checked(
    rule: Rule, graph: Graph, root: Value, wanted: Graph, found: dict[Value, Value], state: _State
) -> Match | NearMiss | None:
    operands = [found[value] for value in wanted.inputs]
    values = [operand for operand, static in zip(operands, rule.statics, strict=True) if not static]
    outputs = [root]
    for out in wanted.outputs[1:]:
        place = found.get(skip(out))
        if place is None:
            return None
        outputs.append(place)
    nodes = between(outputs, values)
    missed = escaping(graph, outputs, nodes)
    if missed is not None:
        return missed
    numbers = [float(uniform(o)) if s else None for o, s in zip(operands, rule.statics, strict=True)]  # type: ignore[arg-type]
    if rule.condition is not None:
        told = rule.condition(*(n if n is not None else o.aval for n, o in zip(numbers, operands, strict=True)))
        if told is not True:
            return NearMiss(told or "its condition does not hold")

    def replacement(*arrays: Any) -> Any:
        given = iter(arrays)
        return rule.replacement(*(n if n is not None else next(given) for n in numbers))

    sample = None
    if rule.sample is not None:
        sample = functools.partial(rule.sample, kinds=[jax.ShapeDtypeStruct(v.shape, v.dtype) for v in values])

    return Match(outputs, values, nodes, replacement, tuple(n for n in numbers if n is not None), sample)


def between(outputs: list[Value], operands: list[Value]) -> set[Node]:
    """Returns the nodes that compute `outputs` from `operands`, without those that only compute constants."""
    ends, nodes, waiting = set(operands), set[Node](), list(outputs)
    while waiting:
        value = waiting.pop()
        if value in ends or value.maker is None or value.maker in nodes or is_constant(value):
            continue
        nodes.add(value.maker)
        waiting += value.maker.inputs
    return nodes


def escaping(graph: Graph, outputs: list[Value], nodes: set[Node]) -> NearMiss | None:
    """Returns why a part cannot be taken out: something within it is used outside, or it uses its own results."""
    own = set(outputs)
    for node in nodes:
        if node.eqn.effects:
            return NearMiss(f"{node.eqn.primitive.name} has an effect")
        for value in node.outputs:
            if value not in own and graph.used(value, nodes):
                user = next((user for user in value.users if user not in nodes), None)
                by = f"by {user.eqn.primitive.name}" if user is not None else "as a result"
                return NearMiss(
                    f"the {node.eqn.primitive.name} {value.aval.str_short()} within is used elsewhere, {by}"
                )
    if len(outputs) > 1:
        inside = between(outputs, [])
        before = {node for node in inside if node not in nodes}
        if any(value in own for node in before for value in node.inputs):
            return NearMiss("what it takes depends on what it gives")
    return None
