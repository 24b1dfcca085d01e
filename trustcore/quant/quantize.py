"""`quantize`: a tree of weights to the same tree with packed weights, whatever the tree is made of.

flax.nnx modules, dicts, dataclasses: anything jax flattens. A leaf is known by its path, the names from the root joined
by dots (`blocks.0.mlp.up.kernel`; the `.value` of an nnx parameter is left off). What is packed is decided for each
leaf before the first one is touched, and everything that is wrong is told in one error.

    float array [K, N]             -> QuantizedArray [K, N]
    stack of experts [E, K, N]     -> QuantizedArray [E, K, N]
    float table [V, D], looked up  -> QuantizedArray [V, D], transposed: blocks run along D
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import QuantizationError
from trustcore.ops.weight import Weight
from trustcore.quant.array import QuantizedArray
from trustcore.quant.encode import no_encoder
from trustcore.quant.formats import BlockFormat
from trustcore.quant.formats.names import Storage, storages

Predicate = Callable[[str, Any], bool]
Formats = str | Mapping[str, str | None] | Callable[[str, Any], str | None]

# Small, and their errors reach everything behind them: every packer of the field leaves these in float.
# Nor are a table of two rows, biases that happen to have two axes, and a state space's exponents matrices of products.
KEPT = re.compile(
    r"norm|router|gate_inp|shared_gate|position|token_type|\btypes\b|rope|rel_b|relative|decay|a_log|bias$",
    re.IGNORECASE,
)
TABLES = ("table", "embedding")


def quantize(
    tree: Any,
    format: Formats,
    *,
    where: Predicate | None = None,
    transposed: Predicate | None = None,
    importance: Mapping[str, Any] | None = None,
    requantize: bool = False,
    search: bool = True,
) -> Any:
    """Returns `tree` with its matrices packed; the tree that was given stays as it is.

    Args:
        tree: a pytree of weights.
        format: the name of a format, with the granularity of its scales where it has a choice ("q4_k", "int8:channel",
            "int4:g64:asym", "fp8_e4m3:128x128"; see `trustcore.quant.formats.names`); or patterns of paths to names, of
            which the first that matches counts (`{"*.down.kernel": "q6_k", "output.*": None, "*": "q4_k"}`, None
            leaving a leaf alone); or a function of (path, array) that gives a name or None.
        where: which leaves, by (path, array). None: `is_packable`, if K is a multiple of the format's block.
        transposed: which arrays are `[N, K]`, such as tables whose rows are looked up. None: those called "table" or
            "embedding".
        importance: paths to what an error in each input costs, `[K]`; see `encode`. Leaves without one are packed as
            if all inputs were alike.
        requantize: whether matrices that are packed already are decoded and packed anew, one at a time; by default they
            stay. Those in the wanted format stay in any case.
        search: see `encode`.

    Raises:
        QuantizationError: a format is unknown or has no encoder; a selected leaf is no float matrix, has a K that the
            blocks do not divide, is abstract, or holds NaN; a pattern or an importance names a path that is not there;
            or nothing at all would be packed. All faults in one message, with their paths.

    An array that stands in several places is packed once. One matrix at a time is held twice.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_weight)
    leaves = [(path_name(path), leaf) for path, leaf in flat]
    plans = plan_leaves(leaves, format, where, transposed or is_table, importance or {}, requantize)
    faults: list[str] = []
    done: dict[tuple[int, LeafPlan, int], Any] = {}
    packed = []
    for (path, leaf), plan in zip(leaves, plans, strict=True):
        if plan is None:
            packed.append(leaf)
            continue
        weighted = (importance or {}).get(path)
        key = (id(leaf), plan, id(weighted))
        if key not in done:
            try:
                done[key] = _pack(leaf, plan, weighted, search)
            except QuantizationError as error:
                faults.append(f"{path}: {error}")
                done[key] = None
        packed.append(done[key])
    _raise(faults)
    return jax.tree_util.tree_unflatten(structure, packed)


