"""Writes safetensors files tensor by tensor: one file, or shards with an index; each file all or nothing.

    header length u64, little-endian | header, a JSON object filled up with spaces | tensor data

What is written is told by shapes and dtypes first, so that the header stands before the first byte of data is made;
then each tensor is made, written and dropped. Memory: one tensor. Tensors of larger numbers come first, so that every
tensor is aligned to its numbers; the data start at a multiple of 8.

Invariant: a file appears under its name when it is complete, and not before; a failure leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from trustcore.errors import CheckpointError
from trustcore.weights.encoding import Encoding
from trustcore.weights.safetensors import DTYPES, MAX_HEADER_BYTES

SHARD_BYTES = 5 * 10**9  # as the field's tools cut models

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i)?)?b?", re.IGNORECASE)
_NAMES = {encoding.dtype: name for name, encoding in DTYPES.items() if encoding.dtype is not None}


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written.

    Attributes:
        shape: of the array that `make` returns.
        dtype: the same.
        make: returns the array; called once, when its turn has come.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: Any) -> Planned:
        """Returns the plan for an array that is there; one on a device is copied when its turn comes."""
        return cls(tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array))

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Planned], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file to `path`, in place of what was there.

    Args:
        path: the file.
        tensors: by name.
        metadata: `__metadata__`, strings.

    Raises:
        CheckpointError: a tensor cannot be written, or is made otherwise than it was planned; names it.
        OSError: the disk refuses.
    """
    path = Path(path)
    order = sorted(tensors, key=lambda name: (-_encoding(path, name, tensors[name]).nbytes, name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        planned = tensors[name]
        entries[name] = {
            "dtype": _NAMES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [offset, offset + planned.nbytes],
        }
        offset += planned.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER_BYTES:
        raise CheckpointError(f"the header has {len(header)} bytes; expected at most {MAX_HEADER_BYTES}", path=path)
    partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in order:
                file.write(_bytes(path, name, tensors[name]).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_shards(
    folder: Path,
    units: Mapping[str, Mapping[str, Planned]],
    metadata: Callable[[Sequence[str]], Mapping[str, str]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `model.safetensors` to a folder, or shards of about `shard_bytes` with `model.safetensors.index.json`.

    Args:
        folder: where the files go; it exists.
        units: tensors by name, in units that stay in one shard, in the order in which shards are cut.
        metadata: from the names of the units in a file to its `__metadata__`; the index has that of all of them.
        shard_bytes: of a shard's data at most, unless one unit has more.

    Raises:
        CheckpointError: a tensor cannot be written; names it.
        OSError: the disk refuses.
    """
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, tensors in units.items():
        nbytes = sum(planned.nbytes for planned in tensors.values())
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + nbytes, total + nbytes
    places: dict[str, str] = {}
    for index, names in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {name: planned for unit in names for name, planned in units[unit].items()}
        write_safetensors(folder / file, tensors, metadata(names))
        places.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        notes = {"total_size": total, **metadata(list(units))}
        text = json.dumps({"metadata": notes, "weight_map": places}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def parse_size(size: int | str) -> int:
    """Returns bytes from a number of them, or from "5GB", "512MiB", "1.5 GB": powers of 1000, with an i of 1024.

    Raises:
        CheckpointError: it is neither, or no byte at all.

    >>> parse_size("5GB"), parse_size("2KiB")
    (5000000000, 2048)
    """
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    nbytes = size if type(size) is int else 0
    if found is not None and len(found[1]) < 20:
        base = 1024 if found[3] else 1000
        nbytes = int(float(found[1]) * base ** " kmgt".index((found[2] or " ").lower()))
    if nbytes < 1:
        raise CheckpointError(f"{size!r} is no size of a file; write a number of bytes, or 5GB or 512MiB, for example")
    return nbytes


def _encoding(path: Path, name: str, planned: Planned) -> Encoding:
    encoding = DTYPES.get(_NAMES.get(planned.dtype, ""))
    if encoding is None:
        known = ", ".join(str(dtype) for dtype in _NAMES)
        raise CheckpointError(
            f"the dtype is {planned.dtype}; expected one of {known}", path=path, field=f"tensor {name!r}"
        )
    if not name or name == "__metadata__":
        raise CheckpointError("this is no name of a tensor", path=path, field=f"tensor {name!r}")
    return encoding


def _bytes(path: Path, name: str, planned: Planned) -> np.ndarray:
    """The little-endian bytes of a tensor, made now."""
    array = np.asarray(planned.make(), order="C")
    if array.dtype != planned.dtype or array.shape != planned.shape:
        raise CheckpointError(
            f"made as {array.dtype}{list(array.shape)}, planned as {planned.dtype}{list(planned.shape)}",
            path=path,
            field=f"tensor {name!r}",
        )
    rows = array.reshape(-1).view(np.uint8)
    encoding = _encoding(path, name, planned)
    return encoding.swapped(rows) if sys.byteorder == "big" and encoding.words else rows
