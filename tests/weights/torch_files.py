"""Files as torch.save writes them, made by hand, so that every field of them may lie."""

from __future__ import annotations

import io
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

RECORDED = np.load(Path(__file__).parents[1] / "data" / "pytorch_files.npz")


def recorded(name: str) -> bytes:
    """A file that torch wrote."""
    return RECORDED[f"{name}/file"].tobytes()


def text(value: str) -> bytes:
    """The opcode that pushes a text."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(dotted: str) -> bytes:
    """The opcode that pushes a function or class; the last dot parts it from its module."""
    module, _, last = dotted.rpartition(".")
    return b"c" + module.encode() + b"\n" + last.encode() + b"\n"


def group(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def sizes(values: Any) -> bytes:
    return group(*(integer(value) for value in values))


def storage(key: str = "0", numbers: int = 4, kind: str = "torch.FloatStorage") -> bytes:
    return group(text("storage"), name(kind), text(key), text("cpu"), integer(numbers)) + b"Q"


def tensor(offset: int = 0, shape: Any = (4,), strides: Any = (1,), of: bytes | None = None) -> bytes:
    of = storage() if of is None else of
    rest = b"\x89" + name("collections.OrderedDict") + b")R"
    values = group(of, integer(offset), sizes(shape), sizes(strides), rest)
    return name("torch._utils._rebuild_tensor_v2") + values + b"R"


def state(**values: bytes) -> bytes:
    """A pickle of a dict with these values."""
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in values.items()) + b"u."


def archive(
    pickle: bytes, storages: dict[str, bytes] | None = None, *, method: int = zipfile.ZIP_STORED, **extra: bytes
) -> bytes:
    """A zip archive with that data.pkl; one storage of four floats unless others are given."""
    buffer = io.BytesIO()
    held = {"0": np.arange(4, dtype=np.float32).tobytes()} if storages is None else storages
    entries = OrderedDict({"m/data.pkl": pickle, "m/version": b"3\n"})
    entries.update({f"m/{key}": value for key, value in extra.items()})
    entries.update({f"m/data/{key}": value for key, value in held.items()})
    with zipfile.ZipFile(buffer, "w", method) as packed:
        for key, value in entries.items():
            packed.writestr(key, value)
    return buffer.getvalue()


def legacy(pickle: bytes, keys: list[str] | None = None, storages: bytes | None = None) -> bytes:
    """The older format with that pickle."""
    keys = ["0"] if keys is None else keys
    floats = np.arange(4, dtype=np.float32).tobytes()
    head = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"\x80\x02M\xe9\x03." + b"\x80\x02}."
    listed = b"\x80\x02](" + b"".join(map(text, keys)) + b"e."
    return head + pickle + listed + (struct.pack("<q", 4) + floats if storages is None else storages)
