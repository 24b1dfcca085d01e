"""Softmax attention as it is written by hand, as one call of `kernels_pallas.attention`.

    scores = q k^T, in any layout            einsum or matmul, transposes, heads mapped by vmap
    scores = scores * scale | / sqrt(h) | tanh(scores / c) * c | + bias | where(mask, scores, very small)   in any order
    weights = softmax(scores)                jax.nn.softmax, or exp and sum, with or without the maximum
    out = weights v                          weights in any dtype; or exp(scores) v, divided by the sum afterwards

Heads of keys may be repeated (jnp.repeat), or queries grouped by them. A mask that depends on no input is looked at:
one that is causal, or a band, becomes so; another one is handed on. What is not among these steps (weights that are
used elsewhere) keeps the attention as it is, and the report says so. So does dropout: the kernels draw other numbers of
a key than the program does, so that no proof could tell one from the other.

Where a query sees no key, a softmax of -inf gives NaN and one of a large negative number the mean of all values; the
kernel gives zeros. Proofs are made with masks that leave each query a key. It is one long file: each step back from the
output hands the next one what it has found, and none is of use alone.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import attention
from trustcore.graph.rewriting.forms import constant, is_constant, maximum_of, skip, through, uniform
from trustcore.graph.rewriting.matching import between, escaping
from trustcore.graph.rewriting.proof import random_operands
from trustcore.graph.rewriting.rule import Finder, Match, NearMiss
from trustcore.graph.rewriting.terms import Graph, Value

_SMALL = -1e4  # a score below this, put in the place of others, is a mask
Labels = tuple[Any, ...]  # of each axis; None where it is of size one


@dataclasses.dataclass
class _Operand:
    """A value with a label for each axis; `heads`: copies of each head that a repeat made."""

    value: Value
    labels: Labels
    repeats: dict[Any, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Scores:
    """The steps from the product of queries and keys to the softmax."""

    product: Value
    scale: float = 1.0
    soft_cap: float | None = None
    masks: list[tuple[Value, Labels, bool]] = dataclasses.field(default_factory=list)  # value, axes, inverted
    biases: list[tuple[Value, Labels, float]] = dataclasses.field(default_factory=list)  # value, axes, factor


class _No(Exception):
    """Why a place that has a softmax between two products is not taken."""


def _find(graph: Graph, root: Value) -> Match | NearMiss | None:
    late = _late(root)
    product, sums = late or (root, None)
    if product.name != "dot_general":
        return None
    for side in (0, 1):
        weights = through(product.inputs[side], ("convert_element_type", "transpose", "reshape", "squeeze"))
        found = _softmax(weights) if sums is None else _exponentials(weights, sums[-1])
        if found is not None:
            try:
                return _built(graph, root, product, sums, side, *found)
            except _No as no:
                return NearMiss(str(no))
        if sums is None and (dropped := _dropped(weights)) is not None and _softmax(dropped) is not None:
            return NearMiss("dropout of the weights: the kernels draw other numbers; call them with dropout= instead")
    return None


def _late(root: Value) -> tuple[Value, list[Value]] | None:
    """For (weights values) / sums: the product, and the values from the divisor in to the sum."""
    if root.name == "div":
        above, below = root.inputs
    elif root.name == "mul":
        inverse = [_through_moves(each)[-1] for each in root.inputs]
        at = next((i for i, v in enumerate(inverse) if v.name == "div" and _is_one(v.inputs[0])), None)
        if at is None:
            return None
        above, below = root.inputs[1 - at], root.inputs[at]
    else:
        return None
    product, sums = _through_moves(above)[-1], _through_moves(below)
    if root.name == "mul":
        sums += _through_moves(sums[-1].inputs[1])
    return (product, sums) if product.name == "dot_general" and sums[-1].name == "reduce_sum" else None


def _through_moves(value: Value) -> list[Value]:
    """A value and those beneath conversions and moves of axes, itself first."""
    found = [skip(value)]
    while found[-1].name in (
        "broadcast_in_dim",
        "reshape",
        "squeeze",
        "expand_dims",
        "transpose",
        "convert_element_type",
    ):
        found.append(skip(found[-1].inputs[0]))
    return found


def _is_one(value: Value) -> bool:
    number = uniform(value)
    return number is not None and number.dtype.kind != "b" and float(number) == 1.0


def _dropped(value: Value) -> Value | None:
    """The weights, of where(bernoulli, weights / keep, 0) or of weights times a mask of random bits."""
    if value.name == "select_n":
        kept = next((v for v in value.inputs[1:] if uniform(v) is None), None)
    elif value.name in ("mul", "div") and uniform(value.inputs[1]) is not None:
        return _dropped(through(value.inputs[0], ("convert_element_type",))) or skip(value.inputs[0])
    else:
        return None
    kept = None if kept is None else through(kept, ("convert_element_type",))
    if kept is not None and kept.name in ("mul", "div") and uniform(kept.inputs[1]) is not None:
        kept = through(kept.inputs[0], ("convert_element_type",))
    return kept


def _softmax(value: Value) -> tuple[Value, Value, int] | None:
    """For exp(s) / sum(exp(s)): that value, s, and the axis of the sum."""
    if value.name != "div":
        return None
    above, below = (
        skip(value.inputs[0]),
        through(value.inputs[1], ("broadcast_in_dim", "reshape", "convert_element_type")),
    )
    if above.name != "exp" or below.name != "reduce_sum" or skip(below.inputs[0]) is not above:
        return None
    axes = tuple(below.maker.params["axes"])  # type: ignore[union-attr]
    return (value, _unshifted(above), int(axes[0])) if len(axes) == 1 else None


def _exponentials(value: Value, total: Value) -> tuple[Value, Value, int] | None:
    """The same for exp(s), where its sum is `total`."""
    axes = tuple(total.maker.params["axes"])  # type: ignore[union-attr]
    summed = through(total.inputs[0], ("convert_element_type",))
    found = value.name == "exp" and summed is value and len(axes) == 1
    return (value, _unshifted(value), int(axes[0])) if found else None


def _unshifted(exponential: Value) -> Value:
    """s, of exp(s) or exp(s - max(s))."""
    scores = skip(exponential.inputs[0])
    if scores.name == "sub" and maximum_of(scores.inputs[1]) is skip(scores.inputs[0]):
        scores = skip(scores.inputs[0])
    return scores


# ---- scores ----------------------------------------------------------------------------------------------------------


def _scores(value: Value) -> tuple[_Scores, list[tuple[str, Value, Any]]]:
    """The steps back from the softmax to the product; those that move axes, innermost last."""
    value, found, factor = skip(value), _Scores(value), 1.0
    moves: list[tuple[str, Value, Any]] = []
    pending: list[tuple[str, Value, Any, int]] = []
    while value.name != "dot_general":
        name, inputs = value.name, value.inputs
        if name in ("convert_element_type", "reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim"):
            if name != "convert_element_type":
                moves.append((name, value, None))
            value = skip(inputs[0])
        elif name in ("mul", "div") and (at := _uniform_side(value)) is not None:
            number = float(uniform(inputs[at]))  # type: ignore[arg-type]
            if name == "div" and at == 0:
                raise _No("scores are a divisor")
            inner = skip(inputs[1 - at])
            capped = inner.inputs[0] if inner.name == "tanh" else None
            if capped is not None:
                cap = _cap(skip(capped), number if name == "mul" else 1 / number)
                if cap is None or found.soft_cap is not None:
                    raise _No("a tanh of the scores that is not cap * tanh(scores / cap)")
                if factor != 1.0:
                    raise _No("scores are scaled after they are capped")
                found.soft_cap, value = number if name == "mul" else 1 / number, cap
                continue
            factor *= number if name == "mul" else 1 / number
            value = inner
        elif name in ("add", "sub") and (at := _uniform_side(value)) is not None and (name == "add" or at == 1):
            value = skip(inputs[1 - at])  # a softmax does not see it
        elif name in ("add", "sub"):
            at = _scored_side(inputs)
            if name == "sub" and at == 1:
                raise _No("scores are subtracted from something")
            other = inputs[1 - at]
            pending.append(("bias", other, factor if name == "add" else -factor, len(moves)))
            value = skip(inputs[at])
        elif name == "select_n" and len(inputs) == 3:
            at = next((i for i in (1, 2) if _is_small(inputs[i], factor)), None)
            if at is None:
                raise _No("a where of the scores puts something else than a very small number in")
            pending.append(("mask", inputs[0], at == 2, len(moves)))
            value = skip(inputs[3 - at])
        else:
            raise _No(f"{name or 'an input'} lies between the product of queries and keys and the softmax")
    found.product, found.scale = value, factor
    return found, [(*move[:2], None) for move in moves] + [(kind, v, (more, at)) for kind, v, more, at in pending]


def _uniform_side(value: Value) -> int | None:
    return next((i for i in (1, 0) if uniform(value.inputs[i]) is not None), None)


def _is_small(value: Value, factor: float) -> bool:
    number = uniform(value)
    return number is not None and number.dtype.kind not in "bui" and float(number) * factor <= _SMALL


def _cap(value: Value, cap: float) -> Value | None:
    if value.name not in ("mul", "div") or (at := _uniform_side(value)) is None or (value.name == "div" and at == 0):
        return None
    number = float(uniform(value.inputs[at]))  # type: ignore[arg-type]
    by = number if value.name == "div" else 1 / number
    return skip(value.inputs[1 - at]) if math.isclose(by, cap, rel_tol=1e-5) else None


def _scored_side(inputs: list[Value]) -> int:
    """Which of two summands leads to a product of queries and keys: the one that does so in fewer steps."""
    depths = [_depth(value) for value in inputs]
    if min(depths) == math.inf:
        raise _No("the sum of scores and a bias does not lead to a product")
    return depths.index(min(depths))


def _depth(value: Value) -> float:
    for steps in range(40):
        value = skip(value)
        if value.name == "dot_general":
            return steps
        if value.maker is None or is_constant(value):
            return math.inf
        best = [v for v in value.inputs if len(v.shape) >= 2 and not is_constant(v) and v.dtype != jnp.bool_]
        if not best:
            return math.inf
        value = best[0]
    return math.inf


# ---- axes ------------------------------------------------------------------------------------------------------------


def _moved(labels: Labels, value: Value) -> Labels:
    """The labels of a value that a move makes of one with `labels`."""
    name = value.name
    if name == "transpose":
        return tuple(labels[i] for i in value.maker.params["permutation"])  # type: ignore[union-attr]
    source = value.inputs[0].shape
    if name == "broadcast_in_dim":
        dims = value.maker.params["broadcast_dimensions"]  # type: ignore[union-attr]
        out: list[Any] = [None] * len(value.shape)
        for d, label, n in zip(dims, labels, source, strict=True):
            if n != value.shape[d]:
                raise _No("an axis of the scores is repeated")
            out[d] = label
        if any(label is None and n != 1 for label, n in zip(out, value.shape, strict=True)):
            raise _No("scores are repeated along an axis")
        return tuple(out)
    if [n for n in source if n != 1] != [n for n in value.shape if n != 1]:
        raise _No("axes of the scores are merged or split")
    kept = iter(label for label, n in zip(labels, source, strict=True) if n != 1)
    return tuple(next(kept) if n != 1 else None for n in value.shape)


def _check_sums(labels: Labels, sums: list[Value], out: Labels) -> None:
    """Raises unless the sums over keys meet the axes of the output that they were taken for."""
    for value in sums[-2::-1]:
        if value.name == "broadcast_in_dim":
            dims = value.maker.params["broadcast_dimensions"]  # type: ignore[union-attr]
            spread: list[Any] = [None] * len(value.shape)
            for d, label, n in zip(dims, labels, value.inputs[0].shape, strict=True):
                spread[d] = label if n == value.shape[d] else None
            labels = tuple(spread)
        elif value.name not in ("convert_element_type", "div"):
            labels = _moved(labels, value)
    if any(label is not None and label != o for label, o in zip(labels[::-1], out[::-1], strict=False)):
        raise _No("what is divided by afterwards is not the sum of the weights")


def _product_labels(product: Value) -> tuple[Labels, Labels, Labels]:
    """Labels of the operands and the result of queries times keys: numbers of the result's axes; "h" is summed over."""
    (left, right), (left_batch, right_batch) = product.maker.params["dimension_numbers"]  # type: ignore[union-attr]
    if len(left) != 1:
        raise _No("queries and keys meet along several axes")
    shapes = [v.shape for v in product.inputs]
    names: list[list[Any]] = [[None] * len(shapes[0]), [None] * len(shapes[1])]
    for number, (i, j) in enumerate(zip(left_batch, right_batch, strict=True)):
        names[0][i] = names[1][j] = number
    names[0][left[0]] = names[1][right[0]] = "h"
    number = len(left_batch)
    for which in (0, 1):
        for i in range(len(shapes[which])):
            if names[which][i] is None:
                names[which][i] = number
                number += 1
    return tuple(names[0]), tuple(names[1]), tuple(range(number))


