"""From a model to a folder that other programs open: weights in shards, config.json, the tokenizer's files.

    model ── names, orientation, order of rotary channels ──▶ tensors of a layout ──▶ safetensors, config.json

The folder appears when it is complete, and not before; a failure leaves nothing behind. Tensors are written one by one:
beside the model, the host holds one of them; `save_streamed` needs no model in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trustcore.errors import CheckpointError, ModelError
from trustcore.models import Model
from trustcore.models.hugging_face import half_order, hugging_face_config
from trustcore.models.model import parameters_of
from trustcore.models.name_map import Rule
from trustcore.models.packed_outputs import outputs_in
from trustcore.models.registry import family_named
from trustcore.models.schemes.write import WRITERS, Writer
from trustcore.models.schemes.write.integers import float_values
from trustcore.models.schemes.write.own import OwnWriter
from trustcore.ops.weight import Weight
from trustcore.quant import QuantizedArray
from trustcore.weights import open_checkpoint
from trustcore.weights.checkpoint import TOKENIZER_GGUF
from trustcore.weights.folder import appearing, companions, copy_companions, refuse_occupied
from trustcore.weights.gguf_writer import write_gguf
from trustcore.weights.packed_layout import header
from trustcore.weights.safetensors_writer import SHARD_BYTES, Planned, parse_size, write_shards

Units = dict[str, dict[str, Planned]]

_PLAIN = ("f16", "bf16")  # formats of which every tool has the numbers as a tensor


def save(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    scheme: str = "trustcore",
    tokenizer: str | os.PathLike[str] | None = None,
    shard_size: int | str = SHARD_BYTES,
) -> Path:
    """Writes a model to a folder and returns the folder.

    Args:
        model: of any family; its matrices may be packed, floats, or both.
        folder: a folder that is not there yet, or is empty.
        scheme: how packed matrices are written.
            "trustcore" holds every format, exactly; `trustcore.load` reads it.
            "gptq", "awq" and "compressed-tensors" are read by transformers, vLLM and others. They hold some formats of
            matrices, as they are; scales of the first two are float16, rounded where they were wider. Tables of
            embeddings, which these layouts do not pack, are decoded to float16.
        tokenizer: a folder with tokenizer.json or a GGUF file, from which the tokenizer is taken; None: from where the
            model came, with what else lies there (how images or sounds are prepared, texts pooled). A model without
            a tokenizer is saved without one.
        shard_size: bytes of a file of weights at most, as a number or as "5GB" or "512MiB"; one weight alone may have
            more. Several files come with an index, `model.safetensors.index.json`.

    Raises:
        ModelError: the scheme is unknown, or cannot hold some of the matrices: all of them in one message.
        CheckpointError: the folder is not empty, the files of the tokenizer are not there, or shard_size is no size.
        OSError: the disk refuses.

    Example:
        >>> trustcore.save(trustcore.quantize(model, "int4:g128"), "model-gptq", scheme="gptq")  # doctest: +SKIP
    """
    parameters = parameters_of(model)
    where = _checked(folder, scheme, shard_size)
    return _save(model, where, lambda path: parameters[path].get_value(), scheme, tokenizer, shard_size, again=False)


def save_streamed(
    model: Model,
    folder: str | os.PathLike[str],
    value: Callable[[str], Any],
    *,
    scheme: str = "trustcore",
    tokenizer: str | os.PathLike[str] | None = None,
    shard_size: int | str = SHARD_BYTES,
) -> Path:
    """Writes a model whose parameters are brought one at a time; arguments and errors as in `save`.

    Args:
        model: its parameters may be abstract.
        folder: see `save`.
        value: from the path of a parameter to its value. Called when the tensors are planned, and again for each of
            them when it is written; what it returns is let go at once.
        scheme: see `save`.
        tokenizer: see `save`.
        shard_size: see `save`.
    """
    return _save(model, _checked(folder, scheme, shard_size), value, scheme, tokenizer, shard_size, again=True)


def check_scheme(scheme: str) -> None:
    """Raises the ModelError that says which schemes there are, unless it is one."""
    if scheme not in WRITERS:
        raise ModelError(f"scheme is {scheme!r}; choose from {', '.join(WRITERS)}.")


def _checked(folder: str | os.PathLike[str], scheme: str, shard_size: int | str) -> Path:
    check_scheme(scheme)
    parse_size(shard_size)
    refuse_occupied(Path(folder))
    return Path(folder)


def _save(
    model: Model,
    folder: Path,
    value: Callable[[str], Any],
    scheme: str,
    tokenizer: str | os.PathLike[str] | None,
    shard_size: int | str,
    *,
    again: bool,
) -> Path:
    writer = WRITERS[scheme]()
    config, rules = _described(model)
    units, packed, plain = _units(model, rules, writer, value, again)
    if packed:
        config["quantization_config"] = writer.config(packed, plain)
    beside = _tokenizer_files(model, tokenizer)

    def metadata(names: Any) -> Mapping[str, str]:
        described = writer.entries if isinstance(writer, OwnWriter) else {}
        here = {name: described[name] for name in names if name in described}
        return {"format": "pt", **(header(here) if here else {})}

    with appearing(folder) as partial:
        write_shards(partial, units, metadata, shard_bytes=parse_size(shard_size))
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        beside(partial)
    return folder


def _units(
    model: Model, rules: list[Rule], writer: Writer, value: Callable[[str], Any], again: bool
) -> tuple[Units, list[str], list[str]]:
    """Tensors by weight, and the modules of matrices that are packed and that are not; or every fault at once.

    With `again`, no value is kept: what a tensor is made of is asked for when its turn comes.
    """
    units: Units = {}
    packed: list[str] = []
    plain: list[str] = []
    faults: list[str] = []
    scales = dict(model.input_scales) if isinstance(writer, OwnWriter) else {}
    for rule in rules:
        path = rule.paths[0]
        modules = [name.removesuffix(".weight") for name in rule.names]

        def of_rule(rule: Rule = rule) -> tuple[Units, bool]:
            return _of_rule(model, rule, [value(path) for path in rule.paths], writer)

        try:
            here, is_packed = of_rule()
        except ModelError as error:
            faults.append(f"{path} {error}")
            continue
        if again:
            here = {unit: {name: _later(of_rule, unit, name, p) for name, p in ts.items()} for unit, ts in here.items()}
        units |= here
        if is_packed:
            packed += modules
        elif rule.is_matrix and not rule.is_table:
            plain += modules
        if path in scales and rule.stored in units:
            scale = np.full(1, scales[path], np.float32)
            units[rule.stored][f"{modules[0]}.input_scale"] = Planned.of(scale)
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ModelError(
            f"{writer.name} holds {writer.holds}. {'; '.join(faults[:20])}{more}. Quantize the model in such a format "
            "(trustcore.quantize(model, ..., requantize=True)), or write it with scheme='trustcore'."
        )
    return units, packed, plain


def _later(of_rule: Callable[[], tuple[Units, bool]], unit: str, name: str, planned: Planned) -> Planned:
    def make() -> np.ndarray:
        return of_rule()[0][unit][name].make()

    return Planned(planned.shape, planned.dtype, make)


def _of_rule(model: Model, rule: Rule, values: list[Any], writer: Writer) -> tuple[Units, bool]:
    """The tensors of one rule by weight, and whether they are a packed matrix in the writer's layout."""
    order = half_order(model.config, rule.paths[0])
    strange = next((v for v in values if isinstance(v, Weight) and not isinstance(v, QuantizedArray)), None)
    if strange is not None:
        raise ModelError(f"is a {type(strange).__name__}, which has no place in a file: merge or densify it")
    if not all(isinstance(value, QuantizedArray) and value.format not in _PLAIN for value in values):
        arrays = zip(rule.names, _arrays(rule, values, order), strict=True)
        return {name: {name: planned} for name, planned in arrays}, False
    if rule.is_table and not isinstance(writer, OwnWriter):
        return {rule.stored: {rule.stored: _decoded(values[0])}}, False
    turned = values if order is None else [outputs_in(values[0], order)]
    modules = [name.removesuffix(".weight") for name in rule.names]
    weights = zip(modules, rule.join_packed(turned), strict=True)
    return {f"{module}.weight": writer.tensors(module, weight) for module, weight in weights}, True


