"""Reads llama.cpp's importance matrices: for each weight matrix, the mean square of each of its inputs.

Two layouts exist. A GGUF file (`general.type` "imatrix") holds, for a tensor `T`, `T.in_sum2` `[E, K]`, sums of
squares, and `T.counts` `[E, 1]`, how many tokens they are sums over; E counts experts. The older binary file:

    entries i32 | entries x (length i32, name, calls i32, values i32, values x f32) | ...

whose values are sums over calls of means. A file is untrusted: every length is checked before it is used.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

from trustcore.errors import CheckpointError
from trustcore.weights.checkpoint import open_checkpoint
from trustcore.weights.gguf_header import MAGIC, shown
from trustcore.weights.mapped import MappedFile, read_bytes

_SUMS, _COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Returns tensor names and the importance of their inputs, float32 `[K]`, or `[E, K]` for a stack of experts.

    Inputs of an expert that was never called count alike: 1.

    Raises:
        CheckpointError: the file is missing, of another kind, or broken.
    """
    path = Path(path)
    found = _read_gguf(path) if read_bytes(path, 4) == MAGIC else _read_binary(path)
    for name, values in found.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise CheckpointError(
                "the importance has numbers that are negative, infinite or NaN", path=path, field=f"tensor {name!r}"
            )
    return found


def _read_gguf(path: Path) -> dict[str, np.ndarray]:
    found = {}
    with open_checkpoint(path) as file:
        names = [name.removesuffix(_SUMS) for name in file if name.endswith(_SUMS)]
        if not names:
            raise CheckpointError(
                f"the file has no tensor called *{_SUMS}: it is no importance matrix. Make one with llama.cpp's "
                "`llama-imatrix`.",
                path=path,
            )
        for name in names:
            sums, counts = file[name + _SUMS].numpy(), file.get(name + _COUNTS)
            if counts is None or counts.encoding != "f32" or sums.dtype != np.float32 or sums.ndim > 2:
                raise CheckpointError(
                    f"expected f32 sums [E, K] and beside them {shown(name + _COUNTS)}, f32",
                    path=path,
                    field=f"tensor {name!r}",
                )
            number = counts.numpy().reshape(-1, 1)
            sums = np.atleast_2d(sums)
            if len(number) not in (1, len(sums)):
                raise CheckpointError(
                    f"{len(number)} counts for {len(sums)} matrices", path=path, field=f"tensor {name!r}"
                )
            found[name] = _means(sums, np.broadcast_to(number, (len(sums), 1)))
    return found


def _means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    means = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32)
    return means[0] if len(means) == 1 else means


def _read_binary(path: Path) -> dict[str, np.ndarray]:
    file = MappedFile(path)
    data, position = file.map, 0

    def take(count: int, field: str) -> bytes:
        nonlocal position
        if not 0 <= count <= file.size - position:
            raise CheckpointError(
                f"{count} bytes are wanted, {file.size - position} are left: this is no importance matrix, or it is "
                "cut short",
                path=path,
                field=field,
                offset=position,
            )
        position += count
        return data[position - count : position]

    def integer(field: str) -> int:
        return struct.unpack("<i", take(4, field))[0]

    found: dict[str, np.ndarray] = {}
    try:
        entries = integer("entries")
        if not 1 <= entries <= file.size // 12:
            raise CheckpointError(
                f"{entries} entries in a file of {file.size} bytes: this is no importance matrix", path=path, offset=0
            )
        for index in range(entries):
            field = f"entry {index}"
            name = take(integer(f"{field}.name"), f"{field}.name").decode("utf-8", "backslashreplace")
            calls = integer(f"{field}.calls")
            count = integer(f"{field}.values")
            if count < 1 or name in found:
                raise CheckpointError(
                    f"{shown(name)} has {count} values, or stands twice; expected each name once, with values",
                    path=path,
                    field=field,
                    offset=position,
                )
            values = np.frombuffer(take(4 * count, f"{field}.values"), "<f4").astype(np.float32)
            found[name] = values / max(calls, 1)
    finally:
        file.close()
    return found
