"""The tensors of a GGUF file as Hugging Face has them: their names, decoded, rotary rows in the order of halves.

    matrix            row by row, turned where one kind of file holds [in, out]
    stack of experts  a tensor for each expert, where that is how the family's files have them
    all else          parameters are made of the file's tensors and put together anew: what one fuses and the other does
                      not, DeepSeek's keys and values of latents

Memory: one tensor as it is written; of the last kind, those that it is made of besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from trustcore.convert.quantize import PIECE
from trustcore.convert.source import PLAIN, SourceTensor
from trustcore.errors import CheckpointError, ModelError
from trustcore.models.config import DecoderConfig
from trustcore.models.decoder import Decoder
from trustcore.models.families import gguf_of
from trustcore.models.from_checkpoint import read_config
from trustcore.models.hugging_face import TOKENS, half_order, hugging_face_config
from trustcore.models.model import parameters_of
from trustcore.models.name_map import Rule
from trustcore.models.registry import DECODERS
from trustcore.quant.formats import BLOCK_FORMATS
from trustcore.weights import Checkpoint, LazyArray
from trustcore.weights.safetensors_writer import Planned

Begins = Callable[[LazyArray], None]


def hugging_face_content(
    checkpoint: Checkpoint, dtype: np.dtype | None, begins: Begins
) -> tuple[dict[str, Any], dict[str, dict[str, Planned]]]:
    """Returns the config.json of a GGUF file's model, and its tensors to be written, by name.

    Args:
        checkpoint: a GGUF file.
        dtype: of the numbers; None keeps it.
        begins: called with each of the file's tensors before it is read.

    Raises:
        CheckpointError: matrices are packed, and there is no dtype to decode them to.
        ModelError: the family is not supported, config.json has no words for it, or tensors are missing or unexpected.
    """
    config = read_config(checkpoint)
    described = hugging_face_config(config, _tokens(checkpoint, config.vocab_size))
    packed = sorted({array.encoding for array in checkpoint.values() if array.encoding not in PLAIN})
    unknown = [encoding for encoding in packed if encoding not in BLOCK_FORMATS]
    if unknown or (packed and dtype is None):
        raise CheckpointError(
            f"matrices are stored as {', '.join(unknown or packed)}, which this format does not hold. "
            + ("It cannot be decoded here." if unknown else "Give a dtype to decode them to (--dtype bfloat16)."),
            path=checkpoint.path,
        )
    names = gguf_of(config).names_in(checkpoint)
    held = {path: rule for rule in names.rules(config) for path in rule.paths}
    shapes = {path: tuple(leaf.get_value().shape) for path, leaf in parameters_of(Decoder(config)).items()}
    units: dict[str, dict[str, Planned]] = {}
    used, missing = set[str](), []
    for wanted in DECODERS.names(config).rules(config):
        if wanted.paths[0] not in shapes:
            continue
        given = list(dict.fromkeys(held[path] for path in wanted.paths if path in held))
        arrays = {name: checkpoint.get(name) for rule in given for name in rule.names}
        absent = [name for name, array in arrays.items() if array is None]
        if absent or not given:
            missing += absent or [wanted.stored]
            continue
        used.update(arrays)
        planned = _planned(_Making(wanted, given, arrays, config, shapes, dtype, begins))
        units |= {name: {name: tensor} for name, tensor in zip(wanted.names, planned, strict=True)}
    left = [name for name in checkpoint if name not in used and not names.ignores(name)]
    if missing or left:
        said = [f"tensors are missing: {', '.join(missing[:6])}"] * bool(missing)
        said += [f"tensors that a {config.family} model does not have: {', '.join(left[:6])}"] * bool(left)
        raise ModelError(f"{checkpoint.path}: {'; '.join(said)}.")
    return described, units


def _tokens(checkpoint: Checkpoint, vocab_size: int) -> dict[str, int]:
    """The tokens that the file's tokenizer begins, ends and fills up texts with."""
    keys = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.padding_token_id")
    given = zip(TOKENS, (checkpoint.metadata.get(key) for key in keys), strict=True)
    return {key: int(token) for key, token in given if isinstance(token, int | np.integer) and 0 <= token < vocab_size}


