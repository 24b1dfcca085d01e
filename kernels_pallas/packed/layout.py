"""How packed weights lie in arrays, as data: what a kernel must know to unpack a tile of them.

A matrix `[K, N]` is cut along K into blocks of `block` weights. Codes lie in *planes*, uint8 or int8
`[K / block, rows, N]` with some bits of each weight's code; the first plane has the low bits. A byte holds 8 / bits
weights; their order along K is given by the chunk: rows are taken `chunk` at a time, and within a chunk all its rows at
the lowest bits come first, then all at the next ones. With a chunk of 16 a block of 32 weights of 4 bits is 16 bytes:
weights 0 to 15 in the low halves, 16 to 31 in the high ones. With a chunk of 1 neighbours share a byte.

    w[b * block + k, n] = scale * (number(code) - zero) + shift        the scale of run k // sub of block b

`kind` says where scales lie, in arrays `[K / block, N]` or `[K / block, rows, N]`; or `[K / run, N]`, where `run`
weights of K, a multiple of the block, share one:

    "scale"     scale, and `zero` or `minimum` where there are such; any float dtype
    "power"     2**(exponent - 127 - halved) of the bytes `exponent`
    "six_bits"  scale * s and -minimum * m: eight runs of s and m, six bits each in the twelve bytes `scales` (GGUF's
                q4_k and q5_k: s and m of runs 0 to 3 in bytes 0 to 3 and 4 to 7; of runs 4 to 7 the low four bits in
                the halves of bytes 8 to 11 and the upper two on top of bytes 0 to 7)
    "int8"      scale * s, one int8 of `scales` a run (q6_k)

A *unit* is what a kernel unpacks in one step: at most 32 weights of a block that lie at the same bits of neighbouring
bytes of every plane, under one scale. Units follow each other along K, but with a chunk of 1, where a unit has every
(8 / bits)-th weight. Nothing is put in order in a kernel: `laid_out` gives x by unit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.codes import as_bytes, float8_e4m3, float8_e5m2, from_table, power_of_two, unsigned

NUMBERS = ("integer", "signed", "e4m3", "e5m2", "table")
KINDS = ("scale", "power", "six_bits", "int8")


@dataclasses.dataclass(frozen=True)
class Plane:
    """An array of codes: its name, bits of a weight in it, and rows of a chunk."""

    name: str
    bits: int
    chunk: int = 1


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to pack a matrix.

    Attributes:
        name: for messages.
        block: weights of K in a block.
        planes: of the codes, low bits first.
        number: what a code stands for: "integer" is the code less `offset`, "signed" an int8, "e4m3" and "e5m2" a
            float of eight bits, "table" an entry of `table`.
        sub: weights of a block under one scale; `block` where all share.
        kind: where the scales lie.
        run: weights of K under one row of the scales; 0: a block's.
        offset: see `number`.
        table: see `number`.
        halved: 1 where codes are kept doubled (GGUF's mxfp4).
        extra: "zero" or "minimum" where scales have such a companion, else "".
    """

    name: str
    block: int
    planes: tuple[Plane, ...]
    number: str = "integer"
    sub: int = 0
    kind: str = "scale"
    run: int = 0
    offset: int = 0
    table: tuple[float, ...] = ()
    halved: int = 0
    extra: str = ""

    @property
    def unit(self) -> int:
        """Weights of a unit."""
        if self.interleaved:
            return math.gcd(32, self.rows(self.planes[0]))
        spans = [self.block if p.bits == 8 else p.chunk for p in self.planes]
        return math.gcd(32, *spans, self.sub or self.block)

    @property
    def units(self) -> int:
        """Units of a block."""
        return self.block // self.unit

    @property
    def interleaved(self) -> bool:
        """Whether neighbours share a byte."""
        return any(p.bits < 8 and p.chunk == 1 for p in self.planes)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the arrays, codes first."""
        scales = {"power": ("exponent",), "six_bits": ("scale", "minimum", "scales"), "int8": ("scale", "scales")}
        found = scales.get(self.kind, ("scale", *((self.extra,) if self.extra else ())))
        return (*(p.name for p in self.planes), *found)

    def rows(self, plane: Plane) -> int:
        """Rows of a plane in a block."""
        return self.block * plane.bits // 8

    def place(self, plane: Plane, unit: int) -> tuple[int, int]:
        """Returns the first row of a unit in a plane's block, and by how many bits it is shifted."""
        if plane.bits == 8:
            return unit * self.unit, 0
        if self.interleaved:
            shift, run = divmod(unit, self.rows(plane) // self.unit)
            return run * self.unit, shift * plane.bits
        held = plane.chunk * (8 // plane.bits)  # weights of a chunk
        chunk, within = divmod(unit * self.unit, held)
        shift, row = divmod(within, plane.chunk)
        return chunk * plane.chunk + row, shift * plane.bits


def refusal(layout: Layout) -> str:
    """Returns why kernels do not unpack such a layout; "" where they do."""
    if layout.interleaved and (len(layout.planes) > 1 or (layout.sub or layout.block) != layout.block):
        return f"{layout.name} keeps neighbours in one byte and has several planes or scales in a block."
    if layout.unit % 8:
        return f"units of {layout.name} have {layout.unit} weights, no multiple of 8."
    return ""


def laid_out(layout: Layout, x: jax.Array, blocks: int) -> jax.Array:
    """Returns x `[R, K]` by unit, `[units, R, blocks * unit]`, zeros beyond K / block blocks."""
    rows, k = x.shape
    count = k // layout.block
    if layout.interleaved:
        each = 8 // layout.planes[0].bits
        parts = x.reshape(rows, count, -1, layout.unit, each).transpose(4, 2, 0, 1, 3)
        parts = parts.reshape(layout.units, rows, count, layout.unit)
    else:
        parts = x.reshape(rows, count, layout.units, layout.unit).transpose(2, 0, 1, 3)
    parts = jnp.pad(parts, ((0, 0), (0, 0), (0, blocks - count), (0, 0))) if blocks > count else parts
    return parts.reshape(layout.units, rows, blocks * layout.unit)


def unit_numbers(layout: Layout, unit: int, rows: Callable[[Plane, int, int], jax.Array]) -> jax.Array:
    """Returns the numbers of a unit, float32.

    Args:
        layout: of the matrix.
        unit: which of a block's.
        rows: of a plane, a first row and a count: these rows of the tile's blocks, `[blocks, count, N]`.
    """
    joined: Any = None
    below = 0
    for plane in layout.planes:
        row, shift = layout.place(plane, unit)
        words = rows(plane, row, layout.unit)
        if plane.bits == 8:
            part = words.astype(jnp.int32) if layout.number == "signed" else unsigned(words)
        else:
            part = (unsigned(words) >> shift) & ((1 << plane.bits) - 1)
        joined = part if joined is None else joined | (part << below)
        below += plane.bits
    if layout.number == "e4m3":
        return float8_e4m3(joined)
    if layout.number == "e5m2":
        return float8_e5m2(joined)
    if layout.number == "table":
        return from_table(joined, layout.table)
    return (joined - layout.offset if layout.offset else joined).astype(jnp.float32)


def unit_scale(
    layout: Layout, unit: int, row: Callable[[str, int], jax.Array]
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Returns the scale of a unit, and its zero and its shift where it has such, float32.

    Args:
        layout: of the matrix.
        unit: which of a block's.
        row: of a field and a row of it: that row of the tile's blocks, `[blocks, 1, N]`; of what has one row, row 0.
    """
    run = unit * layout.unit // (layout.sub or layout.block)
    if layout.kind == "power":
        exponent = unsigned(row("exponent", 0))
        return power_of_two(exponent) * 2.0**-layout.halved, None, None
    scale = row("scale", 0).astype(jnp.float32)
    if layout.kind == "int8":
        return scale * row("scales", run).astype(jnp.int32).astype(jnp.float32), None, None
    if layout.kind == "six_bits":
        s, m = _six_bits(lambda i: unsigned(row("scales", i)), run)
        return scale * s, None, 0.0 - row("minimum", 0).astype(jnp.float32) * m
    extra = row(layout.extra, 0).astype(jnp.float32) if layout.extra else None
    return (scale, extra, None) if layout.extra == "zero" else (scale, None, extra)


def unit_weights(
    layout: Layout,
    unit: int,
    rows: Callable[[Plane, int, int], jax.Array],
    row: Callable[[str, int], jax.Array],
) -> jax.Array:
    """Returns the weights of a unit, float32 `[blocks, unit, N]`; arguments as above."""
    numbers = unit_numbers(layout, unit, rows)
    scale, zero, shift = unit_scale(layout, unit, row)
    numbers = (numbers if zero is None else numbers - zero) * scale
    return numbers if shift is None else numbers + shift


def _six_bits(byte: Callable[[int], jax.Array], run: int) -> tuple[jax.Array, jax.Array]:
    if run < 4:
        s, m = byte(run) & 63, byte(run + 4) & 63
    else:
        low = byte(run + 4)
        s = (low & 15) | ((byte(run - 4) >> 6) << 4)
        m = (low >> 4) | ((byte(run) >> 6) << 4)
    return s.astype(jnp.float32), m.astype(jnp.float32)


def decoded(layout: Layout, fields: dict[str, jax.Array]) -> jax.Array:
    """Returns the matrix, float32 `[K, N]`: the oracle's half of a product."""
    fields = {name: as_bytes(x) if x.dtype.itemsize == 1 else x for name, x in fields.items()}
    first = layout.planes[0]
    count, _, columns = fields[first.name].shape

    def row(name: str, i: int) -> jax.Array:
        x = fields[name]
        x = x[:, i] if x.ndim == 3 else jnp.repeat(x, count // x.shape[0], axis=0)
        return x[:, None]

    def rows(plane: Plane, start: int, size: int) -> jax.Array:
        return fields[plane.name][:, start : start + size]

    units = [unit_weights(layout, unit, rows, row) for unit in range(layout.units)]
    matrix = jnp.stack(units, 1)  # [K / block, units, unit, N]
    if layout.interleaved:
        each = 8 // layout.planes[0].bits
        matrix = matrix.reshape(count, each, -1, columns).swapaxes(1, 2)
    return matrix.reshape(count * layout.block, columns)
