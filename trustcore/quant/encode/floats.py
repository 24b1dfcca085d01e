"""Encoders of numbers that are not evenly spaced: 8-bit floats, MX floats, tables of 16 numbers.

    fp8    w ~ scale * float8               scale = max|w| / the largest float8; a search tries others
    mx     w ~ 2**e * float                 e = floor(log2 max|w|) - emax (OCP Microscaling formats v1.0, section 6.3);
                                            a search tries the neighbouring exponents
    nf4    w ~ scale * table[code]          scale = max|w|, as bitsandbytes has it; a search tries others
    double scale ~ levels[code] * nested + offset       offset the mean; bitsandbytes' table of 256

Rounding to a float of few bits is to nearest, ties to even, on float32 arithmetic that is exact; magnitudes beyond the
largest saturate. Without a search, nf4 and fp4 are bitsandbytes' own codes, double quantization included.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from trustcore.quant.encode.encoder import Encoded, Encoder
from trustcore.quant.encode.integers import planes
from trustcore.quant.encode.search import (
    Grid,
    Reduce,
    inverse,
    plain_reduce,
    power_of_two,
    search_nearest,
    shared_reduce,
    weighted,
)
from trustcore.quant.formats import numbers
from trustcore.quant.formats.names import Storage
from trustcore.quant.formats.scaled import ScaledFormat, nested_grain

_ELEMENTS = {  # by the end of the format's name
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
}
_TABLES = {"nf4": numbers.NF4, "fp4": numbers.FP4}


def float_encoder(storage: Storage) -> Encoder:
    """Returns the encoder of `storage`."""
    spec = storage.format
    assert isinstance(spec, ScaledFormat)
    reduce = plain_reduce if storage.columns == 1 else shared_reduce
    if spec.tabled:
        return Encoder(functools.partial(_tabled, spec, reduce), 1e38)
    if spec.powers:
        return Encoder(functools.partial(_powers, spec), 3.4028235e38)
    return Encoder(functools.partial(_float8, spec, reduce), 1e38)


def round_to_float(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns float32: x rounded to the numbers of a small float dtype, saturated at its largest."""
    info = ml_dtypes.finfo(dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    least = np.float32(info.smallest_normal).view(np.uint32)
    steps = jnp.maximum(bits, jnp.uint32(least)) - jnp.uint32(info.nmant << 23)  # the last digit, as a power of two
    step = jax.lax.bitcast_convert_type(steps, jnp.float32)
    back = jax.lax.bitcast_convert_type(jnp.uint32(254 << 23) - steps, jnp.float32)
    rounded = jnp.round(x * back) * step
    return jnp.clip(rounded, -np.float32(info.max), np.float32(info.max))


def nested_scales(scale: jax.Array) -> Encoded:
    """Returns the fields of scales `[G, N]` that are codes themselves: scale, levels, nested, offset."""
    m, n = scale.shape
    rows, span = nested_grain(m)
    columns = -(-n // span)
    offset = jnp.mean(scale)
    centred = jnp.pad(scale - offset, ((0, 0), (0, columns * span - n)))
    blocks = centred.reshape(rows, m // rows, columns, span)
    nested = jnp.max(jnp.abs(blocks), axis=(1, 3))
    levels = dynamic_map()
    relative = (blocks * inverse(nested)[:, None, :, None]).reshape(m, -1)[:, :n]
    bounds = jnp.asarray((levels[:-1] + levels[1:]) / np.float32(2))
    codes = jnp.searchsorted(bounds, jnp.clip(relative, -1, 1)).astype(jnp.uint8)
    return {
        "scale": codes,
        "levels": jnp.asarray(levels)[:, None],
        "nested": nested,
        "offset": offset.reshape(1, 1),
    }


@functools.cache
def dynamic_map() -> np.ndarray:
    """Returns float32 `[256]`, ascending: a sign, an exponent of base 10 in unary, and as many fraction bits as remain.

    Dynamic quantization (arXiv 1511.04561; arXiv 2110.02861, section 2.2): 2**i means of equal parts of [0.1, 1] under
    10**(i - 6) for i from 0 to 6, of both signs, and 0 and 1. The parts' edges are rounded as bitsandbytes' are:
    counted from the nearer end, in steps of a float32.
    """
    values = [0.0, 1.0]
    for i in range(7):
        places, first = np.arange(2**i + 1), np.float32(0.1)
        step = np.float64((np.float32(1) - first) / np.float32(2**i))
        edges = np.where(places <= 2**i // 2, first + step * places, 1 - step * (2**i - places)).astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        values += [*means, *-means]
    return np.sort(np.array(values, np.float32))


def _element(spec: ScaledFormat) -> np.dtype:
    return np.dtype(_ELEMENTS[spec.name.rsplit("_", 1)[1]])


def _float8(spec: ScaledFormat, reduce: Reduce, x: jax.Array, weight: jax.Array | None, tried: bool) -> Encoded:
    dtype = _element(spec)
    largest = float(ml_dtypes.finfo(dtype).max)
    unit = power_of_two(x, reduce)
    x = x / unit[None]
    if tried:
        places = Grid((largest, *(largest * np.geomspace(0.5, 1.1, 12))), 1)
        nearest = functools.partial(round_to_float, dtype=dtype)
        scale = search_nearest(x, weight, nearest, places, reduce=reduce)
    else:
        scale = reduce(jnp.max, jnp.abs(x)) / largest
    stored = scale * unit
    stored = jnp.where(stored < 2.0**-126, 0, stored)
    codes = round_to_float(x * inverse(stored / unit)[None], dtype)
    return {"codes": _bytes(codes, dtype), "scale": stored}


def _powers(spec: ScaledFormat, x: jax.Array, weight: jax.Array | None, tried: bool) -> Encoded:
    """Exponents are kept from 1 up: 2**-127 is no normal float32. At most 253 are reached."""
    dtype = _element(spec)
    emax = int(np.floor(np.log2(float(ml_dtypes.finfo(dtype).max))))
    bits = jax.lax.bitcast_convert_type(jnp.max(jnp.abs(x), axis=0), jnp.uint32)
    shared = jnp.clip((bits >> jnp.uint32(23)).astype(jnp.int32) - emax, 1, 253)

    def codes_under(shared: jax.Array) -> jax.Array:
        inverse = jax.lax.bitcast_convert_type((254 - shared).astype(jnp.uint32) << jnp.uint32(23), jnp.float32)
        return round_to_float(x * inverse[None], dtype)

    if tried:
        # Blocks of size about one: squares of large numbers would overflow.
        unit = power_of_two(x)
        small = x / unit[None]
        best = (jnp.full(shared.shape, jnp.inf, jnp.float32), shared)
        for step in (0, -1, 1):
            here = jnp.clip(shared + step, 1, 253)
            decoded = codes_under(here) * numbers.power_of_two(here.astype(jnp.uint8))[None] / unit[None]
            error = jnp.sum(weighted(weight, (small - decoded) ** 2), axis=0)
            better = error < best[0]
            best = (jnp.where(better, error, best[0]), jnp.where(better, here, best[1]))
        shared = best[1]
    values = codes_under(shared)
    scale = shared.astype(jnp.uint8)
    if spec.bits == 8:
        return {"codes": _bytes(values, dtype), "scale": scale}
    return {**planes(spec, _six_bits(values, dtype)), "scale": scale}


def _bytes(values: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns float8 numbers as bytes: XLA's CPU compiler writes float8 into an array at 4 M a second, bytes at 200."""
    return jax.lax.bitcast_convert_type(values.astype(dtype), jnp.uint8)


def _six_bits(values: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns the codes of numbers of a 6-bit float: sign, exponent, mantissa."""
    info = ml_dtypes.finfo(dtype)
    mantissa = info.nmant
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    magnitude = jnp.abs(values)
    first = int(np.log2(float(info.smallest_normal)))  # the exponent whose field is 1
    normal = ((bits & jnp.uint32(0x7FFFFFFF)) >> jnp.uint32(23 - mantissa)) - jnp.uint32((127 + first - 1) << mantissa)
    subnormal = (magnitude * np.float32(2.0 ** (mantissa - first))).astype(jnp.uint32)
    code = jnp.where(magnitude < np.float32(info.smallest_normal), subnormal, normal)
    return (code | bits >> jnp.uint32(31) << jnp.uint32(5)).astype(jnp.uint8)


def _tabled(spec: ScaledFormat, reduce: Reduce, x: jax.Array, weight: jax.Array | None, tried: bool) -> Encoded:
    table = np.array(_TABLES[spec.name], np.float32)
    unit = power_of_two(x, reduce)
    if tried:
        places = Grid((1.0, *np.linspace(0.85, 1.25, 9)), 1)
        nearest = functools.partial(_nearest_of, table)
        scale = search_nearest(x / unit[None], weight, nearest, places, reduce=reduce) * unit
    else:
        scale = reduce(jnp.max, jnp.abs(x))
    scale = jnp.where(scale < 2.0**-126, 0, scale)
    return {**planes(spec, table_codes(spec, x, scale)), "scale": scale}


def table_codes(spec: ScaledFormat, x: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns the codes of the nearest entries, uint8 as x; of two that are equally near, the smaller."""
    table = np.array(_TABLES[spec.name], np.float32)
    order = np.argsort(table, kind="stable")
    y = jnp.clip(x * inverse(scale)[None], -1, 1)
    code = jnp.full(x.shape, order[0], jnp.uint8)
    for bound, entry in zip(_bounds(table[order]), order[1:], strict=True):
        code = jnp.where(y > bound, jnp.uint8(entry), code)
    return code


def _nearest_of(table: np.ndarray, y: jax.Array) -> jax.Array:
    table = np.sort(table)
    value = jnp.full_like(y, table[0])
    for bound, entry in zip(_bounds(table), table[1:], strict=True):
        value = jnp.where(y > bound, entry, value)
    return value


def _bounds(table: np.ndarray) -> np.ndarray:
    return (table[:-1] + table[1:]) / np.float32(2)
