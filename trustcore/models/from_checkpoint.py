"""From a checkpoint to a model: configuration, names, shapes; then tensor by tensor, packed ones as they are.

A tensor is read, laid out and given to the device before the next one is touched, and its pages of the file are handed
back: the host never holds more than the model and one tensor. A matrix that another package packed is several tensors,
which `trustcore.models.schemes` finds and reads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.dtypes import compute_dtype
from trustcore.errors import ModelError
from trustcore.memory import Shelf
from trustcore.models.config import DecoderConfig
from trustcore.models.decoder import Decoder
from trustcore.models.families import gguf_of
from trustcore.models.matching import Match, Matching
from trustcore.models.model import Model, TextEncoder, parameters_of
from trustcore.models.name_map import Rule
from trustcore.models.names import Names, described_by
from trustcore.models.registry import family_of
from trustcore.models.scan import put_on_shelf
from trustcore.models.schemes import Packed, Scheme, scheme_of
from trustcore.models.schemes.float8 import input_scale
from trustcore.models.schemes.own import Own
from trustcore.models.sentence import read_pooling
from trustcore.models.writing import Writer, read_writing
from trustcore.quant import QuantizedArray
from trustcore.quant.formats import BLOCK_FORMATS
from trustcore.weights import Checkpoint, LazyArray
from trustcore.weights.packed_layout import packed_tensors
from trustcore.weights.placement import place

Progress = Callable[[int, int], None]

_FLOAT16 = ("f16", "bf16")


def model_from_checkpoint(
    checkpoint: Checkpoint, *, dtype: Any = None, progress: Progress | None = None, shelf: Shelf | None = None
) -> Model:
    """Returns the model whose configuration and weights the checkpoint holds, of any family.

    Args:
        checkpoint: an opened GGUF file, or a model in another format with a config.json.
        dtype: None keeps matrices as they are stored (packed, or 16-bit) and computes in float32 on CPUs, bfloat16
            elsewhere. A dtype decodes all of them into arrays of that dtype and computes in it.
        progress: called with (bytes done, bytes in all) after each tensor.
        shelf: where the weights of layers go, tensor by tensor, in place of memory; see `spill_layers`.

    Matrices that GPTQ, AWQ, bitsandbytes, compressed-tensors or FP8 tools packed stay as they are; `config.json` says
    which of them it was.

    Raises:
        ModelError: the architecture, the quantization or the dtype is not supported, or tensors are missing, unexpected
            or of the wrong shape or encoding: all of them in one message.
    """
    outline = outline_of(checkpoint, dtype=dtype)
    model, parameters = outline.model, parameters_of(outline.model)
    total, done = sum(match.nbytes for match in outline.matches), 0
    shelved: dict[str, int] = {}
    # NumPy moves bytes without the interpreter's lock, so tensors are laid out side by side; onto a shelf one by one.
    with ThreadPoolExecutor(max_workers=2) as pool:
        each = pool.map if shelf is None else map
        for match, values in zip(outline.matches, each(outline.read, outline.matches), strict=True):
            for path, value in zip(match.rule.paths, values, strict=True):
                if shelf is not None and path.startswith(tuple(f"{place}." for place in model.stacks)):
                    shelved[path] = shelf.put(value)
                    value = shelf.shapes(shelved[path])
                parameters[path].set_value(value)
            del values
            done += match.nbytes
            if progress is not None:
                progress(done, total)
    if shelf is not None:
        put_on_shelf(model, shelf, shelved)
    return model


@dataclasses.dataclass(frozen=True, eq=False)
class Outline:
    """A model without its weights, and where they are.

    Attributes:
        model: its parameters are abstract; all else is as the checkpoint says.
        matches: the tensors that make the parameters, in the order of the family's names.
        decode: whether packed matrices become arrays.
    """

    model: Model
    matches: tuple[Match, ...]
    decode: bool

    def read(self, match: Match) -> list[Any]:
        """Returns the parameters of a match, in the order of its paths, and lets the pages of the file go."""
        return _values(match, self.decode, self.model.dtype)


def outline_of(checkpoint: Checkpoint, *, dtype: Any = None) -> Outline:
    """Returns the model in a checkpoint before any of its weights is read; arguments and errors as there."""
    compute = compute_dtype(dtype)
    described = None if checkpoint.format == "gguf" else described_in(checkpoint)
    config, names, module = _read(checkpoint)
    model = module(config, dtype=compute)
    shapes = {path: tuple(parameter.get_value().shape) for path, parameter in parameters_of(model).items()}
    scheme = None if described is None else _scheme(checkpoint)
    found = Matching(names, config, shapes, checkpoint, scheme=scheme)
    packed = ((m.rule.paths[0], m.sources[0]) for m in found.matches if len(m.rule.paths) == len(m.sources) == 1)
    scales = ((path, input_scale(tensor)) for path, tensor in packed if isinstance(tensor, Packed))
    model.input_scales = tuple((path, scale) for path, scale in scales if scale is not None)
    model.source, model.origin = checkpoint.path.name, str(checkpoint.path.absolute())
    if described is not None:
        model.described, model.prefix = json.dumps(described), found.prefix
    if isinstance(model, Writer) and described is not None:
        model.writing = read_writing(checkpoint.path.parent, described, model)
    if isinstance(model, TextEncoder):
        model.pooling = read_pooling(checkpoint.path.parent)
    return Outline(model, tuple(found.matches), dtype is not None)


def decoder_from_checkpoint(checkpoint: Checkpoint, *, dtype: Any = None, progress: Progress | None = None) -> Decoder:
    """Returns the decoder in a checkpoint; see `model_from_checkpoint`.

    Raises:
        ModelError: as there; or the model is none.
    """
    if checkpoint.format != "gguf":
        DecoderConfig.from_hugging_face(described_in(checkpoint))  # refuses other families before weights are read
    model = model_from_checkpoint(checkpoint, dtype=dtype, progress=progress)
    assert isinstance(model, Decoder)
    return model


def described_in(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the config.json of a checkpoint.

    Raises:
        ModelError: there is none.
    """
    described = checkpoint.metadata.get("config")
    if described is None:
        raise ModelError(f"{checkpoint.path}: there is no config.json beside the weights; put the model's there.")
    return described


