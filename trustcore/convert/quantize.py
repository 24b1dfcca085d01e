"""`quantize_checkpoint`: a model on disk to a packed GGUF file, a few million weights at a time.

    checkpoint -> read_source -> a plan (each tensor's format) -> rows -> encode -> blocks -> the file

Everything that can be wrong is looked for before the first tensor is read, and told in one error. Rows are packed
independently of each other, so a tensor goes through memory in pieces: the peak is a constant beyond one tensor of the
source, whatever the size of the model. Codes are chosen here by rounding with a search of scales; a method that chooses
them otherwise hands its result in by `tensors`, packed, or as floats that it has changed.
"""

from __future__ import annotations

import fnmatch
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.convert.mixes import RECIPES, UNNAMED_FILE_TYPE, Facts, fallback, formats_of, is_packable
from trustcore.convert.source import Source, SourceTensor, read_source
from trustcore.errors import QuantizationError
from trustcore.quant import QuantizedArray
from trustcore.quant.encode import ENCODERS
from trustcore.quant.formats import BLOCK_FORMATS
from trustcore.weights import Checkpoint, open_checkpoint
from trustcore.weights.gguf_types import GGML_IDS, GGML_TYPES
from trustcore.weights.gguf_writer import StreamedTensor, write_gguf

Formats = str | Mapping[str, str | None] | Callable[[str, tuple[int, ...]], str | None]
Progress = Callable[[int, int], None]

PIECE = 1 << 22  # weights that are packed at a time: 16 MB as float32
QUANTIZATION_VERSION = 2  # of ggml's block layouts
_ALIASES = {"output": "output.weight", "embed": "token_embd.weight"}
_FLOATS = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor.

    Attributes:
        name: in the file.
        shape: `[..., N, K]`.
        source: how it was stored.
        format: how it is stored now.
        bits_per_weight: scales included.
        nbytes: in the file.
        sqnr_db: `10 log10(sum before^2 / sum (before - after)^2)`; None where nothing changed.
        note: why the format is not the one that was asked for; otherwise empty.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    format: str
    bits_per_weight: float
    nbytes: int
    sqnr_db: float | None
    note: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """What became of a model.

    Attributes:
        path: the file that was written.
        format: what was asked for.
        tensors: in the order of the file.
        seconds: that it took.
        source_bytes: of all tensors in the source.
    """

    path: str
    format: str
    tensors: tuple[TensorReport, ...]
    seconds: float
    source_bytes: int

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of the whole model."""
        return 8 * self.nbytes / max(self.parameters, 1)

    def as_json(self) -> dict[str, Any]:
        """Returns the report as values that JSON can hold."""
        totals = {name: getattr(self, name) for name in ("parameters", "nbytes", "bits_per_weight")}
        return {**asdict(self), **totals, "tensors": [asdict(tensor) for tensor in self.tensors]}


@dataclass(frozen=True)
class _Plan:
    tensor: SourceTensor
    format: str
    note: str = ""


def quantize_checkpoint(
    source: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str],
    format: Formats,
    *,
    keep: Sequence[str] = (),
    importance: Mapping[str, Any] | None = None,
    search: bool = True,
    pure: bool = False,
    requantize: bool = False,
    tensors: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Writes the model at `source` as a GGUF file, packed, and returns what became of each tensor.

    Args:
        source: a GGUF or safetensors model: a path, or a checkpoint that is open.
        out: the file to write, in place of what was there; it appears when it is complete.
        format: a name of `RECIPES` ("q4_k_m"); or patterns of GGUF names to formats, of which the first that matches
            counts, None keeping a tensor as it is; or a function of (name, shape) that gives a format or None. Vectors
            and norms become f32. Rows that a format's blocks do not divide take the format that llama.cpp takes for
            them, and the report says so.
        keep: GGUF names or patterns of them that stay as they are stored; "output" and "embed" stand for the output
            layer (of a tied model: the table of tokens) and the table of tokens.
        importance: what an error in each input costs, by GGUF name, `[K]` or `[E, K]`; see `read_imatrix` and `encode`.
        search: see `encode`.
        pure: every matrix in the recipe's base format, with none of its exceptions.
        requantize: whether matrices that are packed already may be packed in another format, which costs quality.
        tensors: what stands in for tensors of the source, by GGUF name and of the same shape `[..., N, K]`: a
            `QuantizedArray`, which is written as it is, or floats, which are packed as the rest.
        progress: called with (bytes of the source done, bytes in all).

    Raises:
        CheckpointError: the source is broken.
        ModelError: a safetensors model is of a family that is not supported.
        TokenizerError: its tokenizer has no counterpart in GGUF.
        QuantizationError: a format is unknown or has no encoder, a tensor is packed already, a name matches nothing, or
            weights are NaN, infinite or too large. The file is then not written.
        OSError: the disk refuses.

    Example:
        >>> print(quantize_checkpoint("model.safetensors", "model-Q4_K_M.gguf", "q4_k_m").nbytes)  # doctest: +SKIP
    """
    begin = time.perf_counter()
    if not isinstance(source, Checkpoint):
        with open_checkpoint(source) as checkpoint:
            return quantize_checkpoint(
                checkpoint, out, format, keep=keep, importance=importance, search=search, pure=pure,
                requantize=requantize, tensors=tensors, progress=progress,
            )  # fmt: skip
    content = read_source(source)
    given, importance = dict(tensors or {}), dict(importance or {})
    plans = _plan(content, format, keep, importance, pure, requantize, given)
    total, done = sum(plan.tensor.nbytes for plan in plans), 0
    reports: list[TensorReport] = []

    def streamed(plan: _Plan) -> StreamedTensor:
        def make() -> Iterator[np.ndarray]:
            nonlocal done
            noise = _Noise()
            weight = importance.get(plan.tensor.name)
            for piece, share in _pieces(plan, weight, search, given.get(plan.tensor.name), noise):
                yield piece
                if progress is not None:
                    progress(done + int(share * plan.tensor.nbytes), total)
            plan.tensor.release()
            done += plan.tensor.nbytes
            reports.append(_report(plan, noise))

        return StreamedTensor(plan.tensor.shape, plan.format, make)

    metadata = {
        **content.metadata,
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": _file_type(format, plans),
    }
    write_gguf(out, metadata, {plan.tensor.name: streamed(plan) for plan in plans})
    name = format if isinstance(format, str) else "by tensor"
    return ConversionReport(os.fspath(Path(out)), name, tuple(reports), time.perf_counter() - begin, total)


