"""`capture`: what a function multiplies its weights by, with no change to the function.

    fn(params, *batch) -> jaxpr -> every product with a selected leaf of params -> the other operand, x [rows, K]
                                                                                 -> observer.update(state, x)

The function is traced and walked equation by equation. A selected leaf is followed through everything that moves its
elements or casts them (transpose, reshape, slice, jit, checkpoint, functions with a derivative of their own, scan); a
`dot_general` with it is a product, and its other operand goes to the observer. The program that runs returns the
statistics alone, so nothing else of the model is kept, and what no statistic needs is not computed.

A leaf that a scan walks over, or whose products have a batch axis (experts), gets statistics `[L, ...]`, one for each
of its matrices. Packed leaves that are selected are decoded inside the program; others go their usual way.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn

from trustcore import _jax
from trustcore.errors import QuantizationError
from trustcore.graph import View, aval, bind, called, product_of, run, through
from trustcore.ops.weight import Weight
from trustcore.quant.calibration.observers import Observer, State
from trustcore.quant.quantize import KEPT, Predicate, path_name

Key = tuple[str, tuple[int, ...]]  # path, and the position on the leaf's axes that are indexed
States = dict[Key, State]


class Site(NamedTuple):
    """Where the statistics of a product belong in its leaf: K, its axes, those that are stacked and those indexed."""

    k: int
    contracted: tuple[int, ...]
    stacked: tuple[int, ...]
    indexed: tuple[int, ...]
    shape: tuple[int, ...]


def capture(
    fn: Callable[..., Any] | None,
    params: Any,
    observer: Observer | Mapping[str, Observer],
    *,
    where: Predicate | Sequence[str] | None = None,
) -> Capture:
    """Returns a function of a batch that gathers statistics of what `fn` multiplies the weights by.

        collect = capture(fn, params, MeanSquare())
        state = collect(*batch)
        state = collect(*other, state=state)
        importance = collect.finish(state)          # {path: [K]}, as `quantize(importance=...)` takes it

    Args:
        fn: a function of (params, *batch); None: params is a model that is called itself. Its result is not used.
        params: a pytree of weights.
        observer: what to gather, or several by name; then the results are dicts of these names.
        where: which leaves, by (path, array), or their paths; each must take part in a product. None: all float leaves
            of two axes or more that are no norm, router or position, as far as they take part in one.

    Raises:
        QuantizationError: a path is not there, or nothing is selected. When called: a selected leaf takes part in no
            product, or in products that sum over different axes.

    One program a batch shape. It holds the state twice, and the activations of one layer at a time.
    """
    return Capture(fn or call, params, observer, where)


def call(model: Any, *batch: Any) -> Any:
    """Returns `model(*batch)`."""
    return model(*batch)


class Capture:
    """See `capture`.

    Attributes:
        paths: of the selected leaves.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        params: Any,
        observer: Observer | Mapping[str, Observer],
        where: Predicate | Sequence[str] | None = None,
    ):
        self._params = params
        self._observer = Several(observer) if isinstance(observer, Mapping) else observer
        self.paths = selected(params, where)
        self._sites: dict[Key, Site] = {}
        strict = where is not None
        self._program = jax.jit(functools.partial(_collect, fn, self.paths, strict, self._observer, self._sites))

    def __call__(self, *batch: Any, state: States | None = None) -> States:
        """Returns the state after one batch, `state` being that of the batches before."""
        here = self._program(self._params, *batch)
        return here if state is None else self.merge(state, here)

    def merge(self, a: States, b: States) -> States:
        """Returns the state of both parts of the data."""
        return {key: _merge(self._observer, self._sites[key].k, a[key], b[key]) for key in a}

    def finish(self, state: States) -> dict[str, Any]:
        """Returns the statistics by path; those of stacked leaves with leading axes, in the leaf's order."""
        found: dict[str, dict[tuple[int, ...], Any]] = {}
        for (path, index), part in state.items():
            site = self._sites[(path, index)]
            parts = _finished(self._observer, part, len(site.stacked))
            axes = (*site.indexed, *site.stacked)
            for position, value in parts:
                whole = dict(zip(axes, (*index, *position), strict=True))
                found.setdefault(path, {})[tuple(whole[axis] for axis in sorted(whole))] = value
        results = {}
        for path, parts in found.items():
            site = next(site for (name, _), site in self._sites.items() if name == path)
            lead = tuple(site.shape[axis] for axis in sorted((*site.indexed, *site.stacked)))
            missing = [position for position in np.ndindex(*lead) if position not in parts]
            if missing:
                raise QuantizationError(
                    f"capture: {path} {list(site.shape)} takes part in no product at {_listed(missing)}; the function "
                    "does not use all of it. Leave it out by `where`."
                )
            results[path] = _stacked(parts, lead)
        return results


