"""Searches for the scale of a block: weighted least squares of codes against weights.

    symmetric   x[k] ~ scale * code[k]            low <= code <= high
    affine      x[k] ~ scale * code[k] + shift    0 <= code <= levels

    error = sum_k weight[k] * (x[k] - decoded[k])^2

For fixed codes the best scale (and shift) is a closed form; for a fixed scale the best codes are the nearest ones. A
search tries a list of candidates: each lays the codes' grid over the block in one way, rounds, and solves for the scale
that fits those codes best. The candidate with the smallest error wins, and a few rounds of re-rounding and re-fitting
follow.

The rows of a block lie along axis 0 and all other axes are independent: `[R, ..., N]`. A sum then adds whole rows,
which XLA's CPU compiler turns into vector code; summed along an inner axis the same program ran 8 times slower. Sums
are in float32, so the caller brings blocks of size about one (`power_of_two`), or squares of tiny weights would vanish.
`weight` has the rank of x with size 1 where it is shared, or is None for all ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HALF_MAX = 65504.0  # the largest float16
HALF_NORMAL = 2.0**-14  # the smallest of full precision
HALF_TINY = 2.0**-24  # the smallest above zero, and the step between those under HALF_NORMAL


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


class Grids(NamedTuple):
    """The grids of a format: `full` for its codes' full range alone, `even` and `uneven` without and with weights."""

    full: Grid
    even: Grid
    uneven: Grid

    def choose(self, weight: jax.Array | None, search: bool) -> Grid:
        """Returns the grid for these weights."""
        return self.of(weight is not None, search)

    def of(self, weighted: bool, search: bool) -> Grid:
        """Returns the grid where there are weights, or none."""
        if not search:
            return self.full
        return self.uneven if weighted else self.even

    def tried(self, weighted: bool, search: bool) -> tuple[tuple[float, ...], int]:
        """Returns the candidates, pairs one after the other, and the rounds of re-fitting: `Encoder.tried`."""
        grid = self.of(weighted, search)
        return tuple(float(number) for number in np.ravel(grid.candidates)), grid.refits


def symmetric_grids(reach: int) -> Grids:
    """Returns the grids for codes from `-reach` to `reach - 1`.

    Negative places use the one code more that the negative side has. With weights, which may care little for the
    largest value, both signs and stronger clipping pay: q4_0 with the importance of `tests/quant/samples.py` made 0.93
    of llama.cpp's error, and 0.96 when the places went from 0.8 to 1.1 of the reach only.
    """
    even = -np.linspace(0.85 * reach, reach + 0.9, 8)
    uneven = (*-np.linspace(0.6 * reach, reach + 1.5, 16), *np.linspace(0.6 * reach, reach + 0.5, 12))
    return Grids(Grid((-float(reach),)), Grid(tuple(even)), Grid(uneven, 1))


# (span beyond the levels, below): of a grid of such pairs those that together make the least error of gaussian,
# heavy-tailed and shifted weights, found by greedy choice and exchange. Six of them for q4_1 make 1.008 of the error of
# eight, and equal that of sixteen on a regular grid.
_EVEN_PAIRS = {
    3: tuple((span, below) for below in (0.0, 0.3) for span in np.linspace(-1.2, 0.9, 8)),
    15: ((0.4, 0.5), (0.2, 0.0), (0.2, 0.125), (-0.6, 0.25), (0.4, 0.375), (0.6, 0.0)),
    31: ((0.2, 0.0), (-0.6, 0.25), (0.2, 0.25), (-0.6, 0.0), (0.6, 0.0), (0.4, 0.5), (0.0, 0.0), (-0.6, 0.375)),
}


def affine_grids(levels: int) -> Grids:
    """Returns the grids for codes from 0 to `levels`, which are 3, 15 or 31.

    Spans past the levels clip the upper end; those that begin below the first code clip both. Together they make an
    error 14% smaller than the full range alone does (q4_1, gaussian weights).
    """
    even = [(levels + span, below) for span, below in _EVEN_PAIRS[levels]]
    spans = (-0.5, 3.5) if levels > 3 else (-1.5, 1.5)
    below = (0.0, 0.5, 1.0, 1.5) if levels > 3 else (-0.3, 0.0, 0.4)
    uneven = [(levels + span, b) for b in below for span in np.linspace(*spans, 9)]
    # A re-fit after these would take another 0.4% off the error of q4_1, and a tenth off its speed.
    return Grids(Grid(((float(levels), 0.0),)), Grid(tuple(even), int(levels == 3)), Grid(tuple(uneven), 2))


