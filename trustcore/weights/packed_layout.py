"""Packed weights in safetensors files: one tensor for each field, and a header that says what they make together.

    NAME.FIELD        a field of a packed weight, as `QuantizedArray.fields` holds it: `codes`, `scale`, ...
    NAME              any other tensor
    __metadata__["trustcore.weights"] = JSON
        {"version": 1, "weights": {NAME: {"format": FORMAT, "shape": [...], "transposed": BOOL, "fields": [...]}}}

`shape` is the logical shape of the weight, `[..., N, K]` where it is `transposed` and `[..., K, N]` where it is not;
what the fields of a format are is said in `trustcore.quant.formats`. Of a model in shards each shard's header describes
the weights of that shard, and the index's `metadata` all of them. Reading proves that the fields make the weight that
the header promises before any of their bytes is touched, but for `order`, whose values are checked as they are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from trustcore.errors import CheckpointError, QuantizationError
from trustcore.quant import FORMATS, QuantizedArray
from trustcore.quant.formats.layout import BlockFormat
from trustcore.quant.formats.scaled import ScaledFormat
from trustcore.weights.checkpoint import Checkpoint, LazyArray
from trustcore.weights.json_file import parse_object
from trustcore.weights.safetensors_writer import Planned

KEY = "trustcore.weights"
VERSION = 1

_LEVELS = 256  # of a byte


@dataclass(frozen=True)
class PackedTensor:
    """A packed weight on disk; nothing is read before it is asked for."""

    name: str
    format: str
    shape: tuple[int, ...]
    transposed: bool
    fields: Mapping[str, LazyArray]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(field.nbytes for field in self.fields.values())

    def numpy(self) -> dict[str, np.ndarray]:
        """Returns the fields, read-only views of the file.

        Raises:
            CheckpointError: `order` is no order of the rows.
        """
        found = {name: field.numpy() for name, field in self.fields.items()}
        order = found.get("order")
        if order is not None and not np.array_equal(np.sort(order, axis=-1), _counted(order)):
            raise _error(self.fields["order"], f"is no order of the {order.shape[-1]} rows of {self.name!r}")
        return found

    def read(self) -> QuantizedArray:
        """Returns the weight on the default device.

        Raises:
            CheckpointError: `order` is no order of the rows.
        """
        fields = {name: jax.device_put(field, may_alias=True) for name, field in self.numpy().items()}
        return QuantizedArray(self.format, fields, transposed=self.transposed)

    def release(self) -> None:
        """Lets the pages of the file go."""
        for field in self.fields.values():
            field.release()


def describe(weight: QuantizedArray) -> dict[str, Any]:
    """Returns the entry of a weight in the header."""
    return {
        "format": weight.format,
        "shape": list(weight.shape),
        "transposed": weight.transposed,
        "fields": list(weight.fields),
    }


def field_tensors(name: str, weight: QuantizedArray) -> dict[str, Planned]:
    """Returns the tensors of a weight called `name`, by their whole names."""
    return {f"{name}.{field}": Planned.of(array) for field, array in weight.fields.items()}


def header(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns the `__metadata__` of a file with the weights of those entries."""
    return {KEY: json.dumps({"version": VERSION, "weights": dict(entries)}, sort_keys=True)}


def packed_tensors(checkpoint: Checkpoint) -> dict[str, PackedTensor]:
    """Returns the packed weights that a checkpoint's header describes, by name; empty where it has no such header.

    Raises:
        CheckpointError: the header is broken, or does not agree with the tensors of the file.
    """
    text = checkpoint.metadata.get(KEY)
    if text is None:
        return {}
    return {name: _packed(checkpoint, name, entry) for name, entry in _entries(checkpoint, text)}


def _entries(checkpoint: Checkpoint, text: Any) -> Iterator[tuple[str, Any]]:
    def error(message: str) -> CheckpointError:
        return CheckpointError(message, path=checkpoint.path, field=f"__metadata__[{KEY!r}]")

    if not isinstance(text, str):
        raise error(f"the value is {str(text)[:64]!r}; expected a string of JSON")
    try:
        parsed = parse_object(text.encode(), checkpoint.path, f"__metadata__[{KEY!r}]", 0, unique=True)
    except UnicodeEncodeError as fault:
        raise error("the text is not UTF-8") from fault
    weights = parsed.get("weights")
    if parsed.get("version") != VERSION or not isinstance(weights, dict):
        raise error(
            f"version is {str(parsed.get('version'))[:20]!r}; this program reads version {VERSION} with an object of "
            "weights. A newer trustcore may read the file."
        )
    yield from weights.items()


