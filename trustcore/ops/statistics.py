"""What an array holds, as a few words: extremes, moments, counts of what is not a plain number, magnitudes by order.

    x [..., C] -> uint32 [WORDS]:   FLOATS  over finite values, as their bits
                                    COUNTS  of elements, columns and rows
                                    BINS    of magnitudes: bin b holds 2 ** (4 b - 127) <= |x| < 2 ** (4 b - 123)

Bin 0 also holds zeros and subnormals, the last one Inf and NaN. A column is the last axis (a unit, a channel), a row
all others together; those of zeros are counted where there are two rows or more. Moments are accumulated in float32
(the CPU handler: float64 beyond blocks of 1024): the standard deviation is good to some 3e-4 of the mean. Classes are
told by bit patterns, so subnormals are seen where the device flushes them. O(elements) in one pass, no copy of x.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from trustcore.errors import ImplementationError
from trustcore.ops import cpu

FLOATS = ("least", "greatest", "mean", "std", "rms", "norm")
COUNTS = ("zeros", "nan", "inf", "negative_inf", "subnormal", "tiny", "huge", "dead_columns", "zero_rows")
BINS = 64
WORDS = len(FLOATS) + len(COUNTS) + 1 + BINS
TINY, HUGE = 1e-7, 1e6

_INF, _SIGN = 0x7F800000, 0x80000000
_NATIVE = ("float32", "bfloat16", "float16")


def statistics(x: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """Returns the words of x, uint32 `[WORDS]`, see the head of this file.

    Args:
        x: floats or complex numbers (whose parts count as elements) of any shape.
        implementation: "native" (CPU, one device, float32, bfloat16, float16) or "xla"; None: "xla".

    Raises:
        ImplementationError: x is neither, or "native" is not there.
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ImplementationError(f"statistics: x must hold floats or complex numbers, not {x.dtype}")
    if implementation == "native" and x.dtype.name in _NATIVE and x.size:
        return cpu.statistics(_rows(x))
    if implementation not in (None, "xla", "native"):
        raise ImplementationError(f"statistics: no implementation {implementation!r}; there are 'native' and 'xla'")
    return _xla(x)


def native_refusal(dtype: Any) -> str:
    """Returns why "native" would not serve arrays of a dtype; "" when it does."""
    if jnp.dtype(dtype).name not in _NATIVE:
        return f"it knows only {', '.join(_NATIVE)}"
    return cpu.why_not("statistics")


def worst_bits(x: jax.Array) -> jax.Array:
    """Returns the bits of the largest magnitude as float32, uint32: above those of Inf if there is a NaN."""
    words = _magnitudes(_as_float32(x))
    return jnp.max(words, initial=np.uint32(0)) if words.size else jnp.zeros((), jnp.uint32)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(1, -1)


def _as_float32(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if x.dtype == jnp.float64:
        most = float(np.finfo(np.float32).max)
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -most, most), x)
    return x.astype(jnp.float32)


def _magnitudes(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(_SIGN - 1)


def _bits(value: float) -> np.uint32:
    return np.float32(value).view(np.uint32)


def _xla(x: jax.Array) -> jax.Array:
    normal = _bits(float(jnp.finfo(x.dtype).tiny)) if x.dtype != jnp.float64 else _bits(1.1754944e-38)
    if not x.size:
        return jnp.zeros((WORDS,), jnp.uint32)
    x = _rows(_as_float32(x))
    a = _magnitudes(x)
    finite = a < _INF
    kept = jnp.where(finite, x, 0.0)
    classes = {
        "finite": finite,
        "zeros": a == 0,
        "nan": a > _INF,
        "inf": jnp.logical_and(a == _INF, x > 0),
        "negative_inf": jnp.logical_and(a == _INF, x < 0),
        "subnormal": jnp.logical_and(a > 0, a < normal),
        "tiny": jnp.logical_and(a > 0, a < _bits(TINY)),
        "huge": jnp.logical_and(a > _bits(HUGE), finite),
    }
    operands = (
        jnp.where(finite, x, np.inf),
        jnp.where(finite, x, -np.inf),
        kept,
        kept * kept,
        *(mask.astype(jnp.int32) for mask in classes.values()),
    )
    starts = (np.float32(np.inf), np.float32(-np.inf), np.float32(0), np.float32(0), *[np.int32(0)] * len(classes))
    joins = (jnp.minimum, jnp.maximum, *[lax.add] * (2 + len(classes)))

    def join(left: Any, right: Any) -> tuple[jax.Array, ...]:
        return tuple(f(a, b) for f, a, b in zip(joins, left, right, strict=True))

    rows = x.shape[0]
    least, greatest, total, squares, *counts = lax.reduce(operands, starts, join, (0,) if rows > 1 else (0, 1))
    sums = dict(zip(classes, counts, strict=True))
    dead = jnp.sum(sums["zeros"] == rows, dtype=jnp.int32) if rows > 1 else jnp.int32(0)
    zero_rows = jnp.sum(jnp.max(a, axis=1) == 0, dtype=jnp.int32) if rows > 1 else jnp.int32(0)
    least, greatest, total, squares = jnp.min(least), jnp.max(greatest), jnp.sum(total), jnp.sum(squares)
    sums = {name: jnp.sum(count) for name, count in sums.items()}
    n = jnp.maximum(sums["finite"], 1).astype(jnp.float32)
    mean, square = total / n, squares / n
    floats = [least, greatest, mean, jnp.sqrt(jnp.maximum(square - mean * mean, 0.0)), jnp.sqrt(square)]
    floats.append(jnp.sqrt(squares))
    counts = [*(sums[name] for name in COUNTS[:7]), dead, zero_rows, jnp.int32(0)]
    bins = jnp.zeros((BINS,), jnp.int32).at[(a >> np.uint32(25)).reshape(-1).astype(jnp.int32)].add(1)
    return jnp.concatenate(
        [
            lax.bitcast_convert_type(jnp.stack(floats), jnp.uint32),
            lax.bitcast_convert_type(jnp.stack(counts), jnp.uint32),
            lax.bitcast_convert_type(bins, jnp.uint32),
        ]
    )
