"""`rms_norm` and `layer_norm`: what becomes of a tile, forward and backward.

Oracle: `oracle.py`; machines: `../rows.py`.

With s the (added) row, r = 1 / sqrt(mean(c ** 2) + eps), c = s or s - mean(s), n = c r, and g = (shift + weight) * dy:

    ds = r (g - n mean(g n) - mean(g))   (the last mean for LayerNorm alone)
    dweight = sum over rows of dy n      dbias = sum over rows of dy

The backward pass keeps s in its own dtype, and r and the mean of each row; plain autodiff would keep float32 copies of
rows. Forward reads x (and residual) and writes y (and s) once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import Explanation
from kernels_pallas.rows import Program, RowOp, Tile, flattened
from kernels_pallas.sharded import over_rows


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static part of a call: `centre` is LayerNorm's subtraction of the mean."""

    centre: bool
    eps: float
    shift: float = 0.0


def rms_norm(
    x: jax.Array,
    weight: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    shift: float = 0.0,
    implementation: str | None = None,
    interpret: bool = False,
) -> Any:
    """Returns what `rms_norm_oracle` does, in the dtype of x; the pair of it and `x + residual` with a residual.

    Differentiable (in reverse, once) in all operands.

    Args:
        x, weight, residual, eps, shift: see `rms_norm_oracle`.
        implementation: "triton", "mosaic_tpu", "xla"; None takes the first that can compute the call where it runs. A
            name is taken, or raises.
        interpret: runs the named implementation in Pallas' interpreter, on any platform and slowly.

    Raises:
        ValueError: the shapes do not fit each other.
        ImplementationError: the named implementation cannot compute the call.
    """
    run = functools.partial(_run, Spec(False, float(eps), float(shift)), implementation, interpret)
    return over_rows("norm", run, {"x": x, "residual": residual}, {"weight": weight, "bias": None})


def layer_norm(
    x: jax.Array,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    eps: float = 1e-5,
    implementation: str | None = None,
    interpret: bool = False,
) -> Any:
    """Returns what `layer_norm_oracle` does, in the dtype of x; otherwise as `rms_norm`."""
    run = functools.partial(_run, Spec(True, float(eps)), implementation, interpret)
    return over_rows("norm", run, {"x": x, "residual": residual}, {"weight": weight, "bias": bias})


def explain(
    x: Any, weight: Any = None, residual: Any = None, *, platform: str | None = None, architecture: str | None = None
) -> Explanation:
    """Returns for each implementation whether a norm of these operands (or their types) takes it, and why not."""
    _, arrays = operands(x, weight, None, residual)
    return NORM.explain(Spec(False, 1e-6), arrays, platform, architecture)


def operands(x: Any, weight: Any, bias: Any, residual: Any) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Returns the shape of x, and the operands that there are by name, x and residual as matrices of rows."""
    shape, (rows, more) = flattened("norm", x, residual=residual)
    arrays = {"x": rows, "residual": more, "weight": weight, "bias": bias}
    for name in ("weight", "bias"):
        given = arrays[name]
        if given is not None and tuple(given.shape) != shape[-1:]:
            raise ValueError(f"norm: {name} has the shape {list(given.shape)} and must have [{shape[-1]}].")
    return shape, {n: a for n, a in arrays.items() if a is not None}


def _run(spec: Spec, implementation: Any, interpret: bool, *, x: Any, weight: Any, bias: Any, residual: Any) -> Any:
    shape, arrays = operands(x, weight, bias, residual)
    found = [y.reshape(shape) for y in NORM(spec, arrays, implementation, interpret)]
    return found[0] if residual is None else tuple(found)


def forward_program(spec: Spec, names: tuple[str, ...]) -> Program:
    """Returns what becomes of a tile: y, the numbers of each row that are kept, and the sum with the residual."""

    def body(tile: Tile, x: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        total = x["x"]
        if "residual" in x:
            total = (total + x["residual"]).astype(tile.dtype).astype(total.dtype)
        found = {}
        centred = total
        if spec.centre:
            found["mean"] = tile.mean(total)
            centred = total - found["mean"]
        found["scale"] = scale = jax.lax.rsqrt(tile.mean(centred * centred) + spec.eps)
        y = centred * scale
        y = y * _gain(spec, x, y) if "weight" in x else y
        found["y"] = y + jnp.broadcast_to(x["bias"], y.shape) if "bias" in x else y
        return {**found, "total": total}

    outputs: dict[str, Any] = {"y": ("row", None), "scale": ("number", None)}
    outputs |= {"mean": ("number", None)} if spec.centre else {}
    outputs |= {"total": ("row", None)} if "residual" in names else {}
    return Program("norm_forward", body, _kinds(names), outputs, whole=True)


def _backward(spec: Spec, names: tuple[str, ...], wanted: tuple[str, ...]) -> Program:
    def body(tile: Tile, x: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        scale = x["scale"]
        found = {}
        moved = jnp.zeros_like(x["total"])
        if "of_y" in x:
            dy = x["of_y"]
            normal = (x["total"] - x["mean"] if spec.centre else x["total"]) * scale
            pulled = dy * _gain(spec, x, dy) if "weight" in x else dy
            moved = pulled - normal * tile.mean(pulled * normal)
            moved = (moved - tile.mean(pulled) if spec.centre else moved) * scale
            found = {"weight": dy * normal, "bias": dy}
        else:
            found = {"weight": moved, "bias": moved}
        found["x"] = moved + x["of_total"] if "of_total" in x else moved
        return found

    outputs: dict[str, Any] = {n: ("row" if n == "x" else "sum", None) for n in wanted}
    return Program("norm_backward", body, _kinds(names), outputs, whole=True)


def _gain(spec: Spec, x: Mapping[str, jax.Array], like: jax.Array) -> jax.Array:
    gain = x["weight"] + spec.shift if spec.shift else x["weight"]
    return jnp.broadcast_to(gain, like.shape)


def _kinds(names: tuple[str, ...]) -> dict[str, Any]:
    kinds = {"weight": "column", "bias": "column", "scale": "number", "mean": "number"}
    return {n: kinds.get(n, "row") for n in names}


def _keep(spec: Spec, arrays: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    kept = {"total": found.get("total", arrays["x"]), "scale": found["scale"]}
    kept |= {"mean": found["mean"]} if spec.centre else {}
    return {**kept, **({"weight": arrays["weight"]} if "weight" in arrays else {})}


NORM = RowOp("norm", forward_program, _backward, visible=("y", "total"), keep=_keep, alike={"residual": "x"})
