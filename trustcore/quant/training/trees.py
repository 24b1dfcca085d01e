"""Walks over trees of weights: leaves by path, a `Weight` being one leaf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from trustcore.ops.weight import Weight
from trustcore.quant.quantize import path_name

W = TypeVar("W", bound=Weight)


def map_weights(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Returns `tree` with `function(path, leaf)` in place of each leaf."""
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_weight)
    return jax.tree_util.tree_unflatten(structure, [function(path_name(path), leaf) for path, leaf in flat])


def weights_of(tree: Any, kind: type[W]) -> dict[str, W]:
    """Returns the leaves of one class of weights, by path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_weight)
    return {path_name(path): leaf for path, leaf in flat if isinstance(leaf, kind)}


def _is_weight(node: Any) -> bool:
    return isinstance(node, Weight)