def _peeled(operand: _Operand, heads: Any) -> _Operand:
    """The operand without transposes, and without repeats along the axis of the heads."""
    value, labels, repeats = skip(operand.value), operand.labels, {}
    while True:
        if value.name == "transpose":
            order = value.maker.params["permutation"]  # type: ignore[union-attr]
            back: list[Any] = [None] * len(order)
            for i, source in enumerate(order):
                back[source] = labels[i]
            value, labels = skip(value.inputs[0]), tuple(back)
            continue
        spread = skip(value.inputs[0]) if value.name == "reshape" else None
        if spread is not None and spread.name == "broadcast_in_dim" and heads in labels and not repeats:
            at = labels.index(heads)
            source = skip(spread.inputs[0])
            # [.., K, ..] -> [.., K, g, ..] -> [.., K g, ..]
            dims = tuple(int(d) for d in spread.maker.params["broadcast_dimensions"])  # type: ignore[union-attr]
            base = _through_units(source)
            if (
                len(spread.shape) == len(value.shape) + 1
                and spread.shape[at] * spread.shape[at + 1] == value.shape[at]
                and (*spread.shape[:at], value.shape[at], *spread.shape[at + 2 :]) == value.shape
            ):
                kept = tuple(d for d in range(len(spread.shape)) if d != at + 1)
                flat = (*spread.shape[: at + 1], *spread.shape[at + 2 :])
                if dims == kept and source.shape == flat:
                    repeats, value = {heads: spread.shape[at + 1]}, source
                    continue
                if base.shape == flat and dims == tuple(range(len(spread.shape))) and source.shape[at + 1] == 1:
                    repeats, value = {heads: spread.shape[at + 1]}, base
                    continue
        return _Operand(value, labels, repeats)