def _plan(
    source: Source,
    format: Formats,
    keep: Sequence[str],
    importance: Mapping[str, Any],
    pure: bool,
    requantize: bool,
    given: Mapping[str, Any],
) -> list[_Plan]:
    """Decides the format of each tensor, or tells every fault at once."""
    faults: list[str] = []
    names = list(source.tensors)
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    wanted = _wanted(format, shapes, Facts.of(source.metadata, names, with_importance=bool(importance)), pure, faults)
    kept = _matches(keep, names, faults)
    for what, known in (("importance", importance), ("tensors", given)):
        strange = [name for name in known if name not in shapes and (what, name) != ("importance", "output.weight")]
        faults += [f"{what}: there is no tensor {name} (names look like {', '.join(names[:3])})" for name in strange]
    plans = []
    for name, tensor in source.tensors.items():
        value, note = given.get(name), ""
        if value is not None and tuple(value.shape) != tuple(tensor.shape):
            faults.append(f"{name}: what stands in has shape {list(value.shape)}, expected {list(tensor.shape)}")
        target = wanted.get(name)
        if isinstance(value, QuantizedArray):
            target = value.format
            if target not in GGML_IDS or not value.transposed:
                faults.append(f"{name}: {value!r} has no place in GGUF; give [N, K] (transposed=True) in a GGUF format")
        elif name in kept or (target is None and is_packable(name, tensor.shape)):
            target = "f32" if value is not None or tensor.encoding == "f64" else tensor.encoding
            note = "kept" if name in kept else ""
        elif target is None:
            target = "f32" if tensor.encoding in ("f16", "bf16", "f64") else tensor.encoding
        else:
            asked, target = target, fallback(target, tensor.shape[-1])
            if asked != target:
                note = f"{asked} takes rows of {BLOCK_FORMATS[asked].block}"
            faults += _refusals(tensor, target, value, requantize, importance.get(name))
        plans.append(_Plan(tensor, target, note))
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise QuantizationError(f"quantize: {'; '.join(faults[:20])}{more}")
    return plans


def _wanted(
    format: Formats, shapes: Mapping[str, tuple[int, ...]], facts: Facts, pure: bool, faults: list[str]
) -> dict[str, str]:
    """The format that each matrix is to have; what is not named stays as it is."""
    if isinstance(format, str):
        return formats_of(format, shapes, facts, pure=pure)
    packable = [name for name, shape in shapes.items() if is_packable(name, shape)]
    if isinstance(format, Mapping):
        for pattern in format:
            if not fnmatch.filter(packable, pattern):
                faults.append(f"format: pattern {pattern!r} matches no matrix (names look like {packable[:3]})")
        chosen = {n: next((f for p, f in format.items() if fnmatch.fnmatchcase(n, p)), None) for n in packable}
    else:
        chosen = {name: format(name, shapes[name]) for name in packable}
    known = {name: value for name, value in chosen.items() if value is not None}
    strange = sorted({value for value in known.values() if value != "f32" and value not in BLOCK_FORMATS})
    faults += [f"format {value!r} is not known; choose from f32, {', '.join(BLOCK_FORMATS)}" for value in strange]
    return {name: value for name, value in known.items() if value not in strange}


def _matches(keep: Sequence[str], names: Sequence[str], faults: list[str]) -> set[str]:
    found: set[str] = set()
    for word in keep:
        name = _ALIASES.get(word, word)
        if word == "output" and name not in names:
            name = _ALIASES["embed"]  # a tied model
        matching = fnmatch.filter(names, name)
        if not matching:
            faults.append(f"keep: {word!r} matches no tensor; give 'output', 'embed' or a name like {names[0]!r}")
        found.update(matching)
    return found


