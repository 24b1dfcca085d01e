"""What a text adds to packing: importance, codes or scaled weights, and formats that keep a budget.

    model (float32), text -> chunks -> what goes into each matrix -> importance | GPTQ's codes | AWQ's scaled weights
                                                                  -> the cost of each format -> formats under a budget

Everything here works on the matrices of a decoder's blocks, held as floats; embedding and output layer, and what GGUF
files hold as one tensor of several, are packed as without a text. Results of `prepare` go by GGUF names, rows in GGUF's
order; `pack_by_text` gives a model to be saved in other layouts.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.convert.mixes import Facts, fallback, formats_of
from trustcore.convert.source import read_source
from trustcore.errors import QuantizationError
from trustcore.models import Decoder, decoder_links, importance_by_tensor
from trustcore.models.importance import gguf_names
from trustcore.ops.weight import Weight
from trustcore.quant import Sample, allocate, awq, gptq, quantize, sensitivity
from trustcore.quant.calibration import MeanSquare, capture
from trustcore.quant.gptq import GRIDS
from trustcore.quant.quantize import is_table, path_name, plan_leaves
from trustcore.weights import open_checkpoint
from trustcore.weights.gguf_types import GGML_IDS, GGML_TYPES

METHODS = ("imatrix", "gptq", "awq")
CONTEXT, CHUNKS, BATCH = 256, 128, 4  # of the text: tokens a chunk, chunks that are read at most, chunks at a time
# Offered under a budget; for each matrix those whose blocks divide its rows.
OFFERED = ("q2_k", "iq3_s", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """Arguments of `quantize_checkpoint`.

    Attributes:
        format: a recipe, or a format for each tensor, by GGUF name.
        importance: by GGUF name, `[K]`.
        tensors: what stands in for tensors of the source, by GGUF name.
    """

    format: Any
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)
    tensors: Mapping[str, Any] = field(default_factory=dict)


def prepare(
    source: str | os.PathLike[str],
    model: Decoder,
    format: str | None,
    text: str,
    *,
    method: str = "imatrix",
    bits_per_weight: float | None = None,
    pure: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Returns what `quantize_checkpoint` is to be given for the model at `source`.

    Args:
        source: the model's file or folder.
        model: the same, as `trustcore.load(source, dtype="float32")` gives it.
        format: a recipe ("q4_k_m"); with a budget, what the matrices outside of the blocks take, None: "q6_k".
        text: what the model reads for calibration; at most 128 chunks of 256 tokens count.
        method: "imatrix": inputs weigh by their mean squares. "gptq": matrices whose formats GPTQ knows get codes that
            make up for each other's errors (arXiv 2210.17323), the others as by imatrix. "awq": channels are scaled up
            where activations are large and the neighbours scaled down (arXiv 2306.00978), then as by imatrix.
        bits_per_weight: of the whole file: formats are then chosen matrix by matrix, so that the errors of the
            products on the text are least.
        pure: see `quantize_checkpoint`.
        progress: called with (what is being done, done, in all).

    Raises:
        QuantizationError: an unknown method or format, a text that is too short, or a budget that cannot be kept.

    GPTQ and AWQ hold the model twice.
    """
    if method not in METHODS:
        raise QuantizationError(f"method {method!r} is not known; choose one of {', '.join(METHODS)}.")
    batches = _batches(model, text)
    with open_checkpoint(source) as checkpoint:
        content = read_source(checkpoint)
        shapes = {name: tensor.shape for name, tensor in content.tensors.items()}
        facts = Facts.of(content.metadata, list(shapes), with_importance=True)
        orders = {name: tensor.order for name, tensor in content.tensors.items()}
    named = gguf_names(model.config)
    count, held = Counter(named.values()), _leaves(model)
    names = {path: name for path, name in named.items() if count[name] == 1 and path in held}
    paths = tuple(path for path in names if _is_block_matrix(path))

    importance = _collected(model, batches, paths, MeanSquare(), progress)
    weights = importance_by_tensor(importance, model.config)
    wanted: Any = format or "q6_k"
    formats = formats_of(wanted, shapes, facts, pure=pure)
    if bits_per_weight is not None:
        chosen = _under_budget(model, batches, paths, importance, formats, shapes, names, bits_per_weight, progress)
        wanted = formats = {**formats, **chosen}
    if method == "imatrix":
        return Prepared(wanted, weights)
    if method == "gptq":
        targets = {path: fallback(formats[names[path]], shapes[names[path]][-1]) for path in paths}
        known = {path: target for path, target in targets.items() if target in GRIDS}
        tensors = _gptq(model, batches, known, names, orders, progress) if known else {}
        return Prepared(wanted, {n: w for n, w in weights.items() if n not in tensors}, tensors)
    samples = _collected(model, batches, paths, Sample(512), progress)
    targets = {path: fallback(formats[names[path]], shapes[names[path]][-1]) for path in paths}
    scaled = awq(
        model, lambda path, leaf: targets.get(path), decoder_links(model), samples, where=_of(paths), pack=False
    )
    again = _collected(scaled, batches, paths, MeanSquare(), progress)
    return Prepared(wanted, importance_by_tensor(again, model.config), _changed(model, scaled, names, orders))


