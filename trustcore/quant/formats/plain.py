"""GGUF's plain formats: 16-bit floats, and blocks of 32 codes with one scale (Q4_0, Q8_0) or scale and minimum (Q4_1).

Source: ggml's block definitions, as the public GGUF tools decode them. Decoding is bit-exact with the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from trustcore.quant.formats.layout import Affine, Fields, Format, in_order


def _nibbles(codes: jax.Array) -> tuple[jax.Array, ...]:
    return (codes & jnp.uint8(15)).astype(jnp.float32), (codes >> jnp.uint8(4)).astype(jnp.float32)


def _bytes(codes: jax.Array) -> tuple[jax.Array, ...]:
    return (codes.astype(jnp.float32),)


def _field(name: str) -> Callable[[Fields], jax.Array]:
    return lambda fields: fields[name].astype(jnp.float32)


_Q4_0 = Affine("codes", _nibbles, _field("scale"), lambda fields: -8.0 * fields["scale"].astype(jnp.float32))
_Q4_1 = Affine("codes", _nibbles, _field("scale"), _field("minimum"))
_Q8_0 = Affine("codes", _bytes, _field("scale"))


def _decode_f16(fields: Fields) -> jax.Array:
    return fields["values"].astype(jnp.float32)


def _decode_bf16(fields: Fields) -> jax.Array:
    return _widen_bf16(fields["values"])


@jax.custom_jvp
def _widen_bf16(values: jax.Array) -> jax.Array:
    # By bits: XLA's CPU compiler converts bfloat16 an order of magnitude slower than it shifts integers.
    bits = jax.lax.bitcast_convert_type(values, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits << jnp.uint32(16), jnp.float32)


@_widen_bf16.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _widen_bf16(*primals), tangents[0].astype(jnp.float32)


_SCALE = ("scale", np.float16, None)
_MINIMUM = ("minimum", np.float16, None)

PLAIN: tuple[Format, ...] = (
    Format("f16", 1, in_order(("values", np.float16, None)), _decode_f16),
    Format("bf16", 1, in_order(("values", ml_dtypes.bfloat16, None)), _decode_bf16),
    Format("q4_0", 32, in_order(_SCALE, ("codes", np.uint8, 16)), _Q4_0.decode, _Q4_0),
    Format("q4_1", 32, in_order(_SCALE, _MINIMUM, ("codes", np.uint8, 16)), _Q4_1.decode, _Q4_1),
    Format("q8_0", 32, in_order(_SCALE, ("codes", np.int8, 32)), _Q8_0.decode, _Q8_0),
)