def selected(params: Any, where: Predicate | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the paths of the leaves that `where` selects.

    Raises:
        QuantizationError: a path is not there, or nothing is selected.
    """
    leaves = named_leaves(params)
    if where is not None and not callable(where):
        wrong = [path for path in where if path not in leaves]
        if wrong:
            raise QuantizationError(
                f"capture: {_listed(wrong)} is no path of the tree; paths look like {_listed(list(leaves)[:3])}"
            )
        paths = tuple(path for path in leaves if path in set(where))
    else:
        paths = tuple(path for path, leaf in leaves.items() if (where or may_be_multiplied)(path, leaf))
    if not paths:
        raise QuantizationError(f"capture: `where` selects none of {len(leaves)} leaves")
    return paths


def may_be_multiplied(path: str, leaf: Any) -> bool:
    """Returns whether a leaf is looked for by default: floats of two axes or more, no norm, router or position."""
    shape, dtype = getattr(leaf, "shape", ()), getattr(leaf, "dtype", None)
    return len(shape) > 1 and dtype is not None and jnp.issubdtype(dtype, jnp.floating) and KEPT.search(path) is None


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path, a packed matrix being one."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_weight)[0]}


def replaced(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """Returns the tree with other leaves at some paths."""
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_weight)
    return jax.tree_util.tree_unflatten(structure, [leaves.get(path_name(path), leaf) for path, leaf in flat])


def is_weight(node: Any) -> bool:
    """Returns whether a node of a tree is a `Weight`, which counts as a leaf here."""
    return isinstance(node, Weight)


def decoded(leaf: Any) -> Any:
    """Returns the float array of a leaf, packed or not."""
    return leaf.dequantize() if isinstance(leaf, Weight) else leaf


@dataclasses.dataclass(frozen=True)
class Several(Observer):
    """Observers by name, as one."""

    observers: Mapping[str, Observer]

    def init(self, k: int) -> State:
        """See `Observer`."""
        return {name: observer.init(k) for name, observer in self.observers.items()}

    def update(self, state: State, x: jax.Array) -> State:
        """See `Observer`."""
        return {name: observer.update(state[name], x) for name, observer in self.observers.items()}

    def merge(self, a: State, b: State) -> State:
        """See `Observer`."""
        return {name: observer.merge(a[name], b[name]) for name, observer in self.observers.items()}

    def finish(self, state: State) -> dict[str, Any]:
        """See `Observer`."""
        return {name: observer.finish(state[name]) for name, observer in self.observers.items()}


def trace(fn: Callable[..., Any], params: Any, batch: Sequence[Any], paths: Sequence[str]) -> tuple[ClosedJaxpr, list]:
    """Returns the program of `fn(params, *batch)` with the leaves at `paths` as float arrays, and each input's path.

    Inputs that belong to no selected leaf have None. `params` may hold tracers.
    """
    chosen = set(paths)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: decoded(leaf) if path_name(path) in chosen else leaf, params, is_leaf=is_weight
    )
    jaxpr = jax.make_jaxpr(fn)(params, *batch)
    inputs = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    names = [name if name in chosen else None for name in inputs]
    return jaxpr, names + [None] * (len(jaxpr.jaxpr.invars) - len(names))


# ---- the program -----------------------------------------------------------------------------------------------------


class _Value(NamedTuple):
    value: Any
    view: View | None = None


def _collect(
    fn: Callable[..., Any],
    paths: tuple[str, ...],
    strict: bool,
    observer: Observer,
    sites: dict[Key, Site],
    params: Any,
    *batch: Any,
) -> States:
    chosen = set(paths)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(decoded(leaf)) if path_name(path) in chosen else leaf, params, is_leaf=is_weight
    )
    jaxpr, names = trace(fn, params, batch, paths)
    values = [jnp.asarray(leaf) for leaf in jax.tree.leaves((params, *batch))]
    inputs = [
        _Value(value, None if name is None else View.of(name, value.shape))
        for name, value in zip(names, values, strict=True)
    ]
    states: States = {}
    _walk(jaxpr, inputs, _Collector(observer, sites, states))
    unused = [path for path in paths if path not in {path for path, _ in states}]
    if unused and (strict or not states):
        raise QuantizationError(
            f"capture: {_listed(unused)} takes part in no product of the function that can be seen. Seen are "
            "dot_general with the leaf itself, moved or cast, also inside jit, checkpoint, custom derivatives and "
            "scan, but not inside while_loop, cond or shard_map, nor with a part or a combination of leaves. Leave it "
            "out by `where`."
        )
    return states


class _Collector(NamedTuple):
    observer: Observer
    sites: dict[Key, Site]
    states: States

    def add(self, key: Key, state: State) -> None:
        """Joins a state of the same product to what there is."""
        if key in self.states:
            state = _merge(self.observer, self.sites[key].k, self.states[key], state)
        self.states[key] = state


def _walk(jaxpr: ClosedJaxpr, inputs: Sequence[_Value], into: _Collector) -> list[_Value]:
    return run(jaxpr, inputs, functools.partial(_step, into), _Value)


def _step(into: _Collector, eqn: JaxprEqn, inputs: list[_Value]) -> list[_Value]:
    if any(item.view is not None for item in inputs):
        body = called(eqn)
        if body is not None:
            return _walk(body, inputs, into)
        if eqn.primitive.name == "scan":
            return _scan(into, eqn, inputs)
        if eqn.primitive.name == "dot_general":
            for operand in (0, 1):
                _observe(into, eqn, operand, inputs)
    outputs = [_Value(value) for value in bind(eqn, [item.value for item in inputs])]
    if inputs and inputs[0].view is not None and len(outputs) == 1:
        outputs[0] = outputs[0]._replace(view=through(eqn, inputs[0].view))
    return outputs


def _observe(into: _Collector, eqn: JaxprEqn, operand: int, inputs: list[_Value]) -> None:
    view, x = inputs[operand].view, inputs[1 - operand].value
    product = None if view is None else product_of(eqn, operand, view)
    if view is None or product is None:
        return
    key, site = site_of(view, product)
    for (path, _), other in into.sites.items():
        if path == key[0] and other.contracted != site.contracted:
            raise QuantizationError(
                f"capture: products with {path} {list(view.shape)} sum over its axes {list(other.contracted)} in one "
                f"place and {list(site.contracted)} in another; there is no one set of inputs. Leave it out by `where`."
            )
    into.sites[key] = site
    rows = operand_rows(x, product, site.k)
    update = into.observer.update
    init = into.observer.init(site.k)
    for _ in range(product.batch):
        update = jax.vmap(update, in_axes=(None, 0))
    into.add(key, update(init, rows))


def operand_rows(x: jax.Array, product: Any, k: int) -> jax.Array:
    """Returns the other operand of a product as float32 `[*batch, rows, K]`."""
    x = jnp.transpose(x, product.order)
    rows = math.prod(x.shape) // max(math.prod(x.shape[: product.batch]) * k, 1)
    return x.reshape(*x.shape[: product.batch], rows, k).astype(jnp.float32)


def site_of(view: View, product: Any) -> tuple[Key, Site]:
    """Returns where the statistics of a product belong."""
    index = tuple(position for _, position in product.index)
    k = math.prod(view.shape[axis] for axis in product.contracted)
    indexed = tuple(axis for axis, _ in product.index)
    return (view.leaf, index), Site(k, product.contracted, product.stacked, indexed, view.shape)


def _scan(into: _Collector, eqn: JaxprEqn, inputs: list[_Value]) -> list[_Value]:
    """The scan with the statistics of its body: those of leaves it walks over stacked, those of others carried."""
    consts, carries = _jax.scan_counts(eqn.params)
    body: ClosedJaxpr = eqn.params["jaxpr"]
    fixed, moving = inputs[:consts], inputs[consts + carries :]
    walked = {item.view.leaf for item in moving if item.view is not None}
    views = [
        *(item.view for item in fixed),
        *([None] * carries),
        *(None if item.view is None else item.view.turn() for item in moving),
    ]

    def turn(values: Sequence[Any]) -> tuple[list[Any], States]:
        found: States = {}
        here = _Collector(into.observer, into.sites, found)
        outputs = _walk(body, [_Value(v, view) for v, view in zip(values, views, strict=True)], here)
        return [item.value for item in outputs], found

    shapes = [jax.ShapeDtypeStruct(aval(var).shape, aval(var).dtype) for var in body.jaxpr.invars]
    found = jax.eval_shape(lambda *values: turn(values)[1], *shapes)
    carried = {
        key: jax.tree.map(
            lambda own, like: jnp.broadcast_to(own, like.shape), into.observer.init(into.sites[key].k), state
        )
        for key, state in found.items()
        if key[0] not in walked
    }

    def step(carry: tuple[list[Any], States], xs: list[Any]) -> tuple[Any, Any]:
        values, totals = carry
        outputs, found = turn([*(item.value for item in fixed), *values, *xs])
        totals = {key: _merge(into.observer, into.sites[key].k, total, found[key]) for key, total in totals.items()}
        return (outputs[:carries], totals), (outputs[carries:], {k: s for k, s in found.items() if k[0] in walked})

    start = [item.value for item in inputs[consts : consts + carries]]
    (values, totals), (ys, stacked) = jax.lax.scan(
        step,
        (start, carried),
        [item.value for item in moving],
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
    )
    for key, state in {**totals, **stacked}.items():
        into.add(key, state)
    return [_Value(value) for value in (*values, *ys)]


def _merge(observer: Observer, k: int, a: State, b: State) -> State:
    """Joins two states of a product with K inputs, whatever leading axes they have."""
    own = jax.eval_shape(lambda: observer.init(k))
    depth = len(jax.tree.leaves(a)[0].shape) - len(jax.tree.leaves(own)[0].shape)
    merge = observer.merge
    for _ in range(depth):
        merge = jax.vmap(merge)
    return merge(a, b)


# ---- results ---------------------------------------------------------------------------------------------------------


def _finished(observer: Observer, state: State, depth: int) -> list[tuple[tuple[int, ...], Any]]:
    leaves, structure = jax.tree.flatten(jax.device_get(state))
    lead = leaves[0].shape[:depth]
    return [
        (position, observer.finish(jax.tree.unflatten(structure, [leaf[position] for leaf in leaves])))
        for position in np.ndindex(*lead)
    ]


def _stacked(parts: Mapping[tuple[int, ...], Any], lead: tuple[int, ...]) -> Any:
    """The results of all matrices of a leaf as one, arrays with leading axes."""
    if not lead:
        return parts[()]
    values = [_opened(parts[position]) for position in np.ndindex(*lead)]
    join = lambda *columns: np.stack(columns).reshape(*lead, *np.shape(columns[0]))  # noqa: E731
    return _closed(jax.tree.map(join, *values), parts[(0,) * len(lead)])


def _opened(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _opened(part) for name, part in value.items()}
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _closed(joined: Any, like: Any) -> Any:
    if isinstance(like, dict):
        return {name: _closed(joined[name], part) for name, part in like.items()}
    if dataclasses.is_dataclass(like) and not isinstance(like, type):
        return type(like)(**joined)
    return joined


def _listed(items: Sequence[Any]) -> str:
    shown = ", ".join(str(item) for item in items[:5])
    return f"{shown} and {len(items) - 5} more" if len(items) > 5 else shown
