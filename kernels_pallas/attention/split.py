"""How attention is split over a mesh: rows of the batch and heads, each device its own, nothing between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels_pallas import sharded

_BY_HEAD = ("query", "key", "value")
_BY_BATCH = ("query_positions", "key_positions", "query_segments", "key_segments")
_TILES = ("mask", "bias", "block_counts", "block_indices", "query_scale", "key_scale", "value_scale")


def parts(arrays: Mapping[str, Any], split: PartitionSpec | None) -> PartitionSpec | None:
    """Returns over which axes of a mesh batch and heads are split; None where neither is.

    Args:
        arrays: operands of attention by name.
        split: what the caller says; None: what the types of query, key and value say.

    Raises:
        ValueError: another axis is split, two operands differ, or key heads are too few.
    """
    if split is not None:
        if len(split) > 2 or jax.sharding.get_abstract_mesh().empty:
            raise ValueError(
                f"attention: split is {split}; it must be jax.P(axes of the batch, axes of the heads), and the mesh "
                "that of jax.set_mesh."
            )
        return PartitionSpec(*split, *(None,) * (2 - len(split)))
    found = {n: axes for n in _BY_HEAD if (axes := sharded.axes_of(arrays[n])) is not None}
    if not found:
        return None
    batch, heads = (next((axes[i] for axes in found.values() if axes[i] is not None), None) for i in (0, 2))
    for name, axes in found.items():
        if axes[1] is not None or axes[3] is not None or axes[0] not in (None, batch) or axes[2] not in (None, heads):
            raise ValueError(
                f"attention: {name} is split over {axes}; batch and heads alone can be, alike in query, key and value: "
                f"write jax.sharding.reshard({name}, jax.P({batch!r}, None, {heads!r}, None))."
            )
    return PartitionSpec(batch, heads)


def specs(arrays: Mapping[str, Any], split: PartitionSpec) -> dict[str, PartitionSpec]:
    """Returns how each operand is split, by name.

    Raises:
        ValueError: there is more than one key head, and they cannot be split as the query heads are.
    """
    batch, heads = split
    count, kv_heads = _size(arrays, heads), arrays["key"].shape[2]
    if kv_heads > 1 and kv_heads % count:
        raise ValueError(
            f"attention: {kv_heads} key heads cannot be split over {count} devices ({heads!r}); split heads over a "
            f"number that divides them, or repeat them: jnp.repeat(key, {count // kv_heads or 1}, axis=2)."
        )
    of_keys = heads if kv_heads > 1 else None
    found = {}
    for name, x in arrays.items():
        if name in _BY_HEAD:
            found[name] = PartitionSpec(batch, None, heads if name == "query" else of_keys)
        elif name in _BY_BATCH:
            found[name] = PartitionSpec(batch)
        elif name in _TILES:
            by = of_keys if name in ("key_scale", "value_scale") else heads
            found[name] = PartitionSpec(batch if x.shape[0] > 1 else None, by if x.shape[1] > 1 else None)
        else:  # slopes, relative and sinks; the seed
            found[name] = PartitionSpec() if name == "seed" else PartitionSpec(heads)
    return found


def own_seed(seed: jax.Array, split: PartitionSpec) -> jax.Array:
    """Returns the dropout's seed of a device: parts drop other weights, for each counts its rows and heads from 0."""
    axes = tuple(name for entry in split if entry for name in ((entry,) if isinstance(entry, str) else entry))
    return seed ^ (jax.lax.axis_index(axes).astype(jnp.uint32) * jnp.uint32(0x9E3779B9))


def _size(arrays: Mapping[str, Any], axes: Any) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        mesh = next(jax.typeof(arrays[n]).sharding.mesh for n in _BY_HEAD if sharded.axes_of(arrays[n]) is not None)
    size = 1
    for name in () if axes is None else (axes,) if isinstance(axes, str) else axes:
        size *= mesh.shape[name]
    return size
