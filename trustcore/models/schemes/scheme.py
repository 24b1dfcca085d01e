"""What a scheme is: how another package spells one packed matrix as several tensors.

A scheme is made of the `quantization_config` of a model and then asked for one matrix after the other. Whether a matrix
is packed is read off the tensors themselves: files leave out what their lists of exceptions say, and lists err.

    find(module, K, N) -> None      the module is a plain `weight`
                       -> Packed    the tensors it is made of, and how to read them
                       -> ModelError, naming the tensor, what it is and what it should be

Shapes, dtypes and companions are checked by `find`, before a byte of data is touched; values (indices, tables) by
`Packed.read`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from trustcore.errors import ModelError
from trustcore.quant import QuantizedArray
from trustcore.weights import LazyArray

Tensors = Mapping[str, LazyArray]
Fields = Mapping[str, np.ndarray]

FLOATS = ("f16", "bf16", "f32")


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed matrix that was found in a checkpoint.

    Attributes:
        format: the name of its format in `trustcore.quant.FORMATS`.
        tensors: all it is made of.
        fields: reads the format's fields, in NumPy; raises ModelError where values are wrong.
        extras: tensors that belong to the module and that products do not need, such as a scale of its inputs.
    """

    format: str
    tensors: tuple[LazyArray, ...]
    fields: Callable[[], Fields]
    extras: tuple[LazyArray, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def read(self, *, transposed: bool = False) -> QuantizedArray:
        """Returns the matrix on the default device: `[K, N]`, or `[N, K]` when `transposed`."""
        fields = {name: np.ascontiguousarray(field) for name, field in self.fields().items()}
        placed = {name: jax.device_put(field, may_alias=True) for name, field in fields.items()}
        return QuantizedArray(self.format, placed, transposed=transposed)

    def release(self) -> None:
        """Lets the pages of the file go."""
        for tensor in self.tensors:
            tensor.release()


class Scheme(Protocol):
    """One package's way to spell packed matrices."""

    name: str

    def find(self, tensors: Tensors, module: str, k: int, n: int) -> Packed | None:
        """Returns what `module` is made of, a matrix from K inputs to N outputs; None: a plain `weight`.

        Raises:
            ModelError: a tensor is missing, or of the wrong shape or dtype.
        """
        ...


class Module:
    """The tensors of one module, asked for by suffix and checked."""

    def __init__(self, tensors: Tensors, name: str, scheme: str):
        self._tensors, self.name, self.scheme = tensors, name, scheme
        self.used: list[LazyArray] = []

    def __contains__(self, suffix: str) -> bool:
        return f"{self.name}.{suffix}" in self._tensors

    def get(self, suffix: str) -> LazyArray | None:
        """Returns a tensor without asking what it is."""
        return self._tensors.get(f"{self.name}.{suffix}")

    def need(self, suffix: str, encodings: Sequence[str], *shapes: tuple[int, ...], why: str = "") -> LazyArray:
        """Returns the tensor, which has one of the encodings and of the shapes (no shape: any).

        Raises:
            ModelError: it is missing, or something else.
        """
        name = f"{self.name}.{suffix}"
        tensor = self._tensors.get(name)
        expected = " or ".join(f"{' or '.join(encodings)}{list(shape)}" for shape in shapes) or " or ".join(encodings)
        because = f" ({why})" if why else ""
        if tensor is None:
            raise ModelError(f"{name} is missing; {self.scheme} has it as {expected}{because}")
        if tensor.encoding not in encodings or (shapes and tensor.shape not in shapes):
            raise ModelError(
                f"{name} is {tensor.encoding}{list(tensor.shape)}; {self.scheme} has it as {expected}{because}"
            )
        self.used.append(tensor)
        return tensor

    def extras(self, *suffixes: str) -> tuple[LazyArray, ...]:
        """Returns those of the tensors that are there."""
        return tuple(tensor for tensor in map(self.get, suffixes) if tensor is not None)

    def error(self, suffix: str, message: str) -> ModelError:
        """Returns the error that names a tensor of this module."""
        return ModelError(f"{self.name}.{suffix} {message}")


def choose(where: str, value: Any, allowed: Sequence[Any], hint: str = "") -> Any:
    """Returns `value`, or raises the ModelError that says which are supported."""
    if value not in allowed:
        known = ", ".join(str(item) for item in allowed)
        raise ModelError(f"{where} is {str(value)[:64]!r}; supported: {known}.{' ' + hint if hint else ''}")
    return value
