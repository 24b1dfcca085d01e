"""Formats whose scales sit in blocks of fixed size: how numbers are packed, on disk and in arrays.

Such a format, as all of GGUF's are, cuts the contraction axis into blocks. On disk a block is a run of bytes; in arrays
each *field* of the block is an array of its own, with the block index leading and the output axis N contiguous, so that
one row of codes feeds N independent sums:

    disk   [N, K / block, bytes_per_block]  uint8
    arrays codes [K / block, rows, N], scale [K / block, N], ...

`decode` is the definition of a format: a pure function from fields to float32, vectorized over every axis but the block
row. `unpack` and `pack` only move bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore import _jax
from trustcore.errors import QuantizationError
from trustcore.quant.formats.format import Affine, Fields, Format, Streamed

__all__ = ["Affine", "BlockFormat", "Field", "Fields", "in_order"]


@dataclasses.dataclass(frozen=True)
class Field:
    """One part of a block.

    Args:
        name: its name in `QuantizedArray.fields`.
        dtype: of its elements.
        offset: of its first byte in a block on disk.
        rows: elements a block; None for a single one, which has no axis of its own.
    """

    name: str
    dtype: np.dtype
    offset: int
    rows: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes a block."""
        return self.dtype.itemsize * (self.rows or 1)


