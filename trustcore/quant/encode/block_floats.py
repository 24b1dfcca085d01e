"""Encoders of GGUF's 4-bit floats: E2M1 codes under a power of two (MXFP4) or an 8-bit float (NVFP4).

    mxfp4   w = 2**(exponent - 127) * e2m1        blocks of 32
    nvfp4   w = scale * e2m1, scale E4M3          sub-blocks of 16, four to a block

There are few scales of use, so each is tried as stored, and the one of least error kept: nothing is fitted. Without a
search the scale is the rule of the OCP Microscaling formats (v1.0, section 6.3: the exponent of the largest
magnitude, less that of the largest code), and for nvfp4 the E4M3 number nearest to a sixth of the largest magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.quant.encode.encoder import Encoded, Encoder, fold
from trustcore.quant.encode.search import better, inverse, total

# Offsets of the scale codes that are tried, without and with an importance. An octave of E4M3 is eight codes: from a
# largest weight that is clipped to two thirds to one that lands at 4.
_OFFSETS = {"mxfp4": ((0, 1, -1), (0, 1, -1, -2)), "nvfp4": (tuple(range(-3, 7)), tuple(range(-8, 8)))}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDDLES = tuple((a + b) / 2 for a, b in pairwise(_E2M1))


def _magnitude(x: jax.Array) -> jax.Array:
    """Returns the E2M1 number nearest to the magnitude of x: a sum of steps, see `iq4`."""
    steps = zip(_MIDDLES, np.diff(_E2M1), strict=True)
    return sum((jnp.where(jnp.abs(x) > middle, jnp.float32(step), 0.0) for middle, step in steps), jnp.float32(0))


def _codes(x: jax.Array) -> jax.Array:
    """Returns uint8: the code of the E2M1 number nearest to x; what rounds to zero has no sign."""
    code = sum(((jnp.abs(x) > middle).astype(jnp.uint8) for middle in _MIDDLES), jnp.uint8(0))
    return jnp.where((x < 0) & (code > 0), code | jnp.uint8(8), code)


def _least(
    x: jax.Array,
    weight: jax.Array | None,
    starts: jax.Array,
    offsets: Sequence[int],
    value_of: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Returns the scale code `starts + offset` of least error; x `[R, ...]`, starts float32 `[...]`."""
    tried = jnp.asarray(offsets, jnp.float32)

    def attempt(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        code = starts + tried[i]
        unit = inverse(value_of(code))[None]
        y = x * unit
        # In units of x, which the caller has made about one: no square vanishes.
        error = total(weight, (jnp.abs(x) - _magnitude(y) * value_of(code)[None]) ** 2)
        return better(best, (error, code))

    start = (jnp.full_like(starts, jnp.inf), starts)
    return jax.lax.fori_loop(0, len(offsets), attempt, start)[1]


# ---- mxfp4 -----------------------------------------------------------------------------------------------------------

_LOWEST, _HIGHEST = 2.0, 252.0  # below, XLA's CPU compiler takes half the scale for zero; above, 6 * scale is infinite


def _power(exponent: jax.Array) -> jax.Array:
    """Returns 2**(exponent - 127) of whole numbers from 1 to 254."""
    return jax.lax.bitcast_convert_type(exponent.astype(jnp.uint32) << jnp.uint32(23), jnp.float32)


def _mxfp4(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
    largest = jnp.max(jnp.abs(x), axis=0)
    exponent = (jax.lax.bitcast_convert_type(largest, jnp.uint32) >> jnp.uint32(23)).astype(jnp.float32)
    rule = jnp.clip(exponent - 2, _LOWEST, _HIGHEST)  # 4, the power of two in 6, is 2**2
    if search:
        # x / 2**(rule - 127) lies within 8. The scale codes are then relative: 127 + offset.
        y = x * _power(254 - rule)[None]
        best = _least(y, weight, jnp.full_like(rule, 127.0), _OFFSETS["mxfp4"][weight is not None], _power) - 127 + rule
        rule = jnp.clip(best, _LOWEST, _HIGHEST)
    codes = _codes(x * _power(254 - rule)[None])
    return {"exponent": rule.astype(jnp.uint8), "codes": fold(codes, 4, chunk=16)}


# ---- nvfp4 -----------------------------------------------------------------------------------------------------------

_E4M3_MAX, _TOP = 448.0, 126.0  # the largest number and its code; 127 is read as zero


def _e4m3(code: jax.Array) -> jax.Array:
    """Returns the E4M3 number of whole codes from 0 to 126."""
    bits = (code.astype(jnp.uint32) + jnp.uint32((127 - 7) << 3)) << jnp.uint32(20)
    return jnp.where(code < 8, code * 2.0**-9, jax.lax.bitcast_convert_type(bits, jnp.float32))


def _e4m3_code(value: jax.Array) -> jax.Array:
    """Returns the code of the E4M3 number nearest to a value, not negative; 126 for all beyond."""
    bits = jax.lax.bitcast_convert_type(jnp.minimum(value, _E4M3_MAX), jnp.uint32) + jnp.uint32(1 << 19)
    normal = (bits >> jnp.uint32(20)).astype(jnp.float32) - ((127 - 7) << 3)
    return jnp.where(value < 2.0**-6, jnp.round(value * 2.0**9), normal)


def _nvfp4(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
    m = x.shape[-1]
    x = x.reshape(4, 16, m).swapaxes(0, 1)  # [16, 4, M]
    code = _e4m3_code(jnp.max(jnp.abs(x), axis=0) / 6)
    if search:
        offsets = _OFFSETS["nvfp4"][weight is not None]
        parted = None if weight is None else weight.reshape(4, 16, -1).swapaxes(0, 1)
        code = _least(x, parted, code, offsets, lambda c: _e4m3(jnp.clip(c, 0, _TOP)))
        code = jnp.clip(code, 0, _TOP)
    codes = _codes(x * inverse(_e4m3(code))[None]).swapaxes(0, 1).reshape(64, m)
    return {"scales": code.astype(jnp.uint8), "codes": fold(codes, 4, chunk=8)}


def _tried(name: str) -> Callable[[bool, bool], tuple[tuple[float, ...], int]]:
    return lambda weighted, search: (tuple(map(float, _OFFSETS[name][weighted])) if search else (), 0)


BLOCK_FLOATS: dict[str, Encoder] = {
    "mxfp4": Encoder(_mxfp4, 6 * 2.0**125, _tried("mxfp4")),
    "nvfp4": Encoder(_nvfp4, 6 * _E4M3_MAX, _tried("nvfp4")),
}