def _refusals(tensor: SourceTensor, target: str, value: Any, requantize: bool, weight: Any) -> Iterator[str]:
    if target == tensor.encoding and value is None:
        return
    if target == "q8_k":
        why = "is what llama.cpp makes of activations on the way; no file of weights has it. Choose q8_0"
        yield f"{tensor.name}: q8_k {why}"
    elif target != "f32" and target not in ENCODERS:
        yield f"{tensor.name}: format {target!r} has no encoder; those with one: {', '.join(sorted(ENCODERS))}"
    if value is None and tensor.is_packed and target not in _FLOATS and not requantize:
        yield (
            f"{tensor.name} is {tensor.encoding} already, and packing it again as {target} adds to its error: start "
            "from an f16 or f32 model, or allow it (--requantize, requantize=True)"
        )
    shape = None if weight is None else tuple(np.shape(weight))
    if shape is not None and shape not in (tensor.shape[-1:], (*tensor.shape[:-2], tensor.shape[-1])):
        yield f"{tensor.name}: the importance is {list(shape)}, expected one number an input: {[tensor.shape[-1]]}"


def _pieces(plan: _Plan, weight: Any, search: bool, value: Any, noise: _Noise) -> Iterator[tuple[np.ndarray, float]]:
    """The bytes or numbers of a tensor, in order, each with the share of the tensor that is then done."""
    tensor, encoding = plan.tensor, GGML_TYPES[GGML_IDS[plan.format]]
    if isinstance(value, QuantizedArray):
        if tensor.encoding in (*_FLOATS, "f64", *BLOCK_FORMATS):
            noise.add(tensor.floats(0, tensor.rows).T, value.dequantize().reshape(tensor.rows, -1).T)
        yield value.to_blocks(), 1.0
        return
    k, width = tensor.shape[-1] if tensor.shape else 1, max(PIECE // max(tensor.shape[-1:] or (1,)), 1)
    groups, group = 1, tensor.rows
    if weight is not None and np.ndim(weight) > 1:
        groups, group = math.prod(tensor.shape[:-2]), tensor.shape[-2]
        weight = np.asarray(weight).reshape(groups, k)
    # Pieces of one width, so that one program packs them all; the last begins within the one before it.
    count = max(-(-group // width), 1)
    width = -(-group // count)
    floats = None if value is None else np.asarray(value, np.float32).reshape(tensor.rows, k)
    for g in range(groups):
        here = weight if weight is None or np.ndim(weight) == 1 else weight[g]
        for i in range(count):
            start = g * group + min(i * width, group - width)
            stop, fresh = start + width, g * group + i * width - start
            share = min((g * group + (i + 1) * width) / max(tensor.rows, 1), 1.0)
            if plan.format == tensor.encoding and floats is None:
                yield tensor.stored(start, stop)[fresh:], share
                continue
            rows = tensor.floats(start, stop) if floats is None else floats[start:stop]
            if plan.format == "f32":
                yield rows[fresh:], share
                continue
            try:
                packed = QuantizedArray.quantize(rows.T, plan.format, importance=here, search=search)
            except QuantizationError as error:
                raise QuantizationError(f"quantize: {tensor.name}, rows {start} to {stop}: {error}") from error
            noise.add(rows.T[:, fresh:], packed.dequantize()[:, fresh:])
            blocks = packed.to_blocks()[fresh:]
            yield (blocks if encoding.dtype is None else blocks.view(encoding.dtype)), share


class _Noise:
    """Sums of squares over the pieces of a tensor."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, before: Any, after: Any) -> None:
        """Adds a piece: what stood there, and what a reader will see."""
        unit, signal, noise = map(float, _squares(jnp.asarray(before), jnp.asarray(after)))
        self.signal += signal * unit**2
        self.noise += noise * unit**2

    @property
    def decibels(self) -> float | None:
        """The ratio; None where nothing was lost."""
        if self.noise == 0:
            return None
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


@jax.jit
def _squares(before: jax.Array, after: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the largest number, and the sums in units of it, so that no square vanishes."""
    largest = jnp.max(jnp.maximum(jnp.abs(before), jnp.abs(after)), initial=0.0)
    unit = jnp.where(largest > 0, largest, 1.0)
    return unit, jnp.sum((before / unit) ** 2), jnp.sum(((before - after) / unit) ** 2)


def _report(plan: _Plan, noise: _Noise) -> TensorReport:
    shape = plan.tensor.shape
    nbytes = GGML_TYPES[GGML_IDS[plan.format]].tensor_bytes(shape)
    bits = 8 * nbytes / max(math.prod(shape), 1)
    return TensorReport(
        plan.tensor.name, tuple(shape), plan.tensor.encoding, plan.format, bits, nbytes, noise.decibels, plan.note
    )


def _file_type(format: Formats, plans: Sequence[_Plan]) -> int:
    if isinstance(format, str) and format in RECIPES:
        return RECIPES[format].file_type
    return UNNAMED_FILE_TYPE
