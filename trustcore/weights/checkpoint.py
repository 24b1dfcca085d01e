"""A checkpoint: a read-only mapping from tensor name to an array that still lies on disk.

path -> open_checkpoint -> Checkpoint -> LazyArray -> raw() or numpy()

Invariants:
- Opening reads the header alone. A tensor's bytes are touched when `raw()` or `numpy()` is used, and not before.
- A tensor has `prod(shape) / encoding.weights * encoding.nbytes` bytes, all inside its file: a reader proves that
  before it makes a `LazyArray`.
- Views are read-only and keep their mapping alive: closing a checkpoint never invalidates an array taken from it.
- The files must not be truncated by others while they are open (the operating system answers with SIGBUS).
"""

from __future__ import annotations

import mmap
import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from trustcore.errors import CheckpointError

# A platform without madvise (Windows) has neither name: `release` then does nothing.
_DONTNEED: int | None = getattr(mmap, "MADV_DONTNEED", None)


@dataclass(frozen=True)
class Encoding:
    """How the numbers of one tensor are stored: rows of blocks, each `weights` numbers in `nbytes` bytes.

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
        """The encoding of an array of NumPy's `dtype`, one number a block."""
        dtype = np.dtype(dtype)
        parts = 2 if dtype.kind == "c" else 1
        width = dtype.itemsize // parts
        return Encoding(name, 1, dtype.itemsize, dtype, ((0, width, parts),) if width > 1 else ())

    def swapped(self, rows: np.ndarray) -> np.ndarray:
        """A copy of `rows` (uint8) with every multi-byte field reversed; `words` must be known."""
        assert self.words is not None, self.name
        blocks = rows.reshape(-1, self.nbytes).copy()
        for start, width, count in self.words:
            piece = blocks[:, start : start + width * count].reshape(-1, count, width)
            blocks[:, start : start + width * count] = piece[:, :, ::-1].reshape(-1, width * count)
        return blocks.reshape(rows.shape)


class MappedFile:
    """A regular file mapped for reading, with every failure of the operating system as a CheckpointError."""

    def __init__(self, path: Path):
        self.path = path
        self.size = file_size(path)
        if self.size == 0:
            raise CheckpointError("the file is empty; expected a checkpoint. Fetch it again.", path=path, offset=0)
        try:
            with open(path, "rb") as file:
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot be mapped into memory: {error}", path=path) from error
        self.size = len(self._map)  # what is mapped bounds everything, whatever stat said before
        self._bytes: np.ndarray | None = np.frombuffer(self._map, np.uint8)

    @property
    def map(self) -> mmap.mmap:
        """The mapping itself."""
        if self._map is None:
            raise CheckpointError("the checkpoint is closed; open it again, or take the arrays before", path=self.path)
        return self._map

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """Read-only uint8 view of `nbytes` bytes from `offset`; the caller has checked that they are in the file."""
        assert 0 <= offset <= offset + nbytes <= self.size, (offset, nbytes, self.size)
        self.map  # noqa: B018 - raises when closed
        assert self._bytes is not None
        return self._bytes[offset : offset + nbytes]

    def release(self, offset: int, nbytes: int) -> None:
        """Lets the operating system drop the whole pages inside the range; the data stay readable."""
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and _DONTNEED is not None and last > first:
            self._map.madvise(_DONTNEED, first, last - first)

    def close(self) -> None:
        """Unmaps the file, at once or, where arrays still look into it, when the last of them goes."""
        mapping, self._map, self._bytes = self._map, None, None
        if mapping is not None:
            try:
                mapping.close()
            except BufferError:
                return  # arrays look into it: the mapping lives as long as they do


