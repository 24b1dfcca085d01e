"""`convert_checkpoint`: a checkpoint of any kind to safetensors, GGUF or Orbax, tensor by tensor.

    checkpoint -> what is to be written (names, shapes, dtypes) -> each tensor read, cast, written, dropped

Between formats whose tensors have names alone, tensors keep their names and need no model. To GGUF, and from it, names
and the order of rotary rows change as the family's map says, so the family must be one of ours. The configuration, the
tokenizer and the metadata of the file go along.

Memory: one tensor, as it is written, beside the pages of the file that it comes from; pages are handed back.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trustcore.convert.from_gguf import hugging_face_content
from trustcore.convert.quantize import quantize_checkpoint
from trustcore.convert.source import PLAIN
from trustcore.convert.verify import Verification, verify_conversion
from trustcore.dtypes import named_dtype
from trustcore.errors import CheckpointError
from trustcore.weights import Checkpoint, LazyArray, open_checkpoint
from trustcore.weights.checkpoint import TOKENIZER_GGUF
from trustcore.weights.folder import appearing, copy_companions, refuse_occupied
from trustcore.weights.gguf_writer import write_gguf
from trustcore.weights.orbax import write_orbax
from trustcore.weights.packed_layout import KEY, header, packed_tensors
from trustcore.weights.placement import copied
from trustcore.weights.safetensors_writer import SHARD_BYTES, Planned, parse_size, write_safetensors, write_shards

Progress = Callable[[int, int], None]

KINDS = ("safetensors", "gguf", "orbax")
DTYPES = ("float32", "bfloat16", "float16")
ORBAX_ITEM = "params"  # the folder of the arrays, beside config.json and the tokenizer

_FORMATS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_DTYPE_KEYS = ("torch_dtype", "dtype")  # of config.json


@dataclass(frozen=True)
class ConvertReport:
    """What became of a checkpoint.

    Attributes:
        path: that was written.
        kind: "safetensors", "gguf" or "orbax".
        source_kind: of the source, as `Checkpoint.format` names it.
        tensors: how many.
        source_bytes: of the tensors in the source.
        nbytes: of the tensors that were written.
        files: beside the weights: configuration and tokenizer.
        seconds: that it took, without the verification.
        verification: how the two answer; None where it was not asked for.
    """

    path: str
    kind: str
    source_kind: str
    tensors: int
    source_bytes: int
    nbytes: int
    files: tuple[str, ...]
    seconds: float
    verification: Verification | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns the report as values that JSON can hold."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Content:
    """What is written: tensors in units that stay together, and what lies beside them."""

    units: Mapping[str, Mapping[str, Planned]]
    metadata: Callable[[Any], Mapping[str, str]]
    config: dict[str, Any] | None


def convert_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: str | None = None,
    dtype: Any = None,
    shard_size: int | str | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Writes the checkpoint at `source` in another format, and returns what became of it.

    Args:
        source: anything that `open_checkpoint` opens.
        out: a `.gguf` file; a `.safetensors` file, which is written alone; or a folder that is not there yet or is
            empty, for weights with `config.json` and the tokenizer's files. A file is replaced. It appears when it is
            complete.
        kind: "safetensors", "gguf" or "orbax"; None: by the suffix of `out`, safetensors for a folder.
        dtype: float32, bfloat16 or float16, of all floats of 16 bits and more; None keeps them. From a GGUF file with
            packed matrices to another format, it is what they are decoded to.
        shard_size: "5GB", or bytes: how large a safetensors file may be; None: 5 GB.
        verify: load both as models and compare their logits on fixed tokens before `out` appears.
        progress: called with (bytes of the source done, bytes in all).

    Raises:
        CheckpointError: the source is broken; `out` is occupied or does not fit the kind; tensors are stored in a way
            that the other format cannot hold.
        ModelError: GGUF is on one side and the family is not known; or `verify` finds a difference. Nothing is left.
        OSError: the disk refuses.

    Example:
        >>> convert_checkpoint("pytorch_model.bin", "model", dtype="bfloat16", verify=True)  # doctest: +SKIP
    """
    source, out = Path(source), Path(out)
    kind = kind_of(out, kind)
    shard_bytes = SHARD_BYTES if shard_size is None else parse_size(shard_size)
    target = None if dtype is None else named_dtype(dtype, DTYPES)
    if dtype is not None and target is None:
        raise CheckpointError(f"dtype is {dtype!r}; choose from {', '.join(DTYPES)}, or None to keep what is stored")
    is_file = out.suffix in (".gguf", ".safetensors")
    if shard_size is not None and (is_file or kind != "safetensors"):
        raise CheckpointError("shards are safetensors files in a folder; give a folder, or no shard size", path=out)
    if not is_file:
        refuse_occupied(out)
    begin = time.perf_counter()
    with open_checkpoint(source) as checkpoint, appearing(out, file=is_file) as partial:
        report = _write(checkpoint, partial, out, kind, target, shard_bytes, progress)
        report = dataclasses.replace(report, seconds=time.perf_counter() - begin)
        if verify:
            written = partial / out.name if is_file else partial
            exact = target is None or target == np.float32
            report = dataclasses.replace(report, verification=verify_conversion(checkpoint, written, exact=exact))
    return report


