"""Formats whose scales have any granularity: integers, 8-bit floats, MX floats, tables of 16 numbers.

    w[k, n] = scale[k // run, n // span] * number(codes[k, n])             symmetric
    w[k, n] = scale[k // run, n // span] * (codes[k, n] - zero[...])       with `zero`: integers only

    codes   int8 or float8 [..., K, N]; codes of fewer bits lie in *planes*, uint8 [..., K * bits / 8, N]: row
            i * (8 / bits) + j of K at bits j * bits and up of byte i. A code of 3, 5, 6 or 7 bits has one plane for its
            low bits (`codes`) and one or two for the others (`high`, `top`).
    scale   [..., G, C], any float dtype; MX: uint8, powers of two (E8M0)
    zero    as scale, in units of the stored codes, any dtype
    order   int32 [..., K]: stored row r is row order[r] of the logical matrix

Granularity is read off the shape of `scale`: G is 1 (`run` = K), K / run, or ceil(K / 128); C is N, 1 (all columns), or
ceil(N / 128). Where G says both, ceil(K / 128) runs of 128 (the last one shorter) or as many equal ones, integers have
equal runs and the others runs of 128, as checkpoints in 8-bit floats do.

Double quantization (QLoRA, arXiv 2305.14314, section 3) keeps the scales of `nf4` and `fp4` in bytes as well:

    scale = levels[code] * nested + offset       code uint8 [..., G, N], levels [..., 256, 1], offset [..., 1, 1]

`nested` has an entry for 256 scales, counted along the flattened [N, G]: [..., 1, ceil(N / span)] with span = 256 / G
where G divides 256, [..., G / 256, N] where 256 divides G. For any other G, `span` is the largest power of two with
span * G <= 256, or 1; bitsandbytes' own blocks then run across the columns and cannot be kept packed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from trustcore import _jax
from trustcore.errors import QuantizationError
from trustcore.quant.formats import numbers
from trustcore.quant.formats.bits import unfold
from trustcore.quant.formats.format import Affine, Fields, Format, Streamed

BLOCK = 128  # of weights in both directions, where scales belong to square blocks
NESTED = 256  # scales under one nested scale
# Rows of codes taken apart at a time: integers to bytes, the others to float32.
_STREAMED_ROWS, _STREAMED_FLOATS = 128, 32


@dataclasses.dataclass(frozen=True)
class Plane:
    """A field of codes: `bits` of each of them, or whole numbers of `dtype` where bits is 8."""

    name: str
    bits: int
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.uint8))


@dataclasses.dataclass(frozen=True)
class ScaledFormat(Format):
    """One way to store weights under scales of any granularity.

    Args:
        name: as in `QuantizedArray.format`.
        planes: fields of the codes, lowest bits first.
        numbers: codes to the numbers that are scaled, elementwise, exactly.
        integer: whether codes are integers, which may have a zero point.
        group: rows of K under one scale if nobody says otherwise; 0: all of K.
        powers: whether scales are powers of two (MX); the group is fixed then.
        tabled: whether the scales may themselves be codes (nf4, fp4).
    """

    few_rows: ClassVar[int] = _jax.STREAM_ROWS

    name: str
    planes: tuple[Plane, ...]
    numbers: Callable[[jax.Array], jax.Array]
    integer: bool = False
    group: int = 0
    powers: bool = False
    tabled: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return sum(plane.bits for plane in self.planes)

    @property
    def multiple(self) -> int:
        """What K must be a multiple of for the codes to fill whole bytes."""
        return max(8 // plane.bits for plane in self.planes)

    @property
    def field_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """See `Format`."""
        optional = ("zero",) * self.integer + ("levels", "nested", "offset") * self.tabled
        return (*(plane.name for plane in self.planes), "scale"), (*optional, "order")

    def stored_shape(self, fields: Fields) -> tuple[int, ...]:
        """See `Format`."""
        plane = self.planes[0]
        *lead, rows, n = fields[plane.name].shape
        return (*lead, rows * (8 // plane.bits), n)

    def codes(self, fields: Fields) -> jax.Array:
        """Returns the codes `[..., K, N]`: int8, a float8, or uint8 below 2**bits."""
        first, *others = self.planes
        if first.bits == 8:
            return fields[first.name]
        joined, below = unfold(fields[first.name], first.bits), first.bits
        for plane in others:
            joined = joined | unfold(fields[plane.name], plane.bits) << jnp.uint8(below)
            below += plane.bits
        return joined

    def scale(self, fields: Fields) -> jax.Array:
        """Returns the scales, float32 `[..., G, C]`."""
        scale = fields["scale"]
        if self.powers:
            return numbers.power_of_two(scale)
        if "levels" not in fields:
            return scale.astype(jnp.float32)
        levels, offset = (fields[name].astype(jnp.float32) for name in ("levels", "offset"))
        absolute = _looked_up(levels[..., 0], scale) * self._nested(fields)
        return _rounded(absolute) + offset

    def matrix(self, fields: Fields) -> jax.Array:
        """See `Format`."""
        *lead, k, n = self.stored_shape(fields)
        run, span = self.granularity(fields)
        codes, zero = self.codes(fields), fields.get("zero")
        scale = widened(self.scale(fields), span, n)
        if k % run:  # the last run is shorter
            scale = jnp.repeat(scale, run, axis=-2)[..., :k, :]
            if zero is None:
                return self.numbers(codes).astype(jnp.float32) * scale
            zero = jnp.repeat(widened(zero.astype(jnp.float32), span, n), run, axis=-2)[..., :k, :]
            return (codes.astype(jnp.float32) - zero) * scale
        runs = (*lead, k // run, run, n)
        # Stored first, or XLA computes a run's scale anew for each of its weights; see `layout.decode_affine`.
        scale = _jax.computed_once(scale)[..., None, :]
        if zero is None:
            return (self.numbers(codes).astype(jnp.float32).reshape(runs) * scale).reshape(*lead, k, n)
        zero = _jax.computed_once(widened(zero.astype(jnp.float32), span, n))[..., None, :]
        return ((codes.astype(jnp.float32).reshape(runs) - zero) * scale).reshape(*lead, k, n)

    def granularity(self, fields: Fields) -> tuple[int, int]:
        """Returns (run, span): how many rows and columns share a scale; a span of 0 means all columns.

        Raises:
            QuantizationError: the shape of `scale` fits no granularity, or that of `zero` is another.
        """
        *_, k, n = self.stored_shape(fields)
        *_, g, c = fields["scale"].shape
        zero = fields.get("zero")
        if zero is not None and zero.shape != fields["scale"].shape:
            self._misfit(fields, f"its zero is {list(zero.shape)}; both must have one shape")
        run, span = self.run(k, g), span_of(n, c)
        if run is None or span is None:
            self._misfit(
                fields,
                f"rows of the scale must be 1, a divisor of K={k} or {-(-k // BLOCK)}, and its columns {n}, 1 or "
                f"{-(-n // BLOCK)}",
            )
        if self.powers and (run, span) != (self.group, 1) and k and n:
            self._misfit(fields, f"it takes a scale for each {self.group} rows of each column")
        return run, span

    def readied(self, fields: Fields) -> Fields:
        """Returns the fields with float8 codes as bytes.

        XLA's CPU compiler slices a float8 by way of another float, number by number: products of one row then run at
        0.2 G weights/s in place of 2.5 (K=2048, N=8192, two cores, 2026-11). The price is a copy of the bytes.
        """
        codes = fields.get("codes")
        if codes is None or not jnp.issubdtype(codes.dtype, jnp.floating):
            return fields
        return {**fields, "codes": jax.lax.bitcast_convert_type(codes, jnp.uint8)}

    def run(self, k: int, g: int) -> int | None:
        """Returns the rows of K under each of g scales; None where g fits no granularity."""
        if k == 0 or g == 0:
            return 1 if k == 0 else None
        in_blocks = g == -(-k // BLOCK)
        if in_blocks and (k % g or not self.integer):
            return min(BLOCK, k)
        return None if k % g else k // g

    def spans(self, fields: Fields) -> dict[str, int]:
        """See `Format`."""
        _, span = self.granularity(fields)
        own = {"scale": span, "zero": span, "order": 0, "levels": 0, "offset": 0}
        spans = {name: own.get(name, 1) for name in fields}
        if "nested" in fields:
            *_, m, n = fields["scale"].shape
            spans["nested"] = self._nested_span(m, n, fields["nested"].shape)
        return spans

    def trained(self, fields: Fields) -> tuple[str, ...]:
        """See `Format`."""
        planes = [plane.name for plane in self.planes]
        return tuple(n for n, f in fields.items() if n not in planes and jnp.issubdtype(f.dtype, jnp.floating))

    def describe(self, fields: Fields) -> str:
        """See `Format`."""
        *_, k, n = self.stored_shape(fields)
        run, span = self.granularity(fields)
        if self.powers:
            return self.name
        if span == BLOCK and run in (BLOCK, k):
            grain = f"{BLOCK}x{BLOCK}"
        elif run >= k:
            grain = "channel" if span == 1 else "tensor" if span == 0 else f"{k}x{BLOCK}"
        else:
            grain = f"g{run}" if span == 1 else f"{run}x{n if span == 0 else BLOCK}"
        return f"{self.name}:{grain}" + ":asym" * ("zero" in fields) + ":double" * ("levels" in fields)

    def streamed(self, fields: Fields) -> Streamed | str:
        """See `Format`."""
        fields = self.readied(fields)
        k, n = self.stored_shape(fields)
        run, span = self.granularity(fields)
        if k % run:
            return f"its runs of {run} rows do not divide K={k}; use 'tiles'."
        most = min(run, _STREAMED_ROWS if self.integer else _STREAMED_FLOATS)
        sizes = [rows for rows in range(self.multiple, most + 1, self.multiple) if run % rows == 0]
        if not sizes or sizes[-1] < min(run, 16):
            return f"runs of {run} rows fall into no equal parts of whole bytes; use 'tiles'."
        block = sizes[-1]
        count = k // block

        def per_block(values: jax.Array) -> jax.Array:  # [G, C] -> [K / block, N]
            values = jnp.broadcast_to(widened(values, span, n), (values.shape[0], n))
            return jnp.repeat(values, count // values.shape[0], axis=0)

        scale, zero = self.scale(fields), fields.get("zero")
        parts = {p.name: fields[p.name].reshape(count, -1, n) for p in self.planes} | {"scale": per_block(scale)}
        if zero is None:
            return Streamed(block, parts, Affine(lambda f: self.numbers(self.codes(f)), _row("scale")))
        parts["shift"] = per_block(-scale * zero.astype(jnp.float32))
        return Streamed(block, parts, Affine(self.codes, _row("scale"), _row("shift")))

    def unpack(self, blocks: Any) -> NoReturn:
        """Raises: these formats have no form in blocks."""
        raise QuantizationError(
            f"{self.name} has no form in blocks on disk; build QuantizedArray({self.name!r}, fields)."
        )

    def pack(self, fields: Mapping[str, Any]) -> NoReturn:
        """Raises: these formats have no form in blocks."""
        raise QuantizationError(f"{self.name} has no form in blocks on disk; save its fields as arrays.")

    def _nested(self, fields: Fields) -> jax.Array:
        """Returns the nested scales, float32, of the shape of `scale` or one that broadcasts to it."""
        *_, m, n = fields["scale"].shape
        nested = fields["nested"].astype(jnp.float32)
        span = self._nested_span(m, n, nested.shape)
        return jnp.repeat(widened(nested, span, n), m // nested.shape[-2], axis=-2)

    def _nested_span(self, m: int, n: int, shape: tuple[int, ...]) -> int:
        rows, span = nested_grain(m)
        if shape[-2:] == (rows, n):  # columns that were picked one by one
            return 1
        if shape[-2:] == (rows, -(-n // span)):
            return 0 if shape[-1] == 1 else span
        raise QuantizationError(
            f"{self.name}: nested scales {list(shape[-2:])} do not fit scales {[m, n]}; they must be "
            f"{[rows, -(-n // span)]}. Keep scales of any other grouping as float32, in `scale`."
        )

    def _misfit(self, fields: Fields, why: str) -> NoReturn:
        *_, k, n = self.stored_shape(fields)
        raise QuantizationError(
            f"{self.name}: a scale {list(fields['scale'].shape)} does not fit the weights [{k}, {n}]: {why}."
        )


def span_of(n: int, c: int) -> int | None:
    """Returns the columns that each of c scales stands for; 0: all. None where c fits no granularity."""
    if c == n:
        return 1
    return 0 if c == 1 else BLOCK if c == -(-n // BLOCK) else None


def nested_grain(m: int) -> tuple[int, int]:
    """Returns the rows of `nested` over m rows of scales, and how many columns share one of its columns."""
    if m and m % NESTED == 0:
        return m // NESTED, 1
    span = 1
    while 2 * span * m <= NESTED and 2 * span <= NESTED:
        span *= 2
    return 1, span


def widened(values: jax.Array, span: int, n: int) -> jax.Array:
    """Returns `[..., G, N]`, or `[..., G, 1]` where all columns share."""
    return jnp.repeat(values, span, axis=-1)[..., :n] if span > 1 else values


def _rounded(x: jax.Array) -> jax.Array:
    """Returns x; a sum with it does not become one operation with the product that x is, which would round once only.

    Whoever wrote the codes rounded twice.
    """
    even = jnp.pad(x.reshape(-1), (0, x.size % 2))  # `computed_once` wants an even number of rows
    return _jax.computed_once(even.reshape(2, -1)).reshape(-1)[: x.size].reshape(x.shape)


def _looked_up(levels: jax.Array, codes: jax.Array) -> jax.Array:
    """Returns `levels[codes]`: levels `[..., 256]`, codes `[..., G, N]`, leading axes alike."""
    look_up = jnp.take
    for _ in range(levels.ndim - 1):
        look_up = jax.vmap(look_up)
    return look_up(levels, codes)


def _row(name: str) -> Callable[[Fields], jax.Array]:
    return lambda fields: fields[name][..., None, :]


def _integer(bits: int, number: Callable[[jax.Array], jax.Array] | None = None, name: str = "") -> ScaledFormat:
    widths = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}[bits]
    planes = tuple(Plane(n, width) for n, width in zip(("codes", "high", "top"), widths, strict=False))
    return ScaledFormat(name or f"int{bits}", planes, number or numbers.centred(bits), integer=True, group=32)


def _whole(name: str, dtype: Any, number: Callable[[jax.Array], jax.Array], **options: Any) -> ScaledFormat:
    return ScaledFormat(name, (Plane("codes", 8, np.dtype(dtype)),), number, **options)


_SIX_BITS = (Plane("codes", 4), Plane("high", 2))
_FOUR_BITS = (Plane("codes", 4),)
_MX: dict[str, Any] = {"group": 32, "powers": True}

SCALED: tuple[ScaledFormat, ...] = (
    _integer(1, numbers.signs),
    _integer(2, numbers.ternary, "ternary"),
    *(_integer(bits) for bits in range(2, 8)),
    _whole("int8", np.int8, numbers.same, integer=True),
    _whole("fp8_e4m3", ml_dtypes.float8_e4m3fn, numbers.float8_e4m3),
    _whole("fp8_e5m2", ml_dtypes.float8_e5m2, numbers.float8_e5m2),
    _whole("mxfp8_e4m3", ml_dtypes.float8_e4m3fn, numbers.float8_e4m3, **_MX),
    _whole("mxfp8_e5m2", ml_dtypes.float8_e5m2, numbers.float8_e5m2, **_MX),
    ScaledFormat("mxfp6_e2m3", _SIX_BITS, numbers.float6_e2m3, **_MX),
    ScaledFormat("mxfp6_e3m2", _SIX_BITS, numbers.float6_e3m2, **_MX),
    ScaledFormat("nf4", _FOUR_BITS, numbers.from_table(numbers.NF4), group=64, tabled=True),
    ScaledFormat("fp4", _FOUR_BITS, numbers.from_table(numbers.FP4), group=64, tabled=True),
)
