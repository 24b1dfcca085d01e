"""A checkpoint: a read-only mapping from tensor name to an array that still lies on disk.

path -> open_checkpoint (`opening`) -> Checkpoint -> LazyArray -> raw() or numpy()

Invariants:
- Opening reads the header alone. A tensor's bytes are touched when `raw()` or `numpy()` is used, and not before.
- A tensor has `prod(shape) / encoding.weights * encoding.nbytes` bytes, all inside its file: a reader proves that
  before it makes a `LazyArray`.
- Views are read-only and keep their mapping alive: closing a checkpoint never invalidates an array taken from it.
- The files must not be truncated by others while they are open (the operating system answers with SIGBUS).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from trustcore.errors import CheckpointError
from trustcore.weights.encoding import Encoding
from trustcore.weights.mapped import MadeBytes, MappedFile

# The tokenizer of a model from GGUF, beside its weights in another format: metadata without tensors.
TOKENIZER_GGUF = "tokenizer.gguf"


@dataclass(frozen=True, eq=False, repr=False)
class LazyArray:
    """A tensor on disk; nothing is read before it is asked for.

    Attributes:
        name: as the file gives it.
        shape: in row-major (NumPy) order, in numbers, not bytes.
        encoding: "f32", "bf16", "q4_1", ...
        dtype: of the stored numbers of a plain encoding; None of a packed one.
        nbytes: of its numbers side by side, which is what it has on disk unless it is a part of something there.
        path: the file that holds it.
        offset: where it starts in that file, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    dtype: np.dtype | None
    nbytes: int
    path: Path
    offset: int
    _file: MappedFile | MadeBytes = field(repr=False)
    _encoding: Encoding = field(repr=False)
    _big_endian: bool = field(default=False, repr=False)
    _strides: tuple[int, ...] | None = field(default=None, repr=False)  # in numbers; None: side by side, row-major

    def raw(self) -> np.ndarray:
        """Returns the stored bytes, uint8 `[*shape[:-1], bytes_per_row]`, as a little-endian file holds them.

        A read-only view of the mapping without a copy; from a big-endian file, a copy with its fields reversed; of
        numbers that do not lie side by side, a copy.

        Raises:
            CheckpointError: the file is big-endian and the byte order of this encoding is not settled.
        """
        if self._strides is not None:
            together = np.array(self.numpy(), order="C", ndmin=1)
            if sys.byteorder == "big":
                together = together.byteswap()
            return _read_only(together.view(np.uint8))
        rows = self._file.view(self._start, self.nbytes)
        rows = rows.reshape(*self.shape[:-1], self._encoding.row_bytes(self.shape))
        if not self._big_endian or self._encoding.words == ():
            return rows
        if self._encoding.words is None:
            raise self._error(
                f"the byte order of {self.encoding} blocks in a big-endian file is not settled. "
                "Convert the model on the machine that wrote it, or use a little-endian file."
            )
        return _read_only(self._encoding.swapped(rows))

    def numpy(self) -> np.ndarray:
        """Returns the numbers of a plain encoding, read-only: a view where the byte order is the machine's.

        Numbers that do not lie side by side in the file do not lie so in the view.

        Raises:
            CheckpointError: the encoding is packed, or a stored boolean is neither 0 nor 1.
        """
        dtype = self._encoding.dtype
        if dtype is None:
            raise self._error(
                f"{self.encoding} is packed ({self._encoding.weights} weights in {self._encoding.nbytes} bytes) and "
                "has no NumPy dtype. Take raw() for the bytes, or use trustcore.quant to decode them."
            )
        stored = self._file.view(self._start, self._span)
        if dtype == np.bool_ and stored.size and stored.max() > 1:
            raise self._error("a boolean is stored as something other than 0 or 1")
        if self._big_endian != (sys.byteorder == "big"):
            stored = _read_only(self._encoding.swapped(stored))
        if self._strides is None:
            return stored.view(dtype).reshape(self.shape)
        words = stored.view(f"V{dtype.itemsize}")  # as_strided does not know the dtypes of ml_dtypes
        steps = tuple(step * dtype.itemsize for step in self._strides)
        return np.lib.stride_tricks.as_strided(words, self.shape, steps, writeable=False).view(dtype)

    def prefetch(self) -> None:
        """Has the bytes brought near: into the system's cache, or made where they are not stored as they are."""
        self._file.prefetch(self._start, self._span)

    def release(self) -> None:
        """Tells the operating system that this tensor's pages are not needed any more; a later read brings them back.

        Keeps resident memory low after a copy was made. Does nothing where the platform has no madvise.
        """
        self._file.release(self._start, self._span)

    @property
    def _start(self) -> int:
        """Of the first number, in what holds the bytes."""
        return self.offset if isinstance(self._file, MappedFile) else 0

    @property
    def _span(self) -> int:
        """Bytes from the first number to the end of the last."""
        if self._strides is None or not self.nbytes:
            return self.nbytes
        last = sum((size - 1) * step for size, step in zip(self.shape, self._strides, strict=True))
        return (last + 1) * self._encoding.nbytes

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(message, path=self.path, field=f"tensor {self.name!r}", offset=self.offset)

    def __repr__(self) -> str:
        return f"LazyArray({self.name!r}, {self.encoding}{list(self.shape)}, {self.nbytes} bytes)"