def kind_of(out: Path, kind: str | None) -> str:
    """Returns the kind of what is written to `out`.

    Raises:
        CheckpointError: the kind is unknown, or the suffix of `out` is another's.
    """
    by_suffix = {".gguf": "gguf", ".safetensors": "safetensors"}.get(out.suffix)
    found = kind or by_suffix or "safetensors"
    if found not in KINDS:
        raise CheckpointError(f"kind is {kind!r}; choose from {', '.join(KINDS)}")
    if (by_suffix or found) != found or (found == "gguf") != (by_suffix == "gguf"):
        wanted = {
            "gguf": "the name of a .gguf file",
            "safetensors": "a folder, or the name of a .safetensors file",
            "orbax": "a folder",
        }[found]
        raise CheckpointError(f"{found} is written to {wanted}", path=out)
    return found


def _write(
    checkpoint: Checkpoint,
    partial: Path,
    out: Path,
    kind: str,
    dtype: np.dtype | None,
    shard_bytes: int,
    progress: Progress | None,
) -> ConvertReport:
    total = sum(array.nbytes for array in checkpoint.values())
    if kind == "gguf":
        chosen = (lambda *_: None) if dtype is None else _FORMATS[dtype.name]
        made = quantize_checkpoint(checkpoint, partial / out.name, chosen, progress=progress)
        return ConvertReport(str(out), kind, checkpoint.format, len(made.tensors), total, made.nbytes, (), made.seconds)
    content = _content(checkpoint, dtype, _Progress(total, progress))
    tensors = {name: planned for unit in content.units.values() for name, planned in unit.items()}
    beside: list[str] = []
    if content.config is not None:
        (partial / "config.json").write_text(json.dumps(content.config, indent=2) + "\n", encoding="utf-8")
        beside.append("config.json")
    if out.suffix == ".safetensors":
        write_safetensors(partial / out.name, tensors, content.metadata(list(content.units)))
        beside = []  # the file goes alone
    else:
        beside += _write_tokenizer(checkpoint, partial)
        if kind == "orbax":
            write_orbax(partial / ORBAX_ITEM, tensors)
        else:
            write_shards(partial, content.units, content.metadata, shard_bytes=shard_bytes)
    nbytes = sum(planned.nbytes for planned in tensors.values())
    return ConvertReport(str(out), kind, checkpoint.format, len(tensors), total, nbytes, tuple(beside), 0.0)


class _Progress:
    """Counts tensors as they are made, and hands back the pages of the one before."""

    def __init__(self, total: int, tell: Progress | None):
        self._total, self._tell, self._done = total, tell, 0
        self._before: LazyArray | None = None

    def begins(self, array: LazyArray) -> None:
        """A tensor is about to be made."""
        if self._before is not None:
            self._before.release()
        self._before = array
        self._done += array.nbytes
        if self._tell is not None:
            self._tell(min(self._done, self._total), self._total)


def _content(checkpoint: Checkpoint, dtype: np.dtype | None, progress: _Progress) -> _Content:
    if checkpoint.format == "gguf":
        return _from_gguf(checkpoint, dtype, progress)
    packed = packed_tensors(checkpoint)
    config = checkpoint.metadata.get("config")
    quantized = next((key for key in ("quantization_config", "compression_config") if key in (config or {})), None)
    if dtype is not None and (packed or quantized):
        raise CheckpointError(
            "the matrices are packed, and a dtype would change their scales. Convert without a dtype; or decode them: "
            f"trustcore.save(trustcore.load(SRC, dtype={dtype.name!r}), DST)",
            path=checkpoint.path,
            field=quantized or KEY,
        )
    entries = {
        name: {"format": p.format, "shape": list(p.shape), "transposed": p.transposed, "fields": list(p.fields)}
        for name, p in packed.items()
    }
    fields = {field.name: name for name, weight in packed.items() for field in weight.fields.values()}
    units: dict[str, dict[str, Planned]] = {}
    for name, array in checkpoint.items():
        units.setdefault(fields.get(name, name), {})[name] = _planned(array, dtype, progress)
    kept = {
        key: value
        for key, value in checkpoint.metadata.items()
        if isinstance(value, str) and key not in ("config", KEY)
    }

    def metadata(names: Any) -> Mapping[str, str]:
        here = {name: entries[name] for name in names if name in entries}
        return {"format": "pt", **kept, **(header(here) if here else {})}

    if config is not None and dtype is not None:
        config = {key: dtype.name if key in _DTYPE_KEYS else value for key, value in config.items()}
    return _Content(units, metadata, config)


def _planned(array: LazyArray, dtype: np.dtype | None, progress: _Progress) -> Planned:
    if array.dtype is None:
        raise CheckpointError(
            f"{array.encoding} is packed, and is not converted", path=array.path, field=f"tensor {array.name!r}"
        )
    target = dtype if dtype is not None and array.encoding in PLAIN else array.dtype

    def make() -> np.ndarray:
        progress.begins(array)
        return array.numpy() if target == array.dtype else copied(array, target)

    return Planned(array.shape, np.dtype(target), make)


def _from_gguf(checkpoint: Checkpoint, dtype: np.dtype | None, progress: _Progress) -> _Content:
    described, units = hugging_face_content(checkpoint, dtype, progress.begins)
    return _Content(units, lambda _: {"format": "pt"}, {**described, **({"dtype": dtype.name} if dtype else {})})


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Puts the tokenizer of the source into a folder; returns its files."""
    if checkpoint.format == "gguf":
        kept = {
            key: value
            for key, value in checkpoint.metadata.items()
            if key.startswith("tokenizer.") or key == "general.name"
        }
        if kept.get("tokenizer.ggml.model", "none") == "none":
            return []
        write_gguf(folder / TOKENIZER_GGUF, {"general.architecture": "tokenizer", **kept}, {})
        return [TOKENIZER_GGUF]
    return copy_companions(checkpoint.path.parent, folder)
