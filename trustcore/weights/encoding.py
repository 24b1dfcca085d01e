"""How the numbers of one tensor are stored: rows of blocks, each `weights` numbers in `nbytes` bytes.

A plain encoding is a block of one number with a NumPy dtype. A packed one has no dtype here: `trustcore.quant` knows
its arithmetic. The size of a tensor is `prod(shape) / weights * nbytes`, and every row is a whole number of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Encoding:
    """One way to store numbers.

    Attributes:
        name: lower case, as `LazyArray.encoding` gives it.
        weights: numbers in a block; 1 for a plain encoding.
        nbytes: bytes of a block.
        dtype: of one stored number; None when the block is packed and has to be decoded.
        words: the multi-byte fields of a block as `(start, width, count)`, which is what a change of byte order
            reverses. None when the byte order of the block is not settled.
    """

    name: str
    weights: int
    nbytes: int
    dtype: np.dtype | None = None
    words: tuple[tuple[int, int, int], ...] | None = None

    @staticmethod
    def plain(name: str, dtype: Any) -> Encoding:
        """Returns the encoding of an array of NumPy's `dtype`, one number a block."""
        dtype = np.dtype(dtype)
        parts = 2 if dtype.kind == "c" else 1
        width = dtype.itemsize // parts
        return Encoding(name, 1, dtype.itemsize, dtype, ((0, width, parts),) if width > 1 else ())

    def swapped(self, rows: np.ndarray) -> np.ndarray:
        """Returns a copy of `rows` (uint8) with every multi-byte field reversed; `words` must be known."""
        assert self.words is not None, self.name
        blocks = rows.reshape(rows.size // self.nbytes, self.nbytes).copy()
        for start, width, count in self.words:
            piece = blocks[:, start : start + width * count].reshape(len(blocks), count, width)
            blocks[:, start : start + width * count] = piece[:, :, ::-1].reshape(len(blocks), count * width)
        return blocks.reshape(rows.shape)

    def row_bytes(self, shape: Sequence[int]) -> int:
        """Returns the bytes of one row, the last axis of `shape`; a scalar is a row of one."""
        return (shape[-1] if shape else 1) // self.weights * self.nbytes

    def tensor_bytes(self, shape: Sequence[int]) -> int:
        """Returns the bytes of a tensor of `shape`; a ValueError says why the shape cannot be.

        NumPy counts bytes in a signed 64-bit number and leaves sizes of zero out of that count, so both must fit.
        """
        numbers = prod(size for size in shape if size)
        if numbers >= 2**63 or -(-numbers // self.weights) * self.nbytes >= 2**63:
            raise ValueError(f"a tensor of shape {list(shape)} has 2**63 bytes or more")
        row = shape[-1] if shape else 1
        if row % self.weights:
            raise ValueError(
                f"a row of {row} weights is not a multiple of {self.name}'s block of {self.weights} weights"
            )
        return prod(shape) // self.weights * self.nbytes
