"""The reader of `.npz` files: a zip archive of arrays, stored (`numpy.savez`) or deflated (`numpy.savez_compressed`).

    NAME.npy = magic, version, length, {'descr': ..., 'fortran_order': ..., 'shape': ...} | the numbers

A stored array is a view of the file; a deflated one is unpacked when it is asked for, into as many bytes as its header
says and no more. Arrays of Python objects are pickles and are refused. NumPy has no bfloat16 and writes it as two bytes
without a meaning ("V2"), which nothing else in the field is, so they are read as bfloat16.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np

from trustcore.errors import CheckpointError
from trustcore.weights.checkpoint import Checkpoint, LazyArray, make_array
from trustcore.weights.config_file import with_config
from trustcore.weights.encoding import Encoding
from trustcore.weights.mapped import MadeBytes, MappedFile
from trustcore.weights.safetensors import DTYPES, MAX_DIMS
from trustcore.weights.zip_directory import ZipEntry, inflated, read_directory

MAX_HEADER = 10_000  # NumPy's own

_MAGIC = b"\x93NUMPY"
_ENCODINGS = {e.dtype: e for e in DTYPES.values() if e.dtype is not None and not e.name.startswith(("f8", "bf16"))}
_ENCODINGS[np.dtype(np.complex128)] = Encoding.plain("c128", np.complex128)


def open_npz(path: Path) -> Checkpoint:
    """Returns the checkpoint in one `.npz` file, its tensors under the names of its arrays.

    Raises:
        CheckpointError: the file or a `config.json` beside it is broken, or an array has a dtype that is not read.
    """
    file = MappedFile(path)
    made: list[MadeBytes] = []
    try:
        arrays: dict[str, LazyArray] = {}
        for entry in read_directory(file).values():
            name = entry.name.removesuffix(".npy")
            arrays[name] = _array(file, name, entry, made)
        return Checkpoint(path, "npz", with_config({}, path), arrays, [*made, file])
    except BaseException:
        file.close()
        raise


def _array(file: MappedFile, name: str, entry: ZipEntry, made: list[MadeBytes]) -> LazyArray:
    def error(message: str) -> CheckpointError:
        return CheckpointError(message, path=file.path, field=f"tensor {name[:200]!r}", offset=entry.offset)

    start, described = _header(file, entry, error)
    descr, fortran, shape = (described.get(key) for key in ("descr", "fortran_order", "shape"))
    if not isinstance(fortran, bool) or not isinstance(shape, tuple) or len(shape) > MAX_DIMS:
        raise error("the header has no shape of at most 64 sizes, or no order")
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise error("a size in the header is no integer from 0 to 2**63 - 1")
    encoding, big_endian = _encoding(descr, error)
    try:
        nbytes = encoding.tensor_bytes(shape)
    except ValueError as fault:
        raise error(str(fault)) from fault
    if entry.size - start != nbytes:
        raise error(f"the array has {entry.size - start} bytes; expected {nbytes}, which {descr!r} of {shape} takes")
    strides = None
    if fortran and len(shape) > 1:
        strides = tuple(int(np.prod(shape[:axis], dtype=np.int64)) for axis in range(len(shape)))
    if not entry.deflated:
        return make_array(name, shape, encoding, file, entry.offset + start, big_endian=big_endian, strides=strides)
    made.append(MadeBytes(file.path, nbytes, lambda: inflated(file, entry, start, nbytes)))
    return make_array(name, shape, encoding, made[-1], entry.offset, big_endian=big_endian, strides=strides)


def _header(file: MappedFile, entry: ZipEntry, error: Any) -> tuple[int, dict[str, Any]]:
    """Where the numbers start in the entry, and what is said of them."""
    head = inflated(file, entry, 0, min(entry.size, 12)).tobytes()
    if head[:6] != _MAGIC or head[6:7] not in (b"\1", b"\2", b"\3") or len(head) < 12:
        raise error(f"the array starts with {head[:8]!r}; expected {_MAGIC!r} and a version from 1 to 3")
    width = 2 if head[6] == 1 else 4
    start, length = 8 + width, int.from_bytes(head[8 : 8 + width], "little")
    if length > min(MAX_HEADER, entry.size - start):
        raise error(
            f"the header has {length} bytes; expected at most {MAX_HEADER}, within the {entry.size} of the array"
        )
    text = inflated(file, entry, start, length).tobytes()
    try:
        described = ast.literal_eval(text.decode("utf-8" if head[6] == 3 else "latin-1").strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as fault:
        raise error(f"the header is no description of an array: {type(fault).__name__}") from fault
    if not isinstance(described, dict):
        raise error("the header is no dictionary")
    return start + length, described


def _encoding(descr: Any, error: Any) -> tuple[Encoding, bool]:
    if isinstance(descr, str) and descr.lstrip("<>|=") == "V2":
        return DTYPES["BF16"], descr.startswith(">")
    try:
        dtype = np.dtype(descr) if isinstance(descr, str) and len(descr) < 32 else None
    except (TypeError, ValueError):
        dtype = None
    if dtype is not None and dtype.hasobject:
        raise error(
            "an array of Python objects is a pickle, which is not read. Save numbers, each array under its own name"
        )
    encoding = None if dtype is None else _ENCODINGS.get(dtype.newbyteorder("="))
    if encoding is None:
        known = ", ".join(str(found) for found in _ENCODINGS)
        raise error(
            f"the dtype is {str(descr)[:64]!r}; expected one of {known}, or bfloat16. 8-bit floats lose their meaning "
            "in .npz files: save them as safetensors"
        )
    return encoding, descr.startswith(">")
