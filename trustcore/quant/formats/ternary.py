"""GGUF's ternary formats: `w = scale * t`, t in -1, 0, 1, in blocks of 256 (TriLMs, BitNet b1.58).

    tq2_0   a code t + 1 in two bits
    tq1_0   five digits of base 3 in a byte: 48 bytes of five, 4 bytes of four

A byte of tq1_0 is the fraction `0.d0 d1 d2 d3 d4` in base 3, in units of 1/256 and rounded up: digit i is the whole
part of 3 times the fractional part of `byte * 3**i / 256`, that is how many of 1/3 and 2/3 the fraction has reached.
Two bits of tq2_0 hold 3 as well, which decodes to 2 as in the oracle: the `gguf` package, bit-exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.quant.formats.bits import unfold
from trustcore.quant.formats.layout import Affine, BlockFormat, Fields, in_order
from trustcore.quant.formats.plain import one_per_block


def _digits(packed: jax.Array, count: int) -> jax.Array:
    """Returns int8 `[..., count * rows, N]`: the first `count` digits of each byte less one, all first digits first."""
    *lead, rows, n = packed.shape
    powers = np.array([3**i for i in range(count)], np.uint8).reshape(*[1] * len(lead), count, 1, 1)
    fractions = packed.reshape(*lead, 1, rows, n) * jnp.asarray(powers)  # modulo 256
    digits = (fractions >= jnp.uint8(86)).astype(jnp.int8) + (fractions >= jnp.uint8(171)).astype(jnp.int8)
    return digits.reshape(*lead, count * rows, n) - jnp.int8(1)


def _tq1_codes(fields: Fields) -> jax.Array:
    codes = fields["codes"]
    parts = [_digits(codes[..., :32, :], 5), _digits(codes[..., 32:, :], 5), _digits(fields["high"], 4)]
    # Written in place, not concatenated: jax 0.10's CPU compiler does not vectorize a concatenation of computed parts
    # (1.0 against 11.7 G weights/s in the streamed product, one core, 2026-11).
    joined, start = jnp.zeros((*codes.shape[:-2], 256, codes.shape[-1]), jnp.int8), 0
    for part in parts:
        joined = jax.lax.dynamic_update_slice_in_dim(joined, part, start, joined.ndim - 2)
        start += part.shape[-2]
    return joined


def _tq2_codes(fields: Fields) -> jax.Array:
    return unfold(fields["codes"], 2, chunk=32).astype(jnp.int8) - jnp.int8(1)


_SCALE = ("scale", np.float16, None)

TERNARY: tuple[BlockFormat, ...] = (
    BlockFormat.of_affine(
        "tq1_0",
        256,
        in_order(("codes", np.uint8, 48), ("high", np.uint8, 4), _SCALE),
        Affine(_tq1_codes, one_per_block("scale")),
    ),
    BlockFormat.of_affine(
        "tq2_0", 256, in_order(("codes", np.uint8, 64), _SCALE), Affine(_tq2_codes, one_per_block("scale"))
    ),
)
