"""A decoder as Hugging Face's files have it: config.json, the names and the order of its weights.

Those files pair rotary channels by halves. A model that pairs them interleaved (as GGUF files of the Llama family do)
is the same function with the outputs of its query and key products in another order; `half_order` is that order.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from trustcore.errors import ModelError
from trustcore.models.config import DecoderConfig
from trustcore.models.families import FAMILIES
from trustcore.ops.rope import RopeConfig

# What files of Llama 3.1 and later say, whose GGUF files hold the frequencies' divisors in place of it.
_LLAMA3 = {"low_frequency": 1.0, "high_frequency": 4.0, "original_context": 8192}


def hugging_face_config(config: Any) -> dict[str, Any]:
    """Returns the `config.json` of a decoder, which `DecoderConfig.from_hugging_face` reads back.

    Raises:
        ModelError: the family, or its rotary positions, have no place in such a file.
    """
    family, rope = FAMILIES.get(config.family), getattr(config, "rope", None)
    if family is None or family.describe is None or rope is None:
        known = ", ".join(f.name for f in FAMILIES.values() if f.describe is not None)
        raise ModelError(
            f"config.json is written for {known}; a {config.family} model is "
            "saved with the one that it was made of, as long as that describes it."
        )
    described: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.features,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "hidden_act": config.activation,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": _scaling(rope),
        "tie_word_embeddings": config.tied,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "sliding_window": config.window,
        "use_sliding_window": config.window is not None,
        **family.describe(config),
    }
    if rope.size != config.head_dim:
        described["partial_rotary_factor"] = rope.size / config.head_dim
    back = DecoderConfig.from_hugging_face(described)
    assert back.rope is not None
    same = back.rope.size == rope.size and np.allclose(back.rope.frequencies(), rope.frequencies(), rtol=1e-4)
    if not same or back.rope.magnitude != rope.magnitude or dataclasses.replace(back, rope=rope) != config:
        raise ModelError(f"config.json cannot say all of {config}; the model stays in the file that it came from.")
    return described


def _scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """`rope_scaling`; divisors that are Llama 3's are told as such."""
    if rope.divisors:
        guess = RopeConfig(rope.size, theta=rope.theta, scaling="llama3", factor=max(rope.divisors), **_LLAMA3)
        if rope.scaling != "none" or not np.allclose(guess.frequencies(), rope.frequencies(), rtol=1e-4):
            raise ModelError("config.json has no place for divisors of rotary frequencies other than Llama 3's.")
        rope = guess
    if rope.scaling == "none":
        return None
    described: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling != "linear":
        described["original_max_position_embeddings"] = rope.original_context
    if rope.scaling == "yarn":
        described |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "attention_factor": rope.magnitude}
    if rope.scaling == "llama3":
        described |= {"low_freq_factor": rope.low_frequency, "high_freq_factor": rope.high_frequency}
    return described


def half_order(config: Any, path: str) -> np.ndarray | None:
    """Returns which output of a product each output of it in the file is; None: the same."""
    if not isinstance(config, DecoderConfig) or config.rope is None:
        return None
    turned = {"query": config.heads, "key": config.kv_heads}
    heads = next((count for name, count in turned.items() if f".attention.{name}." in path), 0)
    if config.rope.interleaved == FAMILIES[config.family].interleaved or not heads:
        return None
    size, width = config.rope.size, config.head_dim
    head = np.concatenate((np.arange(0, size, 2), np.arange(1, size, 2), np.arange(size, width)))
    return (np.arange(heads)[:, None] * width + head).reshape(-1)