Reduce = Callable[[Callable[..., jax.Array], jax.Array], jax.Array]


def plain_reduce(function: Callable[..., jax.Array], values: jax.Array) -> jax.Array:
    """Returns the reduction of each block: `[R, ...]` to `[...]`."""
    return function(values, axis=0)


def shared_reduce(function: Callable[..., jax.Array], values: jax.Array) -> jax.Array:
    """Returns the reduction of blocks that span axis 1 as well: `[R, S, ...]` to `[1, ...]`.

    Row by row first, so that a sum over a whole matrix does not lose the digits of its terms.
    """
    return function(function(values, axis=0), axis=0, keepdims=True)


def weighted(weight: jax.Array | None, values: jax.Array) -> jax.Array:
    """Returns `weight * values`."""
    return values if weight is None else values * weight


def total(weight: jax.Array | None, values: jax.Array) -> jax.Array:
    """Returns `sum_k weight[k] * values[k]` over the rows of each block: `[R, ...]` to `[...]`."""
    return jnp.sum(weighted(weight, values), axis=0)


def count_of(weight: jax.Array | None, x: jax.Array) -> jax.Array:
    """Returns `sum_k weight[k]`, in the shape of `x[0]`."""
    return jnp.broadcast_to(jnp.float32(x.shape[0]) if weight is None else jnp.sum(weight, axis=0), x.shape[1:])


def inverse(values: jax.Array) -> jax.Array:
    """Returns `1 / values`, and 0 where they are 0."""
    nonzero = values != 0
    return jnp.where(nonzero, 1 / jnp.where(nonzero, values, 1), 0)