def _through_units(value: Value) -> Value:
    while value.name in ("reshape", "broadcast_in_dim", "expand_dims", "squeeze") and [
        n for n in value.inputs[0].shape if n != 1
    ] == [n for n in value.shape if n != 1]:
        value = skip(value.inputs[0])
    return value


# ---- the match -------------------------------------------------------------------------------------------------------


def _built(
    graph: Graph,
    root: Value,
    product: Value,
    sums: list[Value] | None,
    side: int,
    weights: Value,
    softmax_of: Value,
    axis: int,
) -> Match | NearMiss:
    scores, steps = _scores(softmax_of)
    names = _product_labels(scores.product)
    sizes = dict(zip(names[2], scores.product.shape, strict=True))
    # Labels of the scores at each step outwards, from the product on.
    moves = [value for _, value, more in steps if more is None][::-1]
    at_move = [names[2]]
    for move in moves:
        at_move.append(_moved(at_move[-1], move))
    for kind, value, more in steps:
        if more is not None:
            told, place = more
            labels = at_move[len(moves) - place]
            (scores.masks if kind == "mask" else scores.biases).append((value, labels, told))
    labels = at_move[-1]
    span = labels[axis]
    # The weights, moved again before they meet the values.
    summed = labels[:axis] + labels[axis + 1 :]
    chain, value = [], skip(product.inputs[side])
    while value is not weights:
        if value.name != "convert_element_type":
            chain.append(value)
        value = skip(value.inputs[0])
    for move in reversed(chain):
        labels = _moved(labels, move)

    numbers, batch = product.maker.params["dimension_numbers"]  # type: ignore[union-attr]
    if [labels[i] for i in numbers[side]] != [span]:
        raise _No("the weights are not summed over the axis of their softmax")
    shared = [labels[i] for i in batch[side]]
    other = product.inputs[1 - side]
    value_labels: list[Any] = ["?"] * len(other.shape)
    for i, label in zip(batch[1 - side], shared, strict=True):
        value_labels[i] = label
    value_labels[numbers[1 - side][0]] = "s"
    free = [i for i, label in enumerate(value_labels) if label == "?"]
    if len(free) != 1:
        raise _No(f"values have {len(free)} axes of their own")
    value_labels[free[0]] = "v"
    own = [label for i, label in enumerate(labels) if i not in batch[side] and i not in numbers[side]]
    left, right = (own, ["v"]) if side == 0 else (["v"], own)
    out_labels = (*shared, *left, *right)
    if sums is not None:
        above = next(v for v in root.inputs if _through_moves(v)[-1] is product)
        for move in _through_moves(above)[-2::-1]:
            out_labels = out_labels if move.name == "convert_element_type" else _moved(out_labels, move)
        _check_sums(summed, sums, out_labels)

    q_side = 0 if span in names[1] else 1
    q_names, k_names = names[q_side], names[1 - q_side]
    queries = [label for label in q_names if label not in k_names]
    keys = [label for label in k_names if label not in q_names]
    batches = [label for label in names[2] if label in q_names and label in k_names]
    if keys != [span] or not queries:
        raise _No("the softmax is not over the keys of a product of queries and keys")
    if {label for label in shared if label is not None} - set(batches):
        raise _No("values do not share the axes that keys share with queries")
    lost = [label for label in batches if label not in shared and sizes[label] != 1]
    if lost:
        raise _No("values lack an axis that queries share with keys")
    # Which axis is which: the last one of the queries in the scores counts them, the others are groups of heads.
    ordered = [label for label in at_move[-1] if label is not None]
    queries.sort(key=lambda label: (sizes[label] != 1, ordered.index(label) if label in ordered else -1))
    time, groups = queries[-1], queries[:-1]
    real = [label for label in batches if sizes[label] != 1]
    head = (real or batches or [None])[-1]
    outer = [label for label in batches if label != head]

    q = _Operand(scores.product.inputs[q_side], q_names)
    k = _Operand(scores.product.inputs[1 - q_side], k_names)
    v = _Operand(other, tuple(value_labels))
    q, k, v = (_peeled(each, head) for each in (q, k, v))
    if (groups and (k.repeats or v.repeats)) or k.repeats != v.repeats:
        k = _Operand(scores.product.inputs[1 - q_side], k_names)
        v = _Operand(other, tuple(value_labels))
    q = q if not q.repeats else _Operand(scores.product.inputs[q_side], q_names)
    q, k, v = _one_dtype(q, k, v)

    layout = _Layout(sizes, outer, head, groups, time, span)
    options, extra = _masked(scores, layout)
    operands = [q.value, k.value, v.value, *(value for value, _, _ in extra)]
    distinct = list(dict.fromkeys(operands))
    plans = [(q.labels, "q"), (k.labels, "k"), (v.labels, "v")]
    dtype = root.dtype

    def replacement(*arrays: Any) -> Any:
        given = dict(zip(distinct, arrays, strict=True))
        query, key, values = (layout.arranged(given[x], *p) for x, p in zip(operands[:3], plans, strict=True))
        more: dict[str, Any] = dict(options)
        for value, make, _ in extra:
            name, array = make(given[value])
            if name in more and more[name] is not None:
                array = more[name] & array if name == "mask" else more[name] + array
            more[name] = array
        out = attention(query, key, values, scale=scores.scale, soft_cap=scores.soft_cap, **more)
        return layout.back(out, out_labels).astype(dtype)

    nodes = between([root], distinct)
    missed = escaping(graph, [root], nodes)
    if missed is not None:
        return missed
    sampled = _sampler(distinct, {value: no for value, _, no in extra if value.dtype == jnp.bool_})
    return Match([root], distinct, nodes, replacement, (scores.scale,), sampled)


