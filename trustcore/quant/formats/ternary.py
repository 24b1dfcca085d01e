"""GGUF's ternary formats: `w = scale * t`, t in -1, 0, 1, in blocks of 256 (TriLMs, BitNet b1.58).

    tq2_0   a code t + 1 in two bits
    tq1_0   five digits of base 3 in a byte: 48 bytes of five, 4 bytes of four

A byte of tq1_0 is the fraction `0.d0 d1 d2 d3 d4` in base 3, in units of 1/256 and rounded up: digit i is the whole
part of 3 times the fractional part of `byte * 3**i / 256`, which is one multiplication modulo 256 and one shift. Two
bits of tq2_0 hold 3 as well, which decodes to 2 as in the oracle: the `gguf` package, bit-exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.quant.formats.bits import unfold
from trustcore.quant.formats.layout import Affine, Fields, Format, in_order
from trustcore.quant.formats.plain import one_per_block


def _digits(packed: jax.Array, count: int) -> jax.Array:
    """Returns int8 `[..., count * rows, N]`: the first `count` digits of each byte less one, all first digits first."""
    *lead, rows, n = packed.shape
    powers = np.array([3**i for i in range(count)], np.uint8).reshape(*[1] * len(lead), count, 1, 1)
    fractions = packed.reshape(*lead, 1, rows, n) * jnp.asarray(powers)  # modulo 256
    digits = (fractions.astype(jnp.uint16) * jnp.uint16(3)) >> jnp.uint16(8)
    return digits.astype(jnp.int8).reshape(*lead, count * rows, n) - jnp.int8(1)


def _tq1_codes(fields: Fields) -> jax.Array:
    codes = fields["codes"]
    parts = [_digits(codes[..., :32, :], 5), _digits(codes[..., 32:, :], 5), _digits(fields["high"], 4)]
    return jnp.concatenate(parts, axis=-2)


def _tq2_codes(fields: Fields) -> jax.Array:
    return unfold(fields["codes"], 2, chunk=32).astype(jnp.int8) - jnp.int8(1)


_SCALE = ("scale", np.float16, None)

TERNARY: tuple[Format, ...] = (
    Format.of_affine(
        "tq1_0",
        256,
        in_order(("codes", np.uint8, 48), ("high", np.uint8, 4), _SCALE),
        Affine(_tq1_codes, one_per_block("scale")),
    ),
    Format.of_affine(
        "tq2_0", 256, in_order(("codes", np.uint8, 64), _SCALE), Affine(_tq2_codes, one_per_block("scale"))
    ),
)
