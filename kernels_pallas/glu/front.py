"""`glu` and `bias_activation`: what becomes of a tile, forward and backward.

Oracle: `oracle.py`; machines: `../rows.py`.

The backward pass computes the activation again from its operands, which is all it keeps; plain autodiff would keep the
activation's value and slope as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import Explanation
from kernels_pallas.glu.oracle import ACTIVATIONS
from kernels_pallas.rows import Program, RowOp, Tile, flattened
from kernels_pallas.sharded import over_rows


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static part of a call."""

    activation: str


def glu(
    gate: jax.Array,
    up: jax.Array,
    *,
    activation: str = "silu",
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns `activation(gate) * up` as `glu_oracle` does.

    Differentiable (in reverse, once) in both.

    Args:
        gate, up: `[..., F]` of one dtype.
        activation: "relu", "gelu" (exact), "gelu_tanh", "silu" or "tanh".
        implementation: "triton", "mosaic_tpu", "xla"; None takes the first that can compute the call where it runs. A
            name is taken, or raises.
        interpret: runs the named implementation in Pallas' interpreter, on any platform and slowly.

    Raises:
        ValueError: shapes, dtypes or the activation's name are wrong.
        ImplementationError: the named implementation cannot compute the call.
    """
    spec = _spec("glu", activation)

    def run(gate: jax.Array, up: jax.Array) -> jax.Array:
        shape, (x, y) = flattened("glu", gate, up=up)
        return GLU(spec, {"x": x, "up": y}, implementation, interpret)[0].reshape(shape)

    return over_rows("glu", run, {"gate": gate, "up": up}, elementwise=True)


def bias_activation(
    x: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: str = "gelu",
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns `activation(x + bias)` as `bias_activation_oracle` does; otherwise as `glu`."""
    spec = _spec("bias_activation", activation)

    def run(x: jax.Array, bias: jax.Array | None) -> jax.Array:
        shape, (rows,) = flattened("bias_activation", x)
        if bias is not None and tuple(bias.shape) != shape[-1:]:
            raise ValueError(f"bias_activation: bias has the shape {list(bias.shape)} and must have [{shape[-1]}].")
        arrays = {"x": rows} if bias is None else {"x": rows, "bias": bias}
        return BIAS_ACTIVATION(spec, arrays, implementation, interpret)[0].reshape(shape)

    return over_rows("bias_activation", run, {"x": x}, {"bias": bias}, elementwise=True)


def explain(
    gate: Any, up: Any, *, activation: str = "silu", platform: str | None = None, architecture: str | None = None
) -> Explanation:
    """Returns for each implementation whether `glu` of these operands (or their types) takes it, and why not."""
    _, (x, y) = flattened("glu", gate, up=up)
    return GLU.explain(_spec("glu", activation), {"x": x, "up": y}, platform, architecture)


def _spec(op: str, activation: str) -> Spec:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation {activation!r} is not known; choose of {', '.join(ACTIVATIONS)}.")
    return Spec(activation)


def _value_and_slope(tile: Tile, activation: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`f(x)` and `f'(x)`; spelled out, for kernels know fewer functions than XLA."""
    one, half = jnp.ones((), x.dtype), jnp.asarray(0.5, x.dtype)
    if activation == "relu":
        inside = x > 0
        return jnp.where(inside, x, jnp.zeros_like(x)), inside.astype(x.dtype)
    if activation == "tanh":
        y = jnp.tanh(x)
        return y, one - y * y
    if activation == "silu":
        share = jax.lax.logistic(x)
        return x * share, share * (one + x * (one - share))
    if activation == "gelu":
        below = half * (one + tile.erf(x * (2**-0.5)))
        return x * below, below + x * jnp.exp(-(half * x * x)) * (2 * math.pi) ** -0.5
    factor, cube = (2 / math.pi) ** 0.5, 0.044715  # "gelu_tanh": Hendrycks and Gimpel, arXiv 1606.08415, section 2
    bent = jnp.tanh(factor * (x + cube * x * x * x))
    below = half * (one + bent)
    return x * below, below + half * x * (one - bent * bent) * factor * (one + 3 * cube * x * x)


def _biased(x: Mapping[str, jax.Array]) -> jax.Array:
    return x["x"] + jnp.broadcast_to(x["bias"], x["x"].shape) if "bias" in x else x["x"]


def _kinds(names: tuple[str, ...]) -> dict[str, Any]:
    return {n: "column" if n == "bias" else "row" for n in names}


def _forward(spec: Spec, names: tuple[str, ...]) -> Program:
    def body(tile: Tile, x: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        y, _ = _value_and_slope(tile, spec.activation, _biased(x))
        return {"y": y * x["up"] if "up" in x else y}

    return Program("activation_forward", body, _kinds(names), {"y": ("row", None)}, whole=False)


def _backward(spec: Spec, names: tuple[str, ...], wanted: tuple[str, ...]) -> Program:
    def body(tile: Tile, x: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        y, slope = _value_and_slope(tile, spec.activation, _biased(x))
        dy = x["of_y"]
        dx = dy * slope * x["up"] if "up" in x else dy * slope
        return {"x": dx, "up": dy * y, "bias": dx}

    outputs: dict[str, Any] = {n: ("sum" if n == "bias" else "row", None) for n in wanted}
    return Program("activation_backward", body, _kinds(names), outputs, whole=False)


def _keep(spec: Spec, arrays: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    return arrays


GLU = RowOp("glu", _forward, _backward, visible=("y",), keep=_keep)
BIAS_ACTIVATION = RowOp("bias_activation", _forward, _backward, visible=("y",), keep=_keep)