@dataclass(frozen=True, eq=False, repr=False)
class LazyArray:
    """A tensor on disk; nothing is read before it is asked for.

    Attributes:
        name: as the file gives it.
        shape: in row-major (NumPy) order, in numbers, not bytes.
        encoding: "f32", "bf16", "q4_1", ...
        dtype: of a decoded number: the stored dtype of a plain encoding, float32 of a packed one.
        nbytes: on disk.
        path: the file that holds it.
        offset: where it starts in that file, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    dtype: np.dtype
    nbytes: int
    path: Path
    offset: int
    _file: MappedFile = field(repr=False)
    _encoding: Encoding = field(repr=False)
    _big_endian: bool = field(default=False, repr=False)

    def raw(self) -> np.ndarray:
        """The stored bytes, uint8 `[*shape[:-1], bytes_per_row]`, as a little-endian file holds them.

        A read-only view of the mapping without a copy; from a big-endian file, a copy with its fields reversed.

        Raises:
            CheckpointError: the file is big-endian and the byte order of this encoding is not settled.
        """
        rows = self._file.view(self.offset, self.nbytes).reshape(*self.shape[:-1], self._row_bytes())
        if not self._big_endian or self._encoding.words == ():
            return rows
        if self._encoding.words is None:
            raise self._error(
                f"the byte order of {self.encoding} blocks in a big-endian file is not settled. "
                "Convert the model on the machine that wrote it, or use a little-endian file."
            )
        swapped = self._encoding.swapped(rows)
        swapped.flags.writeable = False
        return swapped

    def numpy(self) -> np.ndarray:
        """The numbers of a plain encoding, read-only: a view without a copy where the byte order is the machine's.

        Raises:
            CheckpointError: the encoding is packed.
        """
        dtype = self._encoding.dtype
        if dtype is None:
            raise self._error(
                f"{self.encoding} is packed ({self._encoding.weights} weights in {self._encoding.nbytes} bytes) and "
                "has no NumPy dtype. Take raw() for the bytes, or use trustcore.quant to decode them."
            )
        stored = self._file.view(self.offset, self.nbytes)
        if dtype == np.bool_ and stored.size and stored.max() > 1:
            raise self._error("a boolean is stored as something other than 0 or 1")
        if self._big_endian != (sys.byteorder == "big"):
            stored = self._encoding.swapped(stored)
            stored.flags.writeable = False
        return stored.view(dtype).reshape(self.shape)

    def release(self) -> None:
        """Tells the operating system that this tensor's pages are not needed any more; a later read brings them back.

        Keeps resident memory low after a copy was made. Does nothing where the platform has no madvise.
        """
        self._file.release(self.offset, self.nbytes)

    def _row_bytes(self) -> int:
        row = self.shape[-1] if self.shape else 1
        return row // self._encoding.weights * self._encoding.nbytes

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(message, path=self.path, field=f"tensor {self.name!r}", offset=self.offset)

    def __repr__(self) -> str:
        return f"LazyArray({self.name!r}, {self.encoding}{list(self.shape)}, {self.nbytes} bytes)"


class Checkpoint(Mapping[str, LazyArray]):
    """A read-only mapping from tensor name to `LazyArray`, in the file's order; a context manager.

    Attributes:
        path: the file that was opened (one part of a split model, or its index).
        format: "gguf" or "safetensors".
        metadata: GGUF key-values as Python values, or safetensors' `__metadata__`.

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
        files: Sequence[MappedFile],
    ):
        self.path, self.format = path, format
        self.metadata: Mapping[str, Any] = MappingProxyType(dict(metadata))
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


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at `path`: a GGUF file, a safetensors file or index, or a folder that holds one of them.

    A file is recognised by what it holds, not by its name. Any part of a split GGUF model opens the whole model; a
    single safetensors shard opens alone (open its index, or the folder, for the whole).

    Raises:
        CheckpointError: there is no such file, it is something else, or it is broken.
    """
    from trustcore.weights.gguf import MAGICS, open_gguf

    path = Path(path)
    if _is_folder(path):
        path = _choose(path)
    head = read_head(path)
    if head[:4] in MAGICS:
        return open_gguf(path)
    if path.name.endswith(".safetensors.index.json"):
        from trustcore.weights.safetensors import open_safetensors_index

        return open_safetensors_index(path)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        from trustcore.weights.safetensors import open_safetensors

        return open_safetensors(path)
    refuse_foreign(path, head)
    raise CheckpointError(
        f"the file starts with {head[:8]!r}; expected {b'GGUF'!r} (a GGUF file) or the 8-byte header length and "
        f"{b'{'!r} of a safetensors file",
        path=path,
        field="magic",
        offset=0,
    )


def file_size(path: Path) -> int:
    """Bytes of a regular file; anything else, and a missing file, is a CheckpointError."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise CheckpointError("no such file", path=path) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise CheckpointError(f"cannot be opened: {error}", path=path) from error
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError("this is a folder; give a file, or use open_checkpoint to look inside", path=path)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError("this is not a regular file (a pipe, a socket or a device)", path=path)
    return status.st_size


