"""A decoder as Hugging Face's files have it: config.json, and the order of the rows of its weights.

Those files pair rotary channels by halves. A model that pairs them interleaved (as GGUF files of the Llama family do)
is the same function with the outputs of its query and key products in another order; `half_order` is that order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from trustcore.errors import ModelError
from trustcore.models.config import DecoderConfig
from trustcore.models.families import FAMILIES
from trustcore.ops.rope import RopeConfig

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def hugging_face_config(config: Any, tokens: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Returns the `config.json` of a decoder, which `DecoderConfig.from_hugging_face` reads back.

    Args:
        config: of the model.
        tokens: which tokens begin, end and fill up texts, by the keys `TOKENS`; those not named are null, as the
            families' own defaults are tokens of vocabularies that the model need not have.

    Raises:
        ModelError: such a file cannot say all of it.
    """
    if config.family not in FAMILIES:
        raise ModelError(
            f"config.json is written for decoders; a {config.family} model is saved with the one that it was made of, "
            "as long as that describes it."
        )
    if config.family == "llama" and config.window is not None:  # GGUF files call both "llama"
        config = dataclasses.replace(config, family="mistral")
    family = FAMILIES[config.family]
    described = {
        "architectures": [family.architecture],
        "model_type": config.family,
        **family.describe(config),
        **dict.fromkeys(TOKENS),
        **(tokens or {}),
    }
    back = DecoderConfig.from_hugging_face(described)
    ropes = {"rope": config.rope, "window_rope": config.window_rope}
    same = dataclasses.replace(back, attention_scale=config.attention_scale, **ropes) == config
    if not (same and all(_alike(getattr(back, name), rope) for name, rope in ropes.items()) and _scaled(back, config)):
        wrong = [field for field, value in vars(config).items() if getattr(back, field) != value]
        raise ModelError(
            f"config.json of {config.family} cannot say all of {config} ({', '.join(wrong)}); the model stays in the "
            "file that it came from."
        )
    return described


def _alike(found: RopeConfig | None, wanted: RopeConfig | None) -> bool:
    """Whether two ropes are the same function, to what numbers in files keep; which pairing is not told there."""
    if found is None or wanted is None:
        return found is wanted
    return (
        found.size == wanted.size
        and math.isclose(found.magnitude, wanted.magnitude, rel_tol=1e-6)
        and all(
            np.allclose(found.frequencies(context), wanted.frequencies(context), rtol=1e-4)
            for context in (None, 1 << 30)
        )
    )


def _scaled(found: DecoderConfig, wanted: DecoderConfig) -> bool:
    scales = (c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale for c in (found, wanted))
    return math.isclose(*scales, rel_tol=1e-6)


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