def is_matrix(path: str, array: Any) -> bool:
    """Returns whether a leaf is a weight by default: a float matrix that is no norm, router or table of positions."""
    if not isinstance(array, QuantizedArray | jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return False
    return len(array.shape) == 2 and jnp.issubdtype(array.dtype, jnp.floating) and KEPT.search(path) is None


def is_packable(path: str, array: Any) -> bool:
    """Returns whether a leaf is packed by default: what `is_matrix` says, and stacks `[E, K, N]` of experts.

    Other arrays of three axes are convolutions; a stack is known by its path.
    """
    stacked = "experts" in path.split(".") and len(getattr(array, "shape", ())) == 3
    return is_matrix(path, jax.ShapeDtypeStruct(array.shape[1:], array.dtype) if stacked else array)


def is_table(path: str, array: Any) -> bool:
    """Returns whether a leaf is `[N, K]` by its name."""
    return path.rsplit(".", 1)[-1] in TABLES


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a key path of jax as names joined by dots."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return ".".join(jax.tree_util.keystr((key,), simple=True) for key in path)


class LeafPlan(NamedTuple):
    """What becomes of one leaf: a format as a user writes it, and whether the matrix is stored `[N, K]`."""

    format: str
    transposed: bool


def _is_weight(node: Any) -> bool:
    return isinstance(node, Weight)


def _pack(leaf: Any, plan: LeafPlan, importance: Any, search: bool) -> QuantizedArray:
    weights = leaf.dequantize() if isinstance(leaf, QuantizedArray) else leaf
    return QuantizedArray.quantize(
        weights, plan.format, transposed=plan.transposed, importance=importance, search=search
    )


def plan_leaves(
    leaves: list[tuple[str, Any]],
    format: Formats,
    where: Predicate | None,
    transposed: Predicate,
    importance: Mapping[str, Any],
    requantize: bool,
) -> list[LeafPlan | None]:
    """Returns what becomes of each leaf (None: it stays), or tells every fault at once; arguments as in `quantize`."""
    faults: list[str] = []
    paths = [path for path, _ in leaves]
    if isinstance(format, Mapping):
        for pattern, name in format.items():
            if name is not None and not fnmatch.filter(paths, pattern):
                faults.append(f"pattern {pattern!r} matches no path (paths look like {_some(paths)})")
    for path in importance:
        if path not in paths:
            faults.append(f"importance {path!r} is no path of the tree (paths look like {_some(paths)})")

    plans: list[LeafPlan | None] = []
    passed_over: list[str] = []
    packed_already = False
    for path, leaf in leaves:
        plans.append(None)
        if not (where or is_packable)(path, leaf):
            continue
        name = format_of(format, path, leaf)
        if name is None:
            continue
        if isinstance(leaf, Weight) and not (requantize and isinstance(leaf, QuantizedArray)):
            packed_already = True
            continue
        fault = _fault(path, leaf, name, transposed)
        if fault is None:
            plan = LeafPlan(name, leaf.transposed if isinstance(leaf, QuantizedArray) else transposed(path, leaf))
            same = isinstance(leaf, QuantizedArray) and any(is_stored_as(leaf, s) for s in storages(name))
            packed_already = packed_already or same
            plans[-1] = None if same else plan
        elif where is None and fault.startswith("K="):
            passed_over.append(f"{path}: {fault}")
        else:
            faults.append(f"{path}: {fault}")
    if not faults:  # a name that no leaf was to take
        names = {format} if isinstance(format, str) else set(format.values()) if isinstance(format, Mapping) else set()
        faults += [why for name in sorted(names - {None}, key=str) if (why := no_encoder(name))]
    if not faults and not packed_already and not any(plans):
        why = passed_over or [f"of {len(leaves)} leaves, `where` and `format` select none"]
        faults.append("nothing to pack: " + "; ".join(why[:20]))
    _raise(faults)
    return plans


def format_of(format: Formats, path: str, leaf: Any) -> str | None:
    """Returns the format that a name, patterns or a function give a leaf; None: it is left alone."""
    if isinstance(format, str):
        return format
    if isinstance(format, Mapping):
        return next((name for pattern, name in format.items() if fnmatch.fnmatchcase(path, pattern)), None)
    return format(path, leaf)


def _fault(path: str, leaf: Any, name: str, transposed: Predicate) -> str | None:
    """Returns why the leaf cannot be packed as `name`."""
    if why := no_encoder(name):
        return why
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return "it is abstract; load or initialize the weights first"
    if not isinstance(leaf, QuantizedArray):
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or dtype is None or len(shape) < 2 or not jnp.issubdtype(dtype, jnp.floating):
            described = f"{dtype}{list(shape)}" if shape is not None else type(leaf).__name__
            return f"it is no float matrix but {described}; leave it out by `where`"
        k = shape[-1] if transposed(path, leaf) else shape[-2]
    else:
        k = leaf.stored_shape[-2]
    return storages(name)[0].refusal(k) or None


def is_stored_as(leaf: QuantizedArray, storage: Storage) -> bool:
    """Returns whether the leaf is of that format and granularity, with or without rows in another order."""
    if leaf.spec is not storage.format:
        return False
    shapes = storage.field_shapes(*leaf.stored_shape[-2:])
    found = {name: field.shape[-2:] for name, field in leaf.fields.items() if name != "order"}
    return isinstance(storage.format, BlockFormat) or found == {name: shape.shape for name, shape in shapes.items()}


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:3])


def _raise(faults: list[str]) -> None:
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise QuantizationError(f"quantize: {'; '.join(faults[:20])}{more}")
