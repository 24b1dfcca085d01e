"""Gemma: embeddings scaled by sqrt(D), norms that multiply by 1 + what is stored, GeGLU.

Gemma 2 adds norms behind the products, soft caps and a window in every other layer; Gemma 3 norms of queries and keys
in place of the caps, and rotary positions of their own in the layers with a window. arXiv 2403.08295, 2408.00118,
2503.19786.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trustcore.errors import ModelError
from trustcore.models.config import DecoderConfig
from trustcore.models.families.described import activation, described, scaling, window
from trustcore.models.families.family import Family
from trustcore.models.families.fields import ACTIVATIONS, common, rope_of, window_of
from trustcore.models.families.gguf import gguf
from trustcore.models.families.llama import MLP, OUT, QKV, llama_names
from trustcore.models.name_map import plain, shifted
from trustcore.models.values import Values

_BODY = (plain("embedding.table", "embed_tokens.weight"), shifted("norm.weight", "norm.weight"))
_NORMS = (
    shifted("attention_norm.weight", "input_layernorm.weight"),
    shifted("mlp_norm.weight", "post_attention_layernorm.weight"),
)
_FOUR_NORMS = (
    shifted("attention_norm.weight", "input_layernorm.weight"),
    shifted("attention_post_norm.weight", "post_attention_layernorm.weight"),
    shifted("mlp_norm.weight", "pre_feedforward_layernorm.weight"),
    shifted("mlp_post_norm.weight", "post_feedforward_layernorm.weight"),
)
_QK_NORM = (
    shifted("attention.query_norm.weight", "self_attn.q_norm.weight"),
    shifted("attention.key_norm.weight", "self_attn.k_norm.weight"),
)


def _read(values: Values, **options: Any) -> dict[str, Any]:
    """What all three have. `hidden_activation` is what counts where both keys are there."""
    fields = common(values.with_defaults(head_dim=256, max_position_embeddings=8192), tied=True, **options)
    activation = values.get("hidden_activation") or values.get("hidden_act") or "gelu_pytorch_tanh"
    activation = "gelu_pytorch_tanh" if activation == "gelu" else activation  # Gemma 1's files, which meant it
    chosen = Values({"hidden_activation": activation}, "config.json").choice("hidden_activation", None, ACTIVATIONS)
    return {**fields, "activation": chosen, "embedding_scale": math.sqrt(fields["features"])}


def _read_gemma(values: Values) -> Mapping[str, Any]:
    return _read(values)


def _read_gemma2(values: Values) -> Mapping[str, Any]:
    values = values.with_defaults(sliding_window=4096)
    fields = _read(values)
    return {
        **fields,
        **window_of(values, fields["layers"], lambda i: i % 2 == 0),
        "norm_place": "both",
        "attention_scale": values.number("query_pre_attn_scalar", 256.0) ** -0.5,
        "score_cap": _cap(values, "attn_logit_softcapping", 50.0),
        "logit_cap": _cap(values, "final_logit_softcapping", 30.0),
    }


def _read_gemma3(values: Values) -> Mapping[str, Any]:
    defaults = {"max_position_embeddings": 131072, "vocab_size": 262208, "head_dim": 256, "sliding_window": 4096}
    values = values.with_defaults(**defaults)
    given = values.get("rope_parameters")
    if isinstance(given, Mapping) and "full_attention" in given:
        wide, near = given["full_attention"], given.get("sliding_attention") or {}
    else:
        wide, near = values.get("rope_scaling") or {}, {"rope_theta": values.number("rope_local_base_freq", 1e4)}
    options = {"given": wide, "theta": 1e6}
    fields = _read(values, rope=options)
    every = values.integer("sliding_window_pattern", values.integer("_sliding_window_pattern", 6))
    return {
        **fields,
        **window_of(values, fields["layers"], lambda i: (i + 1) % every != 0),
        "window_rope": rope_of(values, fields["head_dim"], fields["context"], given=near),
        "norm_place": "both",
        "qk_norm": "head",
        "attention_scale": values.number("query_pre_attn_scalar", 256.0) ** -0.5,
        "score_cap": _cap(values, "attn_logit_softcapping", 0.0),
        "logit_cap": _cap(values, "final_logit_softcapping", 0.0),
    }


def _cap(values: Values, key: str, default: float) -> float | None:
    """A soft cap; null and, in files of later models, zero stand for none."""
    if key in values and values.get(key) is None:
        return None
    return values.number(key, default) or None


def _describe(config: DecoderConfig) -> dict[str, Any]:
    return {**described(config), "hidden_activation": activation(config)}


def _describe_gemma2(config: DecoderConfig) -> dict[str, Any]:
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    queries = scale**-2
    whole = math.isclose(queries, round(queries), rel_tol=1e-6)
    return {
        **_describe(config),
        **window(config),
        "query_pre_attn_scalar": round(queries) if whole else queries,
        "attn_logit_softcapping": config.score_cap,
        "final_logit_softcapping": config.logit_cap,
    }


def _describe_gemma3(config: DecoderConfig) -> dict[str, Any]:
    near = config.window_rope
    if near is not None and scaling(near, config.context) is not None:
        raise ModelError("config.json of gemma3_text knows no scaled positions in layers with a window.")
    return {**_describe_gemma2(config), **({} if near is None else {"rope_local_base_freq": near.theta})}


FAMILIES = (
    Family(
        "gemma",
        "Gemma 1",
        "GemmaForCausalLM",
        _read_gemma,
        _describe,
        llama_names((*_NORMS, *QKV, *OUT, *MLP), body=_BODY),
        gguf=gguf("gemma"),
    ),
    Family(
        "gemma2",
        "Gemma 2",
        "Gemma2ForCausalLM",
        _read_gemma2,
        _describe_gemma2,
        llama_names((*_FOUR_NORMS, *QKV, *OUT, *MLP), body=_BODY),
        gguf=gguf("gemma2"),
    ),
    Family(
        "gemma3_text",
        "Gemma 3 (text)",
        "Gemma3ForCausalLM",
        _read_gemma3,
        _describe_gemma3,
        llama_names((*_FOUR_NORMS, *QKV, *OUT, *MLP, *_QK_NORM), body=_BODY),
        gguf=gguf("gemma3"),
    ),
)