def power_of_two(x: jax.Array, reduce: Reduce = plain_reduce) -> jax.Array:
    """Returns the power of two at or below the largest magnitude of each block: `[R, ...]` to `[...]`.

    Dividing by it is exact. It is kept within 2**-100 and 2**100; a block of zeros gets 2**-100.
    """
    largest = jnp.clip(reduce(jnp.max, jnp.abs(x)), 2.0**-100, 2.0**100)
    bits = jax.lax.bitcast_convert_type(largest, jnp.uint32) & jnp.uint32(0x7F800000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def half(scale: jax.Array) -> jax.Array:
    """Returns scales as float16 holds them, in float32: to nearest, and saturated at the largest.

    Among the subnormals, which lie far apart, magnitudes go up instead: a scale that is too small would clip the block,
    and one of zero would lose it. The thousandth is for scales that are such a number but for the errors of sums.
    """
    nearest = jnp.clip(scale, -HALF_MAX, HALF_MAX).astype(jnp.float16).astype(jnp.float32)
    up = jnp.sign(scale) * jnp.ceil(jnp.abs(scale) * (0.999 / HALF_TINY)) * HALF_TINY
    return jnp.where(jnp.abs(scale) < HALF_NORMAL, up, nearest)


def affine_codes(x: jax.Array, scale: jax.Array, shift: jax.Array, levels: int) -> jax.Array:
    """Returns the nearest codes, float32, as x; 0 where the scale is 0."""
    return jnp.clip(jnp.round((x - shift[None]) * inverse(scale)[None]), 0, levels)


Nearest = Callable[[jax.Array], jax.Array]  # from numbers in units of the scale to the codes nearest to them


def whole(low: int, high: int) -> Nearest:
    """Returns the function that gives the nearest whole number from low to high."""
    return lambda x: jnp.clip(jnp.round(x), low, high)


def search_symmetric(x: jax.Array, weight: jax.Array | None, nearest: Nearest, grid: Grid) -> jax.Array:
    """Returns the scale of each block, float32 `[...]`, of either sign; 0 for a block of zeros.

    Args:
        x: blocks `[R, ...]` of size about one.
        weight: of each row in the error.
        nearest: the codes there are.
        grid: what to try.
    """
    return search_nearest(x, weight, nearest, grid, signed=True)


def search_nearest(
    x: jax.Array,
    weight: jax.Array | None,
    nearest: Nearest,
    grid: Grid,
    *,
    signed: bool = False,
    reduce: Reduce = plain_reduce,
) -> jax.Array:
    """Returns the scale of each block for codes that stand for any set of numbers, float32 `[...]`; 0 for zeros.

    Args:
        x: blocks `[R, ...]` of size about one.
        weight: of each row in the error.
        nearest: brings every element to the nearest of the codes' numbers; its order and signs as the argument's.
        grid: the numbers at which the weight of largest magnitude lands.
        signed: whether that weight lands there whatever its sign, which gives scales of either sign.
        reduce: how blocks are reduced over.
    """
    largest, smallest = reduce(jnp.max, x), reduce(jnp.min, x)
    unit = jnp.where(largest >= -smallest, largest, smallest)
    unit = inverse(unit if signed else jnp.abs(unit))

    def fit(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        product = reduce(jnp.sum, weighted(weight, x * codes))
        square = reduce(jnp.sum, weighted(weight, codes * codes))
        scale = product * inverse(square)
        return -product * scale, scale  # the error, less sum x^2, which all candidates share

    def place(candidate: jax.Array) -> jax.Array:
        return nearest(x * (candidate[0] * unit)[None])

    def again(scale: jax.Array) -> jax.Array:
        return nearest(x * inverse(scale)[None])

    zero = jnp.zeros_like(unit)
    return search(grid, place, fit, again, (zero, zero))[1]


def search_affine(
    x: jax.Array, weight: jax.Array | None, levels: int, grid: Grid, *, side: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the scale (not negative) and the shift of each block, float32 `[...]`.

    A constant block gets scale 0 and itself as shift.

    Args:
        x: blocks `[R, ...]` of size about one.
        weight: of each row in the error.
        levels: the largest code.
        grid: what to try.
        side: where given, the sign (-1 or 1, broadcast against `[...]`) that the shift must have, if it is not 0.
    """
    smallest, largest = jnp.min(x, axis=0), jnp.max(x, axis=0)
    if side is not None:
        smallest = jnp.where(side < 0, jnp.minimum(smallest, 0), jnp.maximum(smallest, 0))
    unit = inverse(jnp.maximum(largest - smallest, 0))
    y = x - smallest[None]  # small numbers: the sums below keep their digits
    count = count_of(weight, x)
    share = 1 / count
    mean = total(weight, y) * share

    def fit(codes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        sum_code = total(weight, codes)
        product, square = total(weight, y * codes), total(weight, codes * codes)
        spread = square - sum_code * sum_code * share
        scale = (product - mean * sum_code) * inverse(jnp.where(spread > 1e-6 * square, spread, 0))
        shift = mean - scale * sum_code * share
        if side is not None:
            beyond = (shift + smallest) * side < 0
            shift = jnp.where(beyond, -smallest, shift)
            scale = jnp.where(beyond, (product - shift * sum_code) * inverse(square), scale)
        # sum (y - scale * code - shift)^2, less sum y^2
        error = scale * (scale * square - 2 * product) + shift * (shift * count + 2 * scale * sum_code)
        error = error - 2 * shift * mean * count
        return jnp.where(scale > 0, error, jnp.inf), scale, shift

    def place(candidate: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(y * (candidate[0] * unit)[None] - candidate[1]), 0, levels)

    def again(scale: jax.Array, shift: jax.Array) -> jax.Array:
        return affine_codes(y, scale, shift, levels)

    # To begin with: scale 0. Its shift is the mean, if that stands on the right side.
    shift = mean
    if side is not None:
        shift = jnp.where((mean + smallest) * side < 0, -smallest, mean)
    start = (shift * (shift - 2 * mean) * count, jnp.zeros_like(mean), shift)
    _, scale, shift = search(grid, place, fit, again, start)
    return scale, shift + smallest


Fit = tuple[jax.Array, ...]  # error, then the parameters


def search(
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
