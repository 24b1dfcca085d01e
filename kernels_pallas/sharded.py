"""Calls whose operands are split over a mesh: each device computes its own part, by `jax.shard_map`.

XLA cannot split a kernel: left to it, a plain `jit` gathers the operands on every device. On a mesh with explicit axes
the type of an array says how it is split, so the ops here take the parts from there, and nothing is gathered. On one
with automatic axes no type says it: write `jax.shard_map` around the call, or say which axes are meant where an op has
an argument for it (`split` of `attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def axes_of(x: Any) -> tuple[Any, ...] | None:
    """Returns for each axis of an array over which axes of a mesh it is split, None where over none.

    None alone: the array's type says nothing of it, or that it is whole.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    entries = (*sharding.spec, *(None,) * (len(x.shape) - len(sharding.spec)))
    return None if all(entry is None for entry in entries) else entries


def over(function: Callable[[Any], Any], arrays: Mapping[str, Any], specs: Mapping[str, Any], out_specs: Any) -> Any:
    """Returns `function(arrays)` computed by parts; the arrays' types, or the context, say on which mesh."""
    split = next((x for x in jax.tree.leaves(dict(arrays)) if axes_of(x) is not None), None)
    mesh = jax.sharding.get_abstract_mesh() if split is None else jax.typeof(split).sharding.mesh
    specs = {n: specs[n] for n in arrays}
    if split is not None:
        places = {n: NamedSharding(mesh, spec) for n, spec in specs.items()}
        arrays = {n: jax.tree.map(lambda x, n=n: jax.sharding.reshard(x, places[n]), x) for n, x in arrays.items()}
    # Under jit always: an eager shard_map takes no custom gradients of the kind that the ops have.
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(specs,), out_specs=out_specs))(dict(arrays))


def over_rows(
    op: str,
    function: Callable[..., Any],
    rows: Mapping[str, Any],
    columns: Mapping[str, Any] | None = None,
    *,
    elementwise: bool = False,
) -> Any:
    """Returns `function(**rows, **columns)` of arrays `[..., D]`, each device's rows by itself.

    Args:
        op: its name, for errors.
        function: its results are of the shape of the first of `rows`.
        rows: of one shape, which may be split alike; None for what is not there.
        columns: `[D]`, or None.
        elementwise: whether the last axis may be split as well.

    Raises:
        ValueError: an axis is split that the op needs whole, or operands are split differently.
    """
    given = {n: x for n, x in (*rows.items(), *(columns or {}).items()) if x is not None}
    found = {n: axes for n in rows if n in given and (axes := axes_of(given[n])) is not None}
    if not found:
        return function(**rows, **(columns or {}))
    axes = next(iter(found.values()))
    for name, others in found.items():
        if others != axes:
            raise ValueError(
                f"{op}: {name} is split over {_shown(others)} and other operands over {_shown(axes)}: write "
                f"jax.sharding.reshard({name}, jax.P{_shown(axes)})."
            )
    if axes[-1] is not None and not elementwise:
        whole = (*axes[:-1], None)
        raise ValueError(
            f"{op}: the last axis is split over {axes[-1]!r}, and the op needs rows that are whole: write "
            f"jax.sharding.reshard(x, jax.P{_shown(whole)})."
        )
    spec = PartitionSpec(*axes)
    specs = {n: spec if n in rows else PartitionSpec(axes[-1]) for n in given}
    missing = dict.fromkeys(n for n in (*rows, *(columns or {})) if n not in given)
    return over(lambda arrays: function(**arrays, **missing), given, specs, spec)


def _shown(axes: tuple[Any, ...]) -> str:
    return "(" + ", ".join(repr(entry) for entry in axes) + ("," if len(axes) == 1 else "") + ")"


def refuse(op: str, operands: Any) -> None:
    """Refuses operands that are split over explicit axes, for ops that have no way of their own to go by parts.

    Raises:
        ValueError: one is.
    """
    for x in operands:
        sharding = x.sharding
        if any(entry is not None for entry in sharding.spec) and AxisType.Explicit in sharding.mesh.axis_types:
            raise ValueError(
                f"{op}: an operand {x.dtype}{list(x.shape)} is split over {_shown(tuple(sharding.spec))} of a mesh "
                "with explicit axes, and a kernel is not split by itself: call the op inside of jax.shard_map."
            )
