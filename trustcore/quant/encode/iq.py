"""Encoders of GGUF's IQ formats of one to three bits: groups of four or eight weights that name an entry of a grid.

    w = scale * (2 s + 1) * step * value[level] * sign       s from 0 to 15 (iq1: 7) for each sub-block of 16 or 32

iq1 has no signs: its values are 8 t + 1 or all 8 t - 1, t in -1, 0, 1. Four steps, judged by the squared error of the
decoded weights, as for the K-quants; a fifth at one and two bits:

1. A scale for each sub-block by itself: candidates around what its mean square suggests. Under a given scale the
   entries that cost least are found among all there are (`nearest_entry`), and the scale that fits those is solved for.
2. The scale of the block under which rounding those to odd multiples costs least.
3. For each sub-block s, and for three bits its neighbours, each with its own entries.
4. Least squares for the scale of the block with all s and entries given; kept where it is better. (Looking for the
   entries once more under that scale would take a quarter of the time, and 0.1 to 1.5% off the error of one bit, less
   than half a percent off that of three.)

Formats that store seven signs of eight turn one sign where the number of minus signs is odd: that of the weight with
the least `weight * |x|`, for the cost of turning a weight of magnitude v that becomes m is `4 * weight * v * m`.

Errors are weighed by the weights' own size as llama.cpp does (`_by_size`): at one and two bits always, at three with an
importance, which it multiplies. At one and two bits a power of that product is taken, `_Kind.power`: an importance
says nothing of how errors of several inputs add up, and where errors are as large as weights those of the inputs that
it calls unimportant matter more than it tells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.quant.encode.encoder import Encoded, Encoder, fold
from trustcore.quant.encode.k_quants import halves
from trustcore.quant.encode.nearest_entry import nearest_entry
from trustcore.quant.encode.search import HALF_MAX, better, half, inverse, power_of_two
from trustcore.quant.formats.iq_grids import GRIDS

BLOCK = 256
_MOST = 1.25  # what step 5 may multiply a scale by: in blocks of few large weights there is no more to be kept


class _Kind(NamedTuple):
    """What the encoder knows of a format.

    Args:
        grid: name of its grid.
        values: of the levels, in units of `scale * (2 s + 1) * step`.
        step: see the equation above.
        sub: weights that share s.
        top: the largest s.
        even: whether the number of minus signs of eight weights must be even.
        shifts: what may be added to all values of a run together.
        run: weights in that run.
        candidates: the values' unit in units of the root mean square of a sub-block, to be tried; the first alone
            where there is no search.
        neighbours: of the nearest s, to be tried; the first alone where there is no search.
        power: of the weights of errors.
    """

    grid: str
    values: tuple[int, ...]
    step: float
    sub: int
    top: int = 15
    even: bool = False
    shifts: tuple[int, ...] = (0,)
    run: int = 32
    candidates: tuple[float, ...] = ()
    neighbours: tuple[int, ...] = (0,)
    power: float = 1.0

    @property
    def d(self) -> int:
        return 4 if len(self.values) == 8 else 8

    @property
    def coarse(self) -> bool:
        """Whether it has one or two bits."""
        return self.d == 8

    @property
    def bits(self) -> int:
        return 3 if self.d == 4 else 2


class _Found(NamedTuple):
    """The parts of an encoded block, before they are packed.

    Args:
        index: int32 `[256 / d, M]`, entries.
        minus: bool `[256, M]`, stored signs.
        shift: int32 `[256 / run, M]`, which of the shifts.
        s: float32 `[256 / sub, M]`.
        scale: float32 `[1, M]`.
    """

    index: jax.Array
    minus: jax.Array
    shift: jax.Array
    s: jax.Array
    scale: jax.Array


def _encode(x: jax.Array, weight: jax.Array | None, search: bool, kind: _Kind) -> _Found:
    """Returns the parts of blocks `[256, M]`; see the header."""
    unit = power_of_two(x)[None]  # [1, M]
    m = x.shape[-1]
    x = x / unit
    weight = jnp.ones((BLOCK, 1), jnp.float32) if weight is None else weight
    signed = len(kind.shifts) == 1
    v, minus = _without_signs(x, weight, kind.even) if signed else (x, x < 0)
    d, rows, subs = kind.d, BLOCK // kind.d, BLOCK // kind.sub
    v = v.reshape(rows, d, m).swapaxes(0, 1)  # [d, rows, M]
    weight = weight.reshape(rows, d, -1).swapaxes(0, 1)
    values = jnp.asarray(kind.values, jnp.float32)

    def over_subs(sums: jax.Array) -> jax.Array:
        return jnp.sum(sums.reshape(subs, -1, m), axis=1)  # [rows, M] -> [subs, M]

    def by_row(scale: jax.Array) -> jax.Array:
        return jnp.repeat(scale, rows // subs, axis=0, total_repeat_length=rows)  # [subs, M] -> [rows, M]

    def cheapest(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns index and shift of the cheapest entries under the scales `[subs, M]`."""
        tried = []
        for number, shift in enumerate(kind.shifts):
            at = by_row(scale)[None, None] * (values + shift)[:, None, None, None]  # [levels, 1, rows, M]
            costs = weight[None] * (v[None] - at) ** 2  # [levels, d, rows, M]
            index, cost = nearest_entry(costs.reshape(len(values), d, rows * m), GRIDS[kind.grid], kind.bits)
            cost = jnp.sum(cost.reshape(BLOCK // kind.run, -1, m), axis=1)  # [runs, M]
            tried.append((cost, index.reshape(BLOCK // kind.run, -1, m), jnp.full(cost.shape, number, jnp.int32)))
        _, index, number = functools.reduce(_better_runs, tried)
        return index.reshape(rows, m), number

    def sums_of(index: jax.Array, number: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns error under the scales, x g, g g of entries: weighted sums `[subs, M]`."""
        words = jnp.asarray(GRIDS[kind.grid]).at[index].get(mode="promise_in_bounds")
        shift = jnp.asarray(kind.shifts, jnp.float32)[number]
        shift = jnp.repeat(shift, kind.run // d, axis=0, total_repeat_length=rows)
        product = square = error = jnp.zeros((rows, m))
        for i in range(d):
            level = words >> jnp.uint16(i * kind.bits) & jnp.uint16((1 << kind.bits) - 1)
            g = _value(kind, level) + shift
            product, square = product + weight[i] * v[i] * g, square + weight[i] * g * g
            error = error + weight[i] * (v[i] - by_row(scale) * g) ** 2
        return over_subs(error), over_subs(product), over_subs(square)

    def entries(scale: jax.Array) -> tuple[jax.Array, ...]:
        index, number = cheapest(scale)
        return *sums_of(index, number, scale), index, number

    # 1: scales of sub-blocks, in units of the values.
    sums = over_subs(jnp.sum(weight * v * v, axis=0)), over_subs(jnp.sum(jnp.broadcast_to(weight, v.shape), axis=0))
    size = jnp.sqrt(sums[0] / sums[1])
    candidates = jnp.asarray(kind.candidates if search else kind.candidates[:1], jnp.float32)

    def attempt(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        _, product, square, _, _ = entries(size * candidates[i])
        product = jnp.maximum(product, 0)
        return better(best, (-product * product * inverse(square), product * inverse(square), square))

    start = (jnp.full_like(size, jnp.inf), size, jnp.ones_like(size))
    _, scales, squares = jax.lax.fori_loop(0, len(candidates), attempt, start)

    # 2: the scale of the block, which multiplies odd numbers.
    def stored(scale: jax.Array) -> jax.Array:
        return half(scale * unit) / unit

    scale = stored(_scale_of_odds(scales, squares, kind.top) / kind.step)

    def odd(s: jax.Array) -> jax.Array:
        return (2 * s + 1) * kind.step

    # 3: each sub-block's s.
    nearest = _nearest_odd(scales, scale * kind.step, kind.top)
    offsets = jnp.asarray(kind.neighbours if search else kind.neighbours[:1], jnp.float32)

    def neighbour(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        s = jnp.clip(nearest + offsets[i], 0, kind.top)
        error, product, square, index, number = entries(scale * odd(s))
        return _better_subs(best, (error, s, product, square, index, number))

    none, runs = jnp.zeros_like(nearest), (BLOCK // kind.run, m)
    start = (
        jnp.full_like(nearest, jnp.inf),
        none,
        none,
        none,
        jnp.zeros((rows, m), jnp.int32),
        jnp.zeros(runs, jnp.int32),
    )
    before, s, product, square, index, number = jax.lax.fori_loop(0, len(offsets), neighbour, start)

    # 4: least squares for the scale of the block.
    found = stored(_sum(odd(s) * product) * inverse(_sum(odd(s) ** 2 * square)))
    after, _, _ = sums_of(index, number, found * odd(s))
    scale = jnp.where((_sum(after) < _sum(before)) & (found > 0), found, scale)

    # 5: the mean square of the weights.
    if kind.coarse:
        kept = jnp.sqrt(_sum(sums[0]) * inverse(_sum(odd(s) ** 2 * square)))
        fine = scale * unit >= 2.0**-18  # coarser steps of half precision would round it far off
        scale = jnp.where(fine, stored(jnp.clip(kept, scale, _MOST * scale)), scale)
    return _Found(index, minus, number, s, scale * unit)


def _value(kind: _Kind, level: jax.Array) -> jax.Array:
    """Returns the values of levels, float32, by arithmetic: a look-up takes one at a time."""
    steps = np.diff(kind.values)
    value = level.astype(jnp.float32) * float(steps[0]) + float(kind.values[0])
    for i, more in enumerate(np.diff(steps)):
        if more:
            value = value + jnp.maximum(level.astype(jnp.float32) - (i + 1), 0) * float(more)
    return value


def _without_signs(x: jax.Array, weight: jax.Array, even: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the weights times their signs `[256, M]` as they will be stored, and those signs."""
    minus = x < 0
    v = jnp.abs(x)
    if not even:
        return v, minus
    eight = (BLOCK // 8, 8, x.shape[-1])
    odd = jnp.sum(minus.reshape(eight), axis=1) % 2 == 1  # [32, M]
    # The place among the eight stands in the lowest bits of the cost, so that one minimum finds it.
    cost = jax.lax.bitcast_convert_type((weight * v).reshape(eight), jnp.int32) & ~jnp.int32(7)
    cost = cost | jnp.arange(8, dtype=jnp.int32)[None, :, None]
    turned = (cost == jnp.min(cost, axis=1, keepdims=True)) & odd[:, None]
    turned = turned.reshape(x.shape)
    return jnp.where(turned, -v, v), minus ^ turned


def _sum(values: jax.Array) -> jax.Array:
    return jnp.sum(values, axis=0, keepdims=True)


def _nearest_odd(scales: jax.Array, unit: jax.Array, top: int) -> jax.Array:
    """Returns s from 0 to top: the odd multiple `2 s + 1` of the unit nearest to each scale."""
    return jnp.clip(jnp.round((scales * inverse(unit) - 1) / 2), 0, top)


def _scale_of_odds(scales: jax.Array, squares: jax.Array, top: int) -> jax.Array:
    """Returns the unit `[1, M]` whose odd multiples come closest to the scales `[subs, M]`."""
    largest = jnp.max(scales, axis=0, keepdims=True)
    end = 2 * top + 1
    places = jnp.asarray(np.linspace(end + 0.5, 0.6 * end, 12), jnp.float32)

    def attempt(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        unit = largest / places[i]
        error = _sum(squares * (scales - unit * (2 * _nearest_odd(scales, unit, top) + 1)) ** 2)
        return better(best, (error, unit))

    start = (jnp.full_like(largest, jnp.inf), jnp.zeros_like(largest))
    return jax.lax.fori_loop(0, len(places), attempt, start)[1]


def _better_runs(best: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Returns the cheaper of two, run by run: costs and shifts `[runs, M]`, entries `[runs, rows of a run, M]`."""
    take = other[0] < best[0]
    cost, index, number = (
        jnp.where(take[:, None] if a.ndim == 3 else take, b, a) for a, b in zip(best, other, strict=True)
    )
    return cost, index, number


def _better_subs(best: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Returns what has the smaller error, sub-block by sub-block; rows that are finer or coarser follow theirs."""
    take = other[0] < best[0]  # [subs, M]

    def chosen(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(jnp.repeat(take, len(a) // len(take), axis=0, total_repeat_length=len(a)), b, a)

    return tuple(chosen(a, b) for a, b in zip(best, other, strict=True))


# ---- packing ---------------------------------------------------------------------------------------------------------


def _sign_bytes(minus: jax.Array) -> jax.Array:
    """Returns uint8 `[32, M]`: the signs of eight weights, the first lowest."""
    return fold(minus, 1)


def _low(index: jax.Array) -> jax.Array:
    return (index & 255).astype(jnp.uint8)


def _high(index: jax.Array) -> jax.Array:
    return (index >> 8).astype(jnp.uint8)


def _word(parts: jax.Array, shifts: tuple[int, ...], dtype: type) -> jax.Array:
    """Returns words `[rows / len(shifts), M]`: consecutive rows of parts, each at its shift."""
    parted = parts.astype(dtype).reshape(-1, len(shifts), parts.shape[-1])
    word = parted[:, 0] << dtype(shifts[0])
    for i, shift in enumerate(shifts[1:], 1):
        word = word | parted[:, i] << dtype(shift)
    return word


def _signs_and_scale(found: _Found) -> jax.Array:
    """Returns uint32 `[8, M]`: four times seven signs under the four bits of s."""
    signs = _word(_sign_bytes(found.minus) & jnp.uint8(127), (0, 7, 14, 21), jnp.uint32)
    return signs | found.s.astype(jnp.uint32) << jnp.uint32(28)


def _iq3_xxs(found: _Found) -> Encoded:
    return {**halves(scale=found.scale), "codes": _low(found.index), "signs": _signs_and_scale(found)}


def _iq3_s(found: _Found) -> Encoded:
    return {
        **halves(scale=found.scale),
        "codes": _low(found.index),
        "high": fold(_high(found.index), 1),
        "signs": _sign_bytes(found.minus),
        "scales": fold(found.s, 4),
    }


def _iq2_xxs(found: _Found) -> Encoded:
    codes = _word(found.index, (0, 8, 16, 24), jnp.uint32)
    both = jnp.stack([codes, _signs_and_scale(found)], axis=1)
    return {**halves(scale=found.scale), "codes": both.reshape(16, -1)}


def _iq2_xs(found: _Found) -> Encoded:
    signs = (_sign_bytes(found.minus) & jnp.uint8(127)).astype(jnp.uint16)
    codes = found.index.astype(jnp.uint16) | signs << jnp.uint16(9)
    return {**halves(scale=found.scale), "codes": codes, "scales": fold(found.s, 4)}


def _iq2_s(found: _Found) -> Encoded:
    return {
        **halves(scale=found.scale),
        "codes": _low(found.index),
        "signs": _sign_bytes(found.minus),
        "high": fold(_high(found.index), 2),
        "scales": fold(found.s, 4),
    }


def _iq1_s(found: _Found) -> Encoded:
    high = _word(_high(found.index), (0, 3, 6, 9), jnp.uint16)
    high = high | found.s.astype(jnp.uint16) << jnp.uint16(12) | found.shift.astype(jnp.uint16) << jnp.uint16(15)
    return {**halves(scale=found.scale), "codes": _low(found.index), "high": high}


def _iq1_m(found: _Found) -> Encoded:
    high = _high(found.index) | found.shift.astype(jnp.uint8) << jnp.uint8(3)
    scales = _word(found.s, (0, 3, 6, 9), jnp.uint16)
    bits = jax.lax.bitcast_convert_type(found.scale.astype(jnp.float16), jnp.uint16)  # [1, M]
    nibbles = bits >> jnp.arange(0, 16, 4, dtype=jnp.uint16)[:, None] << jnp.uint16(12)  # [4, M]
    return {"codes": _low(found.index), "high": fold(high, 4), "scales": scales | nibbles}


def _by_size(x: jax.Array) -> jax.Array:
    """Returns `[256, M]`: `sqrt(mean x^2 + x^2)` over the block, what llama.cpp multiplies an importance by.

    At one or two bits an error of the mean square keeps the many small weights at the cost of the few large ones, on
    which more depends.
    """
    y = x / power_of_two(x)[None]
    squares = y * y
    return jnp.sqrt(jnp.mean(squares, axis=0, keepdims=True) + squares + 2.0**-40)


def _encoder(kind: _Kind, pack: Callable[[_Found], Encoded]) -> Encoder:
    def blocks(x: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
        if weight is not None or kind.coarse:
            size = _by_size(x)
            weight = size if weight is None else size * weight
            weight = weight if kind.power == 1 else weight**kind.power
        return pack(_encode(x, weight, search, kind))

    # Well below what the scales reach: weights of about one size are best as the smallest value under a large scale.
    reach = (2 * kind.top + 1) * kind.step * max(kind.values) / 8
    return Encoder(blocks, reach * HALF_MAX, tile=1 << 21)  # tables of 40 times that in float32


# Sub-blocks of 32 gaussian weights want about the second candidate; a wide range costs little where it is not of use,
# and made up to a tenth of the error of weights with an importance.
# Neighbours of s take 1 to 5% off the error of three bits, and less than 1% off that of two.
_NEAR = (0, -1, 1)
_UP_TO_43, _TWO_BITS = (8, 25, 43), (0.05, 0.04, 0.03, 0.065)
_TERNARY, _ONE_BIT = (-8, 0, 8), (0.13, 0.1)
_KINDS: dict[str, tuple[_Kind, Callable[[_Found], Encoded]]] = {
    "iq3_xxs": (
        _Kind(
            "iq3_xxs",
            (4, 12, 20, 28, 36, 44, 52, 62),
            0.25,
            32,
            even=True,
            candidates=(0.04, 0.034, 0.028, 0.05),
            neighbours=_NEAR,
        ),
        _iq3_xxs,
    ),
    "iq3_s": (
        _Kind("iq3_s", tuple(range(1, 16, 2)), 1.0, 32, candidates=(0.17, 0.14, 0.11, 0.21), neighbours=_NEAR),
        _iq3_s,
    ),
    "iq2_xxs": (_Kind("iq2_xxs", _UP_TO_43, 0.125, 32, even=True, candidates=_TWO_BITS, power=0.5), _iq2_xxs),
    "iq2_xs": (_Kind("iq2_xs", _UP_TO_43, 0.125, 16, even=True, candidates=_TWO_BITS, power=0.5), _iq2_xs),
    "iq2_s": (_Kind("iq2_s", _UP_TO_43, 0.125, 16, candidates=_TWO_BITS, power=0.5), _iq2_s),
    "iq1_s": (_Kind("iq1", _TERNARY, 0.125, 32, 7, shifts=(1, -1), candidates=_ONE_BIT, power=0.8), _iq1_s),
    "iq1_m": (_Kind("iq1", _TERNARY, 0.125, 16, 7, shifts=(1, -1), run=8, candidates=_ONE_BIT, power=0.8), _iq1_m),
}
IQ: dict[str, Encoder] = {name: _encoder(kind, pack) for name, (kind, pack) in _KINDS.items()}
