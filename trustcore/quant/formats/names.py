"""How users name a format with the granularity of its scales: "q4_k", "int8:channel", "int4:g64:asym".

    name    = format *(":" option)
    option  = "g" N      a scale for each N rows of K, in each column
            | "channel"  a scale for each column            | "tensor"   one scale
            | "128x128"  a scale for each square of 128     | "asym"     with a zero point (integers)
            | "double"   the scales themselves in bytes (nf4, fp4)
"fp8" alone leaves the choice between E4M3 and E5M2 to whoever sees the weights.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import numpy as np

from trustcore.errors import QuantizationError
from trustcore.quant.formats import BlockFormat, Format, ScaledFormat, get_format
from trustcore.quant.formats.scaled import BLOCK, NESTED, nested_grain

# Names that stand for several formats, of which the one of smaller error is taken.
CHOICES: dict[str, tuple[str, ...]] = {"fp8": ("fp8_e4m3", "fp8_e5m2")}
_SMALL_GROUP = 256  # rows up to which a scale is kept in 16 bits, as its bits count


@dataclasses.dataclass(frozen=True)
class Storage:
    """A format and how fine its scales are.

    Args:
        format: the entry of the table.
        rows: rows of K under one scale; 0: all. Formats of blocks have their own.
        columns: columns under one scale: 1, 0 for all, or 128.
        asymmetric: whether there is a zero point.
        double: whether the scales are codes themselves.
    """

    format: Format
    rows: int = 0
    columns: int = 1
    asymmetric: bool = False
    double: bool = False

    @property
    def name(self) -> str:
        """What the user would write in full."""
        if not isinstance(self.format, ScaledFormat) or self.format.powers:
            return self.format.name
        grain = {0: "tensor", BLOCK: f"{BLOCK}x{BLOCK}"}.get(self.columns) or (
            f"g{self.rows}" if self.rows else "channel"
        )
        return f"{self.format.name}:{grain}" + ":asym" * self.asymmetric + ":double" * self.double

    def run(self, k: int) -> int:
        """Returns the rows of K under one scale, for blocks the weights of one."""
        return (
            self.format.block
            if isinstance(self.format, BlockFormat)
            else min(self.rows, k)
            if self.columns == BLOCK
            else self.rows or k
        )

    @property
    def step(self) -> int:
        """A number whose multiples every K may be."""
        if isinstance(self.format, BlockFormat):
            return self.format.block
        assert isinstance(self.format, ScaledFormat)
        return self.rows or self.format.multiple

    def refusal(self, k: int) -> str:
        """Returns why a matrix of K inputs cannot be stored so; "" when it can."""
        if isinstance(self.format, BlockFormat):
            return (
                ""
                if k % self.format.block == 0
                else f"K={k} is not a multiple of {self.name}'s block of {self.format.block}"
            )
        assert isinstance(self.format, ScaledFormat)
        if k % self.format.multiple:
            return f"K={k} is not a multiple of {self.format.multiple}, the codes of {self.format.name} in whole bytes"
        if self.columns == BLOCK:
            g = -(-k // BLOCK)
            if k and self.format.run(k, g) != self.run(k):
                return f"K={k} in blocks of {BLOCK} would be taken for {g} equal groups"
        elif k % self.run(k or 1):
            return f"K={k} is not a multiple of {self.name}'s group of {self.rows}"
        elif k and self.format.run(k, k // self.run(k)) != self.run(k):
            return f"K={k} in groups of {self.rows} would be taken for blocks of {BLOCK}; use another group"
        return ""

    def scale_shape(self, k: int, n: int) -> tuple[int, int]:
        """Returns `(G, C)`."""
        g = -(-k // self.run(k)) if k else 0
        return g, 1 if self.columns == 0 else -(-n // self.columns)

    def field_shapes(self, k: int, n: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the fields of a `[K, N]` weight.

        Raises:
            QuantizationError: K does not fit.
        """
        if isinstance(self.format, BlockFormat):
            return self.format.field_shapes(k, n)
        spec = self.format
        assert isinstance(spec, ScaledFormat)
        if why := self.refusal(k):
            raise QuantizationError(f"{self.name}: {why}.")
        shapes = {p.name: jax.ShapeDtypeStruct((k * p.bits // 8, n), p.dtype) for p in spec.planes}
        g, c = self.scale_shape(k, n)
        shapes["scale"] = jax.ShapeDtypeStruct((g, c), self.scale_dtype)
        if self.asymmetric:
            shapes["zero"] = jax.ShapeDtypeStruct((g, c), np.int8 if spec.bits == 8 else np.uint8)
        if self.double:
            rows, span = nested_grain(g)
            shapes["levels"] = jax.ShapeDtypeStruct((NESTED, 1), np.float32)
            shapes["nested"] = jax.ShapeDtypeStruct((rows, -(-n // span)), np.float32)
            shapes["offset"] = jax.ShapeDtypeStruct((1, 1), np.float32)
        return shapes

    @property
    def scale_dtype(self) -> np.dtype:
        """Of the scales that an encoder writes: two bytes where a scale has few weights, as GGUF's; else float32.

        8-bit floats reach to 448 and more, so their scales would leave float16's range: theirs are float32.
        """
        spec = self.format
        assert isinstance(spec, ScaledFormat)
        if spec.powers or self.double:
            return np.dtype(np.uint8)
        small = spec.integer and self.columns == 1 and 0 < self.rows <= _SMALL_GROUP
        return np.dtype(np.float16 if small else np.float32)


def storages(name: str) -> tuple[Storage, ...]:
    """Returns what a name stands for: one storage, or those among which the weights decide.

    Raises:
        QuantizationError: see `parse`.
    """
    base, *options = name.split(":")
    return tuple(parse(":".join([choice, *options])) for choice in CHOICES.get(base, (base,)))


@functools.cache
def parse(name: str) -> Storage:
    """Returns the storage that a name stands for.

    Raises:
        QuantizationError: the format is unknown, or an option is, or does not go with the format.
    """
    base, *options = name.split(":")
    if base in CHOICES:
        raise QuantizationError(f"{name!r} leaves the format open; name one of {', '.join(CHOICES[base])}.")
    spec = get_format(base)
    if not isinstance(spec, ScaledFormat):
        if options:
            raise QuantizationError(f"{name!r}: {base} has blocks of fixed size and takes no options; write {base!r}.")
        return Storage(spec)
    grains, flags = [], []
    for option in options:
        (flags if option in ("asym", "double") else grains).append(option)
    if spec.powers and [g for g in grains if g != f"g{spec.group}"]:
        raise QuantizationError(
            f"{name!r}: {base} has a scale for each {spec.group} rows, by definition; write {base!r}."
        )
    unknown = [g for g in grains if _grain(g) is None]
    if unknown or len(grains) > 1 or len(set(flags)) < len(flags):
        what = f"{unknown[0]!r} is no option" if unknown else "an option is given twice"
        raise QuantizationError(
            f"{name!r}: {what}. Write {base!r}, or one granularity after it: g64 (any group of rows), channel, tensor, "
            f"{BLOCK}x{BLOCK}{_flags(spec)}."
        )
    for flag, fits in (("asym", spec.integer and spec.bits > 1 and base != "ternary"), ("double", spec.tabled)):
        if flag in flags and not fits:
            which = "int2 to int8" if flag == "asym" else "nf4 and fp4"
            raise QuantizationError(f"{name!r}: {flag!r} goes with {which}, not with {base}.")
    rows, columns = (_grain(grains[0]) if grains else None) or (spec.group, 1)
    if "double" in flags and columns != 1:
        raise QuantizationError(f"{name!r}: 'double' needs a group of rows, such as {base}:g64:double.")
    if columns == 1 and rows % spec.multiple:
        raise QuantizationError(f"{name!r}: a group of {base} must be a multiple of {spec.multiple} rows: whole bytes.")
    return Storage(spec, rows, columns, "asym" in flags, "double" in flags)


def _grain(option: str) -> tuple[int, int] | None:
    named = {"channel": (0, 1), "tensor": (0, 0), f"{BLOCK}x{BLOCK}": (BLOCK, BLOCK)}
    if option in named:
        return named[option]
    group = re.fullmatch(r"g([1-9][0-9]{0,6})", option)
    return (int(group[1]), 1) if group else None


def _flags(spec: ScaledFormat) -> str:
    return "; then 'asym' for a zero point" if spec.integer else "; then 'double'" if spec.tabled else ""
