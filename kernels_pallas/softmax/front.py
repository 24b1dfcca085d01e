"""`softmax`: what becomes of a tile, forward and backward.

Oracle: `oracle.py`; machines: `../rows.py`.

    dx = scale y (dy - sum(dy y))

The backward pass keeps y in the dtype of x and nothing else: no mask, for y is zero where it hides, and no float32
exponentials. Forward reads x and one byte of the mask and writes y once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import Explanation
from kernels_pallas.rows import Program, RowOp, Tile, flattened
from kernels_pallas.sharded import axes_of, over_rows

_HIDDEN = -1e30  # finite, so that no NaN comes of a row of which nothing is left


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static part of a call."""

    scale: float


def softmax(
    x: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float = 1.0,
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns what `softmax_oracle` does. Differentiable (in reverse, once) in x.

    Args:
        x, mask, scale: see `softmax_oracle`; the mask broadcasts to x.
        implementation: "triton", "mosaic_tpu", "xla"; None takes the first that can compute the call where it runs. A
            name is taken, or raises.
        interpret: runs the named implementation in Pallas' interpreter, on any platform and slowly.

    Raises:
        ValueError: x or the mask has a wrong shape or dtype.
        ImplementationError: the named implementation cannot compute the call.
    """

    def run(x: jax.Array, mask: jax.Array | None) -> jax.Array:
        shape, arrays = _operands(x, mask)
        return SOFTMAX(Spec(float(scale)), arrays, implementation, interpret)[0].reshape(shape)

    if mask is not None and axes_of(x) is not None:
        mask = jax.sharding.reshard(jnp.broadcast_to(mask, x.shape), jax.typeof(x).sharding)
    return over_rows("softmax", run, {"x": x, "mask": mask})


def explain(x: Any, mask: Any = None, *, platform: str | None = None, architecture: str | None = None) -> Explanation:
    """Returns for each implementation whether `softmax` of these operands (or their types) takes it, and why not."""
    if isinstance(mask, jax.ShapeDtypeStruct):
        mask = jnp.zeros((1,) * len(mask.shape), mask.dtype)
    arrays = jax.eval_shape(lambda: _operands(jnp.zeros(x.shape, x.dtype), mask)[1])
    return SOFTMAX.explain(Spec(1.0), arrays, platform, architecture)


def _operands(x: Any, mask: Any) -> tuple[tuple[int, ...], dict[str, Any]]:
    shape, (rows,) = flattened("softmax", x)
    if mask is None:
        return shape, {"x": rows}
    if mask.dtype != jnp.bool_:
        raise ValueError(f"softmax: mask is {mask.dtype} and must be bool; what is to be added is added to x.")
    if len(mask.shape) != len(shape) or any(m not in (1, n) for m, n in zip(mask.shape, shape, strict=True)):
        raise ValueError(f"softmax: mask has the shape {list(mask.shape)} and must broadcast to x, {list(shape)}.")
    return shape, {"x": rows, "mask": jnp.broadcast_to(mask, shape).reshape(rows.shape).astype(jnp.int8)}


def _forward(spec: Spec, names: tuple[str, ...]) -> Program:
    def body(tile: Tile, x: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        scores = x["x"] * spec.scale
        left = x["mask"] > 0 if "mask" in x else None
        scores = scores if left is None else jnp.where(left, scores, jnp.asarray(_HIDDEN, scores.dtype))
        weights = jnp.exp(scores - tile.max(scores))
        weights = weights if left is None else jnp.where(left, weights, jnp.zeros_like(weights))
        total = tile.sum(weights)
        return {"y": weights / jnp.where(total > 0, total, jnp.ones_like(total))}

    return Program("softmax_forward", body, dict.fromkeys(names, "row"), {"y": ("row", None)}, whole=True)


def _backward(spec: Spec, names: tuple[str, ...], wanted: tuple[str, ...]) -> Program:
    def body(tile: Tile, x: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        y, dy = x["y"], x["of_y"]
        return {"x": y * (dy - tile.sum(dy * y)) * spec.scale}

    return Program("softmax_backward", body, dict.fromkeys(names, "row"), {"x": ("row", None)}, whole=True)


def _keep(spec: Spec, arrays: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    return {"y": found["y"]}


SOFTMAX = RowOp("softmax", _forward, _backward, visible=("y",), keep=_keep)
