"""Orbax checkpoints, in and out, through the package `orbax-checkpoint`, which is asked for when it is needed.

    FOLDER/_METADATA, FOLDER/manifest.ocdbt, ...          a tree of arrays, or
    STEP/ITEM/_METADATA, ...                              one item ("default", "params", "pytree") of a step

The tree is read from the metadata; an array is restored by itself, as a NumPy array, when it is asked for. Names are
the keys of the tree with dots between them, and the other way round when a checkpoint is written: "a.b" is `{"a": {"b":
...}}`. What is written is made tensor by tensor, with a handler of ours for leaves that are not made yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from trustcore.errors import CheckpointError
from trustcore.weights.checkpoint import Checkpoint, LazyArray, make_array
from trustcore.weights.config_file import with_config
from trustcore.weights.encoding import Encoding
from trustcore.weights.flax_msgpack import weights_of
from trustcore.weights.mapped import MadeBytes
from trustcore.weights.safetensors import DTYPES
from trustcore.weights.safetensors_writer import Planned
from trustcore.weights.tree import flatten, nested

_METADATA = "_METADATA"
_ENCODINGS = {e.dtype: e for e in DTYPES.values() if e.dtype is not None}
_ENCODINGS[np.dtype(np.complex128)] = Encoding.plain("c128", np.complex128)


def find_orbax(folder: Path) -> Path | None:
    """Returns the Orbax checkpoint that `folder` is or holds, one level or two below; None where there is none.

    Raises:
        CheckpointError: it holds several.
    """
    for pattern in (_METADATA, f"*/{_METADATA}", f"*/*/{_METADATA}"):
        found = sorted(path.parent for path in folder.glob(pattern) if path.is_file())
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in found[:6])
            raise CheckpointError(
                f"the folder holds {len(found)} Orbax checkpoints ({names}). Open one of them: "
                f"open_checkpoint({str(found[-1])!r})",
                path=folder,
            )
        if found:
            return found[0]
    return None


def open_orbax(folder: Path) -> Checkpoint:
    """Returns the Orbax checkpoint at `folder`, which has `_METADATA` in it.

    Raises:
        CheckpointError: `orbax-checkpoint` is not installed, or refuses the folder.
    """
    ocp = _package(folder)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
    except Exception as fault:  # whatever tensorstore and Orbax make of a broken folder
        raise _refused(folder, fault) from fault
    kinds = (ocp.metadata.ArrayMetadata,)
    root = weights_of(tree) if isinstance(tree, dict) else tree
    leaves = flatten(root, lambda value: isinstance(value, kinds), folder)
    keys = {id(leaf): parts for parts, leaf in _keys(tree, kinds)}
    arrays: dict[str, LazyArray] = {}
    made: list[MadeBytes] = []
    for name, leaf in leaves.items():
        dtype = np.dtype(leaf.dtype)
        encoding = _ENCODINGS.get(dtype)
        if encoding is None:
            raise CheckpointError(f"the dtype is {dtype}, which is not read", path=folder, field=f"tensor {name!r}")
        shape = tuple(int(size) for size in leaf.shape)
        made.append(_bytes(ocp, folder, keys[id(leaf)], name, shape, dtype))
        arrays[name] = make_array(name, shape, encoding, made[-1], 0)
    if not arrays:
        raise CheckpointError("the Orbax checkpoint holds no array", path=folder, field=_METADATA)
    beside = folder / _METADATA if (folder / "config.json").is_file() else folder
    return Checkpoint(folder, "orbax", with_config({}, beside), arrays, made)


def write_orbax(folder: Path, tensors: Mapping[str, Planned]) -> None:
    """Writes an Orbax checkpoint, each tensor made, written and dropped before the next one is made.

    Args:
        folder: is not there yet.
        tensors: by name; dots part the keys of the tree.

    Raises:
        CheckpointError: `orbax-checkpoint` is not installed, or one name is the beginning of another.
        OSError: the disk refuses.
    """
    ocp = _package(folder)
    tree: dict[str, Any] = {}
    for parts, name in nested(list(tensors), folder).items():
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = tensors[name]
    import jax

    # Orbax says aloud that something is off where it has no handler of jax's arrays.
    kinds = (Planned, _handler(ocp)), (jax.Array, ocp.type_handlers.ArrayHandler())
    registry = ocp.type_handlers.create_type_handler_registry(*kinds)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.absolute(), ocp.args.PyTreeSave(tree))


def _package(folder: Path) -> Any:
    try:
        import orbax.checkpoint as ocp
        import orbax.checkpoint.type_handlers  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            "Orbax checkpoints need the package orbax-checkpoint: pip install 'trustcore[orbax]'", path=folder
        ) from error
    return ocp


def _handler(ocp: Any) -> Any:
    """What Orbax writes a leaf with that is not made yet: its own handler of NumPy arrays, one array at a time."""

    class PlannedHandler(ocp.type_handlers.NumpyHandler):
        def __init__(self) -> None:
            super().__init__(deepcopy_host_arrays=False)

        async def serialize(self, values: Sequence[Planned], infos: Any, args: Any = None) -> list[Any]:
            for index, planned in enumerate(values):
                array = np.asarray(planned.make(), order="C")
                assert array.dtype == planned.dtype and array.shape == planned.shape, (array.dtype, array.shape)
                chosen = None if args is None else [args[index]]
                pending = list(await super().serialize([array], [infos[index]], chosen))
                while pending:
                    pending.pop().result()
                del array  # before the next one is made
            return []

        def memory_size(self, values: Sequence[Planned]) -> list[tuple[int, int]]:
            return [(planned.nbytes, planned.nbytes) for planned in values]

    return PlannedHandler()


def _bytes(
    ocp: Any, folder: Path, keys: tuple[Any, ...], name: str, shape: tuple[int, ...], dtype: np.dtype
) -> MadeBytes:
    """The bytes of one array, restored when they are looked at."""

    def restore() -> np.ndarray:
        item: Any = 0
        wanted: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(keys):
            item, wanted = {key: item}, {key: wanted}
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=wanted, partial_restore=True)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                found = checkpointer.restore(folder.absolute(), arguments)
            for key in keys:
                found = found[key]
        except Exception as fault:  # whatever tensorstore and Orbax make of a broken folder
            raise _refused(folder, fault, f"tensor {name!r}") from fault
        array = np.ascontiguousarray(found)
        if tuple(np.shape(found)) != shape or array.dtype != dtype:
            raise CheckpointError(
                f"restored as {array.dtype}{list(np.shape(found))}; the metadata say {dtype}{list(shape)}",
                path=folder,
                field=f"tensor {name!r}",
            )
        return array.reshape(-1).view(np.uint8)

    return MadeBytes(folder, prod(shape) * dtype.itemsize, restore)


def _keys(tree: Any, kinds: tuple[type, ...], parts: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """The leaves of a tree of dicts with their keys. A list in it has been counted by `flatten` before."""
    if isinstance(tree, kinds):
        return [(parts, tree)]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return [found for key, value in items for found in _keys(value, kinds, (*parts, key))]


def _refused(folder: Path, fault: Exception, field: str = _METADATA) -> CheckpointError:
    text = (str(fault).strip().splitlines() or [""])[0][:300]
    return CheckpointError(f"Orbax refuses the folder: {type(fault).__name__}: {text}", path=folder, field=field)
