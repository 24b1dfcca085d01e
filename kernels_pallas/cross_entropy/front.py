"""`cross_entropy`: checks a call, and computes it through one primitive forward and one backward.

The backward pass keeps operands and log-sum-exp, and computes the gradients that are asked for. With a frozen table the
forward pass leaves the gradient of hidden up to the cotangents, and the backward pass has no product to compute.

Where the vocabulary is split over devices (`axis`), the primitives compute a device's columns: the log-sum-exp of them,
and the target's part of the loss, `(1 - s) z[label] + s / V sum(z)` of what of it lies there. Both are merged by a
maximum and sums over the devices in plain jax, whose derivatives are jax's: no device has all of the table or logits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from kernels_pallas import _compat, sharded
from kernels_pallas.cross_entropy import xla
from kernels_pallas.dispatch import Explanation, Implementation, Op, Target, primitive

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_NO_LABEL = -(2**31)  # which no label is
_BY_ROW = ("hidden", "labels", "lse", "of_loss", "of_lse")


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static part of a call; see `cross_entropy`."""

    vocabulary: int
    transposed: bool
    scale: float
    soft_cap: float | None
    label_smoothing: float
    z_loss: float
    ignore_index: int
    chunk: int | None
    whole: int | None = None  # V of the whole table, where this is a part of it: other labels are in other parts

    @property
    def spread(self) -> float:
        """What label smoothing gives to each column."""
        return self.label_smoothing / (self.whole or self.vocabulary)


@dataclasses.dataclass(frozen=True)
class Packed:
    """A table that is no array: how its leaves are put together, and how rows of it are taken."""

    tree: Any
    take: Callable[[Any, jax.Array], jax.Array]


class Call(NamedTuple):
    """A call as implementations see it: arrays or their types by name; `take` gives rows of a packed table."""

    spec: Spec
    arrays: dict[str, Any]
    take: Callable[[jax.Array], jax.Array] | None = None
    wanted: tuple[str, ...] = ()

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.spec.vocabulary

    def __str__(self) -> str:
        shapes = {n: self.arrays[n] for n in ("hidden", "table", "labels", "bias") if n in self.arrays}
        return "(" + ", ".join(f"{n} {x.dtype}[{','.join(map(str, x.shape))}]" for n, x in shapes.items()) + ")"


