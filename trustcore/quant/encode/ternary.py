"""Encoders of GGUF's ternary formats: `w = scale * t`, t in -1, 0, 1, in blocks of 256.

The search finds a threshold and with it the scale: weights below half the scale become 0, and the scale is the mean
of the others' magnitudes. Without it the scale is the largest magnitude, as BitNet's own weights want it, which have
no other; the search ends at the same scale for them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.quant.encode.encoder import Encoded, Encoder, fold
from trustcore.quant.encode.search import HALF_MAX, Grid, Grids, half, inverse, power_of_two, search_symmetric, whole

# By how much the largest magnitude exceeds the scale. 256 gaussian weights: about 2.3; a heavy tail: 8 and more.
_PLACES = tuple(np.geomspace(1, 16, 14))
_GRIDS = Grids(Grid((1.0,)), Grid(_PLACES, 2), Grid(_PLACES, 3))
_nearest = whole(-1, 1)


def _codes(x: jax.Array, weight: jax.Array | None, search: bool) -> tuple[jax.Array, jax.Array]:
    """Returns uint8 t + 1 `[256, M]` and float16 scales `[M]`."""
    unit = power_of_two(x)
    x = x / unit[None]
    scale = half(search_symmetric(x, weight, _nearest, _GRIDS.choose(weight, search)) * unit)
    return (_nearest(x * inverse(scale / unit)[None]) + 1).astype(jnp.uint8), scale.astype(jnp.float16)


def _fractions(digits: jax.Array, rows: int) -> jax.Array:
    """Returns uint8 `[rows, M]`: digits `[5 * rows or 4 * rows, M]` of base 3, all first digits first.

    A byte is the fraction `0.d0 d1 d2 d3 d4` in units of 1/256, rounded up: the oracle takes digits out of it by
    multiplication alone.
    """
    digits = digits.astype(jnp.uint16).reshape(-1, rows, digits.shape[-1])
    number = jnp.zeros_like(digits[0])
    for i in range(5):
        number = number * jnp.uint16(3)
        number = number + digits[i] if i < len(digits) else number
    # ceil(number * 256 / 243): 3508 / 2**16 for 13 / 243 gives the same for all 243 numbers.
    beyond = (number.astype(jnp.uint32) * jnp.uint32(3508) + jnp.uint32(65535)) >> jnp.uint32(16)
    return (number + beyond.astype(jnp.uint16)).astype(jnp.uint8)


def _tq1_0(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
    codes, scale = _codes(x, weight, search)
    first, second, last = _fractions(codes[:160], 32), _fractions(codes[160:240], 16), _fractions(codes[240:], 4)
    return {"codes": jnp.concatenate([first, second], axis=0), "high": last, "scale": scale}


def _tq2_0(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
    codes, scale = _codes(x, weight, search)
    return {"codes": fold(codes, 2, chunk=32), "scale": scale}


TERNARY: dict[str, Encoder] = {
    "tq1_0": Encoder(_tq1_0, HALF_MAX, _GRIDS.tried),
    "tq2_0": Encoder(_tq2_0, HALF_MAX, _GRIDS.tried),
}
