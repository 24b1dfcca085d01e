"""Which element of a leaf stands where, through everything that only moves elements.

A `View` is the leaf seen through transposes, reshapes, slices and casts: each of its axes is a run of factors
(size, stride), major first, and element i0, i1, ... of the factors of all axes lies at

    start + i0 * stride0 + i1 * stride1 + ...        in the leaf, counted row by row

so that a product with it can be told in the leaf's own axes, however the program came to it. An axis of size 1 has no
factor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn, Literal

from trustcore.graph.walk import aval

Factors = tuple[tuple[int, int], ...]

_SAME = frozenset(
    {
        "convert_element_type",
        "copy",
        "copy_p",
        "reduce_precision",
        "optimization_barrier",
        "sharding_constraint",
        "name",
    }
)


@dataclasses.dataclass(frozen=True)
class View:
    """A leaf as some variable of a program holds it.

    Attributes:
        leaf: which one.
        shape: of the leaf.
        start: where the first element lies.
        axes: the factors of each axis of the variable.
        scanned: factors that a scan around the variable walks over, outermost first.
    """

    leaf: Any
    shape: tuple[int, ...]
    start: int
    axes: tuple[Factors, ...]
    scanned: Factors = ()

    @staticmethod
    def of(leaf: Any, shape: tuple[int, ...]) -> View:
        """Returns the view of a leaf as it is."""
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        axes = tuple(((n, s),) if n != 1 else () for n, s in zip(shape, strides, strict=True))
        return View(leaf, shape, 0, axes)

    def turn(self) -> View:
        """Returns what one turn of a scan over the first axis sees."""
        return dataclasses.replace(self, axes=self.axes[1:], scanned=self.scanned + (self.axes[0] or ((1, 0),)))


class Product(NamedTuple):
    """How a product goes through a leaf.

    Attributes:
        contracted: the leaf's axes that are summed over, in the leaf's order.
        stacked: the leaf's axes for which there is a product each, by a scan or a batch axis, in that order.
        index: (axis, position) for the leaf's axes of which the product sees one position.
        order: the other operand's axes: batch axes, free ones, then those that meet `contracted`.
        batch: how many of them are batch axes.
    """

    contracted: tuple[int, ...]
    stacked: tuple[int, ...]
    index: tuple[tuple[int, int], ...]
    order: tuple[int, ...]
    batch: int


def through(eqn: JaxprEqn, view: View) -> View | None:
    """Returns the view of its first input's leaf that the output of `eqn` is; None where more than a move happens."""
    name, params = eqn.primitive.name, eqn.params
    axes: list[Factors] | None = None
    start = view.start
    at = [atom.val for atom in eqn.invars[1:] if isinstance(atom, Literal)]
    if name in _SAME and len(eqn.invars) == 1:
        axes = list(view.axes)
    elif name == "transpose":
        axes = [view.axes[i] for i in params["permutation"]]
    elif name == "squeeze":
        axes = [f for i, f in enumerate(view.axes) if i not in params["dimensions"]]
    elif name == "reshape" and params.get("dimensions") is None:
        axes = _regrouped(view.axes, params["new_sizes"])
    elif name == "broadcast_in_dim":
        axes = _broadcast(view, eqn)
    elif name == "slice":
        steps = params["strides"] or (1,) * len(view.axes)
        start, axes = _sliced(view, params["start_indices"], params["limit_indices"], steps)
    elif name == "dynamic_slice" and len(at) == len(eqn.invars) - 1:
        sizes, whole = params["slice_sizes"], aval(eqn.invars[0]).shape
        starts = [min(max(int(a), 0), w - s) for a, w, s in zip(at, whole, sizes, strict=True)]
        ends = [a + s for a, s in zip(starts, sizes, strict=True)]
        start, axes = _sliced(view, starts, ends, (1,) * len(sizes))
    return None if axes is None else dataclasses.replace(view, start=start, axes=tuple(axes))


