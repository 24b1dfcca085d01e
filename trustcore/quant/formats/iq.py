"""GGUF's IQ formats: codes that name an entry of a table rather than a number.

    iq4_nl, iq4_xs    a 4-bit code names one of 16 unevenly spaced values
    iq3_xxs, iq3_s    a code of 8 or 9 bits names four magnitudes; signs apart
    iq2_xxs, _xs, _s  a code of 8, 9 or 10 bits names eight magnitudes; signs apart
    iq1_s, iq1_m      a code of 11 bits names eight of -1, 0, 1, shifted together by +1/8 or -1/8

All are `w = scale * value` with a scale for each sub-block of 16 or 32, so they are decoded as small integers under a
scale: iq1's values are taken eightfold, as 8 t + 1 or 8 t - 1, and its scale by an eighth, which changes no bit. The
_xxs formats and iq2_xs store seven signs of eight; the eighth makes the number of minus signs even. Bit-exact with the
`gguf` package.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.quant.formats.bits import even_signs, lookup, spread, unfold, with_signs
from trustcore.quant.formats.iq_grids import GRIDS
from trustcore.quant.formats.layout import Affine, BlockFormat, Fields, in_order
from trustcore.quant.formats.plain import one_per_block

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _entries(name: str, codes: jax.Array, bits: int, count: int) -> jax.Array:
    """Returns uint8 `[..., rows * count, N]`: the levels in the grid entries that `codes` `[..., rows, N]` name.

    An entry is one 16-bit word, so that there is one gather for four or eight weights; shifts take it apart.
    """
    # Codes cannot leave the table: they have as many bits as it needs.
    words = jnp.asarray(GRIDS[name]).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")
    return spread(words, range(0, bits * count, bits)).astype(jnp.uint8) & jnp.uint8((1 << bits) - 1)


def _joined(low: jax.Array, high: jax.Array) -> jax.Array:
    """Codes of more than eight bits from their low bytes and their upper bits."""
    return low.astype(jnp.uint16) | high.astype(jnp.uint16) << jnp.uint16(8)


def _bits(words: jax.Array, shifts: Sequence[int], bits: int) -> jax.Array:
    """Returns uint8 `[..., rows * len(shifts), N]`: the `bits` bits of each word from each of `shifts` on."""
    return spread(words, shifts).astype(jnp.uint8) & jnp.uint8((1 << bits) - 1)


def _scaled(fields: Fields, codes: jax.Array) -> jax.Array:
    """The block's scale times a number for each sub-block."""
    return one_per_block("scale")(fields) * codes


# ---- four bits -------------------------------------------------------------------------------------------------------


def _iq4_codes(fields: Fields) -> jax.Array:
    return lookup(unfold(fields["codes"], 4, chunk=16), IQ4_VALUES)


def _iq4_xs_scale(fields: Fields) -> jax.Array:
    low, high = unfold(fields["scales"], 4), _bits(fields["high"][..., None, :], range(0, 16, 2), 2)
    codes = (low | high << jnp.uint8(4)).astype(jnp.int8) - jnp.int8(32)
    return _scaled(fields, codes.astype(jnp.float32))


# ---- three bits ------------------------------------------------------------------------------------------------------


def _iq3_xxs_codes(fields: Fields) -> jax.Array:
    levels = _entries("iq3_xxs", fields["codes"], 3, 4)
    # 4, 12, 20, 28, 36, 44, 52, and 62
    magnitudes = jnp.uint8(4) + (levels << jnp.uint8(3)) + (((levels + jnp.uint8(1)) >> jnp.uint8(3)) << jnp.uint8(1))
    return with_signs(magnitudes.astype(jnp.int8), even_signs(_bits(fields["signs"], (0, 7, 14, 21), 7)))


def _iq3_xxs_scale(fields: Fields) -> jax.Array:
    return _scaled(fields, (0.5 + _bits(fields["signs"], (28,), 4).astype(jnp.float32)) * 0.5)


def _iq3_s_codes(fields: Fields) -> jax.Array:
    levels = _entries("iq3_s", _joined(fields["codes"], unfold(fields["high"], 1)), 3, 4)
    magnitudes = (levels << jnp.uint8(1)) + jnp.uint8(1)  # 1, 3, ... 15
    return with_signs(magnitudes.astype(jnp.int8), fields["signs"])


def _iq3_s_scale(fields: Fields) -> jax.Array:
    return _scaled(fields, 1.0 + 2.0 * unfold(fields["scales"], 4).astype(jnp.float32))


# ---- two bits --------------------------------------------------------------------------------------------------------


def _iq2_magnitudes(levels: jax.Array) -> jax.Array:
    """8, 25 and 43 for the levels 0, 1 and 2."""
    return (jnp.uint8(8) + jnp.uint8(17) * levels + (levels >> jnp.uint8(1))).astype(jnp.int8)


def _iq2_xxs_words(fields: Fields) -> tuple[jax.Array, jax.Array]:
    """Returns, for each 32 weights, the word of four codes and the word of four times seven signs under a scale."""
    words = fields["codes"]  # [..., 16, N]
    words = words.reshape(*words.shape[:-2], 8, 2, words.shape[-1])
    return words[..., 0, :], words[..., 1, :]


def _iq2_xxs_codes(fields: Fields) -> jax.Array:
    codes, signs = _iq2_xxs_words(fields)
    levels = _entries("iq2_xxs", unfold(codes, 8), 2, 8)
    return with_signs(_iq2_magnitudes(levels), even_signs(_bits(signs, (0, 7, 14, 21), 7)))


