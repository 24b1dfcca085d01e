"""Writing config.json: what most families call the same, and rotary positions. The inverse of `fields`.

    read(values) -> fields of a DecoderConfig          describe(config) -> entries of config.json

What a family's classes take for granted and our configuration leaves open (a window that null does not turn off, the
layers that have it) is always written out, so that the file means the same to whoever reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from trustcore.errors import ModelError
from trustcore.models.config import DecoderConfig
from trustcore.ops.rope import RopeConfig

# What files of Llama 3.1 and later say, whose GGUF files hold the frequencies' divisors in place of it.
_LLAMA3 = {"low_frequency": 1.0, "high_frequency": 4.0, "original_context": 8192}


def sizes(config: DecoderConfig) -> dict[str, Any]:
    """Returns the sizes of a model under the names that Llama's config.json gave them, and the activation's name."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.features,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "hidden_act": activation(config),
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied,
    }


def described(config: DecoderConfig, *, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """Returns what `common` reads, but for the window; `eps` is the key of the norms' epsilon."""
    return {
        **sizes(config),
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        eps: config.norm_eps,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        **positions(config),
    }


def activation(config: DecoderConfig) -> str:
    """Returns the name that config.json has for the activation."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation)


def window(config: DecoderConfig) -> dict[str, Any]:
    """Returns `sliding_window`, and `layer_types` where not all layers have it."""
    entries: dict[str, Any] = {"sliding_window": config.window}
    if config.window is not None and config.windowed is not None:
        entries["layer_types"] = [("full", "sliding")[holds] + "_attention" for holds in config.windowed]
    return entries


def positions(config: DecoderConfig) -> dict[str, Any]:
    """Returns the entries of rotary positions, none where there are none.

    Raises:
        ModelError: config.json has no words for them.
    """
    rope = config.rope
    if rope is None:
        return {}
    entries: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": scaling(rope, config.context)}
    if rope.size != config.head_dim:
        entries["partial_rotary_factor"] = rope.size / config.head_dim
    if rope.scaling == "longrope":
        entries["original_max_position_embeddings"] = rope.original_context
    return entries


def scaling(rope: RopeConfig, context: int) -> dict[str, Any] | None:
    """Returns `rope_scaling` of a model for `context` tokens; divisors that are Llama 3's are told as such.

    Raises:
        ModelError: config.json has no words for it.
    """
    if rope.divisors and rope.scaling != "longrope":
        guess = RopeConfig(rope.size, theta=rope.theta, scaling="llama3", factor=max(rope.divisors), **_LLAMA3)
        if rope.scaling != "none" or not np.allclose(guess.frequencies(), rope.frequencies(), rtol=1e-4):
            raise ModelError("config.json has no place for divisors of rotary frequencies other than Llama 3's.")
        rope = guess
    if rope.scaling == "none":
        return None
    if rope.scaling == "longrope":
        return {
            "rope_type": "longrope",
            "type": "longrope",
            "short_factor": list(rope.divisors),
            "long_factor": list(rope.long_divisors),
            **_long_magnitude(rope, context),
        }
    entries: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling != "linear":
        entries["original_max_position_embeddings"] = rope.original_context
    if rope.scaling == "yarn":
        entries |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        entries |= {} if rope.attention_factor is None else {"attention_factor": rope.attention_factor}
        entries |= {} if rope.truncate else {"truncate": False}
    if rope.scaling == "llama3":
        entries |= {"low_freq_factor": rope.low_frequency, "high_freq_factor": rope.high_frequency}
    return entries


def _long_magnitude(rope: RopeConfig, context: int) -> Mapping[str, Any]:
    """The factor of cosine and sine, where it is not the one that readers compute."""
    original = rope.original_context or context
    factor = context / original
    own = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return {} if math.isclose(own, rope.magnitude, rel_tol=1e-6) else {"attention_factor": rope.magnitude}