def pack_by_text(
    model: Decoder, formats: Any, text: str, *, method: str = "imatrix", progress: Progress | None = None
) -> Decoder:
    """Returns the model with its matrices packed, those of the blocks by what the text says.

    Args:
        model: a decoder of float weights.
        formats: as `trustcore.quantize` takes them; see `with_kept`.
        text, method, progress: see `prepare`.

    Raises:
        QuantizationError: an unknown method or format, or a text that is too short.

    Holds the model twice.
    """
    if method not in METHODS:
        raise QuantizationError(f"method {method!r} is not known; choose one of {', '.join(METHODS)}.")
    if not isinstance(model, Decoder):
        raise QuantizationError(
            f"a text is read by decoders here, and this is a {model.config.family} model: pack it without one."
        )
    batches = _batches(model, text)
    leaves = _leaves(model)
    plans = plan_leaves(list(leaves.items()), formats, None, is_table, {}, False)
    paths = tuple(path for path, plan in zip(leaves, plans, strict=True) if plan is not None and _is_block_matrix(path))
    if method == "gptq":
        told = _counted("choosing codes", len(paths), progress)
        return quantize(gptq(_hidden, model, batches, format=formats, where=paths, progress=told), formats)
    if method == "awq":
        samples = _collected(model, batches, paths, Sample(512), progress)
        return quantize(awq(model, formats, decoder_links(model), samples, where=_of(paths)), formats)
    importance = _collected(model, batches, paths, MeanSquare(), progress)
    return quantize(model, formats, importance=importance)


def _counted(what: str, total: int, progress: Progress | None) -> Callable[[Any], None]:
    done = 0

    def told(_: Any) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(what, done, total)

    return told


def _is_block_matrix(path: str) -> bool:
    return path.startswith("blocks.") and path.endswith("kernel")


def _of(paths: Sequence[str]) -> Callable[[str, Any], bool]:
    chosen = frozenset(paths)
    return lambda path, leaf: path in chosen


def _hidden(model: Decoder, tokens: jax.Array) -> jax.Array:
    """The blocks alone: logits of a large vocabulary would cost as much as they do."""
    return model.hidden_states(tokens)[0]