def cross_entropy(
    hidden: jax.Array,
    table: Any,
    labels: jax.Array,
    *,
    bias: jax.Array | None = None,
    transposed: bool = False,
    scale: float = 1.0,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    chunk: int | None = None,
    take: Callable[[Any, jax.Array], jax.Array] | None = None,
    axis: str | tuple[str, ...] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Returns the losses `[*rows]` as `cross_entropy_oracle` defines them, float32 (float64 for float64).

    Logits are computed by chunks of C columns, in the backward pass again: O(R * C) memory beyond operands and results,
    R rows in all. Differentiable (in reverse, once) in hidden, table and bias, of the losses and of the log-sum-exp.

    Args:
        hidden: `[*rows, D]`, float16, bfloat16, float32 or float64.
        table: `[D, V]` of the same dtype, or `[V, D]` where `transposed`. With `take`: any pytree.
        labels: integers `[*rows]`.
        bias: `[V]`.
        transposed, scale, soft_cap, label_smoothing, z_loss, ignore_index: see `cross_entropy_oracle`.
        chunk: C; None takes one by the platform and the number of rows.
        take: `take(table, indices)` returns rows `[*indices, D]` of a table that is no array, `[V, D]` (`table.shape`
            says V): packed codes are then decoded chunk by chunk. A function at the top of a module, and no gradient of
            the table.
        axis: inside of `jax.shard_map`, the axis (or axes) of the mesh over which V is split: `table` and `bias` are a
            device's columns, in the order of the devices and as many on each; `hidden` and `labels` (numbers of the
            whole vocabulary) are what the devices of that axis share. Losses are alike on all of them. None: the table
            is whole, or split over explicit axes of a mesh, which its type says (as that of `hidden` says of rows).
        return_lse: the pair of losses and log-sum-exp.
        implementation: "xla", which is the only one, or None.

    Raises:
        ValueError: the shapes do not fit each other.
        ImplementationError: there is no implementation of that name.
    """
    if axis is None and (split := _split(hidden, table, labels, bias, transposed)) is not None:
        specs, axis = split

        def one(given: dict[str, Any]) -> Any:
            return cross_entropy(
                **given, transposed=transposed, scale=scale, soft_cap=soft_cap, label_smoothing=label_smoothing,
                z_loss=z_loss, ignore_index=ignore_index, chunk=chunk, take=take, axis=axis, return_lse=return_lse,
                implementation=implementation,
            )  # fmt: skip

        given = {"hidden": hidden, "table": table, "labels": labels, "bias": bias}
        return sharded.over(one, {n: x for n, x in given.items() if x is not None}, specs, specs["labels"])
    rows = hidden.shape[:-1]
    parts = 1 if axis is None else _parts(axis)
    spec = Spec(
        _vocabulary(table, transposed or take is not None), transposed or take is not None, float(scale),
        None if soft_cap is None else float(soft_cap), float(label_smoothing), float(z_loss), int(ignore_index), chunk,
    )  # fmt: skip
    _check(spec, hidden, table, labels, bias, packed=take is not None)
    if implementation is not None:
        CROSS_ENTROPY.named(implementation)
    count = math.prod(rows)
    whole, labels = spec, labels.reshape(count).astype(jnp.int32)
    numbers = labels
    if axis is not None:
        part = spec.vocabulary
        numbers = labels - jnp.int32(part) * jax.lax.axis_index(axis)
        spec = dataclasses.replace(spec, whole=parts * part, z_loss=0.0, ignore_index=_NO_LABEL)
    smooth = {"hidden": hidden.reshape(count, hidden.shape[-1])}
    fixed = {"labels": numbers}
    packed = None
    if take is None:
        smooth["table"] = table
    else:
        leaves, tree = jax.tree.flatten(jax.lax.stop_gradient(table))
        fixed |= {f"leaf{i}": x for i, x in enumerate(leaves)}
        packed = Packed(tree, take)
    if bias is not None:
        smooth["bias"] = bias
    alike = _vary_alike({**smooth, **fixed})
    smooth, fixed = {n: alike[n] for n in smooth}, {n: alike[n] for n in fixed}
    found: Any = _losses((spec, packed, implementation), smooth, fixed)
    losses, lse = found if axis is None else _merged(whole, spec, axis, labels, *found)
    losses, lse = losses.reshape(rows), lse.reshape(rows)
    return (losses, lse) if return_lse else losses


def _split(hidden: Any, table: Any, labels: Any, bias: Any, transposed: bool) -> tuple[dict[str, Any], Any] | None:
    """How operands are split over explicit axes of a mesh, by name, and the vocabulary's axis; None: they are not.

    Raises:
        ValueError: D is split, or two operands differ.
    """
    arrays = {"hidden": hidden, "labels": labels, "bias": bias}
    arrays |= {"table": table} if isinstance(table, jax.Array) else {}
    found = {n: axes for n, x in arrays.items() if x is not None and (axes := sharded.axes_of(x)) is not None}
    if not found:
        return None
    rows: tuple[Any, ...] = found["labels"] if "labels" in found else (None,) * (hidden.ndim - 1)
    rows = found["hidden"][:-1] if "hidden" in found else rows
    columns = None
    if "table" in found:
        columns = found["table"][0 if transposed else 1]
    specs = {
        "hidden": PartitionSpec(*rows, None),
        "labels": PartitionSpec(*rows),
        "table": PartitionSpec(columns, None) if transposed else PartitionSpec(None, columns),
        "bias": PartitionSpec(columns),
    }
    specs["table"] = specs["table"] if "table" in arrays else PartitionSpec()
    for name, axes in found.items():
        if any(a not in (None, b) for a, b in zip(axes, specs[name], strict=True)):
            raise ValueError(
                f"cross_entropy: {name} is split over {axes}; rows can be, alike in hidden and labels, and the "
                f"vocabulary, alike in table and bias: write jax.sharding.reshard({name}, jax.P{tuple(specs[name])})."
            )
    return specs, columns


def _parts(axis: str | tuple[str, ...]) -> int:
    try:
        return jax.lax.axis_size(axis)
    except NameError:
        raise ValueError(
            f"cross_entropy: axis is {axis!r}, which is no axis of a shard_map around the call; leave it out where the "
            "table is whole."
        ) from None


def _merged(whole: Spec, part: Spec, axis: Any, labels: jax.Array, target: jax.Array, lse: jax.Array) -> Any:
    """Losses and log-sum-exp of the whole vocabulary, of each device's target and log-sum-exp."""
    top = jax.lax.pmax(jax.lax.stop_gradient(lse), axis)
    lse = top + jnp.log(jax.lax.psum(jnp.exp(lse - top), axis))
    losses = lse - jax.lax.psum(target, axis) + whole.z_loss * lse**2
    known = (labels >= 0) & (labels < (part.whole or 0))
    counts = jnp.where(known, jnp.ones((), losses.dtype), jnp.nan)
    return losses * jnp.where(labels == whole.ignore_index, jnp.zeros((), losses.dtype), counts), lse