def _one_dtype(*operands: _Operand) -> list[_Operand]:
    """Operands without conversions to a wider dtype, where all are of one dtype then."""
    narrow = []
    for operand in operands:
        value = operand.value
        source = value.inputs[0] if value.name == "convert_element_type" else value
        if jnp.issubdtype(source.dtype, jnp.floating) and source.dtype.itemsize < value.dtype.itemsize:
            value = skip(source)
        narrow.append(_Operand(value, operand.labels, operand.repeats))
    found = narrow if len({operand.value.dtype for operand in narrow}) == 1 else list(operands)
    kinds = {str(operand.value.dtype) for operand in found}
    if len(kinds) != 1:
        raise _No(f"queries, keys and values are of several dtypes: {', '.join(sorted(kinds))}")
    return [_peeled(operand, object()) if not operand.repeats else operand for operand in found]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Which label is what: the kernel wants `[B, T, N, H]`."""

    sizes: dict[Any, int]
    outer: list[Any]
    head: Any
    groups: list[Any]
    time: Any
    span: Any

    def arranged(self, x: Any, labels: Labels, which: str) -> Any:
        """An operand as `[B, T, N, H]`; one that lacks a shared axis is repeated along it."""
        last = "v" if which == "v" else "h"
        middle = {"q": self.time, "k": self.span, "v": "s"}[which]
        heads = [self.head, *self.groups] if which == "q" else [self.head]
        wanted = [*self.outer, middle, *(h for h in heads if h is not None), last]
        labels = tuple(labels)
        x = x.reshape([n for n, label in zip(x.shape, labels, strict=True) if label in wanted])
        present = [label for label in labels if label in wanted]
        x = jnp.transpose(x, [present.index(label) for label in wanted if label in present])
        for i, label in enumerate(wanted):
            if label not in present:
                x = jnp.expand_dims(x, i)
        count = len(self.outer)
        batch = math.prod(x.shape[:count])
        return x.reshape(batch, x.shape[count], math.prod(x.shape[count + 1 : -1]), x.shape[-1])

    def scores(self, x: Any, labels: Labels) -> Any:
        """A mask or bias with a label (or None) for each axis, as `[B, N, T, S]` with ones where it does not vary."""
        order = [*self.outer, *([self.head] if self.head is not None else []), *self.groups, self.time, self.span]
        moving = [label for label, n in zip(labels, x.shape, strict=True) if label is not None and n != 1]
        x = x.reshape([n for label, n in zip(labels, x.shape, strict=True) if label is not None and n != 1])
        x = jnp.transpose(x, [moving.index(label) for label in order if label in moving])
        x = x.reshape([self.sizes[label] if label in moving else 1 for label in order])
        split = [len(self.outer), len(order) - 2]
        parts = [order[: split[0]], order[split[0] : split[1]]]
        full = [self.sizes[label] if any(other in moving for other in part) else 1 for part in parts for label in part]
        x = jnp.broadcast_to(x, (*full, *x.shape[-2:]))
        batch, heads = math.prod(full[: split[0]]), math.prod(full[split[0] :])
        span = self.sizes[self.span]
        return jnp.broadcast_to(x.reshape(batch, heads, *x.shape[-2:]), (batch, heads, x.shape[-2], span))

    def back(self, out: Any, labels: Labels) -> Any:
        """The kernel's output with its axes as `labels` have them."""
        heads = [*([self.head] if self.head is not None else []), *self.groups]
        have = [*self.outer, self.time, *heads, "v"]
        out = out.reshape([*(self.sizes[label] for label in have[:-1]), out.shape[-1]])
        kept = [label for label in labels if label is not None]
        gone = [label for label in have if label not in kept]
        out = out.reshape([n for n, label in zip(out.shape, have, strict=True) if label not in gone])
        have = [label for label in have if label not in gone]
        shape = [out.shape[have.index(label)] if label is not None else 1 for label in labels]
        return jnp.transpose(out, [have.index(label) for label in kept]).reshape(shape)


