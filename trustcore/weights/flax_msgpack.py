"""The reader of Flax's msgpack files: nested maps with arrays in them, as `flax.serialization.to_bytes` writes them.

    array = extension 1: the msgpack of (shape, name of the dtype, bytes);  extension 3: a NumPy scalar, the same
    an array over a gigabyte = {"__msgpack_chunked_array__": true, "shape": {"0": ...}, "chunks": {"0": array, ...}}

The maps are walked once, without the bytes of arrays: an array is a view of the file, one in chunks is put together
when it is asked for. Names are the keys with dots between them. Of what a training state holds, the weights are taken:
"params" without that name, other collections such as "batch_stats" under theirs, and not "step" and "opt_state".

Bounds: a container claims no more entries than bytes are left, the depth is that of `tree`, and values are counted.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trustcore.errors import CheckpointError
from trustcore.weights.checkpoint import Checkpoint, LazyArray, make_array
from trustcore.weights.config_file import with_config
from trustcore.weights.encoding import Encoding
from trustcore.weights.mapped import MadeBytes, MappedFile
from trustcore.weights.safetensors import DTYPES, MAX_DIMS
from trustcore.weights.tree import MAX_DEPTH, MAX_VISITS, flatten

_CHUNKED = "__msgpack_chunked_array__"
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_STATE = ("step", "opt_state", "tx", "rng", "rngs", "key")  # of a training state, and no weights

_ENCODINGS = {e.dtype.name: e for e in DTYPES.values() if e.dtype is not None}
_ENCODINGS["complex128"] = Encoding.plain("c128", np.complex128)
assert _ENCODINGS["bfloat16"].dtype == ml_dtypes.bfloat16


@dataclass(frozen=True)
class _Array:
    """An array of the file: one run of bytes, or several that follow each other."""

    shape: tuple[int, ...]
    encoding: Encoding
    pieces: tuple[tuple[int, int], ...]  # (offset, bytes)


def looks_like_flax(head: bytes) -> bool:
    """Returns whether a file that starts so may be a msgpack map whose first key is text."""
    first, key = head[:1], head[1:2]
    if first in (b"\xde", b"\xdf"):
        key = head[3:4] if first == b"\xde" else head[5:6]
    elif not b"\x81" <= first <= b"\x8f":
        return False
    return b"\xa0" <= key <= b"\xbf" or key in (b"\xd9", b"\xda", b"\xdb")


def open_flax(path: Path) -> Checkpoint:
    """Returns the checkpoint in one msgpack file of Flax's.

    Raises:
        CheckpointError: the file or a `config.json` beside it is broken.
    """
    file = MappedFile(path)
    try:
        metadata, arrays = read_flax(file)
        return Checkpoint(path, "flax", with_config(metadata, path), arrays, [file])
    except BaseException:
        file.close()
        raise


def read_flax(file: MappedFile) -> tuple[dict[str, Any], dict[str, LazyArray]]:
    """Returns no metadata, and the tensors of a file in its order."""
    reader = _Reader(file, 0, file.size)
    root = reader.value(0)
    if not isinstance(root, dict) or reader.at != file.size:
        raise reader.error("expected one map and nothing behind it")
    found = flatten(weights_of(root), lambda value: isinstance(value, _Array), file.path)
    if not found:
        raise reader.error("the file holds no array")
    return {}, {name: _lazy(file, name, array) for name, array in found.items()}


def weights_of(root: dict[Any, Any]) -> dict[Any, Any]:
    """Returns the weights of a training state, or the tree as it is where it is none."""
    params = root.get("params")
    if not isinstance(params, dict):
        return root
    others = {key: value for key, value in root.items() if key != "params" and key not in _STATE}
    return {**params, **others}


def _lazy(file: MappedFile, name: str, array: _Array) -> LazyArray:
    if len(array.pieces) == 1:
        return make_array(name, array.shape, array.encoding, file, array.pieces[0][0])
    total = sum(nbytes for _, nbytes in array.pieces)

    def join() -> np.ndarray:
        made, done = np.empty(total, np.uint8), 0
        for offset, nbytes in array.pieces:
            made[done : done + nbytes] = file.view(offset, nbytes)
            file.release(offset, nbytes)
            done += nbytes
        return made

    first = array.pieces[0][0] if array.pieces else 0
    return make_array(name, array.shape, array.encoding, MadeBytes(file.path, total, join), first)


class _Reader:
    """Walks one msgpack value; what it does not understand it refuses."""

    def __init__(self, file: MappedFile, start: int, stop: int, visits: int = 0):
        self.file, self.at, self._stop, self._visits = file, start, stop, visits

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(message, path=self.file.path, field="msgpack", offset=self.at)

    def value(self, depth: int) -> Any:
        self._visits += 1
        if depth > MAX_DEPTH or self._visits > MAX_VISITS:
            raise self.error(f"more than {MAX_DEPTH} levels or {MAX_VISITS} values; expected a tree of arrays")
        kind = self._take(1)[0]
        if kind < 0x80 or kind >= 0xE0:
            return kind if kind < 0x80 else kind - 0x100
        if kind < 0x90:
            return self._map(kind & 0x0F, depth)
        if kind < 0xA0:
            return self._list(kind & 0x0F, depth)
        if kind < 0xC0:
            return self._text(kind & 0x1F)
        if kind in _CONSTANTS:
            return _CONSTANTS[kind]
        if kind in _NUMBERS:
            code = _NUMBERS[kind]
            return struct.unpack(code, self._take(struct.calcsize(code)))[0]
        if kind in _SIZED:
            what, width = _SIZED[kind]
            count = width if what == "fixext" else int.from_bytes(self._take(width), "big")
            if what == "map":
                return self._map(count, depth)
            if what == "list":
                return self._list(count, depth)
            if what == "text":
                return self._text(count)
            if what == "bytes":
                return self._skip(count)
            return self._extension(count)
        raise self.error(f"byte {kind:#x} starts no value of msgpack")

    def _take(self, count: int) -> bytes:
        start, _ = self._skip(count)
        return self.file.map[start : start + count]

    def _skip(self, count: int) -> tuple[int, int]:
        """Passes bytes over; returns where they are."""
        start = self.at
        if count > self._stop - start:
            raise self.error(f"{count} bytes are to come and {self._stop - start} are there: the file is cut short")
        self.at += count
        return start, count

    def _text(self, count: int) -> str:
        try:
            return self._take(count).decode()
        except UnicodeDecodeError as fault:
            raise self.error("a text is not UTF-8") from fault

    def _list(self, count: int, depth: int) -> list[Any]:
        self._bound(count)
        return [self.value(depth + 1) for _ in range(count)]

    def _map(self, count: int, depth: int) -> Any:
        self._bound(2 * count)
        found: dict[Any, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str | int) or key in found:
                raise self.error("a key of a map is no text or number, or stands twice")
            found[key] = self.value(depth + 1)
        return self._joined(found) if _CHUNKED in found else found

    def _bound(self, count: int) -> None:
        if count > self._stop - self.at:
            raise self.error(f"a container has {count} values and {self._stop - self.at} bytes are left")

    def _extension(self, count: int) -> Any:
        kind = struct.unpack("b", self._take(1))[0]
        start, _ = self._skip(count)
        if kind not in (_ARRAY, _SCALAR):
            if kind == _COMPLEX:
                return None  # a complex number of Python's: no array
            raise self.error(f"extension {kind}; Flax writes 1 (array), 2 (complex) and 3 (scalar)")
        inner = _Reader(self.file, start, start + count, self._visits)
        found = inner.value(0)
        self._visits = inner._visits
        if not isinstance(found, list) or len(found) != 3 or inner.at != start + count:
            raise self.error("an array is not (shape, dtype, bytes)")
        shape, dtype, data = found
        if isinstance(dtype, tuple):
            dtype = self.file.map[dtype[0] : dtype[0] + min(dtype[1], 64)].decode("ascii", "replace")
        encoding = _ENCODINGS.get(dtype) if isinstance(dtype, str) else None
        if encoding is None:
            raise self.error(f"the dtype is {str(dtype)[:64]!r}; expected one of {', '.join(_ENCODINGS)}")
        if isinstance(data, list) or not isinstance(data, tuple):
            raise self.error("an array's numbers are not bytes")
        self._check(shape, encoding, data[1])
        return _Array(tuple(shape), encoding, (data,))

    def _check(self, shape: Any, encoding: Encoding, held: int) -> None:
        if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(size) for size in shape):
            raise self.error(f"a shape is not at most {MAX_DIMS} integers from 0 to 2**63 - 1")
        try:
            nbytes = encoding.tensor_bytes(shape)
        except ValueError as fault:
            raise self.error(str(fault)) from fault
        if nbytes != held:
            raise self.error(f"an array has {held} bytes; expected {nbytes}, which {encoding.name} of {shape} takes")

    def _joined(self, found: dict[Any, Any]) -> _Array:
        shape, chunks = (self._in_order(found.get(key)) for key in ("shape", "chunks"))
        if not chunks or not all(isinstance(chunk, _Array) and len(chunk.pieces) == 1 for chunk in chunks):
            raise self.error("an array in chunks has none, or they are no arrays")
        encoding = chunks[0].encoding
        if any(chunk.encoding is not encoding for chunk in chunks):
            raise self.error("the chunks of an array have several dtypes")
        self._check(shape, encoding, sum(prod(chunk.shape) * encoding.nbytes for chunk in chunks))
        return _Array(tuple(shape), encoding, tuple(chunk.pieces[0] for chunk in chunks))

    def _in_order(self, found: Any) -> list[Any]:
        if not isinstance(found, dict) or set(found) != {str(index) for index in range(len(found))}:
            raise self.error("an array in chunks has no shape or no chunks by number")
        return [found[str(index)] for index in range(len(found))]


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i",
    0xD3: ">q",
}  # fmt: skip
_SIZED = {
    0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4), 0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4),
    0xD4: ("fixext", 1), 0xD5: ("fixext", 2), 0xD6: ("fixext", 4), 0xD7: ("fixext", 8), 0xD8: ("fixext", 16),
    0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4), 0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2),
    0xDF: ("map", 4),
}  # fmt: skip
