"""`quantize_to_folder`: a model on disk to a folder of packed safetensors, one weight at a time.

    checkpoint -> an abstract model and its matches -> each weight read, packed in pieces, put on a shelf
               -> the shelf read back tensor by tensor -> files of a scheme, config.json, tokenizer

The shelf is a file without a name beside the folder: what a layout needs to know of all matrices (one group size, which
version of zero points) is known before the first tensor is written. It takes as many bytes of the disk as the result.
Memory: one weight as it is stored or as float32, the same packed, and a constant; a stack of experts that files hold
expert by expert is packed so. Scales of a whole matrix want the whole matrix: those formats hold it several times.

Methods here need no data, or an importance that was gathered before. Those that need a text hold the model.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import QuantizationError
from trustcore.heap import trim_heap
from trustcore.memory import Shelf
from trustcore.models.from_checkpoint import Outline, outline_of
from trustcore.models.importance import importance_by_path
from trustcore.models.matching import Match
from trustcore.models.model import Model, parameters_of
from trustcore.models.packed_outputs import outputs_in, side_by_side, stack_packed
from trustcore.models.schemes import Packed
from trustcore.quant import QuantizedArray, hqq
from trustcore.quant.formats import BLOCK_FORMATS, BlockFormat
from trustcore.quant.formats.names import storages
from trustcore.quant.hqq import parse_format
from trustcore.quant.quantize import Formats, LeafPlan, format_of, is_stored_as, is_table, plan_leaves
from trustcore.quant.report import Distance, LeafReport, Report
from trustcore.saving import check_scheme, save_streamed
from trustcore.weights import Checkpoint, open_checkpoint
from trustcore.weights.folder import refuse_occupied
from trustcore.weights.safetensors_writer import SHARD_BYTES, parse_size

METHODS = ("nearest", "search", "hqq")
PIECE = 1 << 22  # weights that are packed at a time
ALIASES: Mapping[str, tuple[str, ...]] = {"embed": ("embedding.table", "words.table")}

Progress = Callable[[int, int], None]
_FLOATS = ("f16", "bf16")


def quantize_to_folder(
    source: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str],
    format: Formats,
    *,
    keep: Sequence[str] = (),
    method: str = "search",
    importance: Mapping[str, Any] | None = None,
    requantize: bool = False,
    scheme: str = "trustcore",
    shard_size: int | str = SHARD_BYTES,
    progress: Progress | None = None,
) -> Report:
    """Writes the model at `source` as a folder, packed, and returns what became of each weight.

    The folder is the one that `save(quantize(load(source), format), out)` writes.

    Args:
        source: a model of any family: a path, or a checkpoint that is open.
        out: a folder that is not there yet, or is empty.
        format: as `trustcore.quantize` takes it: a name, patterns of paths to names, or a function of (path, array),
            whose array has a shape and a dtype alone.
        keep: paths or patterns of them that stay in floats; a path stands for what is below it, too, and "embed" for
            the table of tokens.
        method: "search" looks for the scales of least error, "nearest" takes the first that fits, "hqq" fits float zero
            points (`trustcore.quant.hqq`; integer formats).
        importance: what an error in each input costs, by GGUF name, as `read_imatrix` gives it; a decoder's.
        requantize: whether matrices that are packed already may be packed anew, which costs quality.
        scheme: see `trustcore.save`.
        shard_size: see `trustcore.save`.
        progress: called with (bytes of the source done, bytes in all).

    Raises:
        CheckpointError: the source is broken, the folder is not empty, or the disk refuses.
        ModelError: the family is not supported, or the scheme cannot hold the matrices.
        QuantizationError: a format is unknown or fits nothing, a matrix is packed already, a name matches nothing, or
            weights are NaN, infinite or too large. Nothing is then written.

    Example:
        >>> quantize_to_folder("model", "model-gptq", "int4:g128", scheme="gptq")  # doctest: +SKIP
    """
    if not isinstance(source, Checkpoint):
        with open_checkpoint(source) as checkpoint:
            return quantize_to_folder(
                checkpoint, out, format, keep=keep, method=method, importance=importance, requantize=requantize,
                scheme=scheme, shard_size=shard_size, progress=progress,
            )  # fmt: skip
    if method not in METHODS:
        raise QuantizationError(f"method is {method!r}; choose from {', '.join(METHODS)}.")
    check_scheme(scheme)
    parse_size(shard_size)
    refuse_occupied(Path(out))
    outline = outline_of(source)
    model = outline.model
    weights = {} if importance is None else _importance(importance, model)
    plans = _plan(outline, with_kept(format, keep, list(parameters_of(model))), weights, method, requantize)
    trim_heap()
    total, done = sum(match.nbytes for match in outline.matches), 0
    shelf, places, reports = Shelf(Path(out).absolute().parent), {}, {}
    try:
        for match in outline.matches:
            for path, (value, report) in _packed(outline, match, plans, weights, method).items():
                places[path] = shelf.put(value)
                if report is not None:
                    reports[path] = report
                del value
            done += match.nbytes
            if match.nbytes >= PIECE:
                trim_heap()
            if progress is not None:
                progress(done, total)
        save_streamed(
            model,
            out,
            lambda path: shelf.fetch(places[path]),
            scheme=scheme,
            tokenizer=source.path if source.metadata.get("tokenizer.ggml.model", "none") != "none" else None,
            shard_size=shard_size,
        )
    finally:
        shelf.close()
    return Report(tuple(reports[path] for path in plans if path in reports))


def with_kept(format: Formats, keep: Sequence[str], paths: Sequence[str]) -> Formats:
    """Returns formats with None for what is to be kept.

    Raises:
        QuantizationError: nothing is called so.
    """
    if not keep:
        return format
    patterns = [pattern for word in keep for pattern in ALIASES.get(word, (word, f"{word}.*"))]
    if not any(fnmatch.filter(paths, pattern) for pattern in patterns):
        raise QuantizationError(f"keep: {', '.join(keep)} match no weight; give 'output', 'embed' or a path")

    def chosen(path: str, leaf: Any) -> str | None:
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
            return None
        return format_of(format, path, leaf)

    return chosen


def refuse_packed(path: str, requantize: bool) -> None:
    """Raises the QuantizationError that says that a matrix is packed already, unless that is allowed."""
    if not requantize:
        raise QuantizationError(
            f"{path} is packed already, and packing it again adds to its error: start from a model in floats, or "
            "allow it (--requantize)"
        )


def _importance(importance: Mapping[str, Any], model: Model) -> dict[str, np.ndarray]:
    """By path; an entry for the output layer of a tied model has no path and no use."""
    if getattr(model.config, "tied", False):
        importance = {name: values for name, values in importance.items() if name != "output.weight"}
    return importance_by_path(importance, model.config)


def _plan(
    outline: Outline, format: Formats, importance: Mapping[str, Any], method: str, requantize: bool
) -> dict[str, LeafPlan | None]:
    """What becomes of each parameter; or every fault at once."""
    for match in outline.matches:
        if any(isinstance(s, Packed) or (s.encoding in BLOCK_FORMATS and s.encoding not in _FLOATS)
               for s in match.sources if match.rule.is_matrix):  # fmt: skip
            refuse_packed(match.rule.paths[0], requantize)
    shapes = {path: parameter.get_value().shape for path, parameter in parameters_of(outline.model).items()}
    leaves = [(path, np.broadcast_to(np.float32(0), shape)) for path, shape in shapes.items()]
    plans = plan_leaves(leaves, format, None, is_table, importance, True)
    found = dict(zip(shapes, plans, strict=True))
    if method == "hqq":
        for name in {plan.format for plan in plans if plan is not None}:
            parse_format(name)
    return found


def _packed(
    outline: Outline,
    match: Match,
    plans: Mapping[str, LeafPlan | None],
    importance: Mapping[str, Any],
    method: str,
) -> dict[str, tuple[Any, LeafReport | None]]:
    """The parameters of a match by path, packed where that is planned, with what became of them."""
    paths, rule = match.rule.paths, match.rule
    packers = {path: _Packer(path, plan, importance.get(path), method) for path in paths if (plan := plans[path])}
    if rule.pieces and len(packers) == len(paths):  # one piece of a stack after the other
        for name, source in zip(rule.names, match.sources, strict=True):
            one = dataclasses.replace(rule, pieces=0, stored=name)
            values = outline.read(Match(one, tuple(shape[1:] for shape in match.shapes), (source,)))
            for path, value in zip(paths, values, strict=True):
                packers[path].add(value)
        return {path: packers[path].result(shape) for path, shape in zip(paths, match.shapes, strict=True)}
    found = {}
    for path, value in zip(paths, outline.read(match), strict=True):
        packer = packers.get(path)
        if packer is None:
            found[path] = value, _untouched(path, value)
            continue
        for piece in _matrices(value):
            packer.add(piece)
        found[path] = packer.result(tuple(value.shape))
    return found


def _matrices(value: Any) -> Iterator[Any]:
    """The matrices of a stack, or the one that it is."""
    if value.ndim == 2:
        yield value
        return
    held = value if isinstance(value, QuantizedArray) else np.asarray(value)
    for e in range(value.shape[0]):
        yield jax.tree.map(lambda field, e=e: field[e], held)


class _Packer:
    """Packs a weight matrix by matrix, each a few million weights at a time."""

    def __init__(self, path: str, plan: LeafPlan, importance: Any, method: str):
        self._path, self._plan, self._importance, self._method = path, plan, importance, method
        self._done: list[QuantizedArray] = []
        self._distance = Distance()

    def add(self, value: Any) -> None:
        """Packs a matrix, the next of a stack."""
        if isinstance(value, QuantizedArray) and any(is_stored_as(value, s) for s in storages(self._plan.format)):
            self._done.append(value)
            return
        is_packed = isinstance(value, QuantizedArray)
        transposed = value.transposed if is_packed else self._plan.transposed
        stored = value if is_packed else np.asarray(value).T if transposed else np.asarray(value)
        k, n = value.stored_shape if is_packed else stored.shape
        parts = []
        for start, stop in _spans(self._plan.format, k, n):
            piece = _columns(stored, start, stop, n)
            try:
                packed = self._pack(piece)
            except QuantizationError as error:
                raise QuantizationError(f"quantize: {self._path}: {error}") from error
            self._distance.add(piece, packed.dequantize())
            parts.append(packed)
        whole = parts[0] if len(parts) == 1 else side_by_side(parts)
        self._done.append(whole.T if transposed else whole)

    def result(self, shape: tuple[int, ...]) -> tuple[QuantizedArray, LeafReport]:
        """Returns the weight of that shape, and what became of it."""
        whole = self._done[0] if len(shape) == 2 else stack_packed(self._done)
        return whole, self._distance.report(self._path, shape, whole)

    def _pack(self, piece: jax.Array) -> QuantizedArray:
        if self._method == "hqq":
            return hqq({"kernel": piece}, self._plan.format, where=_all)["kernel"]
        weight = self._importance
        if weight is not None and np.ndim(weight) > 1:
            weight = weight[len(self._done)]
        return QuantizedArray.quantize(piece, self._plan.format, importance=weight, search=self._method != "nearest")


def _all(path: str, leaf: Any) -> bool:
    return True


def _columns(stored: Any, start: int, stop: int, n: int) -> jax.Array:
    """Outputs of a stored matrix `[K, N]` as float32."""
    if not isinstance(stored, QuantizedArray):
        return jnp.asarray(stored[:, start:stop], jnp.float32)
    whole = QuantizedArray(stored.format, stored.fields)
    return (whole if stop - start == n else outputs_in(whole, np.arange(start, stop))).dequantize()


def _spans(format: str, k: int, n: int) -> list[tuple[int, int]]:
    """Outputs that are packed together: as few as make a piece, all where they share something."""
    choices = storages(format)
    one = choices[0]
    shared = len(choices) > 1 or one.columns == 0 or one.double
    if shared or (isinstance(one.format, BlockFormat) and one.format.shared):
        return [(0, n)]
    count = max(math.ceil(k * n / PIECE), 1)
    width = max(-(-math.ceil(n / count) // one.columns) * one.columns, 1)
    return [(start, min(start + width, n)) for start in range(0, max(n, 1), width)]


def _untouched(path: str, value: Any) -> LeafReport | None:
    """What is said of a leaf that stays as it is; only floats are weights."""
    if not isinstance(value, QuantizedArray) and not jnp.issubdtype(value.dtype, jnp.floating):
        return None
    return Distance().report(path, tuple(value.shape), value)