def _masked(scores: _Scores, layout: _Layout) -> tuple[dict[str, Any], list[tuple[Value, Any, bool]]]:
    """Options of the kernel for constant masks; for other masks and biases how they are made, and if inverted."""
    options: dict[str, Any] = {"causal": False}
    length, span = layout.sizes[layout.time], layout.sizes[layout.span]
    extra: list[tuple[Value, Any, bool]] = []
    band = np.ones((length, span), bool)
    banded = False
    masks = [part for value, labels, inverted in scores.masks for part in _conjuncts(value, labels, inverted)]
    for value, labels, factor in scores.biases:
        seen = _constant_mask(value, factor)
        if seen is not None and (flat := _flat(seen, labels, layout)) is not None:
            band, banded = band & flat, True
            continue
        base, axes = _spread(value, labels)
        make = lambda x, axes=axes, factor=factor: ("bias", _scaled(layout.scores(x, axes), factor))  # noqa: E731
        extra.append((base, make, False))
    for value, labels, inverted in masks:
        known = constant(value)
        flat = None if known is None else _flat(known != inverted, labels, layout)
        if flat is not None:
            band, banded = band & flat, True
            continue
        base, axes = _spread(value, labels)
        make = lambda x, axes=axes, no=inverted: ("mask", layout.scores(~x if no else x, axes))  # noqa: E731
        extra.append((base, make, inverted))
    if banded and not band.all():
        distance = np.arange(span)[None, :] - np.arange(length)[:, None]
        back, ahead = -int(distance[band].min()), int(distance[band].max())
        if np.array_equal(band, (distance >= -back) & (distance <= ahead)) and ahead >= 0 and back >= 0:
            causal = ahead == 0
            bounds = (None if back >= length - 1 else back, None if ahead >= span - 1 else ahead)
            options["causal"] = causal
            if bounds[0] is not None or (not causal and bounds[1] is not None):
                options["window"] = (bounds[0], None if causal else bounds[1])
        else:
            options["mask"] = band[None, None]
    return options, extra


