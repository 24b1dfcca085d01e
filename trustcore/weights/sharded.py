"""A checkpoint in several files: the shards that an index names, of any format that is read file by file.

    {"metadata": {...}, "weight_map": {TENSOR: FILE BESIDE THE INDEX, ...}}

Tensors keep the order of the index; what a shard holds beyond the index is left out. The metadata are the first
shard's, then the index's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trustcore.errors import CheckpointError
from trustcore.weights.checkpoint import Checkpoint, LazyArray
from trustcore.weights.config_file import with_config
from trustcore.weights.json_file import read_object
from trustcore.weights.mapped import MappedFile
from trustcore.weights.safetensors import MAX_HEADER_BYTES

# From a file to its metadata and its tensors.
Read = Callable[[MappedFile], tuple[dict[str, Any], dict[str, LazyArray]]]


def open_sharded(path: Path, format: str, read: Read) -> Checkpoint:
    """Returns the checkpoint of all shards that the index at `path` names.

    Args:
        path: the index.
        format: what `Checkpoint.format` is to be.
        read: reads a shard.

    Raises:
        CheckpointError: the index or a shard is missing or broken, or a shard lacks a tensor.
    """
    index = read_object(path, "index", MAX_HEADER_BYTES, unique=True)
    weight_map, notes = index.get("weight_map"), index.get("metadata", {})
    for field, value in (("weight_map", weight_map), ("metadata", notes)):
        if not isinstance(value, dict):
            raise CheckpointError(f"expected an object, found {str(value)[:64]!r}", path=path, field=field)
    assert isinstance(weight_map, dict)
    shards: dict[str, dict[str, LazyArray]] = {}
    files: list[MappedFile] = []
    metadata: dict[str, Any] = {}
    arrays = {}
    try:
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\:"):
                raise CheckpointError(
                    f"the shard of {name[:200]!r} is {str(shard)[:64]!r}; expected the name of a file beside the index",
                    path=path,
                    field="weight_map",
                )
            if shard not in shards:
                files.append(MappedFile(path.with_name(shard)))
                found, shards[shard] = read(files[-1])
                metadata = metadata or found
            if name not in shards[shard]:
                raise CheckpointError(
                    f"the index places {name[:200]!r} here, but the file does not hold it",
                    path=path.with_name(shard),
                    field="header",
                    offset=8 if format == "safetensors" else None,
                )
            arrays[name] = shards[shard][name]
        return Checkpoint(path, format, with_config({**metadata, **notes}, path), arrays, files)
    except BaseException:
        for file in files:
            file.close()
        raise
