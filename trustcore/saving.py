"""From a model to a folder that other programs open: weights in shards, config.json, the tokenizer's files.

    Decoder ── names, orientation, order of rotary channels ──▶ tensors of a layout ──▶ safetensors, config.json

The folder appears when it is complete, and not before; a failure leaves nothing behind. Tensors are written one by one:
beside the model, the host holds one of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trustcore.errors import CheckpointError, ModelError
from trustcore.models import Decoder, DecoderConfig
from trustcore.models.hugging_face import half_order, hugging_face_config, outputs_in
from trustcore.models.names import Name, decoder_names
from trustcore.models.schemes.write import WRITERS, Writer
from trustcore.models.schemes.write.integers import float_values
from trustcore.models.schemes.write.own import OwnWriter
from trustcore.ops.weight import Weight
from trustcore.quant import QuantizedArray
from trustcore.weights import open_checkpoint
from trustcore.weights.checkpoint import TOKENIZER_GGUF
from trustcore.weights.config_file import MAX_CONFIG_BYTES
from trustcore.weights.folder import appearing, refuse_occupied, tokenizer_files
from trustcore.weights.gguf_writer import write_gguf
from trustcore.weights.json_file import read_object
from trustcore.weights.packed_layout import header
from trustcore.weights.safetensors_writer import SHARD_BYTES, Planned, parse_size, write_shards

Units = dict[str, dict[str, Planned]]

_PLAIN = ("f16", "bf16")  # formats of which every tool has the numbers as a tensor


def save(
    model: Decoder,
    folder: str | os.PathLike[str],
    *,
    scheme: str = "trustcore",
    tokenizer: str | os.PathLike[str] | None = None,
    shard_size: int | str = SHARD_BYTES,
) -> Path:
    """Writes a model to a folder and returns the folder.

    Args:
        model: its matrices may be packed, floats, or both.
        folder: a folder that is not there yet, or is empty.
        scheme: how packed matrices are written.
            "trustcore" holds every format, exactly; `trustcore.load` reads it.
            "gptq", "awq" and "compressed-tensors" are read by transformers, vLLM and others. They hold some formats of
            matrices, as they are; scales of the first two are float16, rounded where they were wider. Tables of
            embeddings, which these layouts do not pack, are decoded to float16.
        tokenizer: a folder with tokenizer.json or a GGUF file, from which the tokenizer is taken; None: from where the
            model came. A model without a tokenizer is saved without one.
        shard_size: bytes of a file of weights at most, as a number or as "5GB" or "512MiB"; one weight alone may have
            more. Several files come with an index, `model.safetensors.index.json`.

    Raises:
        ModelError: the scheme is unknown, or cannot hold some of the matrices: all of them in one message.
        CheckpointError: the folder is not empty, the files of the tokenizer are not there, or shard_size is no size.
        OSError: the disk refuses.

    Example:
        >>> trustcore.save(trustcore.quantize(model, "int4:g128"), "model-gptq", scheme="gptq")  # doctest: +SKIP
    """
    if scheme not in WRITERS:
        raise ModelError(f"scheme is {scheme!r}; choose from {', '.join(WRITERS)}.")
    folder = Path(folder)
    shard_bytes = parse_size(shard_size)
    refuse_occupied(folder)
    writer = WRITERS[scheme]()
    units, packed, plain = _units(model, writer)
    config = _config(model)
    if packed:
        config["quantization_config"] = writer.config(packed, plain)
    beside = _tokenizer_files(model, tokenizer)

    def metadata(names: Any) -> Mapping[str, str]:
        described = writer.entries if isinstance(writer, OwnWriter) else {}
        here = {name: described[name] for name in names if name in described}
        return {"format": "pt", **(header(here) if here else {})}

    with appearing(folder) as partial:
        write_shards(partial, units, metadata, shard_bytes=shard_bytes)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        beside(partial)
    return folder


def _units(model: Decoder, writer: Writer) -> tuple[Units, list[str], list[str]]:
    """Tensors by weight, and the modules of matrices that are packed and that are not; or every fault at once."""
    units: Units = {}
    packed: list[str] = []
    plain: list[str] = []
    faults: list[str] = []
    scales = dict(model.input_scales) if isinstance(writer, OwnWriter) else {}
    for name in decoder_names(model.config.layers):
        value = _value(model, name.path)
        if value is None:
            continue
        module = name.hugging_face.removesuffix(".weight")
        table = not name.path.endswith("kernel") and len(value.shape) == 2
        try:
            order = half_order(model.config, name.path)
            if isinstance(value, QuantizedArray) and value.format not in _PLAIN:
                if table and not isinstance(writer, OwnWriter):
                    units[name.hugging_face] = {name.hugging_face: _decoded(value)}
                    continue
                turned = value if order is None else outputs_in(value, order)
                units[name.hugging_face] = writer.tensors(module, turned)
                packed.append(module)
            elif isinstance(value, Weight) and not isinstance(value, QuantizedArray):
                raise ModelError(f"is a {type(value).__name__}, which has no place in a file")
            else:
                units[name.hugging_face] = {name.hugging_face: _array(name, value, order)}
                if not table and len(value.shape) == 2:
                    plain.append(module)
        except ModelError as error:
            faults.append(f"{name.path} {error}")
        if name.path in scales:
            scale = np.full(1, scales[name.path], np.float32)
            units[name.hugging_face][f"{module}.input_scale"] = Planned.of(scale)
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ModelError(
            f"{writer.name} holds {writer.holds}. {'; '.join(faults[:20])}{more}. Quantize the model in such a format "
            "(trustcore.quantize(model, ..., requantize=True)), or write it with scheme='trustcore'."
        )
    return units, packed, plain


def _value(model: Decoder, path: str) -> Any:
    node: Any = model
    for part in path.split("."):
        if node is None:
            return None
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return None if node is None else node.get_value()


def _decoded(table: QuantizedArray) -> Planned:
    """A packed table as float16, decoded when its turn comes."""
    return Planned(tuple(table.shape), np.dtype(np.float16), lambda: float_values(table, np.float16))


def _array(name: Name, value: Any, order: np.ndarray | None) -> Planned:
    """A weight that every tool has as one tensor, outputs first."""
    if isinstance(value, QuantizedArray):  # 16-bit floats, [K, N] as they are stored
        stored, turned = value.fields["values"], True
    else:
        stored, turned = value, name.path.endswith("kernel")
    if isinstance(stored, jax.ShapeDtypeStruct):
        raise ModelError("is abstract; load or initialize the weights first")

    def make() -> np.ndarray:
        array = np.asarray(stored)
        array = array.T if turned else array
        return array if order is None else array[order]

    shape = tuple(reversed(stored.shape)) if turned else tuple(stored.shape)
    return Planned(shape, np.dtype(stored.dtype), make)


def _config(model: Decoder) -> dict[str, Any]:
    """The config.json the model came with, where that still describes it; else one made of its configuration."""
    origin = Path(model.origin).with_name("config.json") if model.origin else None
    if origin is not None and origin.is_file() and not model.config.rope.interleaved:
        found = read_object(origin, "config", MAX_CONFIG_BYTES, unique=False)
        try:
            same = DecoderConfig.from_hugging_face(found) == model.config
        except ModelError:
            same = False
        if same:
            return {k: v for k, v in found.items() if k not in ("quantization_config", "compression_config")}
    return hugging_face_config(dataclasses.replace(model.config))


def _tokenizer_files(model: Decoder, given: str | os.PathLike[str] | None) -> Callable[[Path], None]:
    """The function that puts the tokenizer's files into a folder."""
    if given is None and model.tokenizer is None:
        return lambda folder: None
    source = Path(given if given is not None else model.origin)
    wanted = "pass tokenizer=, a folder with tokenizer.json or a GGUF file"
    if not source.exists() or not (given or model.origin):
        raise CheckpointError(
            f"the tokenizer's files were to be taken from here, and it is gone; {wanted}", path=source
        )
    if source.is_file() and source.suffix == ".gguf":
        with open_checkpoint(source) as checkpoint:
            kept = {
                key: value
                for key, value in checkpoint.metadata.items()
                if key.startswith("tokenizer.") or key == "general.name"
            }
        if "tokenizer.ggml.model" not in kept:
            raise CheckpointError(f"the file has no tokenizer; {wanted}", path=source)
        return lambda folder: write_gguf(folder / TOKENIZER_GGUF, {"general.architecture": "tokenizer", **kept}, {})
    beside = source if source.is_dir() else source.parent
    files = tokenizer_files(beside)
    if not any(file.name in ("tokenizer.json", TOKENIZER_GGUF) for file in files):
        raise CheckpointError(f"there is no tokenizer.json; {wanted}", path=beside)

    def copy(folder: Path) -> None:
        for file in files:
            shutil.copyfile(file, folder / file.name)

    return copy
