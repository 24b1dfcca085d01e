"""`sparsify`: a tree of weights to the same tree with sparse matrices, whatever the tree is made of; and back."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trustcore.errors import ModelError
from trustcore.ops.weight import Weight
from trustcore.sparse.array import SparseArray, parse_pattern

Where = Callable[[str, Any], bool] | Sequence[str]


def sparsify(
    tree: Any, pattern: str, *, where: Where = ("*kernel",), importance: Mapping[str, Any] | None = None
) -> Any:
    """Returns the tree with n of every m inputs of its matrices; the tree that was given stays as it is.

    Args:
        tree: a pytree of weights.
        pattern: "n:m"; see `SparseArray.prune`.
        where: which float leaves of two axes or more, by (path, array), or patterns of paths, names joined by dots.
        importance: by path, what weights of size one are worth; see `SparseArray.prune`.

    Raises:
        ModelError: nothing is selected, or matrices cannot be pruned so: all of them in one message.
    """
    parse_pattern(pattern)
    faults: list[str] = []
    count = 0

    def chosen(path: str, leaf: Any) -> bool:
        return where(path, leaf) if callable(where) else any(fnmatch.fnmatchcase(path, one) for one in where)

    def one(key: Any, leaf: Any) -> Any:
        nonlocal count
        path = _name(key)
        if isinstance(leaf, Weight) or not _is_matrix(leaf) or not chosen(path, leaf):
            return leaf
        count += 1
        try:
            return SparseArray.prune(leaf, pattern, importance=(importance or {}).get(path))
        except ModelError as error:
            faults.append(f"{path}: {error}")
            return leaf

    made = jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_weight)
    if not count:
        faults.append("sparsify: no float matrix is selected.")
    if faults:
        raise ModelError(" ".join(faults[:20]) + (f" And {len(faults) - 20} more." if len(faults) > 20 else ""))
    return made


def densify(tree: Any) -> Any:
    """Returns the tree with arrays in place of its sparse matrices: to be saved, quantized or merged."""
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if isinstance(leaf, SparseArray) else leaf, tree, is_leaf=_is_weight
    )


def _is_weight(node: Any) -> bool:
    return isinstance(node, Weight)


def _is_matrix(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and leaf.ndim > 1 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
