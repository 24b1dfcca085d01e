"""Rules of arithmetic: what changes nothing, what is computed twice, what is known before the program runs.

    EXACT         results are equal bit by bit, NaN, infinities and the signs of zeros included
    APPROXIMATE   equal in real numbers only: rounding, or what becomes of NaN and zeros, differs

XLA does most of this itself. Here it brings a program into a form in which other rules find their patterns, and shows
what is in it that nobody needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.graph.rewriting.forms import constant, is_constant, plain, skip, uniform
from trustcore.graph.rewriting.matching import between
from trustcore.graph.rewriting.rule import Finder, Finding, Match, Rule, Static
from trustcore.graph.rewriting.terms import Graph, Value

FOLDED = 4096  # elements up to which a constant is computed ahead; larger ones are cheaper made than kept


def _identity(graph: Graph, root: Value) -> Match | None:
    base = skip(root)
    if base is root or base.const is not None:
        return None
    return Match([root], [base], between([root], [base]), lambda x: x)


def _zero(graph: Graph, root: Value) -> Match | None:
    """x + -0.0, and in integers x + 0."""
    for place in (0, 1) if root.name == "add" else ():
        zero, other = root.inputs[place], root.inputs[1 - place]
        number = uniform(zero)
        if number is None or number != 0 or other.shape != root.shape or is_constant(other):
            continue
        negative = bool(np.signbit(number.astype(np.float64)))
        if jnp.issubdtype(root.dtype, jnp.integer) or negative:
            return Match([root], [other], between([root], [other]), lambda x: x)
    return None


def _fold(graph: Graph, root: Value) -> Match | None:
    if root.maker is None or not is_constant(root) or root.name in ("iota", "broadcast_in_dim"):
        return None
    known = constant(root, FOLDED)
    if known is None or len(root.maker.outputs) > 1:
        return None
    return Match([root], [], {root.maker}, lambda: jnp.asarray(known), certain=True)


def _common(graph: Graph, root: Value) -> Match | None:
    """The same operation on the same operands, before this one and in the same call."""
    maker = root.maker
    if maker is None or not maker.inputs or maker.eqn.effects or len(maker.outputs) > 1:
        return None
    for other in dict.fromkeys(user for value in maker.inputs for user in value.users):
        if (
            other.order < maker.order
            and other.calls == maker.calls
            and other.eqn.primitive is maker.eqn.primitive
            and all(a is b or _same_literal(a, b) for a, b in zip(other.inputs, maker.inputs, strict=True))
            and _parameters(other) == _parameters(maker)
        ):
            first = other.outputs[0]
            return Match([root], [first], {maker}, lambda x: x, certain=True)
    return None


def _parameters(node: object) -> object:
    return sorted((name, plain(value)) for name, value in node.params.items())  # type: ignore[attr-defined]


def _same_literal(a: Value, b: Value) -> bool:
    if a.const is None or b.const is None or a.shape or b.shape or a.dtype != b.dtype:
        return False
    return bool(np.asarray(a.const) == np.asarray(b.const)) and a.aval.weak_type == b.aval.weak_type


def _transposes(graph: Graph, root: Value) -> Match | None:
    if root.name != "transpose" or root.inputs[0].name != "transpose":
        return None
    inner = root.inputs[0]
    outer_order, inner_order = (tuple(v.maker.params["permutation"]) for v in (root, inner))  # type: ignore[union-attr]
    order = tuple(inner_order[i] for i in outer_order)
    return _views(root, inner.inputs[0], lambda x: x if order == tuple(range(x.ndim)) else jnp.transpose(x, order))


def _reshapes(graph: Graph, root: Value) -> Match | None:
    kinds = ("reshape", "squeeze", "expand_dims")
    if root.name not in kinds or root.inputs[0].name not in kinds:
        return None
    shape = root.shape
    return _views(root, root.inputs[0].inputs[0], lambda x: x if x.shape == shape else jax.lax.reshape(x, shape))


def _widened(graph: Graph, root: Value) -> Match | None:
    """A conversion to a wider dtype and back."""
    if root.name != "convert_element_type" or root.inputs[0].name != "convert_element_type":
        return None
    base, middle = root.inputs[0].inputs[0], root.inputs[0]
    floats = all(jnp.issubdtype(v.dtype, jnp.floating) for v in (base, middle))
    if base.dtype != root.dtype or not floats or middle.dtype.itemsize <= base.dtype.itemsize:
        return None
    return _views(root, base, lambda x: x)


def _views(root: Value, base: Value, replacement: object) -> Match | None:
    """A chain of views as one; what lies between may be used by others, who keep it."""
    if is_constant(base) or root.maker is None:
        return None
    return Match([root], [base], {root.maker}, replacement)  # type: ignore[arg-type]


def _power_of_two(graph: Graph, root: Value) -> Match | None:
    """x / 2 ** k as x * 2 ** -k, which is rounded the same."""
    if root.name != "div" or not jnp.issubdtype(root.dtype, jnp.floating):
        return None
    x, divisor = root.inputs
    number = uniform(divisor)
    if number is None or is_constant(x) or x.shape != root.shape or number == 1:
        return None
    mantissa, exponent = math.frexp(float(number))
    if abs(mantissa) != 0.5 or abs(exponent) > 10:
        return None
    reciprocal = 1.0 / float(number)
    return Match([root], [x], between([root], [x]), lambda x: x * jnp.asarray(reciprocal, x.dtype))


def _positive(numbers: np.random.Generator, kinds: Sequence[Any]) -> list[Any]:
    return [numbers.uniform(0.1, 4.0, kind.shape).astype(kind.dtype) for kind in kinds]


_X = jax.ShapeDtypeStruct((8,), "float32")
_BOOL = jax.ShapeDtypeStruct((8,), "bool")

EXACT: tuple[Finding, ...] = (
    Finder("identity", _identity, exact=True, priority=10),
    Finder("add-zero", _zero, exact=True, priority=10),
    Finder("fold-constant", _fold, exact=True, priority=10),
    Finder("common-subexpression", _common, exact=True, priority=9),
    Finder("transpose-of-transpose", _transposes, exact=True, priority=8),
    Finder("reshape-of-reshape", _reshapes, exact=True, priority=8),
    Finder("widen-and-narrow", _widened, exact=True, priority=8),
    Finder("divide-by-power-of-two", _power_of_two, exact=True, priority=5),
    Rule("double-negation", lambda x: jnp.negative(jnp.negative(x)), lambda x: x, (_X,), exact=True, priority=8),
    Rule("double-not", lambda x: ~(~x), lambda x: x, (_BOOL,), exact=True, priority=8),
    Rule("abs-of-negation", lambda x: jnp.abs(-x), jnp.abs, (_X,), exact=True, priority=8),
    Rule("relu-of-relu", lambda x: jnp.maximum(jnp.maximum(x, 0), 0), lambda x: jnp.maximum(x, 0), (_X,), exact=True),
)

APPROXIMATE: tuple[Finding, ...] = (
    Rule("add-zero-of-any-sign", lambda x: x + 0.0, lambda x: x, (_X,)),
    Rule("minus-itself", lambda x: x - x, jnp.zeros_like, (_X,)),
    Rule("times-zero", lambda x: x * 0.0, jnp.zeros_like, (_X,)),
    Rule("over-itself", lambda x: x / x, jnp.ones_like, (_X,)),
    Rule(
        "scale-of-scale",
        lambda x, a, b: (x * a) * b,
        lambda x, a, b: x * (a * b),
        (_X, Static(2.0), Static(3.0)),
        condition=lambda x, a, b: math.isfinite(a * b),
    ),
    Rule(
        "divide-as-multiply",
        lambda x, a: x / a,
        lambda x, a: x * (1.0 / a),
        (_X, Static(3.0)),
        condition=lambda x, a: a != 0 and math.isfinite(1.0 / a),
    ),
    Rule("log-of-exp", lambda x: jnp.log(jnp.exp(x)), lambda x: x, (_X,)),
    Rule(
        "common-factor",
        lambda x, y, z: x * y + x * z,
        lambda x, y, z: x * (y + z),
        (_X, _X, _X),
    ),
    Rule("inverse-root", lambda x: 1.0 / jnp.sqrt(x), jax.lax.rsqrt, (_X,), sample=_positive),
)
