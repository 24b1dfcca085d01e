"""What a code is worth before it is scaled: integers, small floats, tables; and the power-of-two scale.

    int b      code - 2**(b-1)        unsigned codes of b < 8 bits; int8 codes are signed and stand for themselves
    int1       2 * code - 1           ternary: code - 1
    e4m3, e5m2                        8-bit floats (the `fn` E4M3: no infinity, 448 the largest), IEEE-like E5M2
    e2m3       m / 8, (1 + m / 8) * 2**(e - 1)        e3m2    m / 16, (1 + m / 4) * 2**(e - 3)
    nf4, fp4   a table of 16 numbers within [-1, 1]

Small floats are computed by bits and integers, which is exact and vectorizes: on the CPU XLA converts float8, and
multiplies float16, one number at a time (0.25 G weights/s, 2026-11). The E2M3 and E3M2 encodings and E8M0, the
scale, are those of OCP's Microscaling formats (MX) v1.0; the tables are QLoRA's (arXiv 2305.14314, appendix E) and
bitsandbytes' FP4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Quantiles of a normal distribution, brought to [-1, 1] with an exact zero.
NF4: tuple[float, ...] = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# A sign, two bits of exponent and one of mantissa, over 12. The codes of one exponent lie apart from E2M1's.
FP4: tuple[float, ...] = tuple(
    sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)


def centred(bits: int) -> Callable[[jax.Array], jax.Array]:
    """Returns the function from unsigned codes of `bits` bits to the int8 around zero that they stand for."""
    return lambda codes: codes.astype(jnp.int8) - jnp.int8(1 << (bits - 1))


def signs(codes: jax.Array) -> jax.Array:
    """Returns int8: -1 for code 0 and 1 for code 1."""
    return codes.astype(jnp.int8) * jnp.int8(2) - jnp.int8(1)


def ternary(codes: jax.Array) -> jax.Array:
    """Returns int8: the code less one."""
    return codes.astype(jnp.int8) - jnp.int8(1)


def same(codes: jax.Array) -> jax.Array:
    """Returns the codes: they are numbers already."""
    return codes


def float8_e4m3(codes: jax.Array) -> jax.Array:
    """Returns float32: four bits of exponent, biased by 7, and three of mantissa; 127 is NaN."""
    return _float8(codes, 3, 7, lambda magnitude, number: jnp.where(magnitude == 127, jnp.nan, number))


def float8_e5m2(codes: jax.Array) -> jax.Array:
    """Returns float32: five bits of exponent, biased by 15, and two of mantissa; 124 is infinity, what follows NaN."""

    def special(magnitude: jax.Array, number: jax.Array) -> jax.Array:
        return jnp.where(magnitude > 124, jnp.nan, jnp.where(magnitude == 124, jnp.inf, number))

    return _float8(codes, 2, 15, special)


def _float8(
    codes: jax.Array, mantissa: int, bias: int, special: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.uint32)
    magnitude = bits & jnp.uint32(0x7F)
    # Moved into float32's place, an exponent of 0 reads as (1 + m) * 2**-bias, where m * 2**(1 - bias) is meant.
    moved = (magnitude << jnp.uint32(23 - mantissa)) + jnp.uint32((127 - bias) << 23)
    normal = jax.lax.bitcast_convert_type(moved, jnp.float32)
    smallest = np.float32(2.0 ** (1 - bias))
    number = jnp.where(magnitude < jnp.uint32(1 << mantissa), 2 * normal - smallest, normal)
    number = special(magnitude, number)
    sign = (bits & jnp.uint32(0x80)) << jnp.uint32(24)
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(number, jnp.uint32) | sign, jnp.float32)


def float6_e2m3(codes: jax.Array) -> jax.Array:
    """Returns float32 of six-bit codes: a sign, two bits of exponent, three of mantissa; 7.5 the largest."""
    exponent, mantissa = (codes >> jnp.uint8(3)) & jnp.uint8(3), codes & jnp.uint8(7)
    normal = (mantissa | jnp.uint8(8)) << jnp.maximum(exponent, jnp.uint8(1)) >> jnp.uint8(1)
    eighths = jnp.where(exponent == 0, mantissa, normal)
    return _signed(codes, eighths.astype(jnp.float32) * 0.125)


def float6_e3m2(codes: jax.Array) -> jax.Array:
    """Returns float32 of six-bit codes: a sign, three bits of exponent, two of mantissa; 28 the largest."""
    exponent, mantissa = (codes >> jnp.uint8(2)) & jnp.uint8(7), (codes & jnp.uint8(3)).astype(jnp.uint16)
    shift = jnp.maximum(exponent, jnp.uint8(1)).astype(jnp.uint16)
    normal = (mantissa | jnp.uint16(4)) << shift >> jnp.uint16(1)
    sixteenths = jnp.where(exponent == 0, mantissa, normal)
    return _signed(codes, sixteenths.astype(jnp.float32) * 0.0625)


def from_table(table: Sequence[float]) -> Callable[[jax.Array], jax.Array]:
    """Returns the function from codes of four bits to the float32 entries of a table of 16.

    A tree of selections on the bits of the code, as `bits.lookup`: it vectorizes where a gather does not.
    """

    def look_up(codes: jax.Array) -> jax.Array:
        level: list[jax.Array] = [jnp.float32(value) for value in table]
        for bit in (1, 2, 4, 8):
            upper = (codes & jnp.uint8(bit)) != 0
            level = [jnp.where(upper, b, a) for a, b in zip(level[::2], level[1::2], strict=True)]
        return level[0]

    return look_up


def power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns float32 `2**(exponent - 127)` of E8M0 bytes; 255 is NaN.

    Byte 0, 2**-127, is below float32's normal numbers; XLA takes such for zero on the CPU.
    """
    bits = exponent.astype(jnp.uint32) << jnp.uint32(23)
    bits = jnp.where(exponent == jnp.uint8(0), jnp.uint32(1 << 22), bits)
    return jnp.where(exponent == jnp.uint8(255), jnp.nan, jax.lax.bitcast_convert_type(bits, jnp.float32))


def _signed(codes: jax.Array, magnitude: jax.Array) -> jax.Array:
    return jnp.where(codes & jnp.uint8(32) != 0, -magnitude, magnitude)
