"""Tables of names: where each parameter of a module lies in a checkpoint, and how; for reading and for writing.

    stored tensor --(part, layout)--> parameter            layouts:  plain   as it lies
                                                                     kernel  [out, in] -> [in, out]
                                                                     conv    [O, I, *window] -> [*window, I, O]

A parameter that the module does not have (its path ends at None) has no tensor either. Every disagreement between a
module and a checkpoint is told at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import ModelError
from trustcore.quant import QuantizedArray
from trustcore.weights import Checkpoint, LazyArray

Progress = Callable[[int, int], None]
Layout = Literal["plain", "kernel", "conv"]

_ENCODINGS = ("f64", "f32", "f16", "bf16")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter.

    Attributes:
        path: in the module, `blocks.{}.mlp.up.kernel`; `{}` stands for a layer.
        name: of the tensor on disk.
        layout: how the tensor lies there; see the header of this file.
        part: (i, n): the parameter is the i-th of n equal parts of the tensor, along its first axis.
        others: further names that files give it.
        wide: whether it is float32 (float64) like a vector, whatever matrices are.
    """

    path: str
    name: str
    layout: Layout = "plain"
    part: tuple[int, int] = (0, 1)
    others: tuple[str, ...] = ()
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """All parameters of a module, and what else may stand in its checkpoints.

    Attributes:
        entries: one a parameter.
        prefixes: what may stand before all names: files of a model with a head put the body's name there.
        ignored: patterns (`cls.*`) of names that may be there and are not read.
        spellings: older endings of names, and those that stand for them in the table.
    """

    entries: tuple[Entry, ...]
    prefixes: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()


def linear(path: str, name: str, part: tuple[int, int] = (0, 1)) -> tuple[Entry, ...]:
    """Returns the entries of a `Linear`."""
    return Entry(f"{path}.kernel", f"{name}.weight", "kernel", part), Entry(f"{path}.bias", f"{name}.bias", part=part)


def norm(path: str, name: str) -> tuple[Entry, ...]:
    """Returns the entries of a `LayerNorm` or `RMSNorm`."""
    return Entry(f"{path}.weight", f"{name}.weight"), Entry(f"{path}.bias", f"{name}.bias")


def conv(path: str, name: str) -> tuple[Entry, ...]:
    """Returns the entries of a `flax.nnx.Conv`."""
    return Entry(f"{path}.kernel", f"{name}.weight", "conv"), Entry(f"{path}.bias", f"{name}.bias")


def batch_norm(path: str, name: str) -> tuple[Entry, ...]:
    """Returns the entries of a `flax.nnx.BatchNorm`."""
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return tuple(Entry(f"{path}.{ours}", f"{name}.{theirs}") for ours, theirs in names.items())


def numbered(count: int, entries: Iterable[Entry], at: str = "{}") -> tuple[Entry, ...]:
    """Returns the entries for each of `count` layers, whose number takes the place of `at`."""
    held = tuple(entries)
    return tuple(
        dataclasses.replace(
            entry,
            path=entry.path.replace(at, str(i)),
            name=entry.name.replace(at, str(i)),
            others=tuple(other.replace(at, str(i)) for other in entry.others),
        )
        for i in range(count)
        for entry in held
    )


