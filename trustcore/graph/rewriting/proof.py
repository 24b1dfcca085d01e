"""Whether a replacement computes what it replaces: both are run on random operands of the shapes at hand.

    |replacement - region| <= tolerance * max |region|      element by element, for each result; where the region is not
                                                            finite, the replacement must be the same
    the same for the gradients of sum(result * random) in every operand of floats, unless the rule is exact

Tolerances are those of the narrowest dtype in play. An exact rule must give equal bits (two NaNs are equal), and its
operands hold zeros of both signs, infinities and NaN as well. Proofs are kept: a region that was proven is not run
again in this process.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import jaxpr_as_fun

from trustcore import units
from trustcore.graph.rewriting.rule import Match
from trustcore.graph.rewriting.terms import Value, evaluate

# A few times the rounding of one number, for sums that are taken in another order.
TOLERANCES = {"float64": 1e-11, "float32": 3e-5, "bfloat16": 3e-2, "float16": 4e-3}
_GRADIENT = 4.0  # a gradient has about twice the operations of its function, in a row
BUDGET = 4 << 30  # bytes of intermediate values, of both, up to which they are run

_KEPT: dict[Any, Proof] = {}
_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Proof:
    """What came of running both.

    Attributes:
        error: the largest difference, of results and gradients, relative to the largest number of the region's.
        reason: why the replacement is refused; "" where it is not.
    """

    error: float
    reason: str = ""


def prove(match: Match, replacement: Any, *, exact: bool, budget: int = BUDGET) -> Proof:
    """Returns whether a match's replacement may stand in its place.

    Args:
        match: the place.
        replacement: the replacement's program, a ClosedJaxpr of the operands.
        exact: whether equal bits are asked for.
        budget: bytes of intermediate values up to which it is run.
    """

    def region(*operands: Any) -> list[Any]:
        return evaluate(match.outputs, dict(zip(match.operands, operands, strict=True)))

    kinds = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in match.operands]
    with jax.ensure_compile_time_eval():
        closed = jax.make_jaxpr(region)(*kinds)
        size = sum(_nbytes(value) for node in match.nodes for value in node.outputs)
        if size > budget:
            return Proof(
                0.0, f"{units.size(size)} of intermediate values are more than a proof may take (proof_budget=)"
            )
        key = (str(closed), str(replacement), tuple(map(_bytes, (*closed.consts, *replacement.consts))), exact)
        with _LOCK:
            if key in _KEPT:
                return _KEPT[key]
        proof = _run(match, region, jaxpr_as_fun(replacement), kinds, exact)
    with _LOCK:
        _KEPT[key] = proof
    return proof


def _run(match: Match, region: Any, replacement: Any, kinds: Sequence[Any], exact: bool) -> Proof:
    numbers = np.random.default_rng(20)
    operands = (match.sample or (lambda numbers: random_operands(numbers, kinds, special=exact)))(numbers)
    smooth = [i for i, kind in enumerate(kinds) if jnp.issubdtype(kind.dtype, jnp.floating)]
    if exact or not all(jnp.issubdtype(out.dtype, jnp.floating) for out in match.outputs):
        smooth = []
    weights = random_operands(numbers, [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in match.outputs])
    (plain, slopes), (other, others) = (jax.jit(_both(fn, smooth))(operands, weights) for fn in (region, replacement))
    if exact:
        same = all(_same_bits(np.asarray(a), np.asarray(b)) for a, b in zip(plain, other, strict=True))
        return Proof(0.0) if same else Proof(np.inf, "results are not equal bit by bit")
    tolerance = max(TOLERANCES.get(str(v.dtype), 0.0) for v in (*match.operands, *match.outputs))
    worst = max(map(difference, other, plain))
    if not worst <= tolerance:
        return Proof(worst, f"results differ by {worst:.1e} of the largest, {tolerance:.0e} is allowed")
    steep = max(map(difference, others, slopes), default=0.0)
    if not steep <= _GRADIENT * tolerance:
        allowed = f"{_GRADIENT * tolerance:.0e}"
        return Proof(max(worst, steep), f"gradients differ by {steep:.1e} of the largest, {allowed} is allowed")
    return Proof(max(worst, steep))


def _both(fn: Callable[..., Any], smooth: Sequence[int]) -> Callable[..., Any]:
    """Results, and the gradients of their sums with random weights."""

    def both(operands: Sequence[Any], weights: Sequence[Any]) -> Any:
        def of(*moving: Any) -> Any:
            given = list(operands)
            for i, x in zip(smooth, moving, strict=True):
                given[i] = x
            return list(fn(*given))

        if not smooth:
            return of(), []
        results, pull = jax.vjp(of, *(operands[i] for i in smooth))
        return results, pull(list(weights))

    return both


def random_operands(numbers: np.random.Generator, kinds: Sequence[Any], *, special: bool = False) -> list[Any]:
    """Returns an array for each shape and dtype: normal floats, integers of 0 to 7, both truth values.

    Args:
        numbers: where they come from.
        kinds: shapes and dtypes.
        special: whether floats hold zeros of both signs, infinities and NaN, too.
    """
    made: list[Any] = []
    for kind in kinds:
        if jnp.issubdtype(kind.dtype, jax.dtypes.prng_key):
            count = int(np.prod(kind.shape, dtype=int))
            made.append(jax.random.split(jax.random.key(int(numbers.integers(1 << 30))), count).reshape(kind.shape))
        elif jnp.issubdtype(kind.dtype, jnp.floating):
            x = numbers.standard_normal(kind.shape, np.float32)
            if special:
                places = np.arange(x.size).reshape(x.shape) % 11
                for place, number in ((3, 0.0), (5, -0.0), (7, np.inf), (8, -np.inf), (9, np.nan)):
                    x = np.where(places == place, np.float32(number), x)
            made.append(x.astype(kind.dtype))
        elif jnp.issubdtype(kind.dtype, jnp.complexfloating):
            real, imaginary = numbers.standard_normal((2, *kind.shape))
            made.append((real + 1j * imaginary).astype(kind.dtype))
        elif kind.dtype == jnp.bool_:
            made.append(numbers.random(kind.shape) < 0.5)
        else:
            made.append(numbers.integers(0, 8, kind.shape).astype(kind.dtype))
    return made


def difference(found: Any, wanted: Any) -> float:
    """Returns the largest difference relative to the largest finite number wanted; inf where others disagree."""
    if jnp.issubdtype(found.dtype, jax.dtypes.prng_key) or not jnp.issubdtype(found.dtype, jnp.inexact):
        found, wanted = (
            np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
            for x in (found, wanted)
        )
        return 0.0 if np.array_equal(found, wanted) else np.inf
    a, b = (np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64) for x in (found, wanted))
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return np.inf
    if not finite.any():
        return 0.0
    return float(np.max(np.abs(a - b), where=finite, initial=0.0) / max(np.max(np.abs(b[finite])), 1e-30))


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    nan = np.isnan(a.astype(np.float64)) if a.dtype.kind in "fV" else np.zeros(a.shape, bool)
    other = np.isnan(b.astype(np.float64)) if a.dtype.kind in "fV" else nan
    return np.array_equal(nan, other) and a[~nan].tobytes() == b[~nan].tobytes()


def _bytes(value: Any) -> Any:
    if isinstance(value, Tracer):
        return id(value)
    return hash(np.asarray(value).tobytes()) if getattr(value, "dtype", None) is not None else value


def _nbytes(value: Value) -> int:
    return value.aval.size * value.dtype.itemsize if hasattr(value.aval, "size") else 0