def _iq2_xxs_scale(fields: Fields) -> jax.Array:
    return _quarters(fields, _bits(_iq2_xxs_words(fields)[1], (28,), 4))


def _quarters(fields: Fields, codes: jax.Array) -> jax.Array:
    return _scaled(fields, (0.5 + codes.astype(jnp.float32)) * 0.25)


def _iq2_xs_codes(fields: Fields) -> jax.Array:
    codes = fields["codes"]
    levels = _entries("iq2_xs", codes & jnp.uint16(511), 2, 8)
    return with_signs(_iq2_magnitudes(levels), even_signs((codes >> jnp.uint16(9)).astype(jnp.uint8)))


def _iq2_s_codes(fields: Fields) -> jax.Array:
    levels = _entries("iq2_s", _joined(fields["codes"], unfold(fields["high"], 2)), 2, 8)
    return with_signs(_iq2_magnitudes(levels), fields["signs"])


def _iq2_nibble_scale(fields: Fields) -> jax.Array:
    return _quarters(fields, unfold(fields["scales"], 4))


# ---- one bit ---------------------------------------------------------------------------------------------------------


def _iq1_codes(codes: jax.Array, minus: jax.Array) -> jax.Array:
    """Returns int8 8 t + 1, or 8 t - 1 where `minus`, which has a row for each row of codes or each four of them."""
    levels = _entries("iq1", codes, 2, 8)  # t + 1
    *lead, rows, n = levels.shape
    by = jnp.where(minus, jnp.int8(-9), jnp.int8(-7))[..., None, :]
    shifted = (levels << jnp.uint8(3)).astype(jnp.int8).reshape(*lead, minus.shape[-2], -1, n) + by
    return shifted.reshape(*lead, rows, n)


def _iq1_s_codes(fields: Fields) -> jax.Array:
    high = fields["high"]
    return _iq1_codes(_joined(fields["codes"], _bits(high, (0, 3, 6, 9), 3)), high >= jnp.uint16(1 << 15))


def _iq1_s_scale(fields: Fields) -> jax.Array:
    return _scaled(fields, (1.0 + 2.0 * _bits(fields["high"], (12,), 3).astype(jnp.float32)) * 0.125)


def _iq1_m_codes(fields: Fields) -> jax.Array:
    high = unfold(fields["high"], 4)
    return _iq1_codes(_joined(fields["codes"], high & jnp.uint8(7)), high >= jnp.uint8(8))


def _iq1_m_scale(fields: Fields) -> jax.Array:
    """The block's half-precision scale is spread over the upper four bits of the four words of 3-bit scales."""
    words = fields["scales"]  # [..., 4, N]
    tops = words & jnp.uint16(0xF000)
    parts = [tops[..., i, :] >> jnp.uint16(12 - 4 * i) for i in range(4)]
    block = jax.lax.bitcast_convert_type(parts[0] | parts[1] | parts[2] | parts[3], jnp.float16).astype(jnp.float32)
    codes = _bits(words, (0, 3, 6, 9), 3).astype(jnp.float32)
    return block[..., None, :] * ((1.0 + 2.0 * codes) * 0.125)


_SCALE = ("scale", np.float16, None)


def _iq(name: str, parts: Sequence[tuple[str, type, int | None]], affine: Affine) -> BlockFormat:
    return BlockFormat.of_affine(name, 256, in_order(*parts), affine)


IQ: tuple[BlockFormat, ...] = (
    BlockFormat.of_affine(
        "iq4_nl", 32, in_order(_SCALE, ("codes", np.uint8, 16)), Affine(_iq4_codes, one_per_block("scale"))
    ),
    _iq(
        "iq4_xs",
        (_SCALE, ("high", np.uint16, None), ("scales", np.uint8, 4), ("codes", np.uint8, 128)),
        Affine(_iq4_codes, _iq4_xs_scale),
    ),
    _iq(
        "iq3_xxs",
        (_SCALE, ("codes", np.uint8, 64), ("signs", np.uint32, 8)),
        Affine(_iq3_xxs_codes, _iq3_xxs_scale),
    ),
    _iq(
        "iq3_s",
        (_SCALE, ("codes", np.uint8, 64), ("high", np.uint8, 8), ("signs", np.uint8, 32), ("scales", np.uint8, 4)),
        Affine(_iq3_s_codes, _iq3_s_scale),
    ),
    _iq("iq2_xxs", (_SCALE, ("codes", np.uint32, 16)), Affine(_iq2_xxs_codes, _iq2_xxs_scale)),
    _iq(
        "iq2_xs",
        (_SCALE, ("codes", np.uint16, 32), ("scales", np.uint8, 8)),
        Affine(_iq2_xs_codes, _iq2_nibble_scale),
    ),
    _iq(
        "iq2_s",
        (_SCALE, ("codes", np.uint8, 32), ("signs", np.uint8, 32), ("high", np.uint8, 8), ("scales", np.uint8, 8)),
        Affine(_iq2_s_codes, _iq2_nibble_scale),
    ),
    _iq("iq1_s", (_SCALE, ("codes", np.uint8, 32), ("high", np.uint16, 8)), Affine(_iq1_s_codes, _iq1_s_scale)),
    _iq(
        "iq1_m",
        (("codes", np.uint8, 32), ("high", np.uint8, 16), ("scales", np.uint16, 4)),
        Affine(_iq1_m_codes, _iq1_m_scale),
    ),
)
