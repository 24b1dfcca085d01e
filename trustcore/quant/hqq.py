"""HQQ: integer codes with float zero points, fitted without any data, robustly against outlying weights.

    minimize over z    sum |w - s (q - z)|^p,    q = clip(round(w / s + z)),    p < 1

s is the range of a group over the number of steps. With e standing for the error, half-quadratic splitting alternates
two steps that both have closed forms (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models",
2023, equations 3 to 6), beta growing by kappa from one to the next:

    e = sign(r) max(|r| - |r|^(p-1) / beta, 0),    r = w / s - (q - z)
    z = mean over the group of (q - (w / s - e))

We measure errors in steps of the group, where the authors' code has them in units of the weights: there the shrinkage
depends on how large weights happen to be, and for a language model's it is zero throughout. Each group keeps the best
zero point that it met, so none is worse than the start, `z = -min / s`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from trustcore.errors import QuantizationError
from trustcore.quant.array import QuantizedArray
from trustcore.quant.encode.encoder import fold
from trustcore.quant.encode.search import half
from trustcore.quant.folding.structure import Leaves
from trustcore.quant.formats import get_format
from trustcore.quant.formats.scaled import ScaledFormat
from trustcore.quant.quantize import Predicate, is_matrix

BITS = {f"int{bits}": bits for bits in range(2, 9)}
_LARGEST_ZERO = 1024.0  # float16 then holds zero points to half a step or better
_LARGEST_WEIGHT = 65504.0


def hqq(
    tree: Any,
    format: str = "int4:g64",
    *,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
    where: Predicate | None = None,
    transposed: Predicate | None = None,
) -> Any:
    """Returns `tree` with its matrices packed as integers with float zero points; no data is needed.

    Args:
        tree: a pytree of float weights.
        format: "int2" to "int8", and after a colon the rows that share a scale: "int4:g64"; "int4:channel" is all rows.
        p: exponent of the error, above 0 and at most 1: the smaller, the less outliers count.
        beta: weight of the quadratic term in the first iteration, per squared step.
        kappa: what beta is multiplied by after each iteration.
        iterations: how many.
        where: which leaves, by (path, array); None: matrices that are no norms or routers and whose K the group
            divides.
        transposed: which are `[N, K]`; None: those called "table" or "embedding".

    Raises:
        QuantizationError: the format is no integer format, a selected leaf is no float matrix, its K does not fit, or
            it holds NaN; or nothing would be packed. All faults in one message.

    Scales and zero points are float16. O(iterations * K * N); temporaries of a few matrices.
    """
    bits, group = parse_format(format)
    if not 0 < p <= 1 or beta <= 0 or kappa < 1 or iterations < 0:
        raise QuantizationError(
            f"hqq: p={p}, beta={beta}, kappa={kappa}, iterations={iterations}; p lies in (0, 1], beta is positive, "
            "kappa at least 1, iterations not negative."
        )
    leaves = Leaves(tree, transposed=transposed, method="hqq")
    chosen, faults, passed_over = [], [], []
    for path, leaf in leaves.items():
        if not (where or is_matrix)(path, leaf) or (where is None and isinstance(leaf, QuantizedArray)):
            continue
        wrong = leaves.faults(path, ndims=(2,))
        if not wrong:
            fault = _misfit(leaves.matrix(path).shape[0], bits, group)
            if fault and where is None:
                passed_over.append(f"{path}: {fault}")
                continue
            wrong = [f"{path}: {fault}"] if fault else []
        if not wrong:
            largest = float(jnp.max(jnp.abs(leaves.matrix(path).astype(jnp.float32)), initial=0))
            if not largest <= _LARGEST_WEIGHT:
                wrong = [f"{path}: its largest weight is {largest}; weights must be finite and at most 65504"]
        faults += wrong
        chosen.append(path)
    if not chosen and not faults:
        faults = ["nothing to pack: " + ("; ".join(passed_over[:20]) or "`where` selects no leaf")]
    leaves.refuse(faults)
    for path in chosen:
        matrix = leaves.matrix(path).astype(jnp.float32)
        codes, scale, zero = hqq_codes(matrix, bits, group or matrix.shape[0], p, beta, kappa, iterations)
        fields = pack_codes(codes, bits) | {"scale": scale.astype(jnp.float16), "zero": zero.astype(jnp.float16)}
        leaves.put(path, QuantizedArray(f"int{bits}", fields, transposed=leaves.is_transposed(path)))
    return leaves.tree()


@functools.partial(jax.jit, static_argnums=(1, 2))
def hqq_codes(
    weights: jax.Array, bits: int, group: int, p: float, beta: float, kappa: float, iterations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns codes (int32 `[K, N]`), scales and zero points (float32 `[K / group, N]`, float16 numbers).

    Codes are those of the stored format: from 0, for 8 bits from -128.
    """
    k, n = weights.shape
    first = -128 if bits == 8 else 0
    levels = 2**bits - 1
    w = weights.reshape(k // group, group, n)
    low, high = jnp.min(w, axis=1), jnp.max(w, axis=1)
    # No smaller than what keeps zero points within float16's reach; a group of zeros has any scale.
    scale = jnp.maximum((high - low) / levels, jnp.maximum(high, -low) / _LARGEST_ZERO)
    scale = half(jnp.where(scale > 0, scale, 1))
    y = w / scale[:, None, :]

    def place(zero: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(y + zero[:, None, :]), first, first + levels)

    def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        zero, best, least = state
        codes = place(zero)
        r = y - (codes - zero[:, None, :])
        size = jnp.abs(r)
        power = jnp.where(size > 0, size, 1) ** (p - 1)  # infinite at 0, where the shrinkage is 0 anyhow
        error = jnp.sum(size * power, axis=1)
        e = jnp.sign(r) * jnp.maximum(size - power / (beta * kappa**i), 0)
        following = _half_precision(jnp.mean(codes - (y - e), axis=1))
        return following, jnp.where(error < least, zero, best), jnp.minimum(error, least)

    start = _half_precision(first - low / scale)
    # Once more than there are iterations, to measure the last zero point.
    _, zero, _ = jax.lax.fori_loop(0, iterations + 1, step, (start, start, jnp.full_like(start, jnp.inf)))
    return place(zero).astype(jnp.int32).reshape(k, n), scale, zero


def pack_codes(codes: jax.Array, bits: int) -> dict[str, jax.Array]:
    """Returns the planes of integer codes `[K, N]` as the format `int<bits>` stores them."""
    if bits == 8:
        return {"codes": codes.astype(jnp.int8)}
    planes, below = {}, 0
    for plane in _format(bits).planes:
        planes[plane.name] = fold((codes >> below) & (2**plane.bits - 1), plane.bits)
        below += plane.bits
    return planes


def _format(bits: int) -> ScaledFormat:
    format = get_format(f"int{bits}")
    assert isinstance(format, ScaledFormat)
    return format


def _half_precision(zero: jax.Array) -> jax.Array:
    return zero.astype(jnp.float16).astype(jnp.float32)


def parse_format(format: str) -> tuple[int, int]:
    """Returns bits and group, 0 for all rows.

    Raises:
        QuantizationError: it is none of the formats that `hqq` packs in.
    """
    name, _, grain = format.partition(":")
    if name in BITS and grain in ("", "channel"):
        return BITS[name], 0 if grain else 64
    if name in BITS and grain[:1] == "g" and grain[1:].isdigit() and int(grain[1:]):
        return BITS[name], int(grain[1:])
    raise QuantizationError(
        f'hqq: format {format!r} is none of {", ".join(BITS)}, with rows that share a scale such as "int4:g64".'
    )


def _misfit(k: int, bits: int, group: int) -> str | None:
    multiple = _format(bits).multiple
    if group and k % group:
        return f"K={k} is not a multiple of the group of {group}"
    return f"K={k} is not a multiple of {multiple}, which int{bits} packs together" if k % multiple else None
