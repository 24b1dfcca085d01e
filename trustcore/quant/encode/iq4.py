"""Encoders of GGUF's 4-bit formats with unevenly spaced values: IQ4_NL and IQ4_XS.

    iq4_nl   w = scale * value[code]          blocks of 32
    iq4_xs   w = scale * s * value[code]      sub-blocks of 32, s from -32 to 31, blocks of 256

The values lie closer together around zero, where most weights do, and are not symmetric: -127 on one side, 113 on the
other. A scale of either sign turns them to the side that suits the block.
"""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.quant.encode.encoder import Encoded, Encoder, fold
from trustcore.quant.encode.k_quants import halves, joined, symmetric_under_scales
from trustcore.quant.encode.search import HALF_MAX, Grid, Grids, half, inverse, power_of_two, search_symmetric
from trustcore.quant.formats.iq import IQ4_VALUES

_MIDDLES = tuple((a + b) / 2 for a, b in pairwise(IQ4_VALUES))


def _nearest(x: jax.Array) -> jax.Array:
    """Returns the value nearest to x. A sum of steps: it vectorizes where a look-up would take one at a time."""
    steps = zip(_MIDDLES, np.diff(IQ4_VALUES), strict=True)
    return sum((jnp.where(x > middle, jnp.float32(step), 0.0) for middle, step in steps), jnp.float32(IQ4_VALUES[0]))


def _index(value: jax.Array) -> jax.Array:
    """Returns uint8: which of the values each is."""
    return sum(((value > middle).astype(jnp.uint8) for middle in _MIDDLES), jnp.uint8(0))


# Where the weight of largest magnitude lands among the values, both ways round. With an importance, which may care
# little for the largest, it is clipped more strongly.
_EVEN = Grid((*-np.linspace(104, 142, 6), *np.linspace(92, 126, 6)), 1)
_UNEVEN = Grid((*-np.linspace(76, 148, 14), *np.linspace(68, 132, 14)), 1)
_GRIDS = Grids(Grid((-127.0,)), _EVEN, _UNEVEN)


def _iq4_nl(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
    unit = power_of_two(x)
    x = x / unit[None]
    scale = half(search_symmetric(x, weight, _nearest, _GRIDS.choose(weight, search)) * unit)
    codes = _index(_nearest(x * inverse(scale / unit)[None]))
    return {"scale": scale.astype(jnp.float16), "codes": fold(codes, 4, chunk=16)}


def _iq4_xs(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
    values, s, scale = symmetric_under_scales(x, weight, search, sub=32, nearest=_nearest, grids=_GRIDS, top=32)
    s = (s + 32).astype(jnp.uint8)
    pairs = (s >> jnp.uint8(4)).astype(jnp.uint16) << jnp.arange(0, 16, 2, dtype=jnp.uint16)[:, None]
    return {
        **halves(scale=scale),
        "high": jnp.sum(pairs, axis=0, dtype=jnp.uint16),
        "scales": fold(s & jnp.uint8(15), 4),
        "codes": fold(joined(_index(values)), 4, chunk=16),
    }


IQ4: dict[str, Encoder] = {
    "iq4_nl": Encoder(_iq4_nl, 113 * HALF_MAX),
    "iq4_xs": Encoder(_iq4_xs, 28 * 113 * HALF_MAX),
}
