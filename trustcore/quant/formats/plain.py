"""GGUF's plain formats: 16-bit floats, and blocks of codes with one scale, or scale and minimum.

    q4_0, q5_0   w = scale * (code - 8), (code - 16)       block of 32
    q4_1, q5_1   w = scale * code + minimum                 block of 32
    q8_0         w = scale * code                           block of 32
    q8_k         w = scale * code, float32 scale            block of 256; ggml's own rows of activations
    q1_0         w = scale * (+1 or -1)                     block of 128

The 5-bit formats keep the fifth bits of a block apart, one word of 32. Source: ggml's block definitions, as the public
GGUF tools decode them. Decoding is bit-exact with the `gguf` package, and for q8_k and q1_0 with llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from trustcore.quant.formats.bits import unfold
from trustcore.quant.formats.layout import Affine, BlockFormat, Fields, in_order


def one_per_block(name: str) -> Callable[[Fields], jax.Array]:
    """Returns the function that gives a block's single scale or shift, as float32 `[..., 1, N]`."""
    return lambda fields: fields[name].astype(jnp.float32)[..., None, :]


def _four_bits(fields: Fields) -> jax.Array:
    return unfold(fields["codes"], 4, chunk=16)


def _five_bits(fields: Fields) -> jax.Array:
    return unfold(fields["codes"], 4, chunk=16) | unfold(fields["high"], 1) << jnp.uint8(4)


def _signs(fields: Fields) -> jax.Array:
    return unfold(fields["codes"], 1).astype(jnp.int8) * jnp.int8(2) - jnp.int8(1)


_scale, _minimum = one_per_block("scale"), one_per_block("minimum")

_Q1_0 = Affine(_signs, _scale)
_Q4_0 = Affine(lambda fields: _four_bits(fields).astype(jnp.int8) - jnp.int8(8), _scale)
_Q4_1 = Affine(_four_bits, _scale, _minimum)
_Q5_0 = Affine(lambda fields: _five_bits(fields).astype(jnp.int8) - jnp.int8(16), _scale)
_Q5_1 = Affine(_five_bits, _scale, _minimum)
_Q8_0 = Affine(lambda fields: fields["codes"], _scale)


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
_HIGH = ("high", np.uint8, 4)
_NIBBLES = ("codes", np.uint8, 16)

PLAIN: tuple[BlockFormat, ...] = (
    BlockFormat("f16", 1, in_order(("values", np.float16, None)), _decode_f16),
    BlockFormat("bf16", 1, in_order(("values", ml_dtypes.bfloat16, None)), _decode_bf16),
    BlockFormat.of_affine("q4_0", 32, in_order(_SCALE, _NIBBLES), _Q4_0),
    BlockFormat.of_affine("q4_1", 32, in_order(_SCALE, _MINIMUM, _NIBBLES), _Q4_1),
    BlockFormat.of_affine("q5_0", 32, in_order(_SCALE, _HIGH, _NIBBLES), _Q5_0),
    BlockFormat.of_affine("q5_1", 32, in_order(_SCALE, _MINIMUM, _HIGH, _NIBBLES), _Q5_1),
    BlockFormat.of_affine("q8_0", 32, in_order(_SCALE, ("codes", np.int8, 32)), _Q8_0),
    BlockFormat.of_affine(
        "q8_k", 256, in_order(("scale", np.float32, None), ("codes", np.int8, 256), ("sums", np.int16, 16)), _Q8_0
    ),
    BlockFormat.of_affine("q1_0", 128, in_order(_SCALE, ("codes", np.uint8, 16)), _Q1_0),
)
