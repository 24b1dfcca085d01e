"""Writes GGUF files: metadata and tensors, in either byte order, all or nothing.

A tensor is an array, or a `StreamedTensor` that is made piece by piece when its turn to be written comes: a file of any
size is then written with one piece in memory.

The layout is in `gguf_header`. Values get the types that llama.cpp expects: bool, str, an integer as u32, else i32,
u64 or i64, whichever holds it first; a float as f32. A NumPy scalar or one-dimensional array keeps its own type. A
list is an array of its elements' one type; integers in it are i32, else u32, i64 or u64, the first that holds all.

Invariant: the file appears under its name when it is complete, and not before; a failure leaves nothing behind.
"""

from __future__ import annotations

import math
import os
import secrets
import struct
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from trustcore.errors import CheckpointError
from trustcore.weights.encoding import Encoding
from trustcore.weights.gguf_header import DEFAULT_ALIGNMENT, MAGIC, MAX_DEPTH, MAX_DIMS, MAX_NAME_BYTES, shown
from trustcore.weights.gguf_types import ARRAY, BOOL, GGML_IDS, GGML_TYPES, SCALARS, STRING


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor whose shape and encoding are known before its numbers are.

    Attributes:
        shape: in row-major order, in numbers; the last axis is a row, which packed blocks run along.
        encoding: a name in `GGML_IDS`.
        make: called once, while the file is written. Gives arrays that follow each other in row-major order: of the
            encoding's dtype where it has one, else uint8, the bytes of whole packed blocks.
    """

    shape: tuple[int, ...]
    encoding: str
    make: Callable[[], Iterable[np.ndarray]]


Tensor = np.ndarray | tuple[np.ndarray, str] | StreamedTensor

_SCALAR_IDS = {dtype: number for number, dtype in SCALARS.items()}
_PLAIN_IDS = {encoding.dtype: number for number, encoding in GGML_TYPES.items() if encoding.dtype is not None}
_INTEGERS = tuple(_SCALAR_IDS[np.dtype(name)] for name in ("uint32", "int32", "uint64", "int64"))
_ARRAY_INTEGERS = tuple(_SCALAR_IDS[np.dtype(name)] for name in ("int32", "uint32", "int64", "uint64"))
_F32 = _SCALAR_IDS[np.dtype(np.float32)]


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    version: int = 3,
    byte_order: Literal["little", "big"] = "little",
    alignment: int = DEFAULT_ALIGNMENT,
) -> None:
    """Writes a GGUF file to `path`, in place of what was there.

    Args:
        path: the file to write.
        metadata: key-values: bool, int, float, str, NumPy scalars and one-dimensional arrays, and lists of these.
        tensors: a NumPy array of f32, f16, bf16, f64, i8, i16, i32 or i64; or `(raw, encoding)`, the bytes of packed
            rows as `LazyArray.raw` gives them, uint8 `[..., bytes_per_row]`; or a `StreamedTensor`.
        version: 2 or 3.
        byte_order: of the whole file.
        alignment: of each tensor's first byte; a power of two. Stands in the metadata unless it is the default.

    Raises:
        CheckpointError: a key, value or tensor cannot be written; names it.
        OSError: the disk refuses.

    What the making of a streamed tensor raises passes through.
    """
    path = Path(path)
    writer = _Writer(path, "<" if byte_order == "little" else ">")
    if byte_order not in ("little", "big"):
        raise writer.error(f"{shown(byte_order)} is no byte order; expected 'little' or 'big'", "byte_order")
    if version not in (2, 3):
        raise writer.error(f"the version is {shown(version)}; expected 2 or 3", "version")
    if type(alignment) is not int or not 1 <= alignment < 2**32 or alignment & (alignment - 1):
        raise writer.error(f"the alignment is {shown(alignment)}; expected a power of two", "alignment")
    metadata = dict(metadata)
    if alignment != metadata.get("general.alignment", alignment):
        raise writer.error(
            f"the metadata say {shown(metadata['general.alignment'])}, the argument {alignment}; expected one value",
            "general.alignment",
        )
    if alignment != DEFAULT_ALIGNMENT:
        metadata["general.alignment"] = alignment
    entries = {name: writer.tensor(name, tensor) for name, tensor in tensors.items()}
    header = writer.header(version, metadata, entries, alignment)
    partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(header)
            for name, entry in entries.items():
                _pad(file, alignment)
                writer.write(file, name, entry)
            _pad(file, alignment)  # llama.cpp reads whole paddings, the last one too
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class _Entry:
    """A tensor that the header can describe; `make` gives its bytes as a little-endian file holds them."""

    encoding: Encoding
    shape: tuple[int, ...]
    make: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return self.encoding.tensor_bytes(self.shape)


class _Writer:
    """Turns values into the bytes of a header; every refusal names the file and the field."""

    def __init__(self, path: Path, order: Literal["<", ">"]):
        self.path = path
        self.order: Literal["<", ">"] = order

    def error(self, message: str, field: str) -> CheckpointError:
        return CheckpointError(message, path=self.path, field=field)

    def header(
        self, version: int, metadata: Mapping[str, Any], entries: Mapping[str, _Entry], alignment: int
    ) -> bytearray:
        out = bytearray(MAGIC)
        out += struct.pack(f"{self.order}IQQ", version, len(entries), len(metadata))
        for key, value in metadata.items():
            field = f"metadata {shown(key)}"
            kind, data = self.value(value, field)
            out += self.name(key, field) + struct.pack(f"{self.order}I", kind) + data
        offset = 0
        for name, entry in entries.items():
            out += self.name(name, f"tensor {shown(name)}")
            out += struct.pack(f"{self.order}I{len(entry.shape)}Q", len(entry.shape), *reversed(entry.shape))
            out += struct.pack(f"{self.order}IQ", GGML_IDS[entry.encoding.name], offset)
            offset += -(-entry.nbytes // alignment) * alignment
        return out

    def write(self, file: BinaryIO, name: str, entry: _Entry) -> None:
        """Writes the pieces of a tensor; proves that they are as many bytes as the header says."""
        written = 0
        for piece in entry.make():
            written += piece.size
            if written > entry.nbytes:
                break
            swap = self.order == ">" and entry.encoding.words
            file.write((entry.encoding.swapped(piece) if swap else piece).data)
        if written != entry.nbytes:
            raise self.error(
                f"{'more than ' if written > entry.nbytes else ''}{min(written, entry.nbytes)} bytes were made; "
                f"expected {entry.nbytes}, for {entry.encoding.name}{list(entry.shape)}",
                f"tensor {shown(name)}",
            )

    def name(self, name: Any, field: str) -> bytes:
        data = self.text(name, field)
        if len(data) - 8 > MAX_NAME_BYTES:
            raise self.error(f"the name has {len(data) - 8} bytes; expected at most {MAX_NAME_BYTES}", field)
        return data

    def text(self, text: Any, field: str) -> bytes:
        try:
            data = text.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise self.error(f"{shown(text)} is no UTF-8 text", field) from error
        return struct.pack(f"{self.order}Q", len(data)) + data

    def value(self, value: Any, field: str, depth: int = 0) -> tuple[int, bytes]:
        """The metadata type of `value`, and its bytes."""
        if isinstance(value, (bool, np.bool_)):
            return BOOL, bytes([bool(value)])
        if isinstance(value, str):
            return STRING, self.text(value, field)
        if isinstance(value, (np.number, np.ndarray)):
            return self.numbers(value, field)
        if isinstance(value, int):
            return self.integers([value], _INTEGERS, field)
        if isinstance(value, float):
            return self.floats([value], field)
        if isinstance(value, (list, tuple)):
            if depth == MAX_DEPTH:
                raise self.error(f"lists are nested deeper than {MAX_DEPTH}", field)
            kind, data = self.elements(value, field, depth)
            return ARRAY, struct.pack(f"{self.order}IQ", kind, len(value)) + data
        raise self.error(
            f"a {type(value).__name__} cannot be stored; expected bool, int, float, str, a NumPy number or a list",
            field,
        )

    def elements(self, values: Sequence[Any], field: str, depth: int) -> tuple[int, bytes]:
        """The one type of all elements of a list, and their bytes without a count."""
        if values and all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            return self.integers(values, _ARRAY_INTEGERS, field)
        if values and all(type(value) is float for value in values):
            return self.floats(values, field)
        parts = [self.value(value, f"{field}[{index}]", depth + 1) for index, value in enumerate(values)]
        kinds = {kind for kind, _ in parts} or {_ARRAY_INTEGERS[0]}
        if len(kinds) > 1:
            raise self.error("the elements differ in type; expected a list of one type", field)
        return kinds.pop(), b"".join(data for _, data in parts)

    def numbers(self, value: Any, field: str) -> tuple[int, bytes]:
        """A NumPy scalar or one-dimensional array, in its own type."""
        array = np.asarray(value)
        kind = BOOL if array.dtype == np.bool_ else _SCALAR_IDS.get(array.dtype.newbyteorder("="))
        if kind is None or array.ndim > 1:
            raise self.error(
                f"an array {array.dtype}{list(array.shape)} cannot be stored; expected at most one dimension, of bool, "
                "integers, float32 or float64",
                field,
            )
        if array.ndim == 0:
            return kind, self.packed(array)
        return ARRAY, struct.pack(f"{self.order}IQ", kind, array.size) + self.packed(array)

    def integers(self, values: Sequence[int], kinds: Sequence[int], field: str) -> tuple[int, bytes]:
        """Integers in the first of `kinds` that holds them all."""
        for kind in kinds:
            limits = np.iinfo(SCALARS[kind])
            if min(values) >= limits.min and max(values) <= limits.max:
                return kind, self.packed(np.array(values, SCALARS[kind]))
        raise self.error("the integers do not fit 64 bits", field)

    def floats(self, values: Sequence[float], field: str) -> tuple[int, bytes]:
        largest = float(np.finfo(np.float32).max)
        for value in values:
            if largest < abs(value) < math.inf:
                raise self.error(f"{value} does not fit float32; give numpy.float64({value})", field)
        return _F32, self.packed(np.array(values, np.float32))

    def packed(self, array: np.ndarray) -> bytes:
        return array.astype(array.dtype.newbyteorder(self.order)).tobytes()

    def tensor(self, name: str, tensor: Tensor) -> _Entry:
        field = f"tensor {shown(name)}"
        if isinstance(tensor, StreamedTensor):
            entry = self.streamed(field, tensor)
        elif isinstance(tensor, np.ndarray):
            encoding = GGML_TYPES.get(_PLAIN_IDS.get(tensor.dtype.newbyteorder("="), -1))
            if encoding is None:
                raise self.error(
                    f"the dtype is {tensor.dtype}; expected f32, f16, bf16, f64, i8, i16, i32 or i64, or "
                    "(bytes, encoding) for packed rows",
                    field,
                )
            rows = _little_endian(tensor, encoding)
            entry = _Entry(encoding, tensor.shape, lambda: (rows,))
        elif isinstance(tensor, tuple) and len(tensor) == 2:
            entry = self.raw(field, *tensor)
        else:
            raise self.error(
                f"a {type(tensor).__name__} is no tensor; expected a NumPy array, (bytes, encoding) for packed rows, "
                "or a StreamedTensor",
                field,
            )
        if len(entry.shape) > MAX_DIMS:
            raise self.error(f"the tensor has {len(entry.shape)} dimensions; expected at most {MAX_DIMS}", field)
        if self.order == ">" and entry.encoding.words is None:
            raise self.error(
                f"the byte order of {entry.encoding.name} blocks in a big-endian file is not settled", field
            )
        return entry

    def streamed(self, field: str, tensor: StreamedTensor) -> _Entry:
        """A tensor that is made later: its shape is checked now, each piece when it comes."""
        encoding = self.encoding(tensor.encoding, field)
        try:
            encoding.tensor_bytes(tensor.shape)
        except ValueError as error:
            raise self.error(str(error), field) from error
        dtype = np.dtype(np.uint8) if encoding.dtype is None else encoding.dtype

        def make() -> Iterable[np.ndarray]:
            for piece in tensor.make():
                if not isinstance(piece, np.ndarray) or piece.dtype.newbyteorder("=") != dtype:
                    given = getattr(piece, "dtype", type(piece).__name__)
                    raise self.error(f"a piece of {encoding.name} is {given}; expected an array of {dtype}", field)
                if encoding.dtype is None:
                    if piece.size % encoding.nbytes:
                        raise self.error(f"a piece has {piece.size} bytes, no whole blocks of {encoding.nbytes}", field)
                    yield np.ascontiguousarray(piece).reshape(-1)
                else:
                    yield _little_endian(piece, encoding)

        return _Entry(encoding, tensor.shape, make)

    def raw(self, field: str, rows: np.ndarray, name: str) -> _Entry:
        """Packed rows and their encoding; the shape in weights follows from both."""
        encoding = self.encoding(name, field)
        if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim < 1:
            raise self.error("the bytes are no uint8 array; expected uint8 [..., bytes_per_row]", field)
        if rows.shape[-1] % encoding.nbytes:
            raise self.error(
                f"a row has {rows.shape[-1]} bytes; expected a multiple of {name}'s block of {encoding.nbytes} bytes",
                field,
            )
        shape = (*rows.shape[:-1], rows.shape[-1] // encoding.nbytes * encoding.weights)
        return _Entry(encoding, shape, lambda: (np.ascontiguousarray(rows).reshape(-1),))

    def encoding(self, name: str, field: str) -> Encoding:
        if name not in GGML_IDS:
            raise self.error(f"the encoding is {shown(name)}; expected one of {', '.join(GGML_IDS)}", field)
        return GGML_TYPES[GGML_IDS[name]]


def _little_endian(array: np.ndarray, encoding: Encoding) -> np.ndarray:
    """The bytes of a plain array as a little-endian file holds them, uint8 `[nbytes]`."""
    rows = np.ascontiguousarray(array, dtype=encoding.dtype).reshape(-1).view(np.uint8)
    return encoding.swapped(rows) if sys.byteorder == "big" and encoding.words else rows


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))