class Checkpoint(Mapping[str, LazyArray]):
    """A read-only mapping from tensor name to `LazyArray`, in the file's order; a context manager.

    Attributes:
        path: the file that was opened (one part of a split model, or its index).
        format: "gguf", "safetensors", "pytorch", "npz", "flax" or "orbax".
        metadata: GGUF key-values as Python values; of every other format, under "config", the `config.json` beside
            the file where there is one, with safetensors' `__metadata__`.

    Example:
        >>> with open_checkpoint("model.gguf") as checkpoint:  # doctest: +SKIP
        ...     norm = checkpoint["output_norm.weight"].numpy()
    """

    def __init__(
        self,
        path: Path,
        format: str,
        metadata: Mapping[str, Any],
        arrays: Mapping[str, LazyArray],
        files: Sequence[MappedFile | MadeBytes],
    ):
        self.path, self.format, self.metadata = path, format, dict(metadata)
        self._arrays, self._files = dict(arrays), tuple(files)

    def close(self) -> None:
        """Unmaps the files. Arrays that were taken stay valid; `raw()` and `numpy()` do not work any more."""
        for file in self._files:
            file.close()

    def __getitem__(self, name: str) -> LazyArray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        nbytes = sum(array.nbytes for array in self._arrays.values())
        return f"Checkpoint({str(self.path)!r}, {self.format}, {len(self)} tensors, {nbytes} bytes)"


def make_array(
    name: str,
    shape: tuple[int, ...],
    encoding: Encoding,
    file: MappedFile | MadeBytes,
    offset: int,
    *,
    big_endian: bool = False,
    strides: tuple[int, ...] | None = None,
) -> LazyArray:
    """Returns the `LazyArray` of a tensor that the caller has proved to lie inside `file`.

    Args:
        name: of the tensor.
        shape: row-major.
        encoding: of its numbers.
        file: that holds them.
        offset: of its first number; of `MadeBytes`, where the file has what they are made of.
        big_endian: whether the file is.
        strides: of a plain encoding, in numbers, none of them negative; None: row-major, side by side.
    """
    nbytes = prod(shape) // encoding.weights * encoding.nbytes
    if strides is not None and (not nbytes or _are_row_major(shape, strides)):
        strides = None
    return LazyArray(
        name, shape, encoding.name, encoding.dtype, nbytes, file.path, offset, file, encoding, big_endian, strides
    )


def _are_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    step = 1
    for size, found in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and found != step:
            return False
        step *= size
    return True


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
