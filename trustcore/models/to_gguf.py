"""The other direction: a decoder of Hugging Face's layout as GGUF files describe and store it.

    config -> metadata;   tensor of the checkpoint -> GGUF name, and the order in which its rows are written

GGUF files of the Llama family hold the rows of queries and keys for interleaved rotary pairs, Hugging Face's for halves
(`trustcore.ops.rope`): within each head, row `2 i + j` of the one is row `j R / 2 + i` of the other, where R channels
turn. Rows are only moved, so blocks along them stay what they were.
"""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

import numpy as np

from trustcore.errors import ModelError
from trustcore.models.config import FAMILIES, DecoderConfig
from trustcore.models.names import NOT_WEIGHTS, decoder_names
from trustcore.ops.rope import RopeConfig
from trustcore.weights import Checkpoint, LazyArray


class Placed(NamedTuple):
    """A tensor of a checkpoint under its GGUF name; `rows` says which row is written where, None: as they lie."""

    tensor: LazyArray
    rows: np.ndarray | None


def gguf_metadata(config: DecoderConfig) -> dict[str, Any]:
    """Returns the key-values that say what a decoder is made of; the tokenizer's are not among them.

    Raises:
        ModelError: GGUF has no words for how positions are scaled.
    """
    arch = _architecture(config)
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
        f"{arch}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{arch}.rope.dimension_count": config.rope.size,
        f"{arch}.rope.freq_base": config.rope.theta,
    }
    if config.head_dim * config.heads != config.features:
        values[f"{arch}.attention.key_length"] = values[f"{arch}.attention.value_length"] = config.head_dim
    if config.window is not None:
        values[f"{arch}.attention.sliding_window"] = config.window
    rope = config.rope
    if rope.scaling in ("linear", "yarn"):
        values[f"{arch}.rope.scaling.type"] = rope.scaling
        values[f"{arch}.rope.scaling.factor"] = rope.factor
    if rope.scaling == "yarn":
        values[f"{arch}.rope.scaling.original_context_length"] = rope.original_context
        values[f"{arch}.rope.scaling.yarn_beta_fast"] = rope.beta_fast
        values[f"{arch}.rope.scaling.yarn_beta_slow"] = rope.beta_slow
        own = RopeConfig(rope.size, scaling="yarn", factor=rope.factor, original_context=1).magnitude
        if rope.magnitude != own:
            values[f"{arch}.rope.scaling.attn_factor"] = rope.magnitude / own
    elif rope.scaling == "dynamic":
        raise ModelError(
            "GGUF files cannot say that rotary positions are scaled dynamically. Set rope_scaling in config.json to "
            'null, or to {"rope_type": "linear", "factor": ...}, and check what that does to long texts.'
        )
    return values


def gguf_divisors(config: DecoderConfig) -> np.ndarray | None:
    """Returns the contents of `rope_freqs.weight`, float32 `[R / 2]`, which Llama 3's scaling is stored as; or None."""
    if config.rope.scaling != "llama3":
        return None
    plain = RopeConfig(config.rope.size, theta=config.rope.theta).frequencies()
    return (plain / config.rope.frequencies()).astype(np.float32)


def gguf_tensors(config: DecoderConfig, checkpoint: Checkpoint) -> dict[str, Placed]:
    """Returns the tensors of a checkpoint of Hugging Face's layout under their GGUF names.

    Raises:
        ModelError: tensors are missing, unexpected or of the wrong shape: all of them in one message.
    """
    family = FAMILIES[config.family]
    interleaved = family.gguf_interleaved or not family.gguf  # a family without a GGUF name of its own goes as llama
    shapes = _shapes(config)
    placed, faults, used = {}, [], set()
    for name in decoder_names(config.layers):
        expected = shapes.get(_kind(name.path))
        if expected is None:
            continue
        tensor = checkpoint.get(name.hugging_face)
        if tensor is None:
            near = difflib.get_close_matches(name.hugging_face, list(checkpoint), n=1)
            faults.append(f"{name.hugging_face} is missing" + (f" (nearest: {near[0]})" if near else ""))
            continue
        used.add(name.hugging_face)
        if tuple(tensor.shape) != expected:
            faults.append(f"{name.hugging_face} has shape {list(tensor.shape)}, expected {list(expected)}")
        rows = None
        if interleaved and ".attention.query." in name.path:
            rows = interleaved_rows(config.heads, config.head_dim, config.rope.size)
        elif interleaved and ".attention.key." in name.path:
            rows = interleaved_rows(config.kv_heads, config.head_dim, config.rope.size)
        placed[name.gguf] = Placed(tensor, rows)
    twice = {"lm_head.weight"} if config.tied else set()
    faults += [
        f"{name} is unexpected"
        for name in checkpoint
        if name not in used and name not in twice and not name.endswith(NOT_WEIGHTS)
    ]
    if faults:
        shown = "; ".join(faults[:20]) + (f"; and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise ModelError(f"{checkpoint.path}: the tensors do not fit a {config.family} model: {shown}.")
    return placed


def interleaved_rows(heads: int, head_dim: int, turned: int) -> np.ndarray:
    """Returns int `[heads * head_dim]`: which row of halves stands where in rows of interleaved pairs."""
    head = np.arange(head_dim)
    head[:turned] = head[:turned].reshape(2, -1).T.reshape(-1)
    return (np.arange(heads)[:, None] * head_dim + head).reshape(-1)


def _architecture(config: DecoderConfig) -> str:
    family = FAMILIES[config.family]
    return family.name if family.gguf else "llama"


def _kind(path: str) -> str:
    return path.split(".", 2)[2] if path.startswith("blocks.") else path


def _shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shapes in files, by the path within a block or a model; what the model does not have is not there."""
    c = config
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.table": (c.vocab_size, c.features),
        "norm.weight": (c.features,),
        "attention_norm.weight": (c.features,),
        "attention.query.kernel": (queries, c.features),
        "attention.key.kernel": (keys, c.features),
        "attention.value.kernel": (keys, c.features),
        "attention.out.kernel": (c.features, queries),
        "mlp_norm.weight": (c.features,),
        "mlp.gate.kernel": (c.hidden, c.features),
        "mlp.up.kernel": (c.hidden, c.features),
        "mlp.down.kernel": (c.features, c.hidden),
    }
    if not c.tied:
        shapes["output.kernel"] = (c.vocab_size, c.features)
    if c.qkv_bias:
        shapes |= {f"attention.{n}.bias": (keys,) for n in ("key", "value")} | {"attention.query.bias": (queries,)}
    if c.out_bias:
        shapes["attention.out.bias"] = (c.features,)
    if c.mlp_bias:
        shapes |= {"mlp.gate.bias": (c.hidden,), "mlp.up.bias": (c.hidden,), "mlp.down.bias": (c.features,)}
    return shapes
