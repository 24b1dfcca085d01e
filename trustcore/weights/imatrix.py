"""llama.cpp's importance matrices: the mean squares of what goes into each product, by tensor name.

Two layouts, both read and written (llama.cpp, tools/imatrix):

    GGUF    general.type "imatrix", imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size; for each tensor
            `NAME.in_sum2` f32 [experts, K], sums of squares, and `NAME.counts` f32 [experts, 1], how many rows each
    .dat    little-endian: i32 entries; for each: i32 bytes and the name, i32 calls, i32 values, f32 mean square *
            calls; then, in newer files, i32 chunks, i32 bytes and the name of the data. The experts of a tensor follow
            each other in its values.

    importance = in_sum2 / counts   or   values / calls
"""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from trustcore.errors import CheckpointError
from trustcore.weights.gguf_writer import write_gguf
from trustcore.weights.mapped import read_bytes
from trustcore.weights.opening import open_checkpoint

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME = 1 << 16


@dataclass(frozen=True)
class Entry:
    """The statistics of one tensor.

    Attributes:
        mean: float32 `[K]`, or `[E, K]` for stacked experts: mean squares of the inputs.
        counts: float32 `[E]` (`[1]` without experts), the rows each mean is of; in .dat files, calls.
    """

    mean: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix file.

    Attributes:
        entries: by tensor name, as GGUF files name them ("blk.0.ffn_down.weight").
        datasets: names of the data.
        chunks: of data; 0 where the file does not say.
        chunk_size: tokens a chunk; 0 where the file does not say.
    """

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0
    path: Path | None = field(default=None, compare=False)

    @property
    def importance(self) -> dict[str, np.ndarray]:
        """Mean squares by tensor name."""
        return {name: entry.mean for name, entry in self.entries.items()}

    @staticmethod
    def of(importance: Mapping[str, np.ndarray], *, rows: int = 1, datasets: Sequence[str] = ()) -> Imatrix:
        """Returns the file for mean squares `[K]` or `[E, K]` by tensor name, each taken over `rows` rows."""
        entries = {}
        for name, given in importance.items():
            mean = np.asarray(given, np.float32)
            entries[name] = Entry(mean, np.full(1 if mean.ndim == 1 else len(mean), rows, np.float32))
        return Imatrix(entries, tuple(datasets), 1, rows)


def read_imatrix(path: str | os.PathLike[str], *, experts: Mapping[str, int] | None = None) -> Imatrix:
    """Returns the importance matrix in a GGUF or a .dat file.

    Args:
        path: the file.
        experts: of the tensors that have any, for .dat files, which do not say.

    Raises:
        CheckpointError: the file is neither, or broken; names the field.
    """
    path = Path(path)
    return _read_gguf(path) if read_bytes(path, 4) == b"GGUF" else _read_dat(path, experts or {})


def write_imatrix(
    path: str | os.PathLike[str], imatrix: Imatrix, *, layout: Literal["gguf", "dat"] | None = None
) -> None:
    """Writes an importance matrix, complete or not at all.

    Args:
        path: the file.
        imatrix: its contents.
        layout: "gguf" or "dat"; None: "dat" where the name ends so, otherwise "gguf".

    Raises:
        CheckpointError: the layout is unknown, or an entry cannot be stored.
    """
    path = Path(path)
    layout = layout or ("dat" if path.suffix == ".dat" else "gguf")
    for name, entry in imatrix.entries.items():
        if entry.mean.ndim not in (1, 2) or entry.counts.shape != (1 if entry.mean.ndim == 1 else len(entry.mean),):
            raise CheckpointError(
                f"the mean is {list(entry.mean.shape)} and the counts {list(entry.counts.shape)}; expected [K] and "
                "[1], or [E, K] and [E]",
                path=path,
                field=f"entry {name!r}",
            )
    if layout == "gguf":
        _write_gguf(path, imatrix)
    elif layout == "dat":
        _write_dat(path, imatrix)
    else:
        raise CheckpointError(f"the layout is {layout!r}; expected 'gguf' or 'dat'", path=path)


def _read_gguf(path: Path) -> Imatrix:
    with open_checkpoint(path) as checkpoint:
        kind = checkpoint.metadata.get("general.type", "imatrix")
        if kind != "imatrix":
            raise CheckpointError(f"the file says {kind!r}; expected 'imatrix'", path=path, field="general.type")
        entries = {}
        for name in checkpoint:
            if not name.endswith(_SUMS):
                continue
            tensor = name[: -len(_SUMS)]
            counts = checkpoint.get(tensor + _COUNTS)
            if counts is None:
                raise CheckpointError("its counts are missing", path=path, field=f"tensor {tensor + _COUNTS!r}")
            sums, rows = (np.array(checkpoint[n].numpy(), np.float32) for n in (name, tensor + _COUNTS))
            sums, rows = sums.reshape(-1, sums.shape[-1]), rows.reshape(-1)
            if len(rows) != len(sums):
                raise CheckpointError(
                    f"{len(rows)} counts for sums {list(sums.shape)}; expected one for each row of sums",
                    path=path,
                    field=f"tensor {tensor + _COUNTS!r}",
                )
            entries[tensor] = _entry(path, tensor, sums, rows)
        if not entries:
            raise CheckpointError(f"no tensor ends in {_SUMS!r}; this is no importance matrix", path=path)
        datasets = checkpoint.metadata.get("imatrix.datasets", [])
        numbers = [checkpoint.metadata.get(f"imatrix.{name}", 0) for name in ("chunk_count", "chunk_size")]
        if not isinstance(datasets, list | tuple) or not all(isinstance(n, int) for n in numbers):
            raise CheckpointError("datasets must be a list, chunk_count and chunk_size integers", path=path)
        return Imatrix(entries, tuple(map(str, datasets)), *numbers, path=path)


def _entry(path: Path, name: str, sums: np.ndarray, rows: np.ndarray) -> Entry:
    """Sums and counts as means. An expert that saw no row weighs all its inputs alike, as in llama.cpp."""
    if not (np.isfinite(sums).all() and (sums >= 0).all() and np.isfinite(rows).all() and (rows >= 0).all()):
        raise CheckpointError("sums and counts must be finite and not negative", path=path, field=f"entry {name!r}")
    mean = np.where(rows[:, None] > 0, sums / np.maximum(rows, 1e-30)[:, None], 1).astype(np.float32)
    return Entry(mean[0] if len(mean) == 1 else mean, rows)


def _write_gguf(path: Path, imatrix: Imatrix) -> None:
    tensors: dict[str, np.ndarray | tuple[np.ndarray, str]] = {}
    for name in sorted(imatrix.entries):
        entry = imatrix.entries[name]
        mean = np.atleast_2d(entry.mean).astype(np.float32)
        tensors[name + _SUMS] = mean * entry.counts[:, None].astype(np.float32)
        tensors[name + _COUNTS] = entry.counts.astype(np.float32)[:, None]
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": list(imatrix.datasets) or [""],
        "imatrix.chunk_count": np.uint32(imatrix.chunks),
        "imatrix.chunk_size": np.uint32(imatrix.chunk_size),
    }
    write_gguf(path, metadata, tensors)


class _Reader:
    """Takes numbers off the bytes of a .dat file; every refusal names the place."""

    def __init__(self, path: Path):
        self.path, self.data, self.place = path, path.read_bytes(), 0

    def error(self, message: str, field: str) -> CheckpointError:
        return CheckpointError(message, path=self.path, field=field, offset=self.place)

    def integer(self, field: str, low: int, high: int) -> int:
        if self.place + 4 > len(self.data):
            raise self.error("the file ends here", field)
        (value,) = struct.unpack_from("<i", self.data, self.place)
        if not low <= value <= high:
            raise self.error(f"the number is {value}; expected {low} to {high}", field)
        self.place += 4
        return value

    def text(self, field: str) -> str:
        length = self.integer(f"{field} length", 0, _LONGEST_NAME)
        raw = self.data[self.place : self.place + length]
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise self.error("the name is no UTF-8 text", field) from error
        if len(raw) < length:
            raise self.error("the file ends here", field)
        self.place += length
        return text

    def floats(self, count: int, field: str) -> np.ndarray:
        if self.place + 4 * count > len(self.data):
            raise self.error(f"{count} numbers do not fit the {len(self.data) - self.place} bytes left", field)
        values = np.frombuffer(self.data, "<f4", count, self.place).astype(np.float32)
        self.place += 4 * count
        return values


def _read_dat(path: Path, experts: Mapping[str, int]) -> Imatrix:
    reader = _Reader(path)
    count = reader.integer("entries", 1, 1 << 24)
    entries = {}
    for i in range(count):
        name = reader.text(f"entry {i} name")
        calls = reader.integer(f"entry {name!r} calls", 0, 2**31 - 1)
        size = reader.integer(f"entry {name!r} values", 1, 2**31 - 1)
        values = reader.floats(size, f"entry {name!r}")
        groups = experts.get(name, 1)
        if groups < 1 or size % groups:
            raise reader.error(f"{size} values are no multiple of {groups} experts", f"entry {name!r}")
        entries[name] = _entry(path, name, values.reshape(groups, -1), np.full(groups, calls, np.float32))
    if reader.place == len(reader.data):
        return Imatrix(entries, path=path)
    chunks = reader.integer("chunks", 0, 2**31 - 1)
    return Imatrix(entries, (reader.text("data"),), chunks, path=path)


def _write_dat(path: Path, imatrix: Imatrix) -> None:
    out = bytearray(struct.pack("<i", len(imatrix.entries)))
    for name, entry in imatrix.entries.items():
        calls = max(int(entry.counts.max()), 1)  # one number for all experts: means are kept, counts are not
        values = (entry.mean * np.float32(calls)).astype("<f4").reshape(-1)
        raw = name.encode()
        out += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, len(values)) + values.tobytes()
    data = " ".join(imatrix.datasets).encode()
    out += struct.pack("<ii", imatrix.chunks, len(data)) + data
    partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.partial")
    try:
        partial.write_bytes(out)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
