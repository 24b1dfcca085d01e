"""What packed codes are worth, in arithmetic that XLA, Pallas-Triton and Pallas-Mosaic all have.

Codes come as int32 of 0 to 255, whatever their dtype in memory: small floats are read by their bits, so no chip needs a
type for them, and tables are trees of selections, for a gather takes one element at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def as_bytes(x: jax.Array) -> jax.Array:
    """Returns an array of one byte each as int8 or uint8, its bits unchanged."""
    return x if jnp.issubdtype(x.dtype, jnp.integer) else jax.lax.bitcast_convert_type(x, jnp.uint8)


def unsigned(x: jax.Array) -> jax.Array:
    """Returns int8 or uint8 codes as int32 of 0 to 255."""
    return x.astype(jnp.int32) & 255


def float8_e4m3(codes: jax.Array) -> jax.Array:
    """Returns float32: four bits of exponent, biased by 7, and three of mantissa; 127 is NaN, and so is 255."""
    magnitude = codes & 127
    number = _moved(magnitude, 3, 7)
    number = jnp.where(magnitude == 127, jnp.float32(jnp.nan), number)
    return jnp.where(codes >= 128, 0.0 - number, number)


def float8_e5m2(codes: jax.Array) -> jax.Array:
    """Returns float32: five bits of exponent, biased by 15, and two of mantissa; 124 is infinity, what follows NaN."""
    magnitude = codes & 127
    number = _moved(magnitude, 2, 15)
    number = jnp.where(magnitude == 124, jnp.float32(jnp.inf), number)
    number = jnp.where(magnitude > 124, jnp.float32(jnp.nan), number)
    return jnp.where(codes >= 128, 0.0 - number, number)


def _moved(magnitude: jax.Array, mantissa: int, bias: int) -> jax.Array:
    # In float32's place an exponent of 0 reads as (1 + m) * 2**-bias, where m * 2**(1 - bias) is meant.
    bits = (magnitude << (23 - mantissa)) + ((127 - bias) << 23)
    normal = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(magnitude < (1 << mantissa), 2.0 * normal - 2.0 ** (1 - bias), normal)


def from_table(codes: jax.Array, table: Sequence[float]) -> jax.Array:
    """Returns float32 `table[codes]`, for a table of 2, 4, 8 or 16 entries and codes within it."""
    level: list[Any] = [jnp.float32(value) for value in table]
    bit = 1
    while len(level) > 1:
        upper = (codes & bit) != 0
        level = [jnp.where(upper, b, a) for a, b in zip(level[::2], level[1::2], strict=True)]
        bit *= 2
    return level[0]


def power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns float32 `2**(exponent - 127)`; 255 is NaN, and 0 is 2**-127, which XLA takes for zero on the CPU."""
    bits = jnp.where(exponent == 0, 1 << 22, exponent << 23)
    return jnp.where(exponent == 255, jnp.float32(jnp.nan), jax.lax.bitcast_convert_type(bits, jnp.float32))
