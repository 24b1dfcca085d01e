"""GGUF's K-quants: blocks of 256 weights in sub-blocks of 16 or 32, whose scales are themselves codes.

    q2_k   w = scale * s * code - minimum * m      codes 2 bits, s and m 4 bits, sub-blocks of 16
    q3_k   w = scale * (s - 32) * (code - 4)       codes 3 bits, s 6 bits, sub-blocks of 16
    q4_k   w = scale * s * code - minimum * m      codes 4 bits, s and m 6 bits, sub-blocks of 32
    q5_k   the same with codes of 5 bits
    q6_k   w = scale * s * (code - 32)             codes 6 bits, s 8 bits signed, sub-blocks of 16

Rows of codes hold weights that lie 32 apart (64 apart in q6_k's low bits). All products of a scale and two codes fit
the 24 bits of a float32, so the order of the multiplications does not matter and decoding is bit-exact with the `gguf`
package.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.quant.formats.bits import unfold
from trustcore.quant.formats.layout import Affine, BlockFormat, Fields, in_order


def _times(fields: Fields, name: str, codes: jax.Array) -> jax.Array:
    """Returns float32 `[..., subs, N]`: the block's number `name` times the code of each sub-block."""
    return fields[name].astype(jnp.float32)[..., None, :] * codes.astype(jnp.float32)


def _q3_scales(fields: Fields) -> jax.Array:
    """Sixteen 6-bit scales in 12 bytes: 8 bytes of low nibbles, then 4 bytes of upper bit pairs."""
    packed = fields["scales"]
    low, high = unfold(packed[..., :8, :], 4, chunk=8), unfold(packed[..., 8:, :], 2, chunk=4)
    return (low | high << jnp.uint8(4)).astype(jnp.int8) - jnp.int8(32)


def _q4_scales(fields: Fields) -> jax.Array:
    """Eight 6-bit scales in 12 bytes: four whole in bytes 0-3; four as nibbles of bytes 8-11 under bits 6-7 of 0-3."""
    packed = fields["scales"]
    return _six_bits(packed[..., 0:4, :], packed[..., 8:12, :] & jnp.uint8(15))


def _q4_minima(fields: Fields) -> jax.Array:
    """The same for the minima: bytes 4-7, and the upper nibbles of bytes 8-11 under bits 6-7 of 4-7."""
    packed = fields["scales"]
    return _six_bits(packed[..., 4:8, :], packed[..., 8:12, :] >> jnp.uint8(4))


def _six_bits(first: jax.Array, low: jax.Array) -> jax.Array:
    """Returns `[..., 8, N]`: the low six bits of each of `first`, then `low` under their upper two.

    Selected, not concatenated: jax 0.10's CPU compiler does not vectorize a concatenation of computed parts.
    """
    *lead, rows, n = first.shape
    pair = jax.lax.broadcasted_iota(jnp.uint8, (*lead, 2, rows, n), len(lead))
    whole, joined = first & jnp.uint8(63), low | ((first >> jnp.uint8(2)) & jnp.uint8(48))
    return jnp.where(pair == 0, whole[..., None, :, :], joined[..., None, :, :]).reshape(*lead, 2 * rows, n)


def _q3_codes(fields: Fields) -> jax.Array:
    codes = unfold(fields["codes"], 2, chunk=32) | unfold(fields["high"], 1, chunk=32) << jnp.uint8(2)
    return codes.astype(jnp.int8) - jnp.int8(4)


def _q5_codes(fields: Fields) -> jax.Array:
    return unfold(fields["codes"], 4, chunk=32) | unfold(fields["high"], 1, chunk=32) << jnp.uint8(4)


def _q6_codes(fields: Fields) -> jax.Array:
    codes = unfold(fields["codes"], 4, chunk=64) | unfold(fields["high"], 2, chunk=32) << jnp.uint8(4)
    return codes.astype(jnp.int8) - jnp.int8(32)


_Q2_K = Affine(
    codes=lambda fields: unfold(fields["codes"], 2, chunk=32),
    scale=lambda fields: _times(fields, "scale", fields["scales"] & jnp.uint8(15)),
    shift=lambda fields: -_times(fields, "minimum", fields["scales"] >> jnp.uint8(4)),
)
_Q3_K = Affine(codes=_q3_codes, scale=lambda fields: _times(fields, "scale", _q3_scales(fields)))
_Q4_K = Affine(
    codes=lambda fields: unfold(fields["codes"], 4, chunk=32),
    scale=lambda fields: _times(fields, "scale", _q4_scales(fields)),
    shift=lambda fields: -_times(fields, "minimum", _q4_minima(fields)),
)
_Q5_K = Affine(codes=_q5_codes, scale=_Q4_K.scale, shift=_Q4_K.shift)
_Q6_K = Affine(codes=_q6_codes, scale=lambda fields: _times(fields, "scale", fields["scales"]))

_SCALE = ("scale", np.float16, None)
_MINIMUM = ("minimum", np.float16, None)


def _bytes(name: str, rows: int) -> tuple[str, type, int]:
    return name, np.uint8, rows


K_QUANTS: tuple[BlockFormat, ...] = (
    BlockFormat.of_affine("q2_k", 256, in_order(_bytes("scales", 16), _bytes("codes", 64), _SCALE, _MINIMUM), _Q2_K),
    BlockFormat.of_affine(
        "q3_k", 256, in_order(_bytes("high", 32), _bytes("codes", 64), _bytes("scales", 12), _SCALE), _Q3_K
    ),
    BlockFormat.of_affine("q4_k", 256, in_order(_SCALE, _MINIMUM, _bytes("scales", 12), _bytes("codes", 128)), _Q4_K),
    BlockFormat.of_affine(
        "q5_k",
        256,
        in_order(_SCALE, _MINIMUM, _bytes("scales", 12), _bytes("high", 32), _bytes("codes", 128)),
        _Q5_K,
    ),
    BlockFormat.of_affine(
        "q6_k", 256, in_order(_bytes("codes", 128), _bytes("high", 64), ("scales", np.int8, 16), _SCALE), _Q6_K
    ),
)
