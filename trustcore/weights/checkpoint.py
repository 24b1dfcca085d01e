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

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from trustcore.errors import CheckpointError
from trustcore.weights.encoding import Encoding
from trustcore.weights.mapped import MappedFile, read_bytes

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
        nbytes: on disk.
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
    _file: MappedFile = field(repr=False)
    _encoding: Encoding = field(repr=False)
    _big_endian: bool = field(default=False, repr=False)

    def raw(self) -> np.ndarray:
        """Returns the stored bytes, uint8 `[*shape[:-1], bytes_per_row]`, as a little-endian file holds them.

        A read-only view of the mapping without a copy; from a big-endian file, a copy with its fields reversed.

        Raises:
            CheckpointError: the file is big-endian and the byte order of this encoding is not settled.
        """
        rows = self._file.view(self.offset, self.nbytes)
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

        Raises:
            CheckpointError: the encoding is packed, or a stored boolean is neither 0 nor 1.
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
            stored = _read_only(self._encoding.swapped(stored))
        return stored.view(dtype).reshape(self.shape)

    def release(self) -> None:
        """Tells the operating system that this tensor's pages are not needed any more; a later read brings them back.

        Keeps resident memory low after a copy was made. Does nothing where the platform has no madvise.
        """
        self._file.release(self.offset, self.nbytes)

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(message, path=self.path, field=f"tensor {self.name!r}", offset=self.offset)

    def __repr__(self) -> str:
        return f"LazyArray({self.name!r}, {self.encoding}{list(self.shape)}, {self.nbytes} bytes)"


class Checkpoint(Mapping[str, LazyArray]):
    """A read-only mapping from tensor name to `LazyArray`, in the file's order; a context manager.

    Attributes:
        path: the file that was opened (one part of a split model, or its index).
        format: "gguf" or "safetensors".
        metadata: GGUF key-values as Python values; or safetensors' `__metadata__`, and under "config" the
            `config.json` beside the file where there is one.

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


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Returns the checkpoint at `path`: a GGUF file, a safetensors file or index, or a folder with one of them.

    A file is recognised by what it holds, not by its name. Any part of a split GGUF model opens the whole model; a
    single safetensors shard opens alone (open its index, or the folder, for the whole).

    Raises:
        CheckpointError: there is no such file, it is something else, or it is broken.
    """
    from trustcore.weights.gguf import MAGIC, open_gguf

    path = Path(path)
    if _is_folder(path):
        path = _choose(path)
    head = read_bytes(path, 512)
    if head[:4] == MAGIC:
        return open_gguf(path)
    if path.name.endswith(".safetensors.index.json"):
        from trustcore.weights.safetensors import open_safetensors_index

        return open_safetensors_index(path)
    looks_like_safetensors = head[5:9] == b"\0\0\0{"  # a header length under 2**40, then JSON
    if not looks_like_safetensors:
        refuse_foreign(path, head)
    if looks_like_safetensors or path.suffix == ".safetensors":
        from trustcore.weights.safetensors import open_safetensors

        return open_safetensors(path)
    raise CheckpointError(
        f"the file starts with {head[:8]!r}; expected {MAGIC!r} (a GGUF file) or the 8-byte header length and "
        f"{b'{'!r} of a safetensors file",
        path=path,
        field="magic",
        offset=0,
    )


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
        (
            head.startswith((b"ggjt", b"tjgg", b"lmgg", b"fmgg")),
            "this is a GGML file from before GGUF. Convert the original model again with a current llama.cpp.",
        ),
        (head.startswith(b"\x1f\x8b"), "this is a gzip archive. Unpack it first."),
    )
    for found, message in known:
        if found:
            raise CheckpointError(message, path=path, field="magic", offset=0)


def make_array(
    name: str, shape: tuple[int, ...], encoding: Encoding, file: MappedFile, offset: int, *, big_endian: bool = False
) -> LazyArray:
    """Returns the `LazyArray` of a tensor that the caller has proved to lie inside `file`."""
    nbytes = prod(shape) // encoding.weights * encoding.nbytes
    return LazyArray(name, shape, encoding.name, encoding.dtype, nbytes, file.path, offset, file, encoding, big_endian)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


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
    models: dict[object, str] = {}  # a split GGUF model counts once, by its first part
    for name in names:
        if name.endswith(".gguf") and name != TOKENIZER_GGUF:
            split = split_name(name)
            models.setdefault(name if split is None else (split.prefix, split.count), name)
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
