"""Encoders of the plain formats: 16-bit floats, and blocks of 32 codes with a scale, or a scale and a minimum.

The scale is searched, rounded to float16, and only then are the codes chosen: nearest to the weights under the scale
that the file will hold. Q8_0 is not searched when there is no importance: at 255 levels clipping gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.quant.encode.encoder import Encoded, Encoder, fold
from trustcore.quant.encode.search import (
    HALF_MAX,
    Grid,
    Grids,
    affine_codes,
    affine_grids,
    count_of,
    half,
    inverse,
    power_of_two,
    search_affine,
    search_symmetric,
    symmetric_grids,
    total,
    whole,
)


def _symmetric(bits: int, pack: Callable[[jax.Array], Encoded], grids: Grids) -> Encoder:
    high = (1 << (bits - 1)) - 1
    low = -high - 1 if bits < 8 else -high  # no encoder writes -128, so no reader is known to take it
    nearest = whole(low, high)

    def encode(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
        unit = power_of_two(x)
        x = x / unit[None]
        scale = half(search_symmetric(x, weight, nearest, grids.choose(weight, search)) * unit)
        return {"scale": scale.astype(jnp.float16), **pack(nearest(x * inverse(scale / unit)[None]))}

    return Encoder(encode, high * HALF_MAX, grids.tried)


def _affine(bits: int, pack: Callable[[jax.Array], Encoded], grids: Grids) -> Encoder:
    levels = (1 << bits) - 1

    def encode(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
        unit = power_of_two(x)
        x = x / unit[None]
        scale, shift = search_affine(x, weight, levels, grids.choose(weight, search))
        scale, minimum = half(scale * unit), (shift * unit).astype(jnp.float16)
        codes = affine_codes(x, scale / unit, minimum.astype(jnp.float32) / unit, levels)
        return {"scale": scale.astype(jnp.float16), "minimum": minimum, **pack(codes)}

    return Encoder(encode, HALF_MAX, grids.tried)


def _nibbles(offset: int) -> Callable[[jax.Array], Encoded]:
    return lambda codes: {"codes": fold((codes + offset).astype(jnp.uint8), 4, chunk=16)}


def _nibbles_and_high_bits(offset: int) -> Callable[[jax.Array], Encoded]:
    def pack(codes: jax.Array) -> Encoded:
        codes = (codes + offset).astype(jnp.uint8)
        return {"high": fold(codes >> jnp.uint8(4), 1), "codes": fold(codes & jnp.uint8(15), 4, chunk=16)}

    return pack


def _f16(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
    return {"values": x[0].astype(jnp.float16)}


def _bf16(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
    """Rounds to nearest, ties to even, by bits: XLA's CPU compiler converts bfloat16 far slower than it adds."""
    bits = jax.lax.bitcast_convert_type(x[0], jnp.uint32)
    even = (bits >> jnp.uint32(16)) & jnp.uint32(1)
    bits = (bits + jnp.uint32(0x7FFF) + even) >> jnp.uint32(16)
    return {"values": jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)}


def _nothing(weighted: bool, search: bool) -> tuple[tuple[float, ...], int]:
    return (), 0


def _q8_k(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
    unit = power_of_two(x)
    x = x / unit[None]
    scale = search_symmetric(x, weight, _EIGHT_BITS, _Q8_0.choose(weight, search))
    codes = _EIGHT_BITS(x * inverse(scale)[None])
    sums = jnp.sum(codes.reshape(16, 16, -1), axis=1)
    return {"scale": scale * unit, "codes": codes.astype(jnp.int8), "sums": sums.astype(jnp.int16)}


def _q1_0(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
    """The scale that fits best is the mean magnitude: there is nothing to search."""
    unit = power_of_two(x)
    scale = half(total(weight, jnp.abs(x / unit[None])) / count_of(weight, x) * unit)
    return {"scale": scale.astype(jnp.float16), "codes": fold((x >= 0).astype(jnp.uint8), 1)}


_EIGHT_BITS = whole(-127, 127)
_Q8_0 = Grids(Grid((127.0,)), Grid((127.0,)), Grid(tuple(np.linspace(124.5, 128.5, 9)), 1))

PLAIN: dict[str, Encoder] = {
    "f16": Encoder(_f16, 65519.996, _nothing),  # the largest float32 that does not round to infinity
    "bf16": Encoder(_bf16, 3.3961775e38, _nothing),
    "q4_0": _symmetric(4, _nibbles(8), symmetric_grids(8)),
    "q4_1": _affine(4, _nibbles(0), affine_grids(15)),
    "q5_0": _symmetric(5, _nibbles_and_high_bits(16), symmetric_grids(16)),
    "q5_1": _affine(5, _nibbles_and_high_bits(0), affine_grids(31)),
    "q8_0": _symmetric(8, lambda codes: {"codes": codes.astype(jnp.int8)}, _Q8_0),
    "q8_k": Encoder(_q8_k, 3.3e38),
    "q1_0": Encoder(_q1_0, HALF_MAX, _nothing),
}
