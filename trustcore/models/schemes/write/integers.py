"""Packed matrices of integers in one form, from which the writers of other packages' files start.

    w[k, n] = scale[k // run, n] * (code[k, n] - zero[k // run, n])        code unsigned, of `bits` bits

Formats of that form: int2 to int8 with scales of any granularity, `ternary` (as int2), and GGUF's q4_0, q5_0, q8_0.
Scales of a whole tensor, or of blocks, are repeated for each output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import ModelError
from trustcore.quant import QuantizedArray
from trustcore.quant.formats.layout import BlockFormat
from trustcore.quant.formats.scaled import ScaledFormat

_BLOCKS = {"q4_0": 4, "q5_0": 5, "q8_0": 8}
FORMATS = (*(f"int{bits}" for bits in range(2, 9)), "ternary", *_BLOCKS)


@dataclasses.dataclass(frozen=True)
class Integers:
    """A matrix of the form of the header.

    Attributes:
        bits: of a code.
        k, n: inputs and outputs.
        run: rows of K under one scale; K where there is one for each output.
        scale: float `[K / run, N]`.
        zero: uint8 `[K / run, N]`, or None: 2**(bits-1).
        order: int32 `[K]`, or None: row r of the codes is row order[r] of the matrix.
        codes: makes uint8 `[K, N]`, in stored order.
    """

    bits: int
    k: int
    n: int
    run: int
    scale: np.ndarray
    zero: np.ndarray | None
    order: np.ndarray | None
    codes: Callable[[], np.ndarray]

    @property
    def groups(self) -> int:
        """Scales of an output."""
        return self.k // self.run

    def logical_codes(self) -> np.ndarray:
        """Returns uint8 `[K, N]`, in the order of the matrix."""
        codes = self.codes()
        if self.order is None:
            return codes
        logical = np.empty_like(codes)
        logical[self.order] = codes
        return logical

    def group_index(self) -> np.ndarray:
        """Returns int32 `[K]`: the group of each row of the matrix."""
        stored = np.arange(self.k, dtype=np.int32) // self.run
        if self.order is None:
            return stored
        logical = np.empty_like(stored)
        logical[self.order] = stored
        return logical

    def zeros(self) -> np.ndarray:
        """Returns the zero points, uint8 `[K / run, N]`, where there are none as well."""
        return np.full(self.scale.shape, 1 << (self.bits - 1), np.uint8) if self.zero is None else self.zero


def integers(weight: QuantizedArray) -> Integers | None:
    """Returns a matrix `[K, N]` in the form of the header; None where its format is another.

    Raises:
        ModelError: its zero points are no integers of the codes' range.
    """
    spec = weight.spec
    k, n = weight.stored_shape[-2:]
    if weight.format not in FORMATS or weight.transposed or weight.ndim != 2 or 0 in (k, n):
        return None
    if isinstance(spec, BlockFormat):
        assert spec.affine is not None
        bits, affine, half = _BLOCKS[weight.format], spec.affine, 1 << (_BLOCKS[weight.format] - 1)
        scale = np.asarray(weight.fields["scale"])

        def block_codes() -> np.ndarray:
            centred = np.asarray(jax.jit(affine.codes)(weight.fields)).reshape(k, n)
            return (centred.astype(np.int16) + half).astype(np.uint8)

        return Integers(bits, k, n, spec.block, scale, None, None, block_codes)
    assert isinstance(spec, ScaledFormat)
    bits = spec.bits
    run, span = spec.granularity(weight.fields)
    scale = _widened(np.asarray(weight.fields["scale"]), span, n)
    if k % run:
        return None
    zero = weight.fields.get("zero")
    order = weight.fields.get("order")
    ternary = weight.format == "ternary"  # code - 1 is (code + 1) - 2

    def codes() -> np.ndarray:
        stored = np.asarray(jax.jit(spec.codes)(weight.fields))
        if bits == 8:
            return stored.view(np.uint8) ^ np.uint8(128)
        return stored + np.uint8(1) if ternary else stored

    points = None if zero is None else _points(np.asarray(zero), bits, ternary)
    return Integers(
        bits, k, n, run, scale,
        None if points is None else _widened(points, span, n),
        None if order is None else np.asarray(order),
        codes,
    )  # fmt: skip


def half_scale(scale: np.ndarray) -> np.ndarray:
    """Returns scales as float16, rounded where they are wider.

    Raises:
        ModelError: one is too large or too small for float16.
    """
    if scale.dtype == np.float16:
        return scale
    wide = scale.astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        narrow = wide.astype(np.float16)
    if not np.isfinite(narrow).all() or ((narrow == 0) & (wide != 0)).any():
        raise ModelError("has scales that float16 cannot hold")
    return narrow


def _widened(values: np.ndarray, span: int, n: int) -> np.ndarray:
    """`[G, N]` of `[G, C]`, each column standing for `span` outputs; 0: for all."""
    if span == 1:
        return values
    return np.repeat(values, span or n, axis=-1)[..., :n]


def _points(zero: np.ndarray, bits: int, ternary: bool) -> np.ndarray:
    """Zero points in units of unsigned codes."""
    wide = zero.astype(np.float32) + (128 if bits == 8 else 1 if ternary else 0)
    if not bool(((wide == np.round(wide)) & (wide >= 0) & (wide < 1 << bits)).all()):
        raise ModelError(f"has zero points that are no integers of {bits} bits")
    return wide.astype(np.uint8)


def float_values(weight: QuantizedArray, dtype: type | np.dtype) -> np.ndarray:
    """Returns the decoded matrix in its logical orientation.

    Raises:
        ModelError: a weight is too large for the dtype.
    """
    decoded = np.asarray(jnp.asarray(jax.jit(QuantizedArray.dequantize)(weight)))
    with np.errstate(over="ignore"):
        narrow = decoded.astype(dtype)
    if not bool(np.isfinite(narrow.astype(np.float32)).all()):
        raise ModelError(f"has weights that {np.dtype(dtype).name} cannot hold")
    return narrow