def explain(
    hidden: Any,
    table: Any,
    labels: Any,
    *,
    platform: str | None = None,
    architecture: str | None = None,
    **options: Any,
) -> Explanation:
    """Returns for each implementation whether `cross_entropy` of these operands takes it, and why not.

    Args:
        hidden, table, labels: arrays or `jax.ShapeDtypeStruct`.
        platform, architecture: as in `kernels_pallas.attention.explain`.
        options: as `cross_entropy` takes them.
    """
    platform = platform or _compat.default_platform()
    transposed, bias = options.pop("transposed", False), options.pop("bias", None)
    spec = dataclasses.replace(
        Spec(_vocabulary(table, transposed), transposed, 1.0, None, 0.0, 0.0, -100, None), **options
    )
    _check(spec, hidden, table, labels, bias, packed=False)
    arrays = {"hidden": hidden, "table": table, "labels": labels, **({} if bias is None else {"bias": bias})}
    target = Target(platform, architecture or _compat.device_kind(platform))
    return CROSS_ENTROPY.explain(target, Call(spec, arrays))


def _vocabulary(table: Any, transposed: bool) -> int:
    if len(table.shape) != 2:
        raise ValueError(f"cross_entropy: table has the shape {list(table.shape)} and must have [D, V], or [V, D].")
    return table.shape[0 if transposed else 1]


def _check(spec: Spec, hidden: Any, table: Any, labels: Any, bias: Any, *, packed: bool) -> None:
    size = table.shape[1 if spec.transposed else 0]
    layout = "[V, D]" if spec.transposed else "[D, V]"
    if not hidden.shape or hidden.shape[-1] != size:
        other = "" if packed else f" (an embedding's table, [V, D], wants transposed={not spec.transposed})"
        raise ValueError(
            f"cross_entropy: hidden [..., D] {list(hidden.shape)} does not fit table {layout} {list(table.shape)}"
            f"{other}."
        )
    if tuple(labels.shape) != tuple(hidden.shape[:-1]):
        raise ValueError(
            f"cross_entropy: labels have the shape {list(labels.shape)} and must have {list(hidden.shape[:-1])}, one "
            "for each row of hidden."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"cross_entropy: labels are {labels.dtype} and must be integers.")
    if hidden.dtype.name not in _DTYPES or (not packed and table.dtype != hidden.dtype):
        raise ValueError(
            f"cross_entropy: hidden and table are {hidden.dtype} and {table.dtype}; they must be of one dtype of "
            f"{', '.join(_DTYPES)}: write table.astype(hidden.dtype)."
        )
    if bias is not None and tuple(bias.shape) != (spec.vocabulary,):
        raise ValueError(f"cross_entropy: bias has the shape {list(bias.shape)} and must have [{spec.vocabulary}].")
    if not 0.0 <= spec.label_smoothing <= 1.0:
        raise ValueError(f"cross_entropy: label_smoothing is {spec.label_smoothing}; it must lie within 0 and 1.")
    if spec.soft_cap is not None and not spec.soft_cap > 0:
        raise ValueError(f"cross_entropy: soft_cap is {spec.soft_cap}; it must be positive, or None.")
    if spec.chunk is not None and spec.chunk < 1:
        raise ValueError(f"cross_entropy: chunk is {spec.chunk}; it counts columns, at least 1.")


def _call(
    *operands: Any, spec: Spec, packed: Packed | None, fields: tuple[str, ...], wanted: tuple[str, ...] = ()
) -> Call:
    arrays = dict(zip(fields, operands, strict=True))
    if packed is None:
        return Call(spec, arrays, None, wanted)
    leaves = [x for n, x in arrays.items() if n.startswith("leaf")]

    def take(indices: jax.Array) -> jax.Array:
        return packed.take(jax.tree.unflatten(packed.tree, leaves), indices)

    return Call(spec, arrays, take, wanted)


def _forward_shapes(call: Call) -> list[jax.ShapeDtypeStruct]:
    hidden = call.arrays["hidden"]
    wide = jnp.float64 if hidden.dtype == jnp.float64 else jnp.float32
    return [jax.ShapeDtypeStruct(hidden.shape[:1], wide)] * 2


def _one_pass_shapes(call: Call) -> list[jax.ShapeDtypeStruct]:
    first = _forward_shapes(call)
    return first + [jax.ShapeDtypeStruct(call.arrays["hidden"].shape, first[0].dtype)] * 2


def _backward_shapes(call: Call) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(call.arrays[n].shape, call.arrays[n].dtype) for n in call.wanted]