def read_config(checkpoint: Checkpoint) -> Any:
    """Returns the configuration of the model in a checkpoint.

    Raises:
        ModelError: it holds none, or of a family that is not supported.
    """
    return _read(checkpoint)[0]


def _read(checkpoint: Checkpoint) -> tuple[Any, Names, Callable[..., Model]]:
    """Configuration, names of the weights, and the module."""
    if checkpoint.format != "gguf":
        described = described_in(checkpoint)
        family = family_of(described)
        config = _bounded(family.config(described, described_by(checkpoint)), checkpoint)
        return config, family.names(config), family.module
    table = checkpoint.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ModelError(f"{checkpoint.path}: token_embd.weight [V, D] is missing; this is not a decoder's file.")
    divisors = [checkpoint.get(f"rope_{name}.weight") for name in ("freqs", "factors_short", "factors_long")]
    plain, short, long = (() if d is None else tuple(float(x) for x in d.numpy().reshape(-1)) for d in divisors)
    config = DecoderConfig.from_gguf(
        checkpoint.metadata,
        vocab_size=table.shape[0],
        tied="output.weight" not in checkpoint,
        rope_divisors=plain or short,
        long_divisors=long,
        tensors=checkpoint,
    )
    return _bounded(config, checkpoint), gguf_of(config).names_in(checkpoint), Decoder


def _bounded(config: Any, checkpoint: Checkpoint) -> Any:
    """Bounds the work by the file's own size."""
    layers = _layers(config)
    if layers > len(checkpoint):
        raise ModelError(f"the configuration has {layers} layers, the checkpoint only {len(checkpoint)} tensors.")
    return config


def _layers(config: Any) -> int:
    """How many layers a configuration, and those in it, have together."""
    values = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]
    inner = sum(_layers(value) for _, value in values if dataclasses.is_dataclass(value))
    more = (value for name, value in values if name.endswith("_layers") and isinstance(value, int))
    return inner + getattr(config, "layers", 0) + sum(more)


def _scheme(checkpoint: Checkpoint) -> Scheme | None:
    """How the checkpoint spells packed matrices: by its own header, or as config.json says."""
    packed = packed_tensors(checkpoint)
    return Own(packed) if packed else scheme_of(checkpoint.metadata["config"])


def _values(match: Match, decode: bool, compute: Any) -> list[Any]:
    """Returns the parameters in the orientation of the module: packed where the tensors are, else arrays."""
    values: list[Any]
    rule = match.rule
    # Norms and biases are added in float32, whatever matrices are.
    small = np.float64 if jnp.dtype(compute) == np.float64 else np.float32
    kept = compute if rule.is_matrix or rule.convolved else small
    one = match.sources[0]
    if (
        rule.moves_nothing
        and isinstance(one, LazyArray)
        and one.dtype is not None
        and (decode or not _packs(one, rule))
    ):
        values = [place(one, None, kept, transposed=rule.rows_first)]  # piece by piece, cast on the way
        one.release()
        return values
    held = [_held(source, rule) for source in match.sources]
    if all(isinstance(value, QuantizedArray) for value in held):
        values = rule.split_packed(held, match.shapes)
        if decode:
            values = [value.dequantize().astype(compute) for value in values]
    else:
        arrays = [np.asarray(v.dequantize()) if isinstance(v, QuantizedArray) else v for v in held]
        arrays = rule.split([array.astype(kept) for array in arrays], match.shapes)
        values = [jax.device_put(np.ascontiguousarray(array), may_alias=True) for array in arrays]
    for source in match.sources:
        source.release()
    return values


def _held(source: LazyArray | Packed, rule: Rule) -> Any:
    """One tensor: packed matrices as such `[..., in, out]` (tables `[V, D]`), all else as an array as it lies."""
    if isinstance(source, Packed):
        return source.read(transposed=rule.is_table)
    if not _packs(source, rule):
        return source.numpy()
    if rule.heads:  # as one matrix, whose rows are its outputs or, where they are not, its inputs
        return QuantizedArray.from_blocks(source.encoding, rule.rows(source.raw()), transposed=not rule.rows_first)
    if rule.rows_first or rule.is_table:
        return QuantizedArray.from_blocks(source.encoding, source.raw(), transposed=rule.is_table)
    if source.encoding in _FLOAT16:  # files that hold [in, out] have no blocks along the inputs
        return QuantizedArray(source.encoding, {"values": jnp.array(source.numpy())})
    return QuantizedArray.from_blocks(source.encoding, source.raw()).dequantize()


def _packs(source: LazyArray, rule: Rule) -> bool:
    """Whether a tensor becomes a packed matrix; 16-bit floats do."""
    return source.encoding in BLOCK_FORMATS and rule.is_matrix and len(source.shape) >= 2
