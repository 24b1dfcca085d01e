"""The other direction: a decoder of Hugging Face's layout as GGUF files describe and store it.

    config -> metadata;   tensors of the checkpoint -> GGUF name, and how its rows come about

GGUF files of the Llama family hold the rows of queries and keys for interleaved rotary pairs, Hugging Face's for halves
(`trustcore.ops.rope`): within each head, row `2 i + j` of the one is row `j R / 2 + i` of the other, where R channels
turn. Rows are only moved, so blocks along them stay what they were. Where the two kinds of files fuse, transpose or
shift differently, a tensor is computed when it is asked for (`Computed`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from trustcore.errors import ModelError
from trustcore.models.config import DecoderConfig
from trustcore.models.decoder import Decoder
from trustcore.models.families import FAMILIES, Gguf, gguf_of
from trustcore.models.matching import Matching
from trustcore.models.model import parameters_of
from trustcore.models.name_map import Rule
from trustcore.models.registry import DECODERS
from trustcore.ops.rope import RopeConfig
from trustcore.weights import Checkpoint, LazyArray


class Computed:
    """A tensor that is made of others when its numbers are asked for, and held until it is released.

    Attributes:
        shape: of the tensor.
        encoding: "f32".
        nbytes: of what it is made of, on disk.
    """

    encoding = "f32"

    def __init__(self, shape: tuple[int, ...], sources: tuple[LazyArray, ...], make: Callable[[], np.ndarray]):
        self.shape, self._sources, self._make = shape, sources, make
        self.nbytes = sum(source.nbytes for source in sources)
        self._held: np.ndarray | None = None

    def numpy(self) -> np.ndarray:
        """Returns the numbers, float32."""
        if self._held is None:
            self._held = self._make()
        return self._held

    def release(self) -> None:
        """Lets go of the numbers and of the pages they came from."""
        self._held = None
        for source in self._sources:
            source.release()


class Placed(NamedTuple):
    """A tensor of a checkpoint under its GGUF name; `rows` says which row is written where, None: as they lie."""

    tensor: LazyArray | Computed
    rows: np.ndarray | None


def gguf_metadata(config: DecoderConfig) -> dict[str, Any]:
    """Returns the key-values that say what a decoder is made of; the tokenizer's are not among them.

    Raises:
        ModelError: GGUF has no words for how positions are scaled.
    """
    file = gguf_of(config)
    arch = file.name
    values: dict[str, Any] = {
        "general.architecture": arch,
        "general.type": "model",
        f"{arch}.vocab_size": config.vocab_size,
        f"{arch}.context_length": config.context,
        f"{arch}.embedding_length": config.features,
        f"{arch}.block_count": config.layers,
        f"{arch}.feed_forward_length": config.hidden,
        f"{arch}.attention.head_count": config.heads,
        f"{arch}.attention.head_count_kv": config.kv_heads,
        f"{arch}.attention.layer_norm{'_rms' if config.norm == 'rms' else ''}_epsilon": config.norm_eps,
    }
    if config.head_dim * config.heads != config.features:
        values[f"{arch}.attention.key_length"] = values[f"{arch}.attention.value_length"] = config.head_dim
    if config.window is not None:
        values[f"{arch}.attention.sliding_window"] = config.window
    if config.rope is not None:
        values |= {f"{arch}.rope.{key}": value for key, value in _rope(config.rope, file).items()}
    return {**values, **{f"{arch}.{key}": value for key, value in file.write(config).items()}}


def _rope(rope: RopeConfig, file: Gguf) -> dict[str, Any]:
    values: dict[str, Any] = {"dimension_count": rope.size, "freq_base": rope.theta}
    if rope.scaling in ("linear", "yarn"):
        values |= {"scaling.type": rope.scaling, "scaling.factor": rope.factor}
    if rope.scaling == "yarn":
        values["scaling.original_context_length"] = rope.original_context
        values |= {"scaling.yarn_beta_fast": rope.beta_fast, "scaling.yarn_beta_slow": rope.beta_slow}
        own = RopeConfig(rope.size, scaling="yarn", factor=rope.factor, original_context=1).magnitude
        if rope.magnitude != own:
            values["scaling.attn_factor"] = rope.magnitude / own
        if rope.truncate != file.whole_pairs:
            where = "at whole pairs (truncate: true)" if rope.truncate else "between pairs (truncate: false)"
            raise ModelError(f"GGUF files of {file.name} cannot say that YaRN's ramp begins and ends {where}.")
    elif rope.scaling == "longrope":
        values |= {"scaling.original_context_length": rope.original_context, "scaling.attn_factor": rope.magnitude}
    elif rope.scaling == "dynamic":
        raise ModelError(
            "GGUF files cannot say that rotary positions are scaled dynamically. Set rope_scaling in config.json to "
            'null, or to {"rope_type": "linear", "factor": ...}, and check what that does to long texts.'
        )
    return values


def gguf_divisors(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Returns the tensors, float32 `[R / 2]`, that hold what Llama 3 and LongRoPE divide frequencies by, by name."""
    rope = config.rope
    if rope is None:
        return {}
    if rope.scaling == "llama3":
        plain = RopeConfig(rope.size, theta=rope.theta).frequencies()
        return {"rope_freqs.weight": (plain / rope.frequencies()).astype(np.float32)}
    if rope.scaling == "longrope":
        return {
            "rope_factors_long.weight": np.array(rope.long_divisors, np.float32),
            "rope_factors_short.weight": np.array(rope.divisors, np.float32),
        }
    return {}


