"""Norms whose output is codes of 8 bits with a scale for each row: what a product of 8-bit operands reads.

    y ~ codes * scale,      scale = max |y| / top      (top: 127 for int8, 448 for float8_e4m3fn)

Oracle: below; machines: `../rows.py`. Forward alone. No float row is written: of R rows of D bfloat16 numbers 2 R D
bytes are read and R D written, where a norm and a quantizer one after the other read 2 R D at least twice and write 3 R
D. Not measured on a GPU or TPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.norm import front
from kernels_pallas.rows import Program, RowOp, Tile

TOPS = {"int8": 127.0, "float8_e4m3fn": 448.0}


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static part of a call: that of the norm, and the dtype of codes."""

    norm: front.Spec
    dtype: str


def norm_quantized(
    x: jax.Array,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    centre: bool = False,
    eps: float = 1e-6,
    shift: float = 0.0,
    dtype: Any = jnp.int8,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Returns codes `[..., D]` and float32 scales `[...]` of `rms_norm` or `layer_norm`, and `x + residual` with one.

    Args:
        x, weight, bias, residual, eps, shift: as `rms_norm` and `layer_norm` take them.
        centre: LayerNorm's subtraction of the mean.
        dtype: int8 (rounded to nearest, ties up) or float8_e4m3fn.
        implementation, interpret: as `rms_norm` takes them.

    Raises:
        ValueError: the shapes do not fit each other, or codes have another dtype.
        ImplementationError: the named implementation cannot compute the call.
        NotImplementedError: it is differentiated.
    """
    name = jnp.dtype(dtype).name
    if name not in TOPS:
        raise ValueError(f"norm_quantized: codes of {name} are not known; choose of {', '.join(TOPS)}.")
    shape, arrays = front.operands(x, weight, bias, residual)
    spec = Spec(front.Spec(centre, float(eps), float(shift)), name)
    codes, scale, *total = NORM_QUANTIZED(spec, arrays, implementation, interpret)
    return (codes.reshape(shape), scale.reshape(shape[:-1]), *(t.reshape(shape) for t in total))


def norm_quantized_oracle(
    x: jax.Array,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    centre: bool = False,
    eps: float = 1e-6,
    shift: float = 0.0,
    dtype: Any = jnp.int8,
) -> tuple[jax.Array, ...]:
    """Returns what `norm_quantized` does: the norm by its definition, then codes by theirs. Sums are float32."""
    total = x if residual is None else x + residual
    wide = total.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True) if centre else wide
    y = wide / jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    y = y if weight is None else y * jnp.broadcast_to(weight.astype(jnp.float32) + shift, y.shape)
    y = y if bias is None else y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    top = TOPS[jnp.dtype(dtype).name]
    scale = jnp.max(jnp.abs(y), axis=-1) / top
    codes = y / jnp.where(scale > 0, scale, 1.0)[..., None]
    codes = jnp.floor(codes + 0.5) if jnp.issubdtype(dtype, jnp.integer) else codes
    codes = jnp.clip(codes, -top, top).astype(dtype)
    return (codes, scale) if residual is None else (codes, scale, total)


def _forward(spec: Spec, names: tuple[str, ...]) -> Program:
    plain = front.forward_program(spec.norm, names)
    top = TOPS[spec.dtype]

    def body(tile: Tile, x: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        found = plain.body(tile, x)
        y = found["y"]
        most = tile.max(jnp.abs(y))
        codes = y * jnp.where(most > 0, top / jnp.where(most > 0, most, jnp.ones_like(most)), jnp.zeros_like(most))
        codes = jnp.minimum(jnp.maximum(codes, -top), top)
        if spec.dtype == "int8":
            codes = jnp.floor(codes + 0.5)  # kernels know no `round`
        return {"codes": codes, "scale": most / top, "total": found["total"]}

    outputs: dict[str, Any] = {"codes": ("row", jnp.dtype(spec.dtype)), "scale": ("number", None)}
    outputs |= {"total": ("row", None)} if "residual" in names else {}
    return Program("norm_quantized", body, plain.inputs, outputs, whole=True)


def _backward(spec: Spec, names: tuple[str, ...], wanted: tuple[str, ...]) -> Program:
    raise NotImplementedError(_NO_GRADIENT)


def _keep(spec: Spec, arrays: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    raise NotImplementedError(_NO_GRADIENT)


_NO_GRADIENT = "norm_quantized has no derivative: rounding has none. For training, quantize the output of rms_norm."
NORM_QUANTIZED = RowOp("norm_quantized", _forward, _backward, visible=("codes", "scale", "total"), keep=_keep)
