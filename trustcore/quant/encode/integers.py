"""Encoders of integers under scales of any granularity, symmetric and with a zero point.

    symmetric   w ~ scale * q              -2**(b-1) <= q < 2**(b-1)       int8: from -127
    zero point  w ~ scale * (c - z)        0 <= c, z < 2**b                z a whole code: zero is a number of the grid
    int1        w ~ scale * sign(w)        scale the mean of |w|, which is the best (XNOR-Net, arXiv 1603.05279, eq. 6)
    ternary     w ~ scale * t              t in -1, 0, 1

Without a search these are the textbook's: scale = max|w| / (2**(b-1) - 1), or (max - min) / (2**b - 1) with zero within
the range; ternary: the mean of |w|, as BitNet b1.58 rounds (arXiv 2402.17764, eq. 1-3). A search tries clipped ranges,
both signs of the scale, and thresholds, and fits the scale by least squares. Codes are nearest to the weights under the
scale as it is stored.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from trustcore._jax import computed_once
from trustcore.quant.encode.encoder import Encoded, Encoder, fold
from trustcore.quant.encode.search import (
    HALF_MAX,
    Grid,
    Reduce,
    half,
    inverse,
    plain_reduce,
    power_of_two,
    search,
    search_nearest,
    shared_reduce,
    weighted,
    whole,
)
from trustcore.quant.formats.names import Storage
from trustcore.quant.formats.scaled import Plane, ScaledFormat

_SMALLEST = 2.0**-126  # of float32's normal numbers: XLA takes smaller ones for zero on the CPU


def integer_encoder(storage: Storage, run: int) -> Encoder:
    """Returns the encoder of `storage` for runs of `run` rows."""
    spec = storage.format
    assert isinstance(spec, ScaledFormat)
    reduce = plain_reduce if storage.columns == 1 else shared_reduce
    in_half = storage.scale_dtype == np.float16
    stored = half if in_half else _normal
    if storage.asymmetric:
        encode = functools.partial(_with_zero, spec, run, reduce, stored)
        reach = (1 << spec.bits) - 1.0
    elif spec.name == "int1":
        encode, reach = functools.partial(_binary, spec, reduce, stored), 1.0
    elif spec.name == "ternary":
        encode, reach = functools.partial(_ternary, spec, reduce, stored), 1.0
    else:
        encode = functools.partial(_symmetric, spec, run, reduce, stored)
        reach = (1 << (spec.bits - 1)) - 1.0
    return Encoder(encode, reach * HALF_MAX if in_half else 1e38)


def planes(spec: ScaledFormat, codes: jax.Array) -> Encoded:
    """Returns the fields of unsigned codes `[rows, ...]`, whole bytes of `spec.bits` bits or fewer."""
    codes, below, fields = codes.astype(jnp.uint8), 0, {}
    for plane in spec.planes:
        part = codes >> jnp.uint8(below) & jnp.uint8((1 << plane.bits) - 1)
        fields[plane.name] = _folded(part, plane)
        below += plane.bits
    return fields


def _folded(part: jax.Array, plane: Plane) -> jax.Array:
    flat = part.reshape(part.shape[0], -1)
    return fold(flat, plane.bits).reshape(-1, *part.shape[1:])


def _normal(scale: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(scale) < _SMALLEST, 0, scale)


def _symmetric(
    spec: ScaledFormat, run: int, reduce: Reduce, stored: object, x: jax.Array, weight: jax.Array | None, tried: bool
) -> Encoded:
    high = (1 << (spec.bits - 1)) - 1
    low = -high - 1 if spec.bits < 8 else -high
    unit = power_of_two(x, reduce)
    x = x / unit[None]
    if tried:
        nearest = functools.partial(_clipped, low, high)
        scale = search_nearest(x, weight, nearest, _places(spec.bits, run, weight is None), signed=True, reduce=reduce)
    else:
        scale = reduce(jnp.max, jnp.abs(x)) / high
    scale = stored(scale * unit)  # type: ignore[operator]
    codes = whole(low, high)(x * inverse(scale / unit)[None])
    if spec.bits == 8:
        return {"codes": codes.astype(jnp.int8), "scale": scale}
    return {**planes(spec, codes - low), "scale": scale}


def _clipped(low: int, high: int, y: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(y), low, high)


def _places(bits: int, run: int, even: bool) -> Grid:
    """Where the weight of largest magnitude lands: the more weights share a scale, the further out of reach.

    Of n normal numbers the largest is about sqrt(2 log n) deviations off, and codes of b bits fit best if they reach to
    about 1.1 * sqrt(b) of them, give or take; heavier tails want more.
    """
    reach = 1 << (bits - 1)
    outlier = np.sqrt(2 * np.log(max(run, 2)))
    most = max(1.15, 1.5 * outlier / (1.25 * bits) + 0.25)
    if bits > 6:
        return Grid((float(reach - 1), *map(float, (reach - 1) * np.linspace(0.97, most, 5))), 1)
    count = 12 if even else 16
    negative = -reach * np.geomspace(0.8, most, count)
    positive = () if even and bits > 3 else reach * np.geomspace(0.7, most, count)
    return Grid((float(reach - 1), *map(float, negative), *map(float, positive)), 1)


def _binary(
    spec: ScaledFormat, reduce: Reduce, stored: object, x: jax.Array, weight: jax.Array | None, tried: bool
) -> Encoded:
    unit = power_of_two(x, reduce)
    scale = stored(_mean_size(x / unit[None], weight, reduce) * unit)  # type: ignore[operator]
    return {**planes(spec, x >= 0), "scale": scale}


def _mean_size(x: jax.Array, weight: jax.Array | None, reduce: Reduce) -> jax.Array:
    """Returns the weighted mean of |x| in each block."""
    return reduce(jnp.sum, weighted(weight, jnp.abs(x))) / reduce(jnp.sum, weighted(weight, jnp.ones_like(x)))


def _ternary(
    spec: ScaledFormat, reduce: Reduce, stored: object, x: jax.Array, weight: jax.Array | None, tried: bool
) -> Encoded:
    unit = power_of_two(x, reduce)
    x = x / unit[None]
    mean = _mean_size(x, weight, reduce)
    if tried:

        def fit(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
            product = reduce(jnp.sum, weighted(weight, x * codes))
            scale = product * inverse(reduce(jnp.sum, weighted(weight, codes * codes)))
            return -product * scale, scale

        def place(threshold: jax.Array) -> jax.Array:
            return jnp.where(jnp.abs(x) > (threshold[0] * mean)[None], jnp.sign(x), 0)

        def again(scale: jax.Array) -> jax.Array:
            return whole(-1, 1)(x * inverse(scale)[None])

        thresholds = Grid(tuple(np.linspace(0, 2.2, 12)), 2)
        mean = search(thresholds, place, fit, again, (jnp.zeros_like(mean), jnp.zeros_like(mean)))[1]
    scale = stored(mean * unit)  # type: ignore[operator]
    return {**planes(spec, whole(-1, 1)(x * inverse(scale / unit)[None]) + 1), "scale": scale}


def _with_zero(
    spec: ScaledFormat, run: int, reduce: Reduce, stored: object, x: jax.Array, weight: jax.Array | None, tried: bool
) -> Encoded:
    levels = (1 << spec.bits) - 1
    unit = power_of_two(x, reduce)
    x = x / unit[None]
    smallest = jnp.minimum(reduce(jnp.min, x), 0)
    largest = jnp.maximum(reduce(jnp.max, x), 0)
    if tried:
        scale, zero = _search_zero(x, weight, smallest, largest, levels, _cuts(spec.bits, run), reduce)
    else:
        scale = (largest - smallest) / levels
        zero = jnp.round(-smallest * inverse(scale))
    scale, zero = computed_once(jnp.stack([stored(scale * unit), zero]))  # type: ignore[operator]
    codes = _codes_about(x, scale / unit, zero, levels) + zero[None]
    if spec.bits == 8:  # signed
        return {"codes": (codes - 128).astype(jnp.int8), "scale": scale, "zero": (zero - 128).astype(jnp.int8)}
    return {**planes(spec, codes), "scale": scale, "zero": zero.astype(jnp.uint8)}


def _codes_about(x: jax.Array, scale: jax.Array, zero: jax.Array, levels: int) -> jax.Array:
    """Returns the nearest codes less the zero point; the zero point's own code where the scale is 0."""
    return jnp.clip(jnp.round(x * inverse(scale)[None]), -zero[None], levels - zero[None])


