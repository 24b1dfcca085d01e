"""The GGUF reader: one file, or all parts of a split model, as a `Checkpoint`.

The format and how it is read are in `gguf_header`. A split model is a set of GGUF files called
`NAME-00001-of-00003.gguf` and so on; each is whole in itself and says `split.no` (counted from 0), `split.count` and
`split.tensors.count`. Invariant: a part is taken only if its name and its own numbers agree, so no name can be used
twice, and a file that points at itself is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from trustcore.errors import CheckpointError
from trustcore.weights.checkpoint import Checkpoint, LazyArray
from trustcore.weights.gguf_header import MAGIC, Header, read_header, shown
from trustcore.weights.mapped import MappedFile

__all__ = ["MAGIC", "SplitName", "open_gguf", "split_name"]


class SplitName(NamedTuple):
    """What `model-00001-of-00003.gguf` says: the prefix, the number of the part counted from 1, and the parts."""

    prefix: str
    number: int
    count: int

    def part(self, number: int) -> str:
        """Returns the file name of another part of the same model."""
        return f"{self.prefix}-{number:05d}-of-{self.count:05d}.gguf"


def split_name(name: str) -> SplitName | None:
    """Returns the parts of a split model's file name, or None where the name is not of that kind."""
    found = re.fullmatch(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", name, re.DOTALL)
    return SplitName(found[1], int(found[2]), int(found[3])) if found else None


def open_gguf(path: Path) -> Checkpoint:
    """Returns the checkpoint in a GGUF file; of a split model, any part opens the whole.

    The metadata are the first part's, which holds the model's; tensors keep the order of the parts.

    Raises:
        CheckpointError: a file is missing, broken, or not a part of the same model.
    """
    files: list[MappedFile] = []
    try:
        part = _read(path, files)
        count = _split_value(part, "split.count", 1)
        name = split_name(path.name)
        if name is None and count <= 1:
            return Checkpoint(path, "gguf", part.metadata, part.arrays, files)
        return _open_split(part, name, count, files)
    except BaseException:
        for file in files:
            file.close()
        raise


def _open_split(opened: Header, name: SplitName | None, count: int, files: list[MappedFile]) -> Checkpoint:
    """Reads the parts that are not open yet and proves that they are the parts of one model."""
    place = opened.places.get("split.count")
    if name is None:
        raise CheckpointError(
            f"the file is one part of {count}, but is not called NAME-0000N-of-{count:05d}.gguf, so the others cannot "
            "be found. Give it back its name.",
            path=opened.path,
            field="split.count",
            offset=place,
        )
    if not 1 <= name.number <= name.count or name.count != count:
        raise CheckpointError(
            f"the name says part {name.number} of {name.count}, the file says that there "
            + ("is 1 part" if count == 1 else f"are {count} parts")
            + ". Give it back its name, or join the parts with `llama-gguf-split --merge`.",
            path=opened.path,
            field="split.count",
            offset=place,
        )
    parts = []
    arrays: dict[str, LazyArray] = {}
    for number in range(1, count + 1):
        path = opened.path.with_name(name.part(number))
        part = opened if number == name.number else _read(path, files)
        _check_part(part, number, count)
        for tensor, array in part.arrays.items():
            if tensor in arrays:
                raise CheckpointError(
                    f"the name stands in {arrays[tensor].path.name} too; expected each tensor in one part",
                    path=path,
                    field=f"tensor {tensor!r}",
                )
            arrays[tensor] = array
        parts.append(part)
    first = parts[0]
    total = _split_value(first, "split.tensors.count", len(arrays))
    if total != len(arrays):
        raise CheckpointError(
            f"the file says {total} tensors, its {count} parts hold {len(arrays)}",
            path=first.path,
            field="split.tensors.count",
            offset=first.places["split.tensors.count"],
        )
    return Checkpoint(opened.path, "gguf", first.metadata, arrays, files)


def _check_part(part: Header, number: int, count: int) -> None:
    """Proves that a part of several is the one that its name says."""
    for key, expected in (("split.no", number - 1), ("split.count", count)):
        found = _split_value(part, key, -1)
        if count > 1 and found != expected:
            raise CheckpointError(
                f"the file says {'nothing' if found < 0 else found}; expected {expected}, by its name",
                path=part.path,
                field=key,
                offset=part.places.get(key),
            )


def _split_value(part: Header, key: str, default: int) -> int:
    value = part.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or (key in part.metadata and value < 0):
        raise CheckpointError(
            f"the value is {shown(value)}; expected an integer of 0 or more",
            path=part.path,
            field=key,
            offset=part.places[key],
        )
    return value


def _read(path: Path, files: list[MappedFile]) -> Header:
    file = MappedFile(path)
    files.append(file)
    return read_header(file)