def gguf_tensors(config: DecoderConfig, checkpoint: Checkpoint) -> dict[str, Placed]:
    """Returns the tensors of a checkpoint of Hugging Face's layout under their GGUF names.

    Raises:
        ModelError: tensors are missing, unexpected or of the wrong shape: all of them in one message.
    """
    file = gguf_of(config)
    shapes = {path: tuple(leaf.get_value().shape) for path, leaf in parameters_of(Decoder(config)).items()}
    ours = [rule for rule in file.names.rules(config) if rule.paths[0] in shapes]
    homeless = set(shapes) - {path for rule in ours for path in rule.paths}
    if homeless:
        raise ModelError(f"GGUF files of {file.name} have no place for {', '.join(sorted(homeless)[:5])}.")
    theirs = [match.rule for match in Matching(DECODERS.names(config), config, shapes, checkpoint).matches]
    by_path = {path: rule for rule in theirs for path in rule.paths}
    return {rule.stored: _placed(rule, by_path, config, checkpoint, shapes) for rule in ours}


def _placed(
    rule: Rule, by_path: dict[str, Rule], config: DecoderConfig, checkpoint: Checkpoint, shapes: dict[str, Any]
) -> Placed:
    there = by_path[rule.paths[0]]
    rows = None
    if gguf_of(config).interleaved and not FAMILIES[config.family].interleaved and config.rope is not None:
        heads = {"attention.query.": config.heads, "attention.key.": config.kv_heads}
        count = next((n for part, n in heads.items() if part in rule.paths[0]), None)
        rows = None if count is None else interleaved_rows(count, config.head_dim, config.rope.size)
    if dataclasses.replace(there, stored=rule.stored) == rule:
        return Placed(checkpoint[there.stored], rows)
    rules = list(dict.fromkeys(by_path[path] for path in rule.paths))
    sources = tuple(checkpoint[name] for other in rules for name in other.names)

    def make() -> np.ndarray:
        found: dict[str, np.ndarray] = {}
        for other in rules:
            arrays = [checkpoint[name].numpy().astype(np.float32) for name in other.names]
            found |= dict(zip(other.paths, other.split(arrays, [shapes[p] for p in other.paths]), strict=True))
        return np.ascontiguousarray(rule.join([found[path] for path in rule.paths])[0])

    return Placed(Computed(rule.shape([shapes[path] for path in rule.paths]), sources, make), rows)


def interleaved_rows(heads: int, head_dim: int, turned: int) -> np.ndarray:
    """Returns int `[heads * head_dim]`: which row of halves stands where in rows of interleaved pairs."""
    head = np.arange(head_dim)
    head[:turned] = head[:turned].reshape(2, -1).T.reshape(-1)
    return (np.arange(heads)[:, None] * head_dim + head).reshape(-1)
