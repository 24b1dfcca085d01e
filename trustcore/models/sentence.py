"""From the states of tokens to one vector of a text, as the files of sentence-transformers describe it.

    modules.json ──▶ Transformer, Pooling (1_Pooling/config.json), Normalize ──▶ SentencePooling

Reimers and Gurevych, Sentence-BERT, arXiv 1908.10084.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from trustcore.dtypes import accumulation_dtype
from trustcore.errors import ModelError
from trustcore.models.values import Values
from trustcore.weights.json_file import read_object
from trustcore.weights.mapped import read_bytes

_MOST = 1 << 20  # bytes of a description; real ones have some hundred

# In the order in which several are put together.
_MODES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weighted_mean": "pooling_mode_weightedmean_tokens",
    "last": "pooling_mode_lasttoken",
}


@dataclasses.dataclass(frozen=True)
class SentencePooling:
    """How the states of a text's tokens become its vector.

    Attributes:
        modes: "cls" (the first token), "last", "max", "mean", "mean_sqrt_len", "weighted_mean" (later tokens weigh
            more); the vectors of several stand one after the other.
        normalize: whether the vector is scaled to length one.
        max_length: tokens of a text that are read; None: as many as the model takes.
        refused: what the description asks for beyond this, or "".
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = True
    max_length: int | None = None
    refused: str = ""

    def __post_init__(self) -> None:
        if not self.modes or not set(self.modes) <= _MODES.keys():
            raise ModelError(f"pooling: modes are {self.modes}; choose from {', '.join(_MODES)}.")


def pool(hidden: Float[Array, "B T D"], mask: jax.Array, pooling: SentencePooling) -> Float[Array, "B _"]:
    """Returns one vector a row, float32 (float64 for float64).

    Args:
        hidden: states of tokens.
        mask: `[B, T]`, nonzero where a token counts; at least one in each row.
        pooling: how they become one.

    Differentiable in hidden.
    """
    wide = hidden.astype(accumulation_dtype(hidden.dtype))
    counts = jnp.asarray(mask).astype(bool)
    weights = counts.astype(wide.dtype)
    length = jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1)  # [B, 1]
    total = jnp.einsum("bt,btd->bd", weights, wide)
    found = []
    for mode in pooling.modes:
        if mode in ("cls", "last"):
            place = jnp.argmax(counts, 1) if mode == "cls" else counts.shape[1] - 1 - jnp.argmax(counts[:, ::-1], 1)
            found.append(jnp.take_along_axis(wide, place[:, None, None], axis=1)[:, 0])
        elif mode == "max":
            found.append(jnp.max(jnp.where(counts[..., None], wide, -jnp.inf), axis=1))
        elif mode == "mean":
            found.append(total / length)
        elif mode == "mean_sqrt_len":
            found.append(total / jnp.sqrt(length))
        else:
            rising = weights * jnp.arange(1, weights.shape[1] + 1, dtype=wide.dtype)[None]
            found.append(jnp.einsum("bt,btd->bd", rising, wide) / jnp.sum(rising, axis=1, keepdims=True))
    vector = jnp.concatenate(found, axis=-1)
    if pooling.normalize:
        size = jnp.sqrt(jnp.sum(vector * vector, axis=-1, keepdims=True))
        vector = vector / jnp.maximum(size, 1e-12)
    return vector


def read_pooling(folder: Path) -> SentencePooling | None:
    """Returns the pooling that a folder's modules.json describes; None where there is no such file.

    Raises:
        ModelError, CheckpointError: a description is broken.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return None
    try:
        modules = json.loads(read_bytes(file, _MOST))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON: {error}.") from None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{file}: expected a list of modules.")
    modes: tuple[str, ...] = ()
    normalize, refused = False, []
    for module in modules:
        kind = Values(module, str(file)).text("type", "").rpartition(".")[2]
        if kind == "Pooling":
            modes = _modes(folder, Values(module, str(file)).text("path", ""))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            refused.append(kind)
    beside = folder / "sentence_bert_config.json"
    described = read_object(beside, "config", _MOST, unique=False) if beside.is_file() else {}
    given = Values(described, str(beside))
    length = None if given.get("max_seq_length") is None else given.integer("max_seq_length")
    return SentencePooling(modes or ("mean",), normalize, length, ", ".join(refused))


def _modes(folder: Path, path: str) -> tuple[str, ...]:
    parts = Path(path).parts
    if len(parts) != 1 or parts[0] in ("..", "/"):
        raise ModelError(f"{folder / 'modules.json'}: the path of Pooling is {path!r}; expected a folder beside it.")
    file = folder / path / "config.json"
    described: dict[str, Any] = read_object(file, "config", _MOST, unique=False)
    values = Values(described, str(file))
    named = values.get("pooling_mode")
    if named is not None:
        names = [named] if isinstance(named, str) else named
        renamed = {"weightedmean": "weighted_mean", "lasttoken": "last", "mean_sqrt_len_tokens": "mean_sqrt_len"}
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ModelError(f"{file}: pooling_mode is {named!r}; expected a name or a list of names.")
        return tuple(renamed.get(name, name) for name in names)
    modes = tuple(mode for mode, key in _MODES.items() if values.flag(key, False))
    if not modes:
        raise ModelError(f"{file}: no way of pooling is chosen; expected one of {', '.join(_MODES.values())}.")
    return modes