def product_of(eqn: JaxprEqn, operand: int, view: View) -> Product | None:
    """Returns how a `dot_general` goes through the leaf of which its operand number `operand` is a view.

    None where its axes are no whole axes of the leaf, such as half of the inputs of a matrix.
    """
    contract, batch = eqn.params["dimension_numbers"]
    mine, other = (contract[operand], batch[operand]), (contract[1 - operand], batch[1 - operand])
    free = [i for i in range(len(view.axes)) if i not in (*mine[0], *mine[1])]
    by_axis: dict[str, list[int]] = {}
    for kind, factors in (
        ("contracted", [f for i in mine[0] for f in view.axes[i]]),
        ("stacked", [*view.scanned, *(f for i in mine[1] for f in view.axes[i])]),
        ("free", [f for i in free for f in view.axes[i]]),
    ):
        found = _axes_of(view.shape, factors)
        if kind != "free" and any(taken != view.shape[axis] for axis, taken in found.items()):
            return None
        by_axis[kind] = list(found)
    inner = [*by_axis["contracted"], *by_axis["free"]]
    index = []
    for axis, position in enumerate(_coordinates(view.shape, view.start)):
        if axis not in (*inner, *by_axis["stacked"]) and axis < min(inner, default=0):
            index.append((axis, position))
    pairs = sorted(zip(mine[0], other[0], strict=True), key=lambda pair: _major(view.axes[pair[0]]))
    ndim = len(aval(eqn.invars[1 - operand]).shape)
    rows = [i for i in range(ndim) if i not in (*other[0], *other[1])]
    return Product(
        tuple(sorted(by_axis["contracted"])),
        tuple(by_axis["stacked"]),
        tuple(index),
        (*other[1], *rows, *(x for _, x in pairs)),
        len(other[1]),
    )


def _major(factors: Factors) -> int:
    return -factors[0][1] if factors else 0


def _axes_of(shape: tuple[int, ...], factors: Sequence[tuple[int, int]]) -> dict[int, int]:
    """The axes of the leaf that the factors walk along, major first, and how many positions of each they take."""
    found: dict[int, int] = {}
    for factor in factors:
        size, stride = factor
        within: dict[int, int] = {}
        step = 1
        for axis in range(len(shape) - 1, -1, -1):
            if size > 1 and step <= stride < step * shape[axis]:
                taken = min(size, shape[axis] * step // stride)
                within = {axis: taken, **within}
                size, stride = size // taken, step * shape[axis]
            step *= shape[axis]
        for axis, taken in within.items():
            found[axis] = found.get(axis, 1) * taken
    return found


def _coordinates(shape: tuple[int, ...], start: int) -> list[int]:
    found = []
    for n in reversed(shape):
        found.append(start % n if n else 0)
        start = start // n if n else 0
    return found[::-1]


def _regrouped(axes: tuple[Factors, ...], sizes: tuple[int, ...]) -> list[Factors] | None:
    """The same factors under other axes; a factor is split where an axis ends within it."""
    left = [factor for factors in axes for factor in factors]
    grouped: list[Factors] = []
    for whole in sizes:
        size, group = whole, list[tuple[int, int]]()
        while size > 1:
            if not left:
                return None
            n, stride = left.pop(0)
            if size % n == 0:
                group.append((n, stride))
                size //= n
            elif n % size == 0:
                group.append((size, stride * (n // size)))
                left.insert(0, (n // size, stride))
                size = 1
            else:
                return None
        grouped.append(_joined(group))
    return grouped


def _joined(group: list[tuple[int, int]]) -> Factors:
    """Neighbours that walk on evenly are one factor."""
    done: list[tuple[int, int]] = []
    for n, stride in group:
        if done and done[-1][1] == n * stride:
            done[-1] = (done[-1][0] * n, stride)
        else:
            done.append((n, stride))
    return tuple(done)


def _broadcast(view: View, eqn: JaxprEqn) -> list[Factors] | None:
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    before = aval(eqn.invars[0]).shape
    if any(shape[p] != n for p, n in zip(places, before, strict=True)):
        return None
    if any(n != 1 for i, n in enumerate(shape) if i not in places):
        return None
    axes: list[Factors] = [()] * len(shape)
    for p, factors in zip(places, view.axes, strict=True):
        axes[p] = factors
    return axes


def _sliced(view: View, starts: Any, ends: Any, steps: Any) -> tuple[int, list[Factors] | None]:
    start, axes = view.start, []
    for factors, a, b, step in zip(view.axes, starts, ends, steps, strict=True):
        size = math.prod(n for n, _ in factors)
        if (a, b, step) == (0, size, 1):
            axes.append(factors)
            continue
        if len(factors) != 1:
            return start, None
        stride = factors[0][1]
        start += a * stride
        n = -(-(b - a) // step)
        axes.append(((n, stride * step),) if n != 1 else ())
    return start, axes
