"""Searches for the scale of a block: weighted least squares of codes against weights.

    symmetric   x[k] ~ scale * code[k]            low <= code <= high
    affine      x[k] ~ scale * code[k] + shift    0 <= code <= levels

    error = sum_k weight[k] * (x[k] - decoded[k])^2

For fixed codes the best scale (and shift) is a closed form; for a fixed scale the best codes are the nearest ones. A
search tries a list of candidates: each lays the codes' grid over the block in one way, rounds, and solves for the scale
that fits those codes best. The candidate with the smallest error wins, and a few rounds of re-rounding and re-fitting
follow.

Everything is vectorized: blocks lie along axis -2 (rows), all other axes are independent. Sums run in float32, so the
caller brings blocks of size about one (`power_of_two`), or squares of tiny weights would vanish. `weight` has the rank
of x with size 1 where it is shared, or is None for all ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HALF_MAX = 65504.0  # the largest float16
HALF_TINY = 2.0**-24  # the smallest float16 above zero


class Grid(NamedTuple):
    """What a search tries.

    Args:
        candidates: symmetric: the code, before rounding and clipping, at which the weight of largest magnitude lands.
            Affine: pairs (span, below): the block's range covers `span` codes, and its smallest weight lies `below`
            codes under the first. Spans past the levels clip outliers.
        refits: rounds of re-rounding and re-fitting of the winner.
    """

    candidates: tuple[float, ...] | tuple[tuple[float, float], ...]
    refits: int = 0


def total(weight: jax.Array | None, values: jax.Array) -> jax.Array:
    """Returns `sum_k weight[k] * values[k]` over the rows of each block: `[..., R, N]` to `[..., N]`."""
    return jnp.sum(values if weight is None else values * weight, axis=-2)


def over_rows(values: jax.Array) -> jax.Array:
    """Returns per-block numbers `[..., N]` as `[..., 1, N]`, to stand beside the rows of their blocks."""
    return values[..., None, :]


def inverse(values: jax.Array) -> jax.Array:
    """Returns `1 / values`, and 0 where they are 0."""
    nonzero = values != 0
    return jnp.where(nonzero, 1 / jnp.where(nonzero, values, 1), 0)


def power_of_two(x: jax.Array) -> jax.Array:
    """Returns the power of two at or below the largest magnitude of each block, `[..., R, N]` to `[..., 1, N]`.

    Dividing by it is exact. It is kept within 2**-100 and 2**100; a block of zeros gets 2**-100.
    """
    largest = jnp.clip(jnp.max(jnp.abs(x), axis=-2, keepdims=True), 2.0**-100, 2.0**100)
    bits = jax.lax.bitcast_convert_type(largest, jnp.uint32) & jnp.uint32(0x7F800000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def half(scale: jax.Array) -> jax.Array:
    """Returns scales as float16 holds them, in float32; saturated at the largest, and never 0 unless they are 0.

    A block whose scale lies under the smallest float16 gets that one: coarse codes rather than none.
    """
    rounded = jnp.clip(scale, -HALF_MAX, HALF_MAX).astype(jnp.float16).astype(jnp.float32)
    return jnp.where((rounded == 0) & (scale != 0), jnp.sign(scale) * HALF_TINY, rounded)


def symmetric_codes(x: jax.Array, scale: jax.Array, low: int, high: int) -> jax.Array:
    """Returns the nearest codes, float32 `[..., R, N]`; 0 where the scale is 0."""
    return jnp.clip(jnp.round(x * over_rows(inverse(scale))), low, high)


def affine_codes(x: jax.Array, scale: jax.Array, shift: jax.Array, levels: int) -> jax.Array:
    """Returns the nearest codes, float32 `[..., R, N]`; 0 where the scale is 0."""
    return jnp.clip(jnp.round((x - over_rows(shift)) * over_rows(inverse(scale))), 0, levels)


def search_symmetric(x: jax.Array, weight: jax.Array | None, low: int, high: int, grid: Grid) -> jax.Array:
    """Returns the scale of each block, float32 `[..., N]`, of either sign; 0 for a block of zeros.

    Args:
        x: blocks `[..., R, N]` of size about one.
        weight: of each row in the error.
        low: the smallest code.
        high: the largest.
        grid: what to try.
    """
    largest, smallest = jnp.max(x, axis=-2), jnp.min(x, axis=-2)
    unit = inverse(jnp.where(largest >= -smallest, largest, smallest))

    def fit(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        product, square = total(weight, x * codes), total(weight, codes * codes)
        scale = product * inverse(square)
        return -product * scale, scale  # the error, less sum x^2, which all candidates share

    def place(candidate: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(x * over_rows(candidate[0] * unit)), low, high)

    def again(scale: jax.Array) -> jax.Array:
        return symmetric_codes(x, scale, low, high)

    zero = jnp.zeros_like(largest)
    return _search(grid, place, fit, again, (zero, zero))[1]


def search_affine(
    x: jax.Array, weight: jax.Array | None, levels: int, grid: Grid, *, side: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the scale (not negative) and the shift of each block, float32 `[..., N]`.

    A constant block gets scale 0 and itself as shift.

    Args:
        x: blocks `[..., R, N]` of size about one.
        weight: of each row in the error.
        levels: the largest code.
        grid: what to try.
        side: where given, the sign (-1 or 1, broadcast against `[..., N]`) that the shift must have, if it is not 0.
    """
    smallest, largest = jnp.min(x, axis=-2), jnp.max(x, axis=-2)
    if side is not None:
        smallest = jnp.where(side < 0, jnp.minimum(smallest, 0), jnp.maximum(smallest, 0))
    unit = inverse(jnp.maximum(largest - smallest, 0))
    y = x - over_rows(smallest)  # small numbers: the sums below keep their digits
    count = total(weight, jnp.ones_like(x))
    mean = total(weight, y) / count

    def fit(codes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        sum_code = total(weight, codes)
        product, square = total(weight, y * codes), total(weight, codes * codes)
        spread = square - sum_code * sum_code / count
        scale = (product - mean * sum_code) * inverse(jnp.where(spread > 1e-6 * square, spread, 0))
        shift = mean - scale * sum_code / count
        if side is not None:
            beyond = (shift + smallest) * side < 0
            shift = jnp.where(beyond, -smallest, shift)
            scale = jnp.where(beyond, (product - shift * sum_code) * inverse(square), scale)
        # sum (y - scale * code - shift)^2, less sum y^2
        error = scale * (scale * square - 2 * product) + shift * (shift * count + 2 * scale * sum_code)
        error = error - 2 * shift * mean * count
        return jnp.where(scale > 0, error, jnp.inf), scale, shift

    def place(candidate: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(y * over_rows(candidate[0] * unit) - candidate[1]), 0, levels)

    def again(scale: jax.Array, shift: jax.Array) -> jax.Array:
        return affine_codes(y, scale, shift, levels)

    # To begin with: scale 0. Its shift is the mean, if that stands on the right side.
    shift = mean
    if side is not None:
        shift = jnp.where((mean + smallest) * side < 0, -smallest, mean)
    start = (shift * (shift - 2 * mean) * count, jnp.zeros_like(mean), shift)
    _, scale, shift = _search(grid, place, fit, again, start)
    return scale, shift + smallest


Fit = tuple[jax.Array, ...]  # error, then the parameters


def _search(
    grid: Grid,
    place: Callable[[jax.Array], jax.Array],
    fit: Callable[[jax.Array], Fit],
    again: Callable[..., jax.Array],
    start: Fit,
) -> Fit:
    """Returns the fit of smallest error among `start`, that of each candidate, and the re-fits of the best."""
    candidates = jnp.asarray(np.asarray(grid.candidates, np.float32).reshape(len(grid.candidates), -1))
    best = jax.lax.fori_loop(0, len(grid.candidates), lambda i, b: better(b, fit(place(candidates[i]))), start)
    return jax.lax.fori_loop(0, grid.refits, lambda _, b: better(b, fit(again(*b[1:]))), best)


def better(best: Fit, other: Fit) -> Fit:
    """Returns, block by block, the fit of smaller error; `best` where they are equal."""
    take = other[0] < best[0]
    return tuple(jnp.where(take, b, a) for a, b in zip(best, other, strict=True))
