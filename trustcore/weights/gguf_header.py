"""The header of one GGUF file: metadata and the table of tensors, read with every claim checked.

    magic "GGUF" | version u32 | tensor_count u64 | metadata_kv_count u64
    metadata_kv_count x (key string | type u32 | value)
    tensor_count x (name string | n_dims u32 | n_dims x size u64 | ggml type u32 | offset u64)
    padding to `general.alignment` | tensor data

A string is its length (u64) and UTF-8 bytes; an array is its element type (u32), its count (u64) and the elements.
Sizes stand innermost first, so a shape is their reverse. Offsets count from the start of the tensor data.
Source: docs/gguf.md of ggml. Versions 2 and 3 differ in the byte order alone, which version 3 leaves open.

Nothing in the file is trusted. Every length and count is compared with the bytes that are left before anything is
made of it; what the bytes alone do not bound (a sparse file may claim any size) the limits below do.
Time and memory of opening are linear in the header.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from trustcore.errors import CheckpointError
from trustcore.weights.checkpoint import LazyArray, make_array
from trustcore.weights.encoding import Encoding
from trustcore.weights.gguf_types import ARRAY, BOOL, GGML_TYPES, REMOVED_TYPES, SCALARS, STRING
from trustcore.weights.mapped import MappedFile

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4  # GGML_MAX_DIMS

# The largest vocabularies in use have about 2**18 tokens, each with a text, a score, a type and up to two merges: under
# 2**21 array elements. The largest models, whose experts are merged, have some thousand tensors. A file that reaches
# the limits opens in seconds.
MAX_HEADER_BYTES = 2**28
MAX_ELEMENTS = 2**23  # of all arrays together
MAX_INNER_ARRAYS = 2**16  # of all arrays of arrays together; llama.cpp writes none
MAX_DEPTH = 16  # of arrays in arrays
MAX_PAIRS = 2**16
MAX_TENSORS = 2**17
MAX_NAME_BYTES = 2**16 - 1  # the specification's limit for keys

_MIN_PAIR_BYTES = 8 + 4 + 1  # an empty key, the type, a value of one byte
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8  # an empty name, no dimension, the type, the offset


class Header(NamedTuple):
    """What one file holds.

    Attributes:
        path: the file.
        metadata: the key-values, as Python values.
        arrays: the tensors, in the file's order.
        places: where the value of each key starts, in bytes from the start of the file.
    """

    path: Path
    metadata: dict[str, Any]
    arrays: dict[str, LazyArray]
    places: dict[str, int]


def read_header(file: MappedFile) -> Header:
    """Returns the metadata and the tensors of one file.

    Raises:
        CheckpointError: the file is broken; the error names the field and where it stands.
    """
    return _Reader(file).header()


def shown(value: object) -> str:
    """A short form of a value from the file, for messages: a hostile one may have a million characters."""
    text = repr(value if not isinstance(value, (str, list)) else value[:64])
    return text if len(text) <= 200 else f"{text[:200]}..."


class _Reader:
    """A cursor over the header of one file."""

    def __init__(self, file: MappedFile):
        self.file, self.data, self.path = file, file.map, file.path
        self.pos, self.limit = 0, min(file.size, MAX_HEADER_BYTES)
        self.elements_left, self.inner_arrays_left = MAX_ELEMENTS, MAX_INNER_ARRAYS
        self.order: Literal["<", ">"] = "<"

    def header(self) -> Header:
        magic = self.data[:4]
        if magic != MAGIC:
            raise self.error(f"the file starts with {magic!r}; expected {MAGIC!r}", "magic", 0)
        self.pos = 4
        version = self.number("I", "version")
        if version and version & 0xFFFF == 0:  # no version is near 65536: the bytes stand the other way round
            self.order, self.pos = ">", 4
            version = self.number("I", "version")
        if version == 1:
            raise self.error(
                "GGUF version 1 is not supported; expected 2 or 3. Convert the original model again with a current "
                "llama.cpp.",
                "version",
                4,
            )
        if version not in (2, 3):
            raise self.error(f"the version is {version}; expected 2 or 3", "version", 4)
        tensor_count, pair_count = self.number("Q", "tensor_count"), self.number("Q", "metadata_kv_count")
        for count, least, most, field, place in (
            (tensor_count, _MIN_TENSOR_BYTES, MAX_TENSORS, "tensor_count", 8),
            (pair_count, _MIN_PAIR_BYTES, MAX_PAIRS, "metadata_kv_count", 16),
        ):
            self.check_count(count, least, most, field, place)
        metadata, places = self.metadata(pair_count)
        alignment = self.alignment(metadata, places)
        return Header(self.path, metadata, self.tensors(tensor_count, alignment), places)

    # Numbers, strings, values.

    def error(self, message: str, field: str, offset: int) -> CheckpointError:
        return CheckpointError(message, path=self.path, field=field, offset=offset)

    def need(self, nbytes: int, field: str) -> None:
        """Raises where fewer than `nbytes` bytes of header are left."""
        left = self.limit - self.pos
        if nbytes > left:
            end = (
                f"the header may have {MAX_HEADER_BYTES} bytes, of which {left} are left"
                if self.file.size > self.limit
                else f"the file has {left} left: it is cut short or broken. Fetch it again"
            )
            raise self.error(f"expected {nbytes} more byte{'s' * (nbytes != 1)}; {end}", field, self.pos)

    def check_count(self, count: int, least: int, most: int, field: str, place: int) -> None:
        """Raises where `count` items of at least `least` bytes cannot follow, or are more than `most`."""
        left = self.limit - self.pos
        if count > left // least:
            raise self.error(
                f"the count is {count}; expected at most {left // least}, since an item has {least} byte"
                f"{'s' * (least != 1)} or more and {left} bytes of header are left",
                field,
                place,
            )
        if count > most:
            raise self.error(f"the count is {count}; expected at most {most}, the limit of this reader", field, place)

    def number(self, code: str, field: str) -> int:
        width = struct.calcsize(f"={code}")
        self.need(width, field)
        (value,) = struct.unpack_from(self.order + code, self.data, self.pos)
        self.pos += width
        return value

    def string(self, field: str, most: int = MAX_HEADER_BYTES) -> str:
        place = self.pos
        length = self.number("Q", field)
        most = min(most, self.limit - self.pos)
        if length > most:
            raise self.error(
                f"the text has {length} bytes; expected at most {most}, the limit or what the header has left",
                field,
                place,
            )
        start, self.pos = self.pos, self.pos + length
        try:
            return self.data[start : self.pos].decode()
        except UnicodeDecodeError as error:
            raise self.error(f"the text is not UTF-8: {error.reason}", field, start + error.start) from error

    def strings(self, count: int, field: str) -> list[str]:
        """Reads what `string` reads, `count` times, without a call for each: vocabularies have half a million."""
        unpack, data, pos, limit = struct.Struct(f"{self.order}Q").unpack_from, self.data, self.pos, self.limit
        texts: list[str] = []
        add = texts.append
        last = limit - 8
        for _ in range(count):
            if pos > last:
                break
            end = pos + 8 + unpack(data, pos)[0]
            if end > limit:
                break
            try:
                add(data[pos + 8 : end].decode())
            except UnicodeDecodeError:
                break
            pos = end
        self.pos = pos
        if len(texts) < count:
            self.string(f"{field}[{len(texts)}]")  # raises: it refuses what the loop stopped at
        assert len(texts) == count, field
        return texts

    def value(self, kind: int, field: str, place: int, depth: int = 0) -> Any:
        """Reads one value of metadata type `kind`; `place` is where the file names that type."""
        if kind == STRING:
            return self.string(field)
        if kind in SCALARS or kind == BOOL:
            return self.scalars(kind, 1, field)[0]
        if kind != ARRAY:
            raise self.error(f"the type is {kind}; expected 0 to 12 (see the GGUF specification)", field, place)
        if depth == MAX_DEPTH:
            raise self.error(f"arrays are nested deeper than {MAX_DEPTH}", field, place)
        place = self.pos
        inner, count = self.number("I", field), self.number("Q", field)
        if inner == ARRAY:
            self.check_count(count, 12, self.inner_arrays_left, f"{field}.count", place + 4)
            self.inner_arrays_left -= count
            return [self.value(ARRAY, f"{field}[{index}]", place, depth + 1) for index in range(count)]
        if inner not in SCALARS and inner not in (BOOL, STRING):
            raise self.error(
                f"the element type is {inner}; expected 0 to 12 (see the GGUF specification)", field, place
            )
        least = 8 if inner == STRING else 1 if inner == BOOL else SCALARS[inner].itemsize
        self.check_count(count, least, self.elements_left, f"{field}.count", place + 4)
        self.elements_left -= count
        return self.strings(count, field) if inner == STRING else self.scalars(inner, count, field)

    def scalars(self, kind: int, count: int, field: str) -> list[Any]:
        """Reads `count` numbers or booleans that follow each other, as Python values."""
        dtype = np.dtype(np.uint8) if kind == BOOL else SCALARS[kind].newbyteorder(self.order)
        self.need(count * dtype.itemsize, field)
        numbers = np.frombuffer(self.data, dtype, count, self.pos)
        if kind == BOOL and count and numbers.max() > 1:
            index = int((numbers > 1).argmax())
            raise self.error(f"a boolean is {numbers[index]}; expected 0 or 1", field, self.pos + index)
        self.pos += count * dtype.itemsize
        return (numbers.astype(bool) if kind == BOOL else numbers).tolist()

    # The two tables.

    def metadata(self, count: int) -> tuple[dict[str, Any], dict[str, int]]:
        metadata: dict[str, Any] = {}
        places: dict[str, int] = {}
        for index in range(count):
            start = self.pos
            key = self.string(f"metadata[{index}].key", MAX_NAME_BYTES)
            if key in metadata:
                raise self.error(f"the key {shown(key)} stands twice; expected each key once", "metadata", start)
            field = f"metadata {shown(key)}"
            place = self.pos
            kind = self.number("I", f"{field}.type")
            places[key] = self.pos
            metadata[key] = self.value(kind, field, place)
        return metadata, places

    def alignment(self, metadata: dict[str, Any], places: dict[str, int]) -> int:
        key = "general.alignment"
        value = metadata.get(key, DEFAULT_ALIGNMENT)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value & (value - 1):
            raise self.error(f"the alignment is {shown(value)}; expected a power of two", key, places[key])
        return value

    def tensors(self, count: int, alignment: int) -> dict[str, LazyArray]:
        found: dict[str, tuple[tuple[int, ...], Encoding, int, int]] = {}
        for index in range(count):
            start = self.pos
            name = self.string(f"tensor[{index}].name", MAX_NAME_BYTES)
            if name in found:
                raise self.error(f"the tensor {shown(name)} stands twice; expected each name once", "tensor", start)
            field = f"tensor {shown(name)}"
            start = self.pos
            dims = self.number("I", f"{field}.n_dims")
            if dims > MAX_DIMS:
                raise self.error(f"the tensor has {dims} dimensions; expected at most 4", f"{field}.n_dims", start)
            start = self.pos
            shape = tuple(self.number("Q", f"{field}.dims") for _ in range(dims))[::-1]
            encoding = self.encoding(field)
            try:
                encoding.tensor_bytes(shape)
            except ValueError as error:
                raise self.error(str(error), f"{field}.dims", start) from error
            start = self.pos
            offset = self.number("Q", f"{field}.offset")
            if offset % alignment:
                raise self.error(
                    f"the offset is {offset}; expected a multiple of the alignment {alignment}",
                    f"{field}.offset",
                    start,
                )
            found[name] = shape, encoding, offset, start
        return self.place(found, -(-self.pos // alignment) * alignment)

    def encoding(self, field: str) -> Encoding:
        start = self.pos
        number = self.number("I", f"{field}.type")
        encoding = GGML_TYPES.get(number)
        if encoding is None:
            removed = REMOVED_TYPES.get(number)
            raise self.error(
                f"the ggml type is {number}"
                + (f" ({removed}), which ggml took back. Convert the original model again" if removed else "")
                + f"; expected one of {', '.join(f'{known} ({GGML_TYPES[known].name})' for known in GGML_TYPES)}",
                f"{field}.type",
                start,
            )
        return encoding

    def place(self, found: dict[str, tuple[tuple[int, ...], Encoding, int, int]], base: int) -> dict[str, LazyArray]:
        """Proves that every tensor lies inside the file and none shares a byte with another."""
        spans = []
        arrays = {}
        for name, (shape, encoding, offset, field_at) in found.items():
            first, size = base + offset, prod(shape) // encoding.weights * encoding.nbytes
            if size and first + size > self.file.size:
                raise self.error(
                    f"the data are bytes {first} to {first + size}, but the file has {self.file.size}: it is cut short "
                    "or broken. Fetch it again.",
                    f"tensor {shown(name)}.offset",
                    field_at,
                )
            if size:
                spans.append((first, first + size, name, field_at))
            arrays[name] = make_array(
                name, shape, encoding, self.file, min(first, self.file.size), big_endian=self.order == ">"
            )
        spans.sort()
        for (_, end, before, _), (first, _, name, field_at) in pairwise(spans):
            if first < end:
                raise self.error(
                    f"the data start at byte {first}, but those of tensor {shown(before)} end at {end}; expected no "
                    "overlap",
                    f"tensor {shown(name)}.offset",
                    field_at,
                )
        return arrays