def fill(
    model: Any, table: Table, checkpoint: Checkpoint, *, dtype: Any, what: str, progress: Progress | None = None
) -> None:
    """Gives the parameters of an abstract module the tensors of a checkpoint, one after the other.

    Args:
        model: the module.
        table: of its names.
        checkpoint: an opened safetensors model.
        dtype: of matrices; vectors (norms, biases) are float32, or float64 with it.
        what: the kind of model, for errors.
        progress: called with (bytes done, bytes in all) after each tensor.

    Raises:
        ModelError: tensors are missing, unexpected, mis-shaped or of an unknown encoding: all of them in one message.
    """
    plan = _match(model, table, checkpoint, what)
    total, done = sum(tensor.nbytes // entry.part[1] for entry, _, tensor in plan), 0
    for entry, parameter, tensor in plan:
        parameter.set_value(_read(entry, tensor, len(parameter.get_value().shape), dtype))
        tensor.release()
        done += tensor.nbytes // entry.part[1]
        if progress is not None:
            progress(done, total)


def stored(model: Any, table: Table) -> dict[str, np.ndarray]:
    """Returns the tensors of a module under their names, as `fill` reads them; packed matrices are decoded.

    Raises:
        ModelError: parameters are abstract, or a tensor has only some of its parts.
    """
    parts: dict[str, dict[int, np.ndarray]] = {}
    counts: dict[str, int] = {}
    for entry in table.entries:
        parameter = find(model, entry.path)
        if parameter is None:
            continue
        value = parameter.get_value()
        if isinstance(value, jax.ShapeDtypeStruct):
            raise ModelError(f"{entry.path} is abstract; load or initialize the weights first.")
        array = np.asarray(value.dequantize() if isinstance(value, QuantizedArray) else value)
        parts.setdefault(entry.name, {})[entry.part[0]] = _to_disk(entry.layout, array)
        counts[entry.name] = entry.part[1]
    for name, found in parts.items():
        if len(found) != counts[name]:
            raise ModelError(f"{name} is made of {counts[name]} parameters, of which the model has {len(found)}.")
    return {
        name: np.ascontiguousarray(np.concatenate([found[i] for i in sorted(found)])) if len(found) > 1 else found[0]
        for name, found in parts.items()
    }


def find(module: Any, path: str) -> Any:
    """Returns what stands at a path of a module, or None where the module has no such part."""
    for step in path.split("."):
        if module is None:
            return None
        module = module[int(step)] if step.isdigit() else getattr(module, step)
    return module


def _match(model: Any, table: Table, checkpoint: Checkpoint, what: str) -> list[tuple[Entry, Any, LazyArray]]:
    here = _canonical(table, checkpoint)
    plan: list[tuple[Entry, Any, LazyArray]] = []
    used: set[str] = set()
    faults: list[str] = []
    told: set[str] = set()
    for entry in table.entries:
        parameter = find(model, entry.path)
        if parameter is None:
            continue
        name = next((name for name in (entry.name, *entry.others) if name in here), None)
        if name is None:
            if entry.name not in told:
                near = difflib.get_close_matches(entry.name, list(here), n=1)
                faults.append(f"{entry.name} is missing" + (f" (nearest: {near[0]})" if near else ""))
            told.add(entry.name)
            continue
        tensor = checkpoint[here[name]]
        used.add(name)
        expected = _disk_shape(entry, tuple(parameter.get_value().shape))
        if tuple(tensor.shape) != expected:
            if name not in told:
                faults.append(f"{name} has shape {list(tensor.shape)}, expected {list(expected)}")
            told.add(name)
        elif tensor.encoding not in _ENCODINGS:
            faults.append(f"{name} is stored as {tensor.encoding}; readable encodings: {', '.join(_ENCODINGS)}")
        plan.append((entry, parameter, tensor))
    twice = {name for entry in table.entries for name in (entry.name, *entry.others)}
    faults += [
        f"{name} is unexpected"
        for name in here
        if name not in used
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in table.ignored)
        and not (name in twice and _is_other(name, used, table))
    ]
    if faults:
        shown = "; ".join(faults[:20]) + (f"; and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise ModelError(f"{checkpoint.path}: the tensors do not fit a {what} model: {shown}.")
    return plan


def _is_other(name: str, used: set[str], table: Table) -> bool:
    """Whether this is a second copy of a tensor that was read under another of its names."""
    return any(
        name in (entry.name, *entry.others) and used.intersection((entry.name, *entry.others))
        for entry in table.entries
    )


def _canonical(table: Table, checkpoint: Mapping[str, LazyArray]) -> dict[str, str]:
    """The names of the checkpoint by the names of the table: without prefix, in today's spelling."""

    def spelled(name: str) -> str:
        for old, new in table.spellings:
            if name.endswith(old):
                return name.removesuffix(old) + new
        return name

    wanted = {name for entry in table.entries for name in (entry.name, *entry.others)}
    names = {spelled(name): name for name in checkpoint}
    prefix = max(table.prefixes, key=lambda prefix: sum(prefix + name in names for name in wanted))
    return {name.removeprefix(prefix): held for name, held in names.items()}


def _disk_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    if entry.layout == "kernel":
        shape = shape[::-1]
    elif entry.layout == "conv":
        shape = (shape[-1], shape[-2], *shape[:-2])
    return (shape[0] * entry.part[1], *shape[1:]) if shape else shape


def _to_disk(layout: Layout, array: np.ndarray) -> np.ndarray:
    if layout == "kernel":
        return array.T
    if layout == "conv":
        return np.moveaxis(array, (-1, -2), (0, 1))
    return array


def _read(entry: Entry, tensor: LazyArray, axes: int, dtype: Any) -> jax.Array:
    array = tensor.numpy()
    i, count = entry.part
    size = math.ceil(array.shape[0] / count) if array.ndim else 0
    array = array[i * size : (i + 1) * size] if count > 1 else array
    if entry.layout == "kernel":
        array = array.T
    elif entry.layout == "conv":
        array = np.moveaxis(array, (0, 1), (-1, -2))
    vectors = np.float64 if jnp.dtype(dtype) == np.float64 else np.float32
    array = array.astype(vectors if axes < 2 or entry.wide else dtype)
    return jax.device_put(np.ascontiguousarray(array).reshape(array.shape), may_alias=True)