def _folded(bind: Any, operands: Any, axes: Any, **params: Any) -> Any:
    """A mapped axis becomes more rows; one by one where tables are mapped, or a shared one's gradient is wanted."""
    fields = params["fields"]
    mapped = dict(zip(fields, axes, strict=True))
    count = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    front = {
        n: x if mapped[n] is None else jnp.moveaxis(x, mapped[n], 0) for n, x in zip(fields, operands, strict=True)
    }
    shared = [n for n in fields if n not in _BY_ROW]
    if any(mapped[n] is not None for n in shared) or set(params.get("wanted", ())) - {"hidden"}:
        moving = {n: x for n, x in front.items() if mapped[n] is not None}
        found = jax.lax.map(lambda part: bind.bind(*({**front, **part}[n] for n in fields), **params), moving)
        return found, [0] * len(found)
    rows = front["hidden"].shape[0 if mapped["hidden"] is None else 1]

    def folded(name: str, x: jax.Array) -> jax.Array:
        if name in shared:
            return x
        x = jnp.broadcast_to(x[None], (count, *x.shape)) if mapped[name] is None else x
        return x.reshape(count * rows, *x.shape[2:])

    found = bind.bind(*(folded(n, front[n]) for n in fields), **params)
    return [x.reshape(count, rows, *x.shape[1:]) for x in found], [0] * len(found)


_XLA = Implementation(
    "xla",
    lambda target, call: "",
    {
        "forward": lambda target, call, interpret: xla.forward(call, target.platform),
        "one_pass": lambda target, call, interpret: xla.one_pass(call, target.platform),
        "backward": lambda target, call, interpret: xla.backward(call, target.platform),
    },
)
CROSS_ENTROPY = Op("cross_entropy", (_XLA,), lambda direction, call: (f"cross_entropy_{direction}", xla.facts(call)))
_forward = primitive(CROSS_ENTROPY, "forward", _call, _forward_shapes, _folded)
_one_pass = primitive(CROSS_ENTROPY, "one_pass", _call, _one_pass_shapes, _folded)
_backward = primitive(CROSS_ENTROPY, "backward", _call, _backward_shapes, _folded)


@jax.tree_util.register_static
class _Wanted(tuple):
    """Names of operands whose gradients are asked for: static in what the backward pass keeps."""


def _vary_alike(arrays: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(arrays, _compat.vary_alike(list(arrays.values())), strict=True))


def _run(primitive_: Any, static: Any, arrays: dict[str, jax.Array], **params: Any) -> Any:
    spec, packed, implementation = static
    params = {"spec": spec, "packed": packed, "implementation": implementation, "interpret": False, **params}
    return primitive_.bind(*arrays.values(), fields=tuple(arrays), **params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(static: Any, smooth: dict[str, jax.Array], fixed: dict[str, jax.Array]) -> Any:
    return tuple(_run(_forward, static, {**smooth, **fixed}))


def _losses_forward(static: Any, smooth: Any, fixed: Any) -> Any:
    spec = static[0]
    wanted = _Wanted(n for n in smooth if smooth[n].perturbed)
    smooth, fixed = {n: x.value for n, x in smooth.items()}, {n: x.value for n, x in fixed.items()}
    if wanted == ("hidden",) and not (spec.label_smoothing and spec.soft_cap):
        losses, lse, of_lse, target = _run(_one_pass, static, {**smooth, **fixed})
        like = {n: jnp.zeros((), x.dtype) for n, x in smooth.items()}  # which operands there are, and their dtypes
        return (losses, lse), (like, {"labels": fixed["labels"], "of_lse": of_lse, "target": target}, lse, None)
    found: Any = _losses(static, smooth, fixed)
    losses, lse = found
    return (losses, lse), (smooth, fixed, lse, wanted)


def _losses_backward(static: Any, kept: Any, cotangents: Any) -> Any:
    smooth, fixed, lse, wanted = kept
    of_loss, of_lse = (jnp.zeros_like(lse) if isinstance(g, SymbolicZero) else g for g in cotangents)
    if static[0].whole is not None:  # the first result is the target's part, lse - loss
        of_loss, of_lse = -of_loss, of_lse + of_loss
    if wanted is None:
        spec, labels = static[0], fixed["labels"]
        counts, known = labels != spec.ignore_index, (labels >= 0) & (labels < spec.vocabulary)
        known = known if spec.whole is None else jnp.ones_like(known)
        of_loss = jnp.where(counts, jnp.where(known, of_loss, jnp.nan), 0)
        share = of_loss * (1 + 2 * spec.z_loss * lse) + of_lse
        hidden = share[:, None] * fixed["of_lse"] - of_loss[:, None] * fixed["target"]
        return {**dict.fromkeys(smooth), "hidden": hidden.astype(smooth["hidden"].dtype)}, None
    arrays = _vary_alike({**smooth, **fixed, "lse": lse, "of_loss": of_loss, "of_lse": of_lse})
    found = _run(_backward, static, arrays, wanted=tuple(wanted))
    return {**dict.fromkeys(smooth), **dict(zip(wanted, found, strict=True))}, None


_losses.defvjp(_losses_forward, _losses_backward, symbolic_zeros=True)