def _packed(checkpoint: Checkpoint, name: str, entry: Any) -> PackedTensor:
    """The weight of an entry, proved to be what the tensors make."""

    def error(message: str) -> CheckpointError:
        return CheckpointError(message, path=checkpoint.path, field=f"__metadata__[{KEY!r}].weights[{name[:200]!r}]")

    if not isinstance(entry, dict):
        raise error(f"the entry is {str(entry)[:64]!r}; expected an object")
    format, transposed, names = entry.get("format"), entry.get("transposed"), entry.get("fields")
    if not isinstance(format, str) or format not in FORMATS:
        raise error(f"format is {str(format)[:64]!r}; known: {', '.join(sorted(FORMATS))}")
    shape = _sizes(entry.get("shape"))
    if shape is None:
        raise error(f"shape is {str(entry.get('shape'))[:64]}; expected a list of 2 to 16 sizes")
    if not isinstance(transposed, bool):
        raise error(f"transposed is {str(transposed)[:64]!r}; expected true or false")
    if not isinstance(names, list) or not names or not all(isinstance(field, str) for field in names):
        raise error(f"fields is {str(names)[:64]}; expected a list of names")
    fields = {}
    for field in names:
        tensor = checkpoint.get(f"{name}.{field}")
        if tensor is None:
            raise error(f"there is no tensor {f'{name}.{field}'[:250]!r}, which the entry names")
        fields[field] = tensor
    stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    try:
        abstract = {field: jax.ShapeDtypeStruct(tensor.shape, _dtype(tensor)) for field, tensor in fields.items()}
        fits(format, abstract, stored)
    except QuantizationError as fault:
        raise error(str(fault)) from None
    return PackedTensor(name, format, shape, transposed, fields)


def fits(format: str, fields: Mapping[str, Any], stored: tuple[int, ...]) -> None:
    """Proves that fields of those shapes and dtypes make a weight of stored shape `[..., K, N]`.

    Args:
        format: a name in `FORMATS`.
        fields: anything with a shape and a dtype.
        stored: the shape.

    Raises:
        QuantizationError: they do not; names the field.
    """
    spec = FORMATS[format]
    spec.in_order(fields)
    *lead, k, n = stored
    if isinstance(spec, BlockFormat):
        expected = {name: (field.shape, field.dtype) for name, field in spec.field_shapes(k, n).items()}
        expected.update({name: ((1, 1), np.floating) for name in spec.shared})
    else:
        assert isinstance(spec, ScaledFormat)
        expected = _scaled(spec, fields, k, n)
    for name, field in fields.items():
        tail, dtype = expected[name]
        shape, dtypes = (*lead, *tail), dtype if isinstance(dtype, tuple) else (dtype,)
        if tuple(field.shape) != shape or not any(_is(field.dtype, one) for one in dtypes):
            known = " or ".join(np.dtype(one).name if isinstance(one, np.dtype) else one.__name__ for one in dtypes)
            raise QuantizationError(
                f"{format}: {name} is {field.dtype}{list(field.shape)}; a weight {list(stored)} has it as "
                f"{known}{list(shape)}"
            )
    if isinstance(spec, ScaledFormat):
        spec.spans(fields)  # refuses scales that fit no granularity


def _scaled(spec: ScaledFormat, fields: Mapping[str, Any], k: int, n: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes (without leading axes) and dtypes of the fields; that of the scale is free, and is left as it is."""
    if k % spec.multiple:
        raise QuantizationError(f"{spec.name}: K={k} is not a multiple of {spec.multiple}")
    free = {name: tuple(fields[name].shape[-2:]) for name in ("scale", "nested") if name in fields}
    expected: dict[str, tuple[tuple[int, ...], Any]] = {
        plane.name: ((k * plane.bits // 8, n), plane.dtype) for plane in spec.planes
    }
    codes = spec.powers or "levels" in fields
    expected["scale"] = (free["scale"], np.dtype(np.uint8) if codes else np.floating)
    expected["zero"] = (free["scale"], (np.floating, np.integer))
    expected["order"] = ((k,), np.dtype(np.int32))
    expected["levels"] = ((_LEVELS, 1), np.floating)
    expected["offset"] = ((1, 1), np.floating)
    expected["nested"] = (free.get("nested", ()), np.floating)
    return expected


def _is(dtype: Any, kind: Any) -> bool:
    """Whether a dtype is `kind`, or of that kind; the 8-bit and 16-bit floats of ml_dtypes are floats."""
    return np.dtype(dtype) == kind if isinstance(kind, np.dtype) else bool(jax.numpy.issubdtype(dtype, kind))


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A shape of the header; None where it is none."""
    if not isinstance(value, list) or not 2 <= len(value) <= 16:
        return None
    return tuple(value) if all(type(size) is int and 0 <= size < 2**40 for size in value) else None


def _dtype(tensor: LazyArray) -> np.dtype:
    if tensor.dtype is None:
        raise QuantizationError(f"{tensor.name} is stored as {tensor.encoding}, which no field is")
    return tensor.dtype


def _counted(order: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(order.shape[-1]), order.shape)


def _error(tensor: LazyArray, message: str) -> CheckpointError:
    return CheckpointError(message, path=tensor.path, field=f"tensor {tensor.name!r}", offset=tensor.offset)
