"""JSON from files that are not trusted: bounded in size and in values before it is parsed.

Python makes an object of 50 to 100 bytes of every two bytes of the densest JSON, so the bytes alone are no bound.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from trustcore.errors import CheckpointError
from trustcore.weights.mapped import file_size, read_bytes

MAX_VALUES = 2**22  # ten a tensor: four times the largest index in use, of some 100,000 tensors


def read_object(path: Path, field: str, most: int, *, unique: bool) -> dict[str, Any]:
    """Returns the JSON object that a file of at most `most` bytes holds.

    Args:
        path: the file.
        field: what the file is, for errors.
        most: bytes that it may have.
        unique: refuse an object that names a key twice; otherwise the last one counts.
    """
    size = file_size(path)
    if size > most:
        raise CheckpointError(f"the file has {size} bytes; expected at most {most}", path=path, field=field)
    return parse_object(read_bytes(path, most), path, field, 0, unique=unique)


def parse_object(data: bytes, path: Path, field: str, offset: int, *, unique: bool) -> dict[str, Any]:
    """Returns the JSON object in `data`, which stands at byte `offset` of the file at `path`."""

    def error(message: str, place: int = 0) -> CheckpointError:
        return CheckpointError(message, path=path, field=field, offset=offset + place)

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise error(f"the key {twice[:64]!r} stands twice; expected each key once", max(at(data, twice), 0))
        return found

    values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if values > MAX_VALUES:
        raise error(f"the JSON has {values} values or more; expected at most {MAX_VALUES}")
    try:
        text = data.decode()
        parsed = json.loads(text, object_pairs_hook=distinct if unique else None)
    except UnicodeDecodeError as fault:
        raise error(f"the text is not UTF-8: {fault.reason}", fault.start) from fault
    except json.JSONDecodeError as fault:
        raise error(f"the text is not JSON: {fault.msg}", len(fault.doc[: fault.pos].encode())) from fault
    except CheckpointError:
        raise
    except RecursionError as fault:
        raise error("the JSON is nested too deep; expected a few levels") from fault
    except ValueError as fault:  # an integer of thousands of digits
        raise error(f"the text is not JSON: {fault}") from fault
    if not isinstance(parsed, dict):
        raise error(f"the JSON is {_KINDS.get(type(parsed), 'a number')}; expected an object")
    return parsed


def at(data: bytes, key: str) -> int:
    """Returns where `key` stands as a key of the JSON in `data`, or -1 where it is written with escapes."""
    quoted = re.escape(f'"{key}"'.encode(errors="replace"))
    found = re.search(quoted + rb"\s*:", data)
    return found.start() if found else -1


_KINDS = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