def _decoded(table: QuantizedArray) -> Planned:
    """A packed table as float16, decoded when its turn comes."""
    return Planned(tuple(table.shape), np.dtype(np.float16), lambda: float_values(table, np.float16))


def _arrays(rule: Rule, values: list[Any], order: np.ndarray | None) -> list[Planned]:
    """The tensors of weights that every tool has as numbers, in the order of the file."""
    if any(isinstance(value, jax.ShapeDtypeStruct) for value in values):
        raise ModelError("is abstract; load or initialize the weights first")
    expected = rule.shape([tuple(value.shape) for value in values])
    kinds = {_stored(value).dtype for value in values}
    dtype = np.dtype(kinds.pop()) if len(kinds) == 1 else np.dtype(np.float32)

    def make(piece: int) -> np.ndarray:
        arrays = [np.asarray(_stored(value)).astype(dtype) for value in values]
        if order is not None:
            arrays = [array[..., order] for array in arrays]
        return rule.join(arrays)[piece]

    return [Planned(expected, dtype, lambda piece=piece: make(piece)) for piece in range(len(rule.names))]


def _stored(value: Any) -> Any:
    """A weight as numbers: 16-bit floats as they are stored, all other packed ones decoded."""
    if not isinstance(value, QuantizedArray):
        return value
    if value.format not in _PLAIN:
        return value.dequantize()
    return value.fields["values"].T if value.transposed else value.fields["values"]


def _described(model: Model) -> tuple[dict[str, Any], list[Rule]]:
    """The config.json, and how the weights are called: as they came, where that still describes the model."""
    family, config, parameters = family_named(model.config.family), model.config, parameters_of(model)

    def rules(prefix: str | None) -> list[Rule]:
        found = family.names(config).rules(config, prefix)
        return [rule for rule in found if rule.paths[0] in parameters]

    if model.described and half_order(config, "blocks.0.attention.query.kernel") is None:
        found, kept = json.loads(model.described), rules(model.prefix)
        try:
            same = family.config(found, [name for rule in kept for name in rule.names]) == config
        except ModelError:
            same = False
        if same:
            return {k: v for k, v in found.items() if k not in ("quantization_config", "compression_config")}, kept
    return hugging_face_config(config), rules(None)


def _tokenizer_files(model: Model, given: str | os.PathLike[str] | None) -> Callable[[Path], object]:
    """The function that puts the tokenizer's files, and what else goes with a model, into a folder."""
    if given is None and model.tokenizer is None:
        beside = Path(model.origin).parent
        known = bool(model.origin) and not model.origin.endswith(".gguf") and beside.is_dir()
        return (lambda folder: copy_companions(beside, folder)) if known else (lambda folder: None)
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
    if not {"tokenizer.json", TOKENIZER_GGUF}.intersection(companions(beside)):
        raise CheckpointError(f"there is no tokenizer.json; {wanted}", path=beside)
    return lambda folder: copy_companions(beside, folder)
