"""From a checkpoint to a decoder: configuration, names, shapes; then tensor by tensor, packed ones as they are.

A tensor is read, laid out and given to the device before the next one is touched, and its pages of the file are handed
back: the host never holds more than the model and one tensor. A matrix that another package packed is several tensors,
which `trustcore.models.schemes` finds and reads.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trustcore.dtypes import named_dtype
from trustcore.errors import ModelError
from trustcore.models.config import DecoderConfig
from trustcore.models.decoder import Decoder
from trustcore.models.names import NOT_WEIGHTS, Name, decoder_names
from trustcore.models.schemes import Packed, Scheme, scheme_of
from trustcore.models.schemes.float8 import input_scale
from trustcore.models.schemes.own import Own
from trustcore.quant import QuantizedArray
from trustcore.quant.formats import BLOCK_FORMATS
from trustcore.weights import Checkpoint, LazyArray
from trustcore.weights.packed_layout import packed_tensors

Progress = Callable[[int, int], None]

_PLAIN = ("f32", "f64")  # encodings that are read as arrays; those of BLOCK_FORMATS stay packed

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
    compute = _compute_dtype(dtype)
    from_gguf = checkpoint.format == "gguf"
    config = _read_config(checkpoint, from_gguf)
    if config.layers > len(checkpoint):  # bounds the work below by the file's own size
        raise ModelError(
            f"the configuration has {config.layers} layers, the checkpoint only {len(checkpoint)} tensors."
        )
    model = Decoder(config, dtype=compute)
    scheme = None if from_gguf else _scheme(checkpoint)
    plan = _match(model, checkpoint, decoder_names(config.layers), from_gguf, scheme)

    total, done = sum(tensor.nbytes for _, _, tensor in plan), 0
    # NumPy moves bytes without the interpreter's lock, so tensors are laid out side by side.
    with ThreadPoolExecutor(max_workers=2) as pool:
        values = pool.map(lambda item: _read(item[0], item[2], dtype is not None, compute), plan)
        for (_, parameter, tensor), value in zip(plan, values, strict=True):
            parameter.set_value(value)
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)
    scales = ((path, input_scale(tensor)) for path, _, tensor in plan if isinstance(tensor, Packed))
    model.input_scales = tuple((path, scale) for path, scale in scales if scale is not None)
    model.source, model.origin = checkpoint.path.name, str(checkpoint.path.absolute())
    return model


def _compute_dtype(dtype: Any) -> Any:
    if dtype is None:
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    names = ("float32", "bfloat16", "float16", "float64")
    given = named_dtype(dtype, names)
    if given is None:
        raise ModelError(f"dtype is {dtype!r}; choose from {', '.join(names)}, or None to keep weights as stored.")
    return given


def _read_config(checkpoint: Checkpoint, from_gguf: bool) -> DecoderConfig:
    if not from_gguf:
        config = checkpoint.metadata.get("config")
        if config is None:
            raise ModelError(f"{checkpoint.path}: there is no config.json beside the weights; put the model's there.")
        return DecoderConfig.from_hugging_face(config)
    table = checkpoint.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ModelError(f"{checkpoint.path}: token_embd.weight [V, D] is missing; this is not a decoder's file.")
    divisors = checkpoint.get("rope_freqs.weight")
    return DecoderConfig.from_gguf(
        checkpoint.metadata,
        vocab_size=table.shape[0],
        tied="output.weight" not in checkpoint,
        rope_divisors=() if divisors is None else tuple(float(x) for x in divisors.numpy().reshape(-1)),
    )


def _scheme(checkpoint: Checkpoint) -> Scheme | None:
    """How the checkpoint spells packed matrices: by its own header, or as config.json says."""
    packed = packed_tensors(checkpoint)
    return Own(packed) if packed else scheme_of(checkpoint.metadata["config"])


def _match(
    model: Decoder, checkpoint: Checkpoint, names: tuple[Name, ...], from_gguf: bool, scheme: Scheme | None
) -> list[tuple[str, nnx.Param[Any], LazyArray | Packed]]:
    """Pairs parameters with tensors, or tells every disagreement at once."""
    plan: list[tuple[str, nnx.Param[Any], LazyArray | Packed]] = []
    faults: list[str] = []
    used = {"lm_head.weight", "output.weight"} if model.output is None else set[str]()  # a tied table may stand twice
    packed: dict[str, bool] = {}  # modules that are packed: whether they are as they should be
    for name in names:
        parameter = _find(model, name.path)
        given = name.gguf if from_gguf else name.hugging_face
        if parameter is None:
            continue
        shape = parameter.get_value().shape
        if scheme is not None and len(shape) == 2:
            module = given.removesuffix(".weight")
            k, n = shape if name.path.endswith("kernel") else reversed(shape)
            try:
                found = scheme.find(checkpoint, module, k, n)
            except ModelError as error:
                if any(other.startswith(module) for other in checkpoint):
                    faults.append(str(error))
                    packed[module] = False
                    continue
                found = None
            if found is not None:
                used.update(part.name for part in (*found.tensors, *found.extras))
                packed[module] = True
                plan.append((name.path, parameter, found))
                continue
        tensor = checkpoint.get(given)
        if tensor is None:
            near = difflib.get_close_matches(given, list(checkpoint), n=1)
            faults.append(f"{given} is missing" + (f" (nearest: {near[0]})" if near else ""))
            continue
        used.add(given)
        expected = tuple(reversed(shape)) if name.path.endswith("kernel") else tuple(shape)
        if tuple(tensor.shape) != expected:
            faults.append(f"{given} has shape {list(tensor.shape)}, expected {list(expected)}")
        elif tensor.encoding not in BLOCK_FORMATS and tensor.encoding not in _PLAIN:
            known = ", ".join((*_PLAIN, *BLOCK_FORMATS))
            faults.append(f"{given} is stored as {tensor.encoding}; readable encodings: {known}")
        plan.append((name.path, parameter, tensor))
    left = [checkpoint[given] for given in checkpoint if given not in used and not given.endswith(NOT_WEIGHTS)]
    faults += [f"{tensor.name} is unexpected" for tensor in left if not _explained(tensor, scheme, packed)]
    if faults:
        if scheme is None and any(given.endswith(_PACKED_NAMES) for given in checkpoint):
            faults.insert(0, "matrices are packed as another package does, but config.json has no quantization_config")
        shown = "; ".join(faults[:20]) + (f"; and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise ModelError(f"{checkpoint.path}: the tensors do not fit a {model.config.family} model: {shown}.")
    return plan


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


def _find(module: Any, path: str) -> nnx.Param[Any] | None:
    for part in path.split("."):
        if module is None:
            return None
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


def _read(path: str, tensor: LazyArray | Packed, decode: bool, compute: Any) -> Any:
    """Returns the tensor in the orientation of the module: packed where it is a packed matrix, else an array."""
    transposed = not path.endswith("kernel")
    if isinstance(tensor, Packed):
        value = tensor.read(transposed=transposed)
        if decode:
            value = value.dequantize().astype(compute)
    elif tensor.encoding in BLOCK_FORMATS and len(tensor.shape) == 2:
        value: Any = QuantizedArray.from_blocks(tensor.encoding, tensor.raw(), transposed=transposed)
        if decode:
            value = value.dequantize().astype(compute)
    else:
        array = tensor.numpy()
        # Norms and biases are added in float32, whatever the matrices are.
        array = array.astype(np.float32 if array.ndim == 1 else compute)
        value = jax.device_put(np.ascontiguousarray(array if transposed else array.T), may_alias=True)
    tensor.release()
    return value
