"""An axis of experts over devices: each holds some of the experts of a layer, and computes the rows that go to those.

    y = sum over devices of  (sum over the device's e of share[e] * expert_e(x))

The router runs everywhere. A device sorts the rows by its own experts, those of others behind them, multiplies in one
ragged product a matrix, drops the others, and the sums are added up over the axis. No expert has a capacity: the output
is that of one device, but for the order of a sum. What travels is one sum of the outputs a layer, R * D numbers; rows
need not be exchanged, for every device of the axis has them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from trustcore.errors import ModelError
from trustcore.nn.experts import ExpertMLP, Experts, rows_of_choices, sum_of_choices
from trustcore.ops.experts import by_expert

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ExpertPlacement:
    """Which axis of a mesh the experts of a layer lie along.

    Attributes:
        mesh: of devices.
        axis: of the mesh, for the experts.
        rows: axes of the mesh over which rows are split where their number allows it; empty: every device has all.
    """

    mesh: Mesh
    axis: str
    rows: tuple[str, ...] = ()

    def mixture(
        self,
        experts: ExpertMLP,
        rows: Float[Array, "R D"],
        chosen: Int[Array, "R k"],
        shares: Float[Array, "R k"],
        scale_inputs: bool = False,
    ) -> Float[Array, "R D"]:
        """Returns the sum over each row's experts of share times output; differentiable.

        `scale_inputs`: shares multiply what experts read instead.
        """
        parts = 1
        for name in self.rows:
            parts *= self.mesh.shape[name]
        split = P(self.rows) if self.rows and rows.shape[0] % parts == 0 else P()
        every = tuple(self.mesh.axis_names)

        def local(experts: ExpertMLP, rows: jax.Array, chosen: jax.Array, shares: jax.Array) -> jax.Array:
            count = experts.gate.kernel.get_value().shape[0]
            first = jax.lax.axis_index(self.axis).astype(chosen.dtype) * count
            return jax.lax.psum(mixture_of_some(experts, rows, chosen - first, shares, count, scale_inputs), self.axis)

        # Varying axes are not checked: the ragged products have gradients by hand, which say nothing of them.
        run = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(P(self.axis), split, split, split),
            out_specs=split,
            axis_names=set(every),
            check_vma=False,
        )
        if AxisType.Explicit not in self.mesh.axis_types:
            return run(experts, rows, chosen, shares)
        before = NamedSharding(self.mesh, jax.typeof(rows).sharding.spec)
        y = run(experts, *(jax.reshard(part, NamedSharding(self.mesh, split)) for part in (rows, chosen, shares)))
        return jax.reshard(y, before)


def mixture_of_some(
    experts: ExpertMLP,
    rows: Float[Array, "R D"],
    chosen: Int[Array, "R k"],
    shares: Float[Array, "R k"],
    count: int,
    scale_inputs: bool,
) -> Float[Array, "R D"]:
    """Returns the mixture of those of each row's experts that are 0 .. count - 1."""
    inside = (chosen >= 0) & (chosen < count)
    order, sizes = by_expert(jnp.where(inside, chosen, count), count)  # rows of others are sorted behind
    here = jnp.take(inside.reshape(-1), order)[:, None]
    expert = jnp.clip(jnp.take(chosen.reshape(-1), order), 0, count - 1)
    # A ragged product leaves rows of no group undefined: they are cut off on both sides, so in gradients, too.
    given = jnp.where(here, rows_of_choices(rows, shares, order, scale_inputs), 0)
    out = jnp.where(here, experts(given, expert, sizes), 0)
    return sum_of_choices(out, shares, order, scale_inputs)


def expert_parallel(model: T, mesh: Mesh, *, axis: str = "experts", rows: tuple[str, ...] = ()) -> T:
    """Returns the model with the experts of each of its layers spread over an axis of a mesh; it computes the same.

    Args:
        model: that has `Experts` layers; kernels may be packed. What is no expert stays where it is.
        mesh: of devices.
        axis: of the mesh; its size divides the number of experts.
        rows: axes over which tokens are split, for meshes that split the batch, too.

    Raises:
        ModelError: the mesh has no such axis, the model no experts, or they do not divide.

    Spread first and stack the layers (`scan_layers`) then.
    """
    for name in (axis, *rows):
        if name not in mesh.shape:
            raise ModelError(f"expert_parallel: the mesh has no axis {name!r}; it has {', '.join(mesh.axis_names)}.")
    if axis in rows:
        raise ModelError(f"expert_parallel: rows and experts are both to be split over {axis!r}; name another axis.")
    parts = mesh.shape[axis]
    copy = jax.tree.map(lambda leaf: leaf, model)
    layers = [module for _, module in nnx.iter_modules(copy) if isinstance(module, Experts)]  # pyright: ignore
    if not layers:
        raise ModelError(f"expert_parallel: a {type(model).__name__} without experts has nothing to spread.")
    for layer in layers:
        if layer.config.count % parts:
            raise ModelError(f"expert_parallel: {layer.config.count} experts do not divide over {parts} devices.")
        layer.experts = jax.tree.map(lambda leaf: _placed(leaf, NamedSharding(mesh, P(axis))), layer.experts)
        layer.placement = ExpertPlacement(mesh, axis, tuple(rows))
    return copy


def _placed(leaf: Any, sharding: NamedSharding) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.device_put(leaf, sharding)