def _search_zero(
    x: jax.Array,
    weight: jax.Array | None,
    smallest: jax.Array,
    largest: jax.Array,
    levels: int,
    grid: Grid,
    reduce: Reduce,
) -> tuple[jax.Array, jax.Array]:
    """Returns the scale of each block and its zero point, a whole code as float32.

    Candidates are parts of the range: (of the negative side, of the positive side). Each rounds its zero point; the
    scale is then fitted to the codes.
    """

    def fit(placed: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        codes, zero = placed
        product = reduce(jnp.sum, weighted(weight, x * codes))
        scale = product * inverse(reduce(jnp.sum, weighted(weight, codes * codes)))
        return jnp.where(scale > 0, -product * scale, jnp.inf), scale, zero

    def place(candidate: jax.Array) -> tuple[jax.Array, jax.Array]:
        low, high = candidate[0] * smallest, candidate[1] * largest
        scale = (high - low) / levels
        scale, zero = computed_once(jnp.stack([scale, jnp.round(-low * inverse(scale))]))
        return _codes_about(x, scale, zero, levels), zero

    def again(scale: jax.Array, zero: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _codes_about(x, scale, zero, levels), zero

    nothing = jnp.zeros_like(smallest)
    return search(grid, place, fit, again, (nothing, nothing, nothing))[1:]  # type: ignore[return-value]


def _cuts(bits: int, run: int) -> Grid:
    """Parts of the range's sides that a search tries: fewer codes and more weights call for stronger clipping."""
    if bits >= 7:
        parts: np.ndarray = np.array([0.9, 1.0])
    else:
        least = max(0.2, 1 - (0.09 * np.log2(max(run, 2)) + 0.1) * (3.2 / bits) * 0.5)
        parts = np.linspace(least, 1.05, 5)
    return Grid(((1.0, 1.0), *((float(a), float(b)) for a in parts for b in parts)), 1)