def _scaled(x: Any, factor: float) -> Any:
    return x if factor == 1.0 else x * jnp.asarray(factor, x.dtype)


def _conjuncts(value: Value, labels: Labels, inverted: bool) -> list[tuple[Value, Labels, bool]]:
    """The parts of `a & b`, or of `~(a | b)`, that hold each on its own."""
    value = skip(value)
    if value.name == "not":
        return _conjuncts(value.inputs[0], labels, not inverted)
    if value.name in ("convert_element_type",) and value.inputs[0].dtype == jnp.bool_:
        return _conjuncts(value.inputs[0], labels, inverted)
    if value.name in ("ne", "eq") and value.dtype == jnp.bool_ and not is_constant(value):
        number = uniform(value.inputs[1])
        inner = skip(value.inputs[0])
        was_bool = inner.name == "convert_element_type" and inner.inputs[0].dtype == jnp.bool_
        if number is not None and float(number) == 0 and was_bool:
            return _conjuncts(inner.inputs[0], labels, inverted != (value.name == "eq"))
    if value.name == ("or" if inverted else "and") and not is_constant(value):
        return [part for each in value.inputs for part in _conjuncts(each, labels, inverted)]
    if value.name == "broadcast_in_dim" and not is_constant(value):
        base, axes = _spread(value, labels)
        if base.name in ("and", "or", "not", "broadcast_in_dim"):
            return _conjuncts(base, axes, inverted)
    return [(value, labels, inverted)]