def _batches(model: Decoder, text: str) -> list[jax.Array]:
    """Returns chunks of the text, `[BATCH, T]` each; the last ones that fill no batch are left out."""
    ids = model.tokenizer.encode(text)
    length = min(CONTEXT, model.config.context)
    chunks = min(len(ids) // length, CHUNKS)
    if chunks < BATCH:
        raise QuantizationError(
            f"the calibration text has {len(ids)} tokens; at least {BATCH * length} are needed. Give a longer text, of "
            "the kind that the model will be used for."
        )
    rows = np.asarray(ids[: chunks * length], np.int32).reshape(chunks, length)
    return [jnp.asarray(rows[i : i + BATCH]) for i in range(0, chunks - BATCH + 1, BATCH)]


def _collected(
    model: Decoder, batches: Sequence[jax.Array], paths: Sequence[str], observer: Any, progress: Progress | None
) -> dict[str, Any]:
    collect = capture(_hidden, model, observer, where=paths)
    state = None
    for i, batch in enumerate(batches):
        state = collect(batch, state=state)
        if progress is not None:
            jax.block_until_ready(state)
            progress("reading the calibration text", i + 1, len(batches))
    assert state is not None
    return collect.finish(state)


def _under_budget(
    model: Decoder,
    batches: Sequence[jax.Array],
    paths: Sequence[str],
    importance: Mapping[str, Any],
    formats: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    bits_per_weight: float,
    progress: Progress | None,
) -> dict[str, str]:
    """Returns formats by GGUF name for the matrices of the blocks, so that the file keeps the budget."""
    within = {names[path] for path in paths}
    others = 0
    for name, shape in shapes.items():
        if name not in within:
            stored = fallback(formats[name], shape[-1]) if name in formats else "f32"
            others += GGML_TYPES[GGML_IDS[stored]].tensor_bytes(shape)
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    left = int(bits_per_weight * total / 8) - others
    options = sensitivity(
        _hidden,
        model,
        batches,
        OFFERED,
        by="hessian",
        where=paths,
        importance=importance,
        progress=None if progress is None else lambda done, whole: progress("trying formats", done, whole),
    )
    least: dict[str, int] = {}
    for option in options:
        least[option.path] = min(option.nbytes, least.get(option.path, option.nbytes))
    if sum(least.values()) > left:
        lowest = 8 * (others + sum(least.values())) / total
        raise QuantizationError(
            f"a budget of {bits_per_weight:g} bits a weight cannot be kept: what lies outside of the blocks takes "
            f"{8 * others / total:.2f}, and with the smallest formats that fit the rows the file has {lowest:.2f}."
        )
    chosen = allocate(options, nbytes=left).chosen
    return {names[path]: option.format for path, option in chosen.items() if option.format is not None}


def _gptq(
    model: Decoder,
    batches: Sequence[jax.Array],
    targets: Mapping[str, str],
    names: Mapping[str, str],
    orders: Mapping[str, np.ndarray | None],
    progress: Progress | None,
) -> dict[str, Any]:
    """Returns packed matrices `[N, K]` by GGUF name."""
    told = _counted("choosing codes", len(targets), progress)
    packed = gptq(
        _hidden, model, batches, format=lambda path, leaf: targets.get(path), where=tuple(targets), progress=told
    )
    found = _leaves(packed)
    return {names[path]: _reordered(found[path], orders[names[path]]).T for path in targets}


def _changed(
    before: Decoder, after: Decoder, names: Mapping[str, str], orders: Mapping[str, np.ndarray | None]
) -> dict[str, np.ndarray]:
    """Returns the weights that a folding has changed, as files hold them, by GGUF name."""
    old, new = _leaves(before), _leaves(after)
    changed = {}
    for path, leaf in new.items():
        if path in names and leaf is not old[path]:
            array = np.asarray(_reordered(leaf, orders[names[path]]), np.float32)
            changed[names[path]] = array.T if path.endswith("kernel") else array
    return changed


def _reordered(leaf: Any, order: np.ndarray | None) -> Any:
    """Returns a matrix `[K, N]` or vector `[N]`, packed or not, with its outputs in the order of the file's rows."""
    return leaf if order is None else jax.tree.map(lambda field: field[..., order], leaf)


def _leaves(model: Decoder) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda leaf: isinstance(leaf, Weight))[0]
    return {path_name(path): leaf for path, leaf in flat}
