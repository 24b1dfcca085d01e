"""The loss of labels over a vocabulary as it is written by hand, as one call of `kernels_pallas.cross_entropy`.

    logits = hidden table (+ bias)                    table [D, V], or [V, D] transposed
    log p = logits - max - log sum exp(logits - max)  jax.nn.log_softmax, or logits - logsumexp(logits)
    gather(log p, labels)                             jnp.take_along_axis along the last axis
    logsumexp(logits) - gather(logits, labels)        as optax writes it
    sum(one_hot(labels) * log p)

The logits `[rows, V]` are then computed by chunks of columns, and are never in memory as a whole. Labels below zero
count from the end where they do in the program; one that is no column gives NaN from a gather, 0 from a one-hot.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.cross_entropy import cross_entropy
from trustcore.graph.rewriting.forms import is_constant, maximum_of, same_value, skip, through, uniform
from trustcore.graph.rewriting.matching import between, escaping
from trustcore.graph.rewriting.proof import random_operands
from trustcore.graph.rewriting.rule import Finder, Match, NearMiss
from trustcore.graph.rewriting.terms import Graph, Value

COLUMNS = 4096  # of a vocabulary; the logits of a smaller one take little memory
_MOVES = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims")


@dataclasses.dataclass(frozen=True)
class _Product:
    """Logits: hidden `[*rows, D]` times a table, and a bias `[V]`."""

    hidden: Value
    table: Value
    bias: Value | None
    transposed: bool


def _find(graph: Graph, root: Value) -> Match | NearMiss | None:
    found = _gathered(root) or _subtracted(root) or _one_hot(root)
    if found is None:
        return None
    kind, logits, labels, wraps = found
    product = _product(logits)
    if product is None:
        return NearMiss("the logits are no product of rows and a table")
    columns = logits.shape[-1]
    if columns < COLUMNS:
        return NearMiss(f"{columns} columns: such logits take little memory")
    if product.hidden.dtype != product.table.dtype:
        return NearMiss(f"rows of {product.hidden.dtype} and a table of {product.table.dtype}")
    operands = [product.hidden, product.table, labels, *([product.bias] if product.bias is not None else [])]
    distinct = list(dict.fromkeys(operands))
    rows, dtype = logits.shape[:-1], root.dtype

    def replacement(*arrays: Any) -> Any:
        hidden, table, label, *bias = (dict(zip(distinct, arrays, strict=True))[value] for value in operands)
        label = label.reshape(rows).astype(jnp.int32)
        if wraps:
            label = jnp.where(label < 0, label + columns, label)
        known = (label >= 0) & (label < columns)
        losses, lse = cross_entropy(
            hidden, table, jnp.where(known, label, -1), bias=bias[0] if bias else None, ignore_index=-1,
            transposed=product.transposed, return_lse=True,
        )  # fmt: skip
        if kind == "gather":
            losses = jnp.where(known, -losses, jnp.nan)
        elif kind == "sub":
            losses = jnp.where(known, losses, lse + jnp.nan)
        else:
            losses = -losses
        return losses.astype(dtype).reshape(root.shape)

    def sample(numbers: np.random.Generator) -> list[Any]:
        """Random operands; labels among the columns, below zero where the program counts from the end, and beyond."""
        made = random_operands(numbers, [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in distinct])
        at = distinct.index(labels)
        drawn = numbers.integers(-columns if wraps else 0, columns, labels.shape)
        drawn.reshape(-1)[: drawn.size // 8] = columns + 3
        made[at] = drawn.astype(labels.dtype)
        # Logits of the size that they have in models, or one column takes all.
        made[distinct.index(product.hidden)] *= np.asarray(product.hidden.shape[-1] ** -0.5, product.hidden.dtype)
        return made

    nodes = between([root], distinct)
    missed = escaping(graph, [root], nodes)
    return missed or Match([root], distinct, nodes, replacement, sample=sample)


# ---- the loss --------------------------------------------------------------------------------------------------------

_Found = tuple[str, Value, Value, bool]  # how it is written, logits, labels, whether labels count from the end


def _gathered(root: Value) -> _Found | None:
    """gather(log p, labels)."""
    picked = _picked(root)
    if picked is None or root.name != "gather":
        return None
    logits = _log_softmax(picked[0])
    return None if logits is None else ("gather", logits, *picked[1:])


def _subtracted(root: Value) -> _Found | None:
    """logsumexp(logits) - gather(logits, labels)."""
    if root.name != "sub":
        return None
    logits, value = _log_sum(through(root.inputs[0], _MOVES)), through(root.inputs[1], _MOVES)
    while value.name == "gather" and is_constant(value.inputs[1]) and math.prod(value.shape) == _count(value.inputs[0]):
        value = through(value.inputs[0], _MOVES)  # the only one of an axis of size one
    picked = None if logits is None else _picked(value)
    if picked is None or logits is None or not same_value(picked[0], logits):
        return None
    return "sub", logits, *picked[1:]


def _one_hot(root: Value) -> _Found | None:
    """sum(one_hot(labels) * log p)."""
    if root.name != "reduce_sum" or skip(root.inputs[0]).name != "mul":
        return None
    product = skip(root.inputs[0])
    if tuple(root.maker.params["axes"]) != (len(product.shape) - 1,):  # type: ignore[union-attr]
        return None
    for side in (0, 1):
        logits = _log_softmax(product.inputs[1 - side])
        hot = through(product.inputs[side], ("convert_element_type",))
        if logits is None or hot.name != "eq" or hot.shape != product.shape:
            continue
        for which in (0, 1):
            counted = through(hot.inputs[1 - which], ("broadcast_in_dim",))
            labels = through(hot.inputs[which], _MOVES)
            if counted.name == "iota" and not is_constant(labels) and _count(labels) == math.prod(root.shape):
                return "one hot", logits, labels, False
    return None


def _picked(value: Value) -> tuple[Value, Value, bool] | None:
    """What a gather along the last axis reads, its labels, and whether those below zero count from the end."""
    if value.name != "gather" or value.maker is None:
        return None
    source, params = value.inputs[0], value.maker.params
    rank, numbers = len(source.shape), params["dimension_numbers"]
    rows = tuple(range(rank - 1))
    whole = tuple(numbers.operand_batching_dims) == rows and tuple(numbers.start_index_map) == (rank - 1,)
    fills = "FILL_OR_DROP" in str(params["mode"]) and (params["fill_value"] is None or np.isnan(params["fill_value"]))
    if not whole or not fills or _count(value) != math.prod(source.shape[:-1]):
        return None
    labels = through(value.inputs[1], _MOVES)
    wraps = labels.name == "select_n" and _wraps(labels, source.shape[-1])
    labels = through(labels.inputs[1], _MOVES) if wraps else labels
    return (source, labels, wraps) if _count(labels) == _count(value) else None


def _wraps(value: Value, columns: int) -> bool:
    """Whether a value is where(i < 0, i + columns, i)."""
    test, kept, moved = (skip(each) for each in value.inputs)
    return (
        test.name == "lt"
        and moved.name == "add"
        and any(skip(each) is kept for each in moved.inputs)
        and any((number := uniform(each)) is not None and int(number) == columns for each in moved.inputs)
    )


# ---- log p -----------------------------------------------------------------------------------------------------------


def _log_softmax(value: Value) -> Value | None:
    """The logits, of log p over the last axis."""
    value = skip(value)
    if value.name != "sub":
        return None
    above, below = skip(value.inputs[0]), through(value.inputs[1], _MOVES)
    if below.name == "log" and (inner := _exponent(below)) is not None and inner is above:
        return _unshifted(above) or above
    logits = _log_sum(below)
    return logits if logits is not None and skip(logits) is above else None


def _log_sum(value: Value) -> Value | None:
    """The logits, of the logarithm of the sum of their exponentials over the last axis."""
    if value.name == "add":
        for side in (0, 1):
            inner = _exponent(through(value.inputs[side], _MOVES))
            logits = None if inner is None else _unshifted(inner)
            if logits is not None and maximum_of(value.inputs[1 - side]) is logits:
                return logits
    return _exponent(value) if value.name == "log" else None


def _exponent(value: Value) -> Value | None:
    """s, of log(sum(exp(s))) over the last axis."""
    if value.name != "log":
        return None
    total = through(value.inputs[0], (*_MOVES, "abs"))
    if total.name != "reduce_sum" or skip(total.inputs[0]).name != "exp":
        return None
    power = skip(total.inputs[0])
    last = tuple(total.maker.params["axes"]) == (len(power.shape) - 1,)  # type: ignore[union-attr]
    return skip(power.inputs[0]) if last else None


def _unshifted(value: Value) -> Value | None:
    """x, of x - max(x)."""
    if value.name != "sub":
        return None
    logits = skip(value.inputs[0])
    return logits if maximum_of(value.inputs[1]) is logits else None


def _product(logits: Value) -> _Product | None:
    value, bias = through(logits, ("convert_element_type",)), None
    if value.name == "add":
        for side in (0, 1):
            row = through(value.inputs[side], _MOVES)
            if len(row.shape) == 1 and row.shape == logits.shape[-1:] and not is_constant(row):
                bias, value = row, through(value.inputs[1 - side], ("convert_element_type",))
                break
    if value.name != "dot_general":
        return None
    (left, right), batch = value.maker.params["dimension_numbers"]  # type: ignore[union-attr]
    hidden, table = value.inputs
    if any(batch) or len(table.shape) != 2 or tuple(left) != (len(hidden.shape) - 1,) or len(right) != 1:
        return None
    transposed = right[0] == 1
    source = skip(table)
    if source.name == "transpose":
        table, transposed = source.inputs[0], not transposed
    return _Product(hidden, table, bias, transposed)


def _count(value: Value) -> int:
    return math.prod(value.shape)


CROSS_ENTROPY = Finder("cross-entropy", _find, priority=90)