@dataclasses.dataclass(frozen=True)
class BlockFormat(Format):
    """One way to store weights in blocks.

    Args:
        name: as in `QuantizedArray.format` and `LazyArray.encoding`.
        block: weights that share a block; 1 where each stands alone.
        fields: parts of a block; together they cover its bytes on disk.
        decode: fields `[..., K/block, rows, N]` and `[..., K/block, N]` to float32 `[..., K/block, block, N]`
            (for block 1: `[..., K, N]`).
        affine: the parts of `decode` where the format has that shape.
        shared: names of optional fields `[..., 1, 1]` that belong to the whole matrix and to no block.
    """

    name: str
    block: int
    fields: tuple[Field, ...]
    decode: Callable[[Fields], jax.Array]
    affine: Affine | None = None
    shared: tuple[str, ...] = ()

    @classmethod
    def of_affine(
        cls, name: str, block: int, fields: tuple[Field, ...], affine: Affine, shared: tuple[str, ...] = ()
    ) -> BlockFormat:
        """Returns the format that decodes as `affine` says."""
        return cls(name, block, fields, functools.partial(decode_affine, affine), affine, shared)

    @property
    def field_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """See `Format`."""
        return tuple(field.name for field in self.fields), self.shared

    def stored_shape(self, fields: Fields) -> tuple[int, ...]:
        """See `Format`."""
        field = self.fields[0]
        *lead, n = fields[field.name].shape
        if field.rows is not None:
            lead = lead[:-1]
        return (*lead[:-1], lead[-1] * self.block, n)

    def matrix(self, fields: Fields) -> jax.Array:
        """See `Format`."""
        decoded = self.decode(fields)
        if self.block == 1:
            return decoded
        *lead, blocks, block, n = decoded.shape
        return decoded.reshape(*lead, blocks * block, n)

    def spans(self, fields: Fields) -> dict[str, int]:
        """See `Format`."""
        return {name: 0 if name in self.shared else 1 for name in fields}

    def trained(self, fields: Fields) -> tuple[str, ...]:
        """See `Format`."""
        return tuple(name for name, field in fields.items() if jnp.issubdtype(field.dtype, jnp.floating))

    def describe(self, fields: Fields) -> str:
        """See `Format`."""
        return self.name

    def streamed(self, fields: Fields) -> Streamed | str:
        """See `Format`."""
        if self.affine is None and self.block > 1:
            return f"{self.name} is not of the form scale * code + shift; use 'tiles'."
        blocks = fields[self.fields[0].name].shape[0]
        each = {
            name: jnp.broadcast_to(field[0], (blocks, 1)) if name in self.shared else field
            for name, field in fields.items()
        }
        return Streamed(self.block, each, self.affine, self.decode)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of a block on disk; the arrays take exactly as many."""
        return sum(field.nbytes for field in self.fields)

    @property
    def bits_per_weight(self) -> float:
        """Storage of a weight, scales included."""
        return 8 * self.bytes_per_block / self.block

    def unpack(self, blocks: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the fields of weights as they lie on disk.

        Args:
            blocks: uint8 `[..., N, K / block * bytes_per_block]`, the bytes of N rows of K weights.

        Raises:
            QuantizationError: the rows are not a whole number of blocks.
        """
        if blocks.dtype != np.uint8 or blocks.ndim < 2 or blocks.shape[-1] % self.bytes_per_block:
            raise QuantizationError(
                f"{self.name}: rows must be uint8 and a multiple of {self.bytes_per_block} bytes long "
                f"({self.block} weights a block), got {blocks.dtype}{list(blocks.shape)}."
            )
        blocks = blocks.reshape(*blocks.shape[:-1], -1, self.bytes_per_block)  # [..., N, blocks, bytes]
        fields = {}
        for field in self.fields:
            part = blocks[..., field.offset : field.offset + field.nbytes]
            # A field of one element is one column of bytes wide: view it as its dtype before the axes move.
            part = _view(part, field.dtype)  # [..., N, blocks, rows]
            axes = (*range(part.ndim - 3), part.ndim - 2, part.ndim - 1, part.ndim - 3)
            part = np.ascontiguousarray(part.transpose(axes))  # [..., blocks, rows, N]
            fields[field.name] = part if field.rows is not None else part[..., 0, :]
        return fields

    def pack(self, fields: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the bytes on disk, uint8 `[..., N, K / block * bytes_per_block]`: the inverse of `unpack`."""
        if any(name in fields for name in self.shared):
            raise QuantizationError(
                f"{self.name}: {', '.join(self.shared)} has no place in the blocks; multiply it into the weights and "
                "pack them anew, or write it beside the blocks and leave it out here."
            )
        parts = []
        for field in sorted(self.fields, key=lambda f: f.offset):
            part = np.asarray(fields[field.name])
            part = part if field.rows is not None else part[..., None, :]
            axes = (*range(part.ndim - 3), part.ndim - 1, part.ndim - 3, part.ndim - 2)
            parts.append(np.ascontiguousarray(part.transpose(axes)).view(np.uint8))  # [..., N, blocks, bytes]
        packed = np.concatenate(parts, axis=-1)
        return packed.reshape(*packed.shape[:-2], -1)

    def field_shapes(self, k: int, n: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the fields of a `[K, N]` weight."""
        if k % self.block:
            raise QuantizationError(f"{self.name}: {k} weights are not a multiple of the block size {self.block}.")
        shape = {f.name: (k // self.block, *(() if f.rows is None else (f.rows,)), n) for f in self.fields}
        return {f.name: jax.ShapeDtypeStruct(shape[f.name], f.dtype) for f in self.fields}


def in_order(*parts: tuple[str, Any, int | None]) -> tuple[Field, ...]:
    """Returns fields that follow each other without a gap, from (name, dtype, rows)."""
    fields, offset = [], 0
    for name, dtype, rows in parts:
        fields.append(Field(name, np.dtype(dtype), offset, rows))
        offset += fields[-1].nbytes
    return tuple(fields)


def decode_affine(affine: Affine, fields: Fields) -> jax.Array:
    """Returns float32 `[..., K / block, block, N]`."""
    codes = affine.codes(fields)
    # Stored first, or XLA computes a sub-block's scale anew for each of its weights: K-quants then decode 1.2 to 2
    # times as slowly, and 7 to 12 times in the loop over tiles of jax 0.10.2 (CPU, 2026-11).
    scale = _jax.computed_once(affine.scale(fields))
    decoded = codes.astype(jnp.float32).reshape(*scale.shape[:-1], -1, scale.shape[-1]) * scale[..., None, :]
    if affine.shift is not None:
        decoded = decoded + _jax.computed_once(affine.shift(fields))[..., None, :]
    return decoded.reshape(codes.shape)


def _view(part: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.itemsize == 1:
        return part.view(dtype)
    return np.ascontiguousarray(part).view(dtype)