class _Making:
    """What a rule of the written file is made of: rules of the file that is read, and their tensors."""

    def __init__(
        self,
        wanted: Rule,
        given: list[Rule],
        arrays: dict[str, Any],
        config: DecoderConfig,
        shapes: dict[str, tuple[int, ...]],
        dtype: np.dtype | None,
        begins: Begins,
    ):
        self.wanted, self.given, self.arrays, self.shapes, self.begins = wanted, given, arrays, shapes, begins
        first: LazyArray = arrays[given[0].names[0]]
        stored = np.dtype(jnp.bfloat16 if first.encoding == "bf16" else first.dtype or np.float32)
        self.target = stored if dtype is None else dtype
        self.orders = {path: half_order(config, path) for rule in given for path in rule.paths}


def _planned(making: _Making) -> list[Planned]:
    """The tensors of a rule."""
    wanted, given = making.wanted, making.given[0]
    one = len(making.given) == 1 and given.paths == wanted.paths and not (given.heads or given.column)
    arrays = [making.arrays[name] for name in given.names]
    matrices = all(len(array.shape) > 1 for array in arrays)
    if one and given.groups == wanted.groups and (matrices or making.orders[wanted.paths[0]] is None):
        if given.pieces == wanted.pieces:
            return [_rows(making, array, None) for array in arrays]
        if wanted.pieces and given.rows_first == wanted.rows_first and arrays[0].shape[0] == wanted.pieces:
            return [_rows(making, arrays[0], piece) for piece in range(len(wanted.names))]
    if wanted.pieces:
        raise ModelError(
            f"{given.stored} lies otherwise in Hugging Face's files. Load the model and save it: "
            "trustcore.save(trustcore.load(SRC, dtype=...), DST)."
        )
    return [_joined(making)]


def _rows(making: _Making, array: LazyArray, piece: int | None) -> Planned:
    """A tensor that is one of the file, or one piece of a stack, but for the order and the direction of its rows."""
    given, wanted = making.given[0], making.wanted
    tensor = SourceTensor(array.name, array.shape, array.encoding, array, making.orders[wanted.paths[0]])
    shape: tuple[int, ...] = array.shape if piece is None else array.shape[1:]
    rows, columns = tensor.rows if piece is None else tensor.rows // array.shape[0], array.shape[-1]
    turned = given.rows_first != wanted.rows_first and len(shape) > 1

    def make() -> np.ndarray:
        making.begins(array)
        made = np.empty((rows, columns), making.target)
        first = 0 if piece is None else piece * rows
        for start, stop in _pieces(rows, columns):
            found = tensor.floats(first + start, first + stop)
            made[start:stop] = found + np.float32(given.shift - wanted.shift)
        made = made.reshape(shape)
        return np.ascontiguousarray(np.swapaxes(made, -1, -2)) if turned else made

    written = (*shape[:-2], *reversed(shape[-2:])) if turned else shape
    return Planned(written, making.target, make)


def _joined(making: _Making) -> Planned:
    """A tensor of parameters that lie in several tensors of the file, or in parts of them."""
    wanted, shapes = making.wanted, making.shapes

    def make() -> np.ndarray:
        found: dict[str, np.ndarray] = {}
        for rule in making.given:
            whole = []
            for array in (making.arrays[name] for name in rule.names):
                making.begins(array)
                tensor = SourceTensor(array.name, array.shape, array.encoding, array)
                whole.append(tensor.floats(0, tensor.rows).reshape(array.shape))
            found |= dict(zip(rule.paths, rule.split(whole, [shapes[path] for path in rule.paths]), strict=True))
        turned = ((found[path], making.orders[path]) for path in wanted.paths)
        parts = [part if order is None else part[..., order] for part, order in turned]
        return np.ascontiguousarray(wanted.join(parts)[0]).astype(making.target)

    return Planned(wanted.shape([shapes[path] for path in wanted.paths]), making.target, make)


def _pieces(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    width = max(PIECE // max(columns, 1), 1)
    for start in range(0, rows, width):
        yield start, min(start + width, rows)