def _spread(value: Value, labels: Labels) -> tuple[Value, Labels]:
    """What a value is broadcast from, and the labels of its axes."""
    value = skip(value)
    while value.name in ("broadcast_in_dim", "reshape", "squeeze", "expand_dims"):
        source = skip(value.inputs[0])
        if value.name == "broadcast_in_dim":
            dims = value.maker.params["broadcast_dimensions"]  # type: ignore[union-attr]
            labels = tuple(labels[d] if n != 1 else None for d, n in zip(dims, source.shape, strict=True))
        elif [n for n in source.shape if n != 1] == [n for n in value.shape if n != 1]:
            kept = iter(label for label, n in zip(labels, value.shape, strict=True) if n != 1)
            labels = tuple(next(kept) if n != 1 else None for n in source.shape)
        else:
            break
        value = source
    return value, labels


def _constant_mask(value: Value, factor: float) -> np.ndarray | None:
    """Where a bias that depends on no input is zero; None where it is something else than zero and very small."""
    known = constant(value)
    if known is None or known.dtype.kind in "bui":
        return None
    with np.errstate(invalid="ignore"):
        scaled = known.astype(np.float64) * factor
    zero = known == 0
    return zero if (zero | (scaled <= _SMALL)).all() else None


def _flat(seen: np.ndarray, labels: Labels, layout: _Layout) -> np.ndarray | None:
    """A constant mask as `[T, S]`, if it is the same for all else."""
    index, order = [], []
    for axis, (label, n) in enumerate(zip(labels, seen.shape, strict=True)):
        if label in (layout.time, layout.span) and n != 1:
            order.append(label)
            index.append(slice(None))
        elif n == 1 or (seen == np.take(seen, [0], axis)).all():
            index.append(0)
        else:
            return None
    flat = seen[tuple(index)]
    if order == [layout.span, layout.time]:
        flat = flat.T
    elif order == [layout.time]:
        flat = flat[:, None]
    return np.broadcast_to(flat, (layout.sizes[layout.time], layout.sizes[layout.span]))


def _sampler(operands: list[Value], masks: dict[Value, bool]) -> Any:
    kinds = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in operands]

    def sample(numbers: np.random.Generator) -> list[Any]:
        """Random operands; masks that leave most keys to see, the first and the last always."""
        found = random_operands(numbers, kinds)
        for i, value in enumerate(operands):
            if value in masks:
                seen = numbers.random(value.shape) < 0.7
                seen[..., [0, -1]] = True
                found[i] = seen != masks[value]
        return found

    return sample


ATTENTION = Finder("attention", _find, priority=100)