def read_head(path: Path, nbytes: int = 512) -> bytes:
    """The first bytes of a regular file that is not empty."""
    if file_size(path) == 0:
        raise CheckpointError("the file is empty; expected a checkpoint. Fetch it again.", path=path, offset=0)
    try:
        with open(path, "rb") as file:
            return file.read(nbytes)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error}", path=path) from error


def refuse_foreign(path: Path, head: bytes) -> None:
    """Raises the CheckpointError that says what the file is, where `head` shows a kind that people often have."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    known = (
        (
            text.startswith(b"version https://git-lfs"),
            "this is a Git LFS pointer, not the model. Run `git lfs pull` in its repository, or download the file.",
        ),
        (
            text.startswith((b"<!doctype html", b"<html", b"<?xml")),
            "this is a web page, not a model: the download went wrong. Check the address, or log in, and fetch again.",
        ),
        (
            head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")),
            "this looks like a PyTorch pickle or a zip archive. Loading a pickle runs code; "
            "convert the model to safetensors where you trust it.",
        ),
        (head.startswith((b"ggjt", b"tjgg", b"lmgg", b"fmgg")), "this is a GGML file from before GGUF. Convert it."),
        (head.startswith(b"\x1f\x8b"), "this is a gzip archive. Unpack it first."),
    )
    for found, message in known:
        if found:
            raise CheckpointError(message, path=path, field="magic", offset=0)


def check_tensor_size(shape: Sequence[int], encoding: Encoding) -> int:
    """Bytes of a tensor of `shape`; a ValueError says why the shape cannot be.

    NumPy counts bytes in a signed 64-bit number and leaves sizes of zero out of that count, so both must fit.
    """
    numbers = prod(size for size in shape if size)
    if numbers >= 2**63 or -(-numbers // encoding.weights) * encoding.nbytes >= 2**63:
        raise ValueError(f"a tensor of shape {list(shape)} has 2**63 bytes or more")
    row = shape[-1] if shape else 1
    if row % encoding.weights:
        raise ValueError(
            f"a row of {row} weights is not a multiple of {encoding.name}'s block of {encoding.weights} weights"
        )
    return prod(shape) // encoding.weights * encoding.nbytes


def make_array(
    name: str, shape: tuple[int, ...], encoding: Encoding, file: MappedFile, offset: int, *, big_endian: bool = False
) -> LazyArray:
    """The `LazyArray` of a tensor that the caller has proved to lie inside `file`."""
    nbytes = prod(shape) // encoding.weights * encoding.nbytes
    dtype = np.dtype(np.float32) if encoding.dtype is None else encoding.dtype
    return LazyArray(name, shape, encoding.name, dtype, nbytes, file.path, offset, file, encoding, big_endian)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False  # the file's own error says it better


def _choose(folder: Path) -> Path:
    """The one checkpoint in `folder`: an index before `model.safetensors` before a single file of either kind."""
    from trustcore.weights.gguf import split_name

    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError as error:
        raise CheckpointError(f"the folder cannot be read: {error}", path=folder) from error
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    tensors = [name for name in names if name.endswith(".safetensors")]
    for preferred in ("model.safetensors.index.json", "model.safetensors"):
        if preferred in names:
            indices, tensors = [preferred], []
            break
    models: dict[str, str] = {}  # a split GGUF model counts once, by its first part
    for name in names:
        if name.endswith(".gguf"):
            split = split_name(name)
            models.setdefault(name if split is None else f"{split[0]} of {split[2]}", name)
    found = (indices or tensors) + list(models.values())
    if not found:
        raise CheckpointError(
            "the folder holds no checkpoint; expected model.safetensors.index.json, a .safetensors or a .gguf file",
            path=folder,
        )
    if len(found) > 1:
        raise CheckpointError(
            f"the folder holds {len(found)} checkpoints ({', '.join(found[:6])}{', ...' if len(found) > 6 else ''}). "
            f"Open one of them: open_checkpoint({str(folder / found[0])!r})",
            path=folder,
        )
    return folder / found[0]
