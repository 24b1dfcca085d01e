"""What a code is worth before it is scaled: integers, small floats, tables; and the power-of-two scale.

    int b      code - 2**(b-1)        unsigned codes of b < 8 bits; int8 codes are signed and stand for themselves
    int1       2 * code - 1           ternary: code - 1
    e4m3, e5m2                        8-bit floats (the `fn` E4M3: no infinity, 448 the largest), IEEE-like E5M2
    e2m3       m / 8, (1 + m / 8) * 2**(e - 1)        e3m2    m / 16, (1 + m / 4) * 2**(e - 3)
    nf4, fp4   a table of 16 numbers within [-1, 1]

Small floats without infinities are computed as integers over a power of two, which is exact; 8-bit floats go through
float16, which holds all of both and which CPUs widen in one instruction. The E2M3 and E3M2 encodings and E8M0, the
scale, are those of OCP's Microscaling formats (MX) v1.0; the tables are QLoRA's (arXiv 2305.14314, appendix E) and
bitsandbytes' FP4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

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


def float8_e5m2(codes: jax.Array) -> jax.Array:
    """Returns float16: E5M2 is its upper byte."""
    bits = jax.lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(bits << jnp.uint16(8), jnp.float16)


def float8_e4m3(codes: jax.Array) -> jax.Array:
    """Returns float16: its exponent is biased by 15 in place of 7, so the bits, moved over, are 2**-8 of the number."""
    bits = jax.lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.uint16)
    magnitude = (bits & jnp.uint16(0x7F)) << jnp.uint16(7)
    number = jax.lax.bitcast_convert_type((bits & jnp.uint16(0x80)) << jnp.uint16(8) | magnitude, jnp.float16)
    return jnp.where(magnitude == jnp.uint16(0x7F << 7), jnp.float16(jnp.nan), number * jnp.float16(256))


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
