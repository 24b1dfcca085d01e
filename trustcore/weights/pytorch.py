"""The PyTorch reader: what `torch.save` wrote, a zip archive (torch 1.6 and newer) or the older run of pickles.

    zip:    PREFIX/data.pkl | PREFIX/data/KEY, one for each storage | PREFIX/byteorder | ...
    older:  magic | version | system | the object | list of keys | for each key: numbers i64, then their bytes

The object is run by `pickle_machine`, which executes nothing; a tensor in it is a storage, an offset, sizes and
strides. Each is proved to lie within its storage, and the storage within the file, so a tensor is a view of the
mapping, shared where the file shares. Storages are read by torch and written by torch as little-endian bytes, unless a
zip archive's `byteorder` says otherwise; their checksums are not computed, since that would read them.

Refused: archives of TorchScript, tar files from before 2017, compressed storages, sparse, quantized and meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from trustcore.errors import CheckpointError
from trustcore.weights.checkpoint import Checkpoint, LazyArray, make_array
from trustcore.weights.config_file import with_config
from trustcore.weights.encoding import Encoding
from trustcore.weights.mapped import MappedFile
from trustcore.weights.pickle_machine import MAX_BYTES, Global, PickleMachine, Window, ordered, shown
from trustcore.weights.safetensors import DTYPES, MAX_DIMS
from trustcore.weights.tree import flatten, unwrapped
from trustcore.weights.zip_directory import MAGIC as ZIP_MAGIC
from trustcore.weights.zip_directory import ZipEntry, read_directory, read_entry

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
MAX_REPEATED = 2**20  # numbers of a tensor that repeats those of its storage

_ENCODINGS = {encoding.name: encoding for encoding in DTYPES.values()}
_ENCODINGS["c128"] = Encoding.plain("c128", np.complex128)
_STORAGES = {
    "Double": "f64", "Float": "f32", "Half": "f16", "BFloat16": "bf16", "Long": "i64", "Int": "i32", "Short": "i16",
    "Char": "i8", "Byte": "u8", "Bool": "bool", "ComplexFloat": "c64", "ComplexDouble": "c128",
}  # fmt: skip
_TORCH_DTYPES = {
    "float64": "f64", "double": "f64", "float32": "f32", "float": "f32", "float16": "f16", "half": "f16",
    "bfloat16": "bf16", "int64": "i64", "long": "i64", "int32": "i32", "int": "i32", "int16": "i16", "short": "i16",
    "int8": "i8", "uint8": "u8", "uint16": "u16", "uint32": "u32", "uint64": "u64", "bool": "bool",
    "complex64": "c64", "complex128": "c128", "float8_e4m3fn": "f8_e4m3", "float8_e5m2": "f8_e5m2",
    "float8_e4m3fnuz": "f8_e4m3fnuz", "float8_e5m2fnuz": "f8_e5m2fnuz", "float8_e8m0fnu": "f8_e8m0",
}  # fmt: skip


@dataclass(frozen=True)
class _Type:
    """A class of storages."""

    encoding: Encoding


@dataclass(frozen=True)
class _Storage:
    """A storage that a pickle refers to: `nbytes` bytes from `start` of what the file has under `key`."""

    key: str
    encoding: Encoding
    start: int
    nbytes: int
    whole: int  # bytes under the key


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    encoding: Encoding
    offset: int  # in numbers of the encoding
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Class:
    """A class that a pickle may name and that nothing is made of."""


def open_pytorch(path: Path) -> Checkpoint:
    """Returns the checkpoint in one file of torch's: the state dict in it, under names with dots.

    A state dict inside what a training program saved is found under "state_dict", "model" and the like.

    Raises:
        CheckpointError: the file or a `config.json` beside it is broken, or the pickle names what is not a tensor's.
    """
    file = MappedFile(path)
    try:
        metadata, arrays = read_pytorch(file)
        return Checkpoint(path, "pytorch", with_config(metadata, path), arrays, [file])
    except BaseException:
        file.close()
        raise


def read_pytorch(file: MappedFile) -> tuple[dict[str, Any], dict[str, LazyArray]]:
    """Returns no metadata, and the tensors of a file in the order of its state dict."""
    if file.map[:4] == ZIP_MAGIC:
        root, place, big_endian = _read_zip(file)
    else:
        root, place = _read_legacy(file)
        big_endian = False
    is_leaf: Callable[[Any], bool] = lambda value: isinstance(value, _Tensor)  # noqa: E731
    tensors = flatten(unwrapped(root, is_leaf), is_leaf, file.path)
    if not tensors:
        raise CheckpointError("the pickle holds no tensor; expected a state dict", path=file.path, field="pickle")
    return {}, {name: _array(file, name, tensor, place, big_endian) for name, tensor in tensors.items()}


_Place = Callable[[_Storage], int]  # where the bytes under a storage's key start, and proof that it lies there


def _read_zip(file: MappedFile) -> tuple[Any, _Place, bool]:
    entries = read_directory(file)
    names = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(names) != 1:
        raise _error(file, f"the archive has {len(names)} entries data.pkl; one makes it a file of torch.save")
    prefix = names[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        raise _error(
            file, "this is an archive of TorchScript, a program. Save the module's state_dict() with torch.save instead"
        )
    order = b"little"
    if f"{prefix}byteorder" in entries:
        order = read_entry(file, entries[f"{prefix}byteorder"], 16)
    if order not in (b"little", b"big"):
        raise _error(file, f"byteorder is {order!r}; expected 'little' or 'big'")
    pickle = entries[names[0]]
    if pickle.deflated:
        raise _compressed(file, pickle)
    read_entry(file, pickle, MAX_BYTES)  # proves the checksum
    machine = _machine(file, "data.pkl")
    root = machine.run(Window(file, pickle.offset, pickle.offset + pickle.size))

    def place(storage: _Storage) -> int:
        entry = entries.get(f"{prefix}data/{storage.key}")
        if entry is None:
            raise _error(file, f"storage {storage.key!r} is not in the archive: it is broken")
        if entry.deflated:
            raise _compressed(file, entry)
        if entry.size < storage.whole:
            raise _error(
                file, f"storage {storage.key!r} has {entry.size} bytes; the pickle says {storage.whole}", entry.offset
            )
        return entry.offset

    return root, place, order == b"big"


def _read_legacy(file: MappedFile) -> tuple[Any, _Place]:
    sizes: dict[str, int] = {}  # bytes of a number of each storage
    machine = _machine(file, "pickle", sizes)
    window = Window(file, 0, file.size)
    magic = machine.run(window)
    if magic != LEGACY_MAGIC:
        raise _error(
            file,
            f"the file starts with a pickle of {shown(magic)}; expected torch's magic number. It is a pickle of "
            "something else; load it with the program that wrote it, and save its arrays as safetensors",
        )
    version = machine.run(window)
    if version != LEGACY_VERSION:
        raise _error(file, f"the version of the file is {shown(version)}; expected {LEGACY_VERSION}")
    machine.run(window)  # what the machine was like that wrote the file; its storages are little-endian whatever it was
    root = machine.run(window)
    keys = machine.run(window)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise _error(file, f"the list of storages is {shown(keys)}; expected a list of texts", window.tell())
    found: dict[str, tuple[int, int]] = {}
    at = window.tell()
    for key in keys:
        if key not in sizes or key in found:
            raise _error(file, f"storage {key[:64]!r} is listed, and used by no tensor or listed twice", at)
        numbers = int.from_bytes(file.map[at : at + 8], "little", signed=True)
        nbytes = numbers * sizes[key]
        if at + 8 > file.size or numbers < 0 or at + 8 + nbytes > file.size:
            raise _error(file, f"storage {key[:64]!r} has {numbers} numbers, past the file's end: it is cut short", at)
        found[key] = at + 8, nbytes
        at += 8 + nbytes

    def place(storage: _Storage) -> int:
        if storage.key not in found:
            raise _error(file, f"storage {storage.key!r} is not in the file: it is broken")
        start, nbytes = found[storage.key]
        if nbytes < storage.whole:
            raise _error(file, f"storage {storage.key!r} has {nbytes} bytes; the pickle says {storage.whole}", start)
        return start

    return root, place


def _array(file: MappedFile, name: str, tensor: _Tensor, place: _Place, big_endian: bool) -> LazyArray:
    offset = place(tensor.storage) + tensor.storage.start + tensor.offset * tensor.encoding.nbytes
    return make_array(name, tensor.shape, tensor.encoding, file, offset, big_endian=big_endian, strides=tensor.strides)


def _machine(file: MappedFile, field: str, sizes: dict[str, int] | None = None) -> PickleMachine:
    """The machine with torch's names; `sizes` gets the bytes of a number of each storage that is met."""

    def refuse(message: str) -> CheckpointError:
        return machine.error(message)

    def storage(pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise refuse(f"a persistent id is {shown(pid)}; expected ('storage', type, key, location, numbers)")
        _, kind, key, _, numbers, *views = pid
        if not isinstance(kind, _Type) or not isinstance(key, str) or not _is_size(numbers):
            raise refuse(f"a storage is ({shown(kind)}, {shown(key)}, {shown(numbers)}); expected (type, key, numbers)")
        width = kind.encoding.nbytes
        if sizes is not None and sizes.setdefault(key, width) != width:
            raise refuse(f"storage {key[:64]!r} has numbers of {sizes[key]} and of {width} bytes")
        start, count = 0, numbers
        if views and views[0] is not None:  # of the older format: a part of a storage
            view = views[0]
            if not isinstance(view, tuple) or len(view) != 3 or not _is_size(view[1]) or not _is_size(view[2]):
                raise refuse(f"the view of storage {key[:64]!r} is {shown(view)}; expected (key, offset, numbers)")
            _, start, count = view
            if start + count > numbers:
                raise refuse(f"a view of storage {key[:64]!r} ends at {start + count} of {numbers} numbers")
        return _Storage(key, kind.encoding, start * width, count * width, numbers * width)

    def tensor(found: Any, encoding: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
        if not isinstance(found, _Storage) or not isinstance(encoding, Encoding):
            raise refuse(f"a tensor is made of {shown(found)}; expected a storage")
        lists = (shape, strides)
        if not all(isinstance(x, tuple | list) and len(x) <= MAX_DIMS and all(map(_is_size, x)) for x in lists):
            raise refuse(f"sizes or strides of a tensor are not at most {MAX_DIMS} integers from 0 to 2**63 - 1")
        if len(shape) != len(strides) or not _is_size(offset):
            raise refuse(f"a tensor has {len(shape)} sizes, {len(strides)} strides and offset {shown(offset)}")
        try:
            encoding.tensor_bytes(shape)
        except ValueError as fault:
            raise refuse(str(fault)) from fault
        numbers = prod(shape)
        if not numbers:
            return _Tensor(found, encoding, 0, tuple(shape), tuple(strides))
        end = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) + 1
        held = found.nbytes // encoding.nbytes
        if end > held:
            raise refuse(
                f"a tensor of sizes {list(shape)}, strides {list(strides)} and offset {offset} ends at number {end} of "
                f"its storage {found.key[:64]!r}, which has {held}"
            )
        if numbers > max(held, MAX_REPEATED):
            raise refuse(
                f"a tensor of sizes {list(shape)} repeats the {held} numbers of its storage; expected at most "
                f"{MAX_REPEATED} numbers of such a tensor. Save it with .contiguous()"
            )
        return _Tensor(found, encoding, offset, tuple(shape), tuple(strides))

    def version1(found: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        return tensor(found, found.encoding if isinstance(found, _Storage) else None, offset, shape, strides)

    def version3(found: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, encoding: Any, *_: Any):
        return tensor(found, encoding, offset, shape, strides)

    def parameter(data: Any, *_: Any) -> _Tensor:
        if not isinstance(data, _Tensor):
            raise refuse(f"a parameter is made of {shown(data)}; expected a tensor")
        return data

    def of_type(function: Any, kind: Any, arguments: Any, *_: Any) -> _Tensor:
        if not isinstance(function, Global) or not isinstance(kind, _Class) or not isinstance(arguments, tuple):
            raise refuse(f"a tensor is made by {shown(function)}; expected a function that rebuilds tensors")
        return parameter(function.call(*arguments))

    def size(*values: Any) -> tuple[Any, ...]:
        return tuple(values[0]) if values and isinstance(values[0], list | tuple) else ()

    def device(*values: Any) -> str:
        return ":".join(str(value) for value in values if isinstance(value, str | int))

    constants: dict[str, Any] = {
        **{f"torch.{name}": _ENCODINGS[ours] for name, ours in _TORCH_DTYPES.items()},
        **{
            f"{module}.{name}Storage": _Type(_ENCODINGS[ours])
            for module in ("torch", "torch.cuda")
            for name, ours in _STORAGES.items()
        },
        "torch.storage.UntypedStorage": _Type(_ENCODINGS["u8"]),
        "torch.UntypedStorage": _Type(_ENCODINGS["u8"]),
        "torch.Tensor": _Class(),
        "torch.nn.parameter.Parameter": _Class(),
    }
    functions: dict[str, Callable[..., Any]] = {
        "collections.OrderedDict": ordered,
        "torch._utils._rebuild_tensor": version1,
        "torch._utils._rebuild_tensor_v2": version1,
        "torch._utils._rebuild_tensor_v3": version3,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
        "torch._tensor._rebuild_from_type_v2": of_type,
        "torch.Size": size,
        "torch.device": device,
    }
    machine = PickleMachine(file.path, field, constants, functions, storage)
    return machine


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _compressed(file: MappedFile, entry: ZipEntry) -> CheckpointError:
    return _error(
        file,
        f"entry {entry.name[:200]!r} is compressed, which torch.save never does: a view of it cannot be given. Unpack "
        "the archive and pack it again without compression (zip -0)",
        entry.offset,
    )


def _error(file: MappedFile, message: str, offset: int = 0) -> CheckpointError:
    return CheckpointError(message, path=file.path, field="torch.save", offset=offset)
