"""From a checkpoint to a decoder: configuration, names, shapes; then tensor by tensor, packed ones as they are.

A tensor is read, laid out and given to the device before the next one is touched, and its pages of the file are handed
back: the host never holds more than the model and one tensor. A matrix that another package packed is several tensors,
which `trustcore.models.schemes` finds and reads.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trustcore.dtypes import compute_dtype
from trustcore.errors import ModelError
from trustcore.models.config import DecoderConfig
from trustcore.models.decoder import Decoder, parameters_of
from trustcore.models.families import FAMILIES, gguf_of, rules_of
from trustcore.models.name_map import Rule
from trustcore.models.schemes import Packed, Scheme, scheme_of
from trustcore.models.schemes.float4 import GptOss
from trustcore.models.schemes.float8 import input_scale
from trustcore.models.schemes.own import Own
from trustcore.quant import QuantizedArray
from trustcore.quant.formats import BLOCK_FORMATS
from trustcore.weights import Checkpoint, LazyArray
from trustcore.weights.packed_layout import packed_tensors
from trustcore.weights.placement import place

Progress = Callable[[int, int], None]

_PLAIN = ("f32", "f64")  # encodings that are read as arrays; those of BLOCK_FORMATS stay packed

_FLOAT16 = ("f16", "bf16")

# Beside packed matrices in files, and not needed: scales of a cache of keys and values in 8-bit floats.
_CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".kv_scale")

# What packed matrices of other packages are called, for the hint that config.json does not tell of them.
_PACKED_NAMES = (
    ".qweight",
    ".weight_packed",
    ".SCB",
    ".weight.absmax",
    ".weight_scale",
    ".weight_scale_inv",
    "_blocks",
)


def decoder_from_checkpoint(checkpoint: Checkpoint, *, dtype: Any = None, progress: Progress | None = None) -> Decoder:
    """Returns the decoder whose configuration and weights the checkpoint holds.

    Args:
        checkpoint: an opened GGUF file or safetensors model.
        dtype: None keeps matrices as they are stored (packed, or 16-bit) and computes in float32 on CPUs, bfloat16
            elsewhere. A dtype decodes all of them into arrays of that dtype and computes in it.
        progress: called with (bytes done, bytes in all) after each tensor.

    Matrices that GPTQ, AWQ, bitsandbytes, compressed-tensors or FP8 tools packed stay as they are; `config.json` says
    which of them it was.

    Raises:
        ModelError: the architecture, the quantization or the dtype is not supported, or tensors are missing, unexpected
            or of the wrong shape or encoding: all of them in one message.
    """
    compute = compute_dtype(dtype)
    from_gguf = checkpoint.format == "gguf"
    config = read_config(checkpoint)
    if config.layers > len(checkpoint):  # bounds the work below by the file's own size
        raise ModelError(
            f"the configuration has {config.layers} layers, the checkpoint only {len(checkpoint)} tensors."
        )
    model = Decoder(config, dtype=compute)
    scheme = None if from_gguf else _scheme(checkpoint)
    entries = _match(model, checkpoint, from_gguf, scheme)

    total, done = sum(entry.nbytes for entry in entries), 0
    # NumPy moves bytes without the interpreter's lock, so tensors are laid out side by side.
    with ThreadPoolExecutor(max_workers=2) as pool:
        loaded = pool.map(lambda entry: _read(entry, dtype is not None, compute), entries)
        for entry, values in zip(entries, loaded, strict=True):
            for parameter, value in zip(entry.parameters, values, strict=True):
                parameter.set_value(value)
            done += entry.nbytes
            if progress is not None:
                progress(done, total)
    packed = ((e.rule.paths[0], e.sources[0]) for e in entries if len(e.rule.paths) == len(e.sources) == 1)
    scales = ((path, input_scale(tensor)) for path, tensor in packed if isinstance(tensor, Packed))
    model.input_scales = tuple((path, scale) for path, scale in scales if scale is not None)
    model.source, model.origin = checkpoint.path.name, str(checkpoint.path.absolute())
    return model


def read_config(checkpoint: Checkpoint) -> DecoderConfig:
    """Returns the configuration of the decoder in a checkpoint.

    Raises:
        ModelError: it holds none, or of a family that is not supported.
    """
    if checkpoint.format != "gguf":
        config = checkpoint.metadata.get("config")
        if config is None:
            raise ModelError(f"{checkpoint.path}: there is no config.json beside the weights; put the model's there.")
        return DecoderConfig.from_hugging_face(config)
    table = checkpoint.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ModelError(f"{checkpoint.path}: token_embd.weight [V, D] is missing; this is not a decoder's file.")
    divisors = [checkpoint.get(f"rope_{name}.weight") for name in ("freqs", "factors_short", "factors_long")]
    plain, short, long = (() if d is None else tuple(float(x) for x in d.numpy().reshape(-1)) for d in divisors)
    return DecoderConfig.from_gguf(
        checkpoint.metadata,
        vocab_size=table.shape[0],
        tied="output.weight" not in checkpoint,
        rope_divisors=plain or short,
        long_divisors=long,
    )


def _scheme(checkpoint: Checkpoint) -> Scheme | None:
    """How the checkpoint spells packed matrices: by its own header, or as config.json says."""
    packed = packed_tensors(checkpoint)
    return Own(packed) if packed else scheme_of(checkpoint.metadata["config"])


@dataclasses.dataclass(frozen=True, eq=False)
class _Entry:
    """A rule that the model and the checkpoint agree on: its parameters, and what holds each of its tensors."""

    rule: Rule
    parameters: tuple[nnx.Param[Any], ...]
    shapes: tuple[tuple[int, ...], ...]
    sources: tuple[LazyArray | Packed, ...]

    @property
    def nbytes(self) -> int:
        return sum(source.nbytes for source in self.sources)


@dataclasses.dataclass
class _Matching:
    """What was found on the way: faults, tensors that are used, modules that are packed (True: as they should)."""

    faults: list[str] = dataclasses.field(default_factory=list)
    used: set[str] = dataclasses.field(default_factory=set)
    packed: dict[str, bool] = dataclasses.field(default_factory=dict)


def _match(model: Decoder, checkpoint: Checkpoint, from_gguf: bool, scheme: Scheme | None) -> list[_Entry]:
    """Pairs parameters with tensors, or tells every disagreement at once."""
    family = FAMILIES[model.config.family]
    names = gguf_of(model.config).names if from_gguf else family.names_for(model.config).adapted(checkpoint)
    entries: list[_Entry] = []
    state, found, placed = _Matching(), parameters_of(model), 0
    for rule in rules_of(model.config, names):
        parameters = tuple(found[path] for path in rule.paths if path in found)
        if not parameters:
            if rule.paths == ("output.kernel",):
                state.used.update(rule.names)  # a tied table may stand twice
            continue
        assert len(parameters) == len(rule.paths), f"{rule.stored}: the model has only some of {rule.paths}"
        placed += len(parameters)
        shapes = tuple(tuple(parameter.get_value().shape) for parameter in parameters)
        sources = [_source(name, rule, shapes, checkpoint, scheme, state) for name in rule.names]
        entries.append(_Entry(rule, parameters, shapes, tuple(s for s in sources if s is not None)))
    assert placed == len(found), f"names of {model.config.family} cover {placed} of {len(found)} parameters"
    faults = state.faults
    left = [checkpoint[given] for given in checkpoint if given not in state.used and not given.endswith(names.ignored)]
    faults += [f"{tensor.name} is unexpected" for tensor in left if not _explained(tensor, scheme, state.packed)]
    if faults:
        if scheme is None and any(given.endswith(_PACKED_NAMES) for given in checkpoint):
            faults.insert(0, "matrices are packed as another package does, but config.json has no quantization_config")
        shown = "; ".join(faults[:20]) + (f"; and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise ModelError(f"{checkpoint.path}: the tensors do not fit a {model.config.family} model: {shown}.")
    return entries


def _source(
    name: str,
    rule: Rule,
    shapes: Sequence[tuple[int, ...]],
    checkpoint: Checkpoint,
    scheme: Scheme | None,
    state: _Matching,
) -> LazyArray | Packed | None:
    """What holds one tensor of a rule; None, and a fault, where nothing does."""
    expected = rule.shape(shapes)
    if scheme is not None and rule.is_matrix and len(expected) >= 2:
        module = name.removesuffix(".weight")
        *lead, k, n = expected
        if rule.rows_first or rule.is_table:
            k, n = n, k
        try:
            packed = _find_packed(scheme, checkpoint, module, tuple(lead), k, n)
        except ModelError as error:
            if any(other.startswith(module) for other in checkpoint):
                state.faults.append(str(error))
                state.packed[module] = False
                return None
            packed = None
        if packed is not None:
            state.used.update(part.name for part in (*packed.tensors, *packed.extras))
            state.packed[module] = True
            return packed
    tensor = checkpoint.get(name)
    if tensor is None:
        near = difflib.get_close_matches(name, list(checkpoint), n=1)
        state.faults.append(f"{name} is missing" + (f" (nearest: {near[0]})" if near else ""))
        return None
    state.used.add(name)
    if tuple(tensor.shape) != expected:
        state.faults.append(f"{name} has shape {list(tensor.shape)}, expected {list(expected)}")
    elif tensor.encoding not in BLOCK_FORMATS and tensor.encoding not in _PLAIN:
        known = ", ".join((*_PLAIN, *BLOCK_FORMATS))
        state.faults.append(f"{name} is stored as {tensor.encoding}; readable encodings: {known}")
    return tensor


def _find_packed(
    scheme: Scheme, checkpoint: Mapping[str, LazyArray], module: str, lead: tuple[int, ...], k: int, n: int
) -> Packed | None:
    """What a matrix, or a stack of them, is made of in the scheme; None: it is a plain tensor."""
    if not lead:
        return scheme.find(checkpoint, module, k, n)
    return scheme.find_stack(checkpoint, module, lead, k, n) if isinstance(scheme, GptOss) else None


def _explained(tensor: LazyArray, scheme: Scheme | None, packed: dict[str, bool]) -> bool:
    """Whether a tensor that no parameter takes may stand in a file with packed matrices."""
    if scheme is not None and tensor.name.endswith(_CACHE_SCALES):
        return True
    module, _, suffix = tensor.name.rpartition(".")
    if packed.get(module) and suffix == "bias":  # AutoGPTQ's layers have a bias whether the model has or not
        return tensor.encoding in ("f16", "bf16", "f32") and not tensor.numpy().any()
    parts = tensor.name.split(".")
    owners = (".".join(parts[:end]) for end in range(1, len(parts)))
    return any(packed.get(owner) is False for owner in owners)  # its fault has been told


def _read(entry: _Entry, decode: bool, compute: Any) -> list[Any]:
    """Returns the parameters in the orientation of the module: packed where the tensors are, else arrays."""
    values: list[Any]
    rule = entry.rule
    kept = compute if rule.is_matrix else np.float32  # norms and biases are added in float32, whatever matrices are
    one = entry.sources[0]
    if (
        rule.moves_nothing
        and isinstance(one, LazyArray)
        and one.dtype is not None
        and (decode or not _packs(one, rule))
    ):
        values = [place(one, None, kept, transposed=rule.rows_first)]  # piece by piece, cast on the way
        one.release()
        return values
    held = [_held(source, rule) for source in entry.sources]
    if all(isinstance(value, QuantizedArray) for value in held):
        values = rule.split_packed(held, entry.shapes)
        if decode:
            values = [value.dequantize().astype(compute) for value in values]
    else:
        arrays = [np.asarray(v.dequantize()) if isinstance(v, QuantizedArray) else v for v in held]
        arrays = rule.split([array.astype(kept) for array in arrays], entry.shapes)
        values = [jax.device_put(np.ascontiguousarray(array), may_alias=True) for array in arrays]
    for source in entry.sources:
        source.release()
    return values


def _held(source: LazyArray | Packed, rule: Rule) -> Any:
    """One tensor: packed matrices as such `[..., in, out]` (tables `[V, D]`), all else as an array as it lies."""
    if isinstance(source, Packed):
        return source.read(transposed=rule.is_table)
    if not _packs(source, rule):
        return source.numpy()
    if rule.rows_first or rule.is_table:
        return QuantizedArray.from_blocks(source.encoding, source.raw(), transposed=rule.is_table)
    if source.encoding in _FLOAT16:  # files that hold [in, out] have no blocks along the inputs
        return QuantizedArray(source.encoding, {"values": jnp.array(source.numpy())})
    return QuantizedArray.from_blocks(source.encoding, source.raw()).dequantize()


def _packs(source: LazyArray, rule: Rule) -> bool:
    """Whether a tensor becomes a packed matrix; 16-bit floats do."""
    return source.encoding in BLOCK_FORMATS and rule.is_matrix and len(source.shape) >= 2
