"""Encoders of the K-quants: blocks of 256 weights in sub-blocks, whose scales are codes under a scale of the block.

    affine      w = scale * s * code - minimum * m      q2_k, q4_k, q5_k
    symmetric   w = scale * s * code                    q3_k, q6_k

Four steps, each judged by the squared error of the decoded weights:

1. A scale (and shift) for each sub-block by itself.
2. The scale of the block under which rounding those to s and m costs least.
3. For each sub-block, s and its neighbours with the m that fits each best.
4. Least squares for scale and minimum of the whole block with all s, m and codes given; kept where it is better.

All sub-blocks of a block must shift the same way, for `minimum` has one sign. That is down, as in every block with a
weight below zero; a block of positive weights alone gets a negative minimum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.quant.encode.encoder import Encoded, Encoder, fold
from trustcore.quant.encode.search import (
    HALF_MAX,
    Grids,
    Nearest,
    affine_codes,
    affine_grids,
    better,
    count_of,
    half,
    inverse,
    power_of_two,
    search_affine,
    search_symmetric,
    symmetric_grids,
    total,
    whole,
)

BLOCK = 256
_NEIGHBOURS = (-1.0, 0.0, 1.0)


# ---- w = scale * s * code - minimum * m ------------------------------------------------------------------------------


def _affine(
    x: jax.Array, weight: jax.Array | None, search: bool, *, sub: int, levels: int, top: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns codes `[sub, subs, M]`, s and m `[subs, M]`, scale and minimum `[1, M]`.

    Args:
        x: `[256, M]`.
        weight: as in `Encoder`.
        search: as in `Encoder`.
        sub: weights in a sub-block.
        levels: the largest code.
        top: the largest s and m.
    """
    unit = power_of_two(x)[None]  # [1, M]
    side = jnp.where(jnp.min(x, axis=0, keepdims=True) >= 0, 1.0, -1.0)  # the sign of -minimum
    x, weight = _parted(x / unit, sub), None if weight is None else _parted(weight, sub)
    count = count_of(weight, x)
    sum_x = total(weight, x)

    def stored(scale: jax.Array) -> jax.Array:
        return half(scale * unit) / unit

    def codes_under(scale: jax.Array, s: jax.Array, minimum: jax.Array, m: jax.Array) -> jax.Array:
        return affine_codes(x, scale * s, -minimum * m, levels)

    def error(codes: jax.Array, scale: jax.Array, s: jax.Array, minimum: jax.Array, m: jax.Array) -> jax.Array:
        return total(weight, (x - (scale * s)[None] * codes + (minimum * m)[None]) ** 2)

    scales, shifts = search_affine(x, weight, levels, affine_grids(levels).choose(weight, search), side=side)
    codes = affine_codes(x, scales, shifts, levels)
    scale = stored(_scale_of_scales(scales, total(weight, codes * codes), 0, top))
    minimum = -side * stored(_scale_of_scales(jnp.abs(shifts), count, 0, top))
    s, m = _nearest(scales, scale, 0, top), _nearest(-shifts, minimum, 0, top)

    def neighbour(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        near = jnp.clip(s + jnp.asarray(_NEIGHBOURS)[i], 0, top)
        shift = m
        for _ in range(2):  # the m that fits the codes, the codes that fit the m
            codes = codes_under(scale, near, minimum, shift)
            shift = _nearest((scale * near * total(weight, codes) - sum_x) / count, minimum, 0, top)
        return better(best, (error(codes_under(scale, near, minimum, shift), scale, near, minimum, shift), near, shift))

    start = (error(codes_under(scale, s, minimum, m), scale, s, minimum, m), s, m)
    before, s, m = jax.lax.fori_loop(0, len(_NEIGHBOURS), neighbour, start)

    # Least squares for x ~ scale * (s codes) - minimum * m, over the block.
    codes = codes_under(scale, s, minimum, m)
    aa, ab, bb = (
        _over_subs(v) for v in (s * s * total(weight, codes * codes), s * m * total(weight, codes), m * m * count)
    )
    ax, bx = _over_subs(s * total(weight, x * codes)), _over_subs(m * sum_x)
    determinant = aa * bb - ab * ab
    solvable = inverse(jnp.where(determinant > 1e-6 * aa * bb, determinant, 0))
    found = ((ax * bb - ab * bx) * solvable, (ab * ax - aa * bx) * solvable)
    found = tuple(stored(v) for v in found)
    after = error(codes_under(found[0], s, found[1], m), found[0], s, found[1], m)
    take = (_over_subs(after) < _over_subs(before)) & (found[0] > 0)
    scale, minimum = jnp.where(take, found[0], scale), jnp.where(take, found[1], minimum)
    return codes_under(scale, s, minimum, m), s, m, scale * unit, minimum * unit


# ---- w = scale * s * code --------------------------------------------------------------------------------------------


def symmetric_under_scales(
    x: jax.Array, weight: jax.Array | None, search: bool, *, sub: int, nearest: Nearest, grids: Grids, top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns codes `[sub, subs, M]` as `nearest` gives them, s `[subs, M]` from -top to top - 1, scale `[1, M]`.

    Args:
        x: `[256, M]`.
        weight: as in `Encoder`.
        search: as in `Encoder`.
        sub: weights in a sub-block.
        nearest: the codes there are.
        grids: what to try for a sub-block.
        top: of the scales.
    """
    unit = power_of_two(x)[None]  # [1, M]
    x, weight = _parted(x / unit, sub), None if weight is None else _parted(weight, sub)

    def stored(scale: jax.Array) -> jax.Array:
        return half(scale * unit) / unit

    def codes_under(scale: jax.Array, s: jax.Array) -> jax.Array:
        return nearest(x * inverse(scale * s)[None])

    def error(scale: jax.Array, s: jax.Array) -> jax.Array:
        return total(weight, (x - (scale * s)[None] * codes_under(scale, s)) ** 2)

    scales = search_symmetric(x, weight, nearest, grids.choose(weight, search))
    codes = nearest(x * inverse(scales)[None])
    scale = stored(_scale_of_scales(scales, total(weight, codes * codes), -top, top - 1))
    s = _nearest(scales, scale, -top, top - 1)

    def neighbour(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        near = jnp.clip(s + jnp.asarray(_NEIGHBOURS)[i], -top, top - 1)
        return better(best, (error(scale, near), near))

    before, s = jax.lax.fori_loop(0, len(_NEIGHBOURS), neighbour, (error(scale, s), s))

    codes = codes_under(scale, s)
    squares = _over_subs(s * s * total(weight, codes * codes))
    found = stored(_over_subs(s * total(weight, x * codes)) * inverse(squares))
    scale = jnp.where(_over_subs(error(found, s)) < _over_subs(before), found, scale)
    return codes_under(scale, s), s, scale * unit


# ---- shared ----------------------------------------------------------------------------------------------------------


def _parted(values: jax.Array, sub: int) -> jax.Array:
    """Returns `[256, M]` as `[sub, subs, M]`: the rows of the sub-blocks first."""
    return values.reshape(-1, sub, values.shape[-1]).swapaxes(0, 1)


def _over_subs(values: jax.Array) -> jax.Array:
    """Returns the sum over the sub-blocks of a block: `[subs, M]` to `[1, M]`."""
    return jnp.sum(values, axis=0, keepdims=True)


def _nearest(values: jax.Array, unit: jax.Array, low: int, high: int) -> jax.Array:
    return jnp.clip(jnp.round(values * inverse(unit)), low, high)


def _scale_of_scales(values: jax.Array, weight: jax.Array, low: int, high: int) -> jax.Array:
    """Returns the unit `[1, M]` whose multiples from low to high come closest to values `[subs, M]`.

    The value of largest magnitude lands on the far end, or up to a quarter short of it: coarser steps may suit the
    others better.
    """
    largest, smallest = jnp.max(values, axis=0, keepdims=True), jnp.min(values, axis=0, keepdims=True)
    extreme = jnp.where(largest >= -smallest, largest, smallest)
    end = float(low or high)  # the side that has one code more
    places = jnp.asarray(np.linspace(end, 0.76 * end, 8), jnp.float32)

    def attempt(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        unit = extreme / places[i]
        error = _over_subs(weight * (values - unit * _nearest(values, unit, low, high)) ** 2)
        return better(best, (error, unit))

    start = (jnp.full_like(extreme, jnp.inf), jnp.zeros_like(extreme))
    return jax.lax.fori_loop(0, len(places), attempt, start)[1]


# ---- formats ---------------------------------------------------------------------------------------------------------


def _q2_k(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
    codes, s, m, scale, minimum = _affine(x, weight, search, sub=16, levels=3, top=15)
    scales = s.astype(jnp.uint8) | m.astype(jnp.uint8) << jnp.uint8(4)
    return {"scales": scales, "codes": fold(joined(codes), 2, chunk=32), **halves(scale=scale, minimum=minimum)}


def _symmetric(
    x: jax.Array, weight: jax.Array | None, search: bool, *, reach: int, top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns uint8 codes `[256, M]` from 0 to 2 * reach - 1, s `[16, M]` from -top to top - 1, scale `[1, M]`."""
    codes, s, scale = symmetric_under_scales(
        x, weight, search, sub=16, nearest=whole(-reach, reach - 1), grids=symmetric_grids(reach), top=top
    )
    return joined(codes + reach), s, scale


def _q3_k(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
    codes, s, scale = _symmetric(x, weight, search, reach=4, top=32)
    s = (s + 32).astype(jnp.uint8)
    low, high = fold(s & jnp.uint8(15), 4, chunk=8), fold(s >> jnp.uint8(4), 2, chunk=4)
    return {
        "high": fold(codes >> jnp.uint8(2), 1, chunk=32),
        "codes": fold(codes & jnp.uint8(3), 2, chunk=32),
        "scales": jnp.concatenate([low, high], axis=0),
        **halves(scale=scale),
    }


def _q4_k(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
    codes, s, m, scale, minimum = _affine(x, weight, search, sub=32, levels=15, top=63)
    return {
        **halves(scale=scale, minimum=minimum),
        "scales": _six_bits(s, m),
        "codes": fold(joined(codes), 4, chunk=32),
    }


def _q5_k(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
    codes, s, m, scale, minimum = _affine(x, weight, search, sub=32, levels=31, top=63)
    codes = joined(codes)
    return {
        **halves(scale=scale, minimum=minimum),
        "scales": _six_bits(s, m),
        "high": fold(codes >> jnp.uint8(4), 1, chunk=32),
        "codes": fold(codes & jnp.uint8(15), 4, chunk=32),
    }


def _q6_k(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
    codes, s, scale = _symmetric(x, weight, search, reach=32, top=128)
    return {
        "codes": fold(codes & jnp.uint8(15), 4, chunk=64),
        "high": fold(codes >> jnp.uint8(4), 2, chunk=32),
        "scales": s.astype(jnp.int8),
        **halves(scale=scale),
    }


def joined(codes: jax.Array) -> jax.Array:
    """Returns uint8 `[256, M]` of codes in sub-blocks `[sub, subs, M]`."""
    return codes.astype(jnp.uint8).swapaxes(0, 1).reshape(BLOCK, -1)


def halves(**scales: jax.Array) -> Encoded:
    """Returns the scales `[1, M]` as float16 `[M]`."""
    return {name: scale[0].astype(jnp.float16) for name, scale in scales.items()}


def _six_bits(s: jax.Array, m: jax.Array) -> jax.Array:
    """Eight s and eight m in 12 bytes: the first four of each whole, with the upper bits of the last four on top."""
    s, m = s.astype(jnp.uint8), m.astype(jnp.uint8)

    def under(codes: jax.Array) -> jax.Array:
        return codes[:4] | (codes[4:] >> jnp.uint8(4)) << jnp.uint8(6)

    last = (s[4:] & jnp.uint8(15)) | (m[4:] & jnp.uint8(15)) << jnp.uint8(4)
    return jnp.concatenate([under(s), under(m), last], axis=0)


K_QUANTS: dict[str, Encoder] = {
    "q2_k": Encoder(_q2_k, 15 * HALF_MAX, affine_grids(3).tried),
    "q3_k": Encoder(_q3_k, 31 * 3 * HALF_MAX, symmetric_grids(4).tried),
    "q4_k": Encoder(_q4_k, 63 * HALF_MAX, affine_grids(15).tried),
    "q5_k": Encoder(_q5_k, 63 * HALF_MAX, affine_grids(31).tried),
    "q6_k": Encoder(_q6_k, 127 * 31 * HALF_MAX, symmetric_grids(32).tried),
}
