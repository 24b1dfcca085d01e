"""The safetensors reader: one file as a `Checkpoint` (`sharded` reads the shards that an index names).

    header length u64, little-endian | header, a JSON object | tensor data
    header = {"__metadata__": {str: str}, NAME: {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}, ...}

Offsets count from the end of the header. The header is parsed here, because the `safetensors` package says nothing
about where a tensor lies and a view needs to know; every entry that a view rests on is proved to lie inside the file.
Then the package opens the file too, and what it refuses (tensors that overlap or leave gaps, for example) is refused.
Time and memory of opening are linear in the header.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from trustcore.errors import CheckpointError
from trustcore.weights.checkpoint import Checkpoint, LazyArray, make_array
from trustcore.weights.config_file import with_config
from trustcore.weights.encoding import Encoding
from trustcore.weights.json_file import at, parse_object
from trustcore.weights.mapped import MappedFile

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMS = 64  # NumPy's

DTYPES = {
    "BOOL": Encoding.plain("bool", np.bool_),
    "U8": Encoding.plain("u8", np.uint8),
    "I8": Encoding.plain("i8", np.int8),
    "U16": Encoding.plain("u16", np.uint16),
    "I16": Encoding.plain("i16", np.int16),
    "U32": Encoding.plain("u32", np.uint32),
    "I32": Encoding.plain("i32", np.int32),
    "U64": Encoding.plain("u64", np.uint64),
    "I64": Encoding.plain("i64", np.int64),
    "F16": Encoding.plain("f16", np.float16),
    "BF16": Encoding.plain("bf16", ml_dtypes.bfloat16),
    "F32": Encoding.plain("f32", np.float32),
    "F64": Encoding.plain("f64", np.float64),
    "C64": Encoding.plain("c64", np.complex64),
    "F8_E5M2": Encoding.plain("f8_e5m2", ml_dtypes.float8_e5m2),
    "F8_E4M3": Encoding.plain("f8_e4m3", ml_dtypes.float8_e4m3fn),
    "F8_E8M0": Encoding.plain("f8_e8m0", ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": Encoding.plain("f8_e4m3fnuz", ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": Encoding.plain("f8_e5m2fnuz", ml_dtypes.float8_e5m2fnuz),
    "F6_E2M3": Encoding("f6_e2m3", 4, 3, None, ()),
    "F6_E3M2": Encoding("f6_e3m2", 4, 3, None, ()),
    "F4": Encoding("f4", 2, 1, None, ()),
}


def open_safetensors(path: Path) -> Checkpoint:
    """Returns the checkpoint in one safetensors file.

    Raises:
        CheckpointError: the file, or a `config.json` beside it, is missing or broken.
    """
    file = MappedFile(path)
    try:
        metadata, arrays = read_safetensors(file)
        return Checkpoint(path, "safetensors", with_config(metadata, path), arrays, [file])
    except BaseException:
        file.close()
        raise


def read_safetensors(file: MappedFile) -> tuple[dict[str, Any], dict[str, LazyArray]]:
    """Returns the `__metadata__` and the tensors of a file, in the order in which they lie in it."""
    header, base = _header(file)
    entries = parse_object(header, file.path, "header", 8, unique=True)
    metadata = entries.pop("__metadata__", None) or {}
    found = [(_entry(file, header, base, name, entry), name) for name, entry in entries.items()]
    found.sort(key=lambda item: item[0][2])
    _ask_package(file.path)
    return metadata, {
        name: make_array(name, shape, encoding, file, base + begin) for (shape, encoding, begin), name in found
    }


def _header(file: MappedFile) -> tuple[bytes, int]:
    """The bytes of the header, and where the data start."""
    length = int.from_bytes(file.map[:8], "little")
    most = min(file.size - 8, MAX_HEADER_BYTES)
    if length > most:
        raise CheckpointError(
            f"the header has {length} bytes; expected at most {max(most, 0)}, since the file has {file.size} and the "
            f"format allows {MAX_HEADER_BYTES}. The file is cut short or is no safetensors file. Fetch it again.",
            path=file.path,
            field="header length",
            offset=0,
        )
    return file.map[8 : 8 + length], 8 + length


def _entry(file: MappedFile, header: bytes, base: int, name: str, entry: Any) -> tuple[tuple[int, ...], Encoding, int]:
    """Shape, encoding and first byte (from `base`) of a tensor, proved to lie inside the file."""

    def error(message: str, part: str = "") -> CheckpointError:
        place = 8 + max(at(header, name), 0)
        return CheckpointError(message, path=file.path, field=f"tensor {name[:200]!r}{part}", offset=place)

    if not isinstance(entry, dict):
        raise error(f"the entry is {str(entry)[:64]!r}; expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    encoding = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if encoding is None:
        raise error(f"the dtype is {str(dtype)[:64]!r}; expected one of {', '.join(DTYPES)}", ".dtype")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise error(
            f"the shape is {str(shape)[:64]}; expected a list of at most {MAX_DIMS} integers from 0 to 2**63 - 1",
            ".shape",
        )
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise error(f"the offsets are {str(offsets)[:64]}; expected two integers, begin and end", ".data_offsets")
    try:
        nbytes = encoding.tensor_bytes(shape)
    except ValueError as fault:
        raise error(str(fault), ".shape") from fault
    begin, end = offsets
    if end - begin != nbytes:
        raise error(
            f"the offsets {begin} to {end} span {end - begin} bytes; expected {nbytes}, which {dtype} of shape {shape} "
            "takes",
            ".data_offsets",
        )
    if base + end > file.size:
        raise error(
            f"the data are bytes {base + begin} to {base + end}, but the file has {file.size}: it is cut short or "
            "broken. Fetch it again.",
            ".data_offsets",
        )
    return tuple(shape), encoding, begin


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _ask_package(path: Path) -> None:
    """Raises where the `safetensors` package does not open the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return
    except (SafetensorError, OSError, ValueError) as fault:
        raise CheckpointError(
            f"the safetensors package refuses the file: {fault}", path=path, field="header", offset=8
        ) from fault
