"""Families with Llama's shape and names: RMS norms before the products, rotary positions, a gated feed-forward.

Llama, Mistral, Qwen2, Qwen3, SmolLM3, Granite, OLMo 2 (norms behind the products), Phi-3 (fused matrices),
StableLM and Cohere (layer norms, parallel blocks)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from trustcore.models.config import DecoderConfig
from trustcore.models.families.described import described, window
from trustcore.models.families.family import Family
from trustcore.models.families.fields import SCALINGS, common, positioned_of, window_of
from trustcore.models.families.gguf import gguf
from trustcore.models.families.gguf_layer_norm import COMMAND_R, STABLELM
from trustcore.models.name_map import Rule, fused, kernel, linear, norm, plain, stacked
from trustcore.models.names import Names, under
from trustcore.models.values import Values

QKV = (
    *linear("attention.query", "self_attn.q_proj"),
    *linear("attention.key", "self_attn.k_proj"),
    *linear("attention.value", "self_attn.v_proj"),
)
OUT = linear("attention.out", "self_attn.o_proj")
MLP = (
    *linear("mlp.gate", "mlp.gate_proj"),
    *linear("mlp.up", "mlp.up_proj"),
    *linear("mlp.down", "mlp.down_proj"),
)
QK_NORM = (
    plain("attention.query_norm.weight", "self_attn.q_norm.weight"),
    plain("attention.key_norm.weight", "self_attn.k_norm.weight"),
)
OUTPUT = (dataclasses.replace(kernel("output.kernel", "lm_head.weight"), others=("language_model.lm_head.weight",)),)
# What is computed, and what models that see have besides their text model.
SEEING = ("vision_model.*", "vision_tower.*", "multi_modal_projector.*")
NOT_WEIGHTS = ("*.rotary_emb.inv_freq", *SEEING, *(f"model.{name}" for name in SEEING))
NORMS = (*norm("attention_norm", "input_layernorm"), *norm("mlp_norm", "post_attention_layernorm"))


def llama_names(layer: Iterable[Rule], *, body: tuple[Rule, ...] | None = None) -> Names:
    """Returns names below `model.` and `model.layers.{}.`, as most of Hugging Face's decoders have them."""
    return Names(
        (plain("embedding.table", "embed_tokens.weight"), *norm("norm", "norm")) if body is None else body,
        under("blocks.{}.", "layers.{}.", layer),
        OUTPUT,
        prefix="model.",
        prefixes=("model.language_model.", "language_model.model.", "model.text_model.", ""),
        ignored=NOT_WEIGHTS,
    )


LLAMA = llama_names((*NORMS, *QKV, *OUT, *MLP))


def read_llama(values: Values) -> Mapping[str, Any]:
    """Returns the fields of Llama, Mistral and others that add nothing."""
    fields = common(values)
    return {**fields, **window_of(values, fields["layers"])}


def _read_qwen(values: Values) -> dict[str, Any]:
    """Qwen's window is used when asked for, in the layers from `max_window_layers` on."""
    fields = common(values)
    first = values.integer("max_window_layers", 0, least=0)
    window = window_of(values, fields["layers"], lambda i: i >= first)
    return {**fields, **(window if values.flag("use_sliding_window", False) else {"window": None})}


def read_qwen2(values: Values) -> dict[str, Any]:
    """Returns the fields of Qwen2, whose queries, keys and values always have a bias."""
    return {**_read_qwen(values), "qkv_bias": True, "out_bias": False}


def read_qwen3(values: Values) -> dict[str, Any]:
    """Returns the fields of Qwen3, which normalizes queries and keys head by head."""
    return {**_read_qwen(values), "qk_norm": "head"}


def _read_smollm3(values: Values) -> Mapping[str, Any]:
    fields = _read_qwen(values)
    tied = values.flag("tie_word_embeddings", True)
    return {**fields, "positioned": positioned_of(values, fields["layers"]), "tied": tied}


def _read_granite(values: Values) -> Mapping[str, Any]:
    return {
        **common(values),
        "embedding_scale": values.number("embedding_multiplier", 1.0),
        "residual_scale": values.number("residual_multiplier", 1.0),
        "attention_scale": values.number("attention_multiplier", 1.0),
        "logit_scale": 1.0 / (values.number("logits_scaling", 1.0) or 1.0),
    }


def _read_olmo2(values: Values) -> Mapping[str, Any]:
    return {**common(values, default_eps=1e-5), "norm_place": "after", "qk_norm": "whole"}


def _read_phi3(values: Values) -> Mapping[str, Any]:
    given = values.get("rope_parameters", values.get("rope_scaling")) or {}
    if isinstance(given, Mapping) and given.get("type") == "su":  # what Phi-3 first called it
        given = {**given, "type": "longrope"}
    fields = common(values, default_eps=1e-5, rope={"given": given, "kinds": (*SCALINGS, "longrope")})
    return {**fields, **window_of(values, fields["layers"])}


def _read_stablelm(values: Values) -> Mapping[str, Any]:
    fields = common(values, eps="layer_norm_eps", default_eps=1e-5, rope={"partial": 0.25})
    parallel = values.flag("use_parallel_residual", False)
    return {
        **fields,
        "norm": "layer",
        "norm_bias": True,
        "qkv_bias": values.flag("use_qkv_bias", False),
        "out_bias": False,
        "qk_norm": "each" if values.flag("qk_layernorm", False) else None,
        "parallel": parallel,
        "shared_norm": parallel,
    }


def _read_cohere(values: Values) -> Mapping[str, Any]:
    return {
        **common(values, tied=True, eps="layer_norm_eps", default_eps=1e-5, rope={"interleaved": True}),
        "norm": "layer",
        "parallel": True,
        "shared_norm": True,
        "qk_norm": "each" if values.flag("use_qk_norm", False) else None,
        "logit_scale": values.number("logit_scale", 0.0625),
    }


def _describe_llama(config: DecoderConfig) -> Mapping[str, Any]:
    return {**described(config), **({} if config.window is None else window(config))}


def _describe_mistral(config: DecoderConfig) -> Mapping[str, Any]:
    return {**described(config), **window(config)}


def describe_qwen(config: DecoderConfig) -> dict[str, Any]:
    """Returns the entries of Qwen's decoders; older readers take the layers with a window from a number."""
    windowed = config.windowed or (True,) * config.layers
    first = windowed.index(True) if config.window is not None else config.layers
    return {
        **described(config),
        **window(config),
        "use_sliding_window": config.window is not None,
        "max_window_layers": first,
    }


def _describe_smollm3(config: DecoderConfig) -> Mapping[str, Any]:
    positioned = config.positioned or (True,) * config.layers
    return {**describe_qwen(config), "no_rope_layers": [int(x) for x in positioned]}


def _describe_granite(config: DecoderConfig) -> Mapping[str, Any]:
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return {
        **described(config),
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": scale,
        "logits_scaling": 1.0 / config.logit_scale,
    }


def _describe_phi3(config: DecoderConfig) -> Mapping[str, Any]:
    return {**described(config), **window(config)}


def _describe_stablelm(config: DecoderConfig) -> Mapping[str, Any]:
    rope = config.rope
    return {
        **described(config, eps="layer_norm_eps"),
        "partial_rotary_factor": 1.0 if rope is None else rope.size / config.head_dim,
        "use_qkv_bias": config.qkv_bias,
        "qk_layernorm": config.qk_norm is not None,
        "use_parallel_residual": config.parallel,
    }


def _describe_cohere(config: DecoderConfig) -> Mapping[str, Any]:
    return {
        **described(config, eps="layer_norm_eps"),
        "use_qk_norm": config.qk_norm is not None,
        "logit_scale": config.logit_scale,
    }


OLMO2 = (
    plain("attention_post_norm.weight", "post_attention_layernorm.weight"),
    plain("mlp_post_norm.weight", "post_feedforward_layernorm.weight"),
)
QKV_FUSED = fused([f"attention.{part}.kernel" for part in ("query", "key", "value")], "self_attn.qkv_proj.weight")
GATE_UP_FUSED = fused(["mlp.gate.kernel", "mlp.up.kernel"], "mlp.gate_up_proj.weight")
STABLELM_NORMS = tuple(
    stacked(f"attention.{part}_norm.weight", f"self_attn.{name}_layernorm.norms.{{e}}.weight", heads)
    for part, name, heads in (("query", "q", "heads"), ("key", "k", "kv_heads"))
)

FAMILIES = (
    Family(
        "llama",
        "Llama 2, 3, 3.1, 3.2; SmolLM, SmolLM2; TinyLlama",
        "LlamaForCausalLM",
        read_llama,
        _describe_llama,
        LLAMA,
        gguf=gguf("llama", interleaved=True),
    ),
    Family(
        "mistral",
        "Mistral",
        "MistralForCausalLM",
        read_llama,
        _describe_mistral,
        LLAMA,
        gguf=gguf("llama", interleaved=True, own=False),
    ),
    Family(
        "qwen2",
        "Qwen2, Qwen2.5",
        "Qwen2ForCausalLM",
        read_qwen2,
        describe_qwen,
        LLAMA,
        gguf=gguf("qwen2"),
    ),
    Family(
        "qwen3",
        "Qwen3",
        "Qwen3ForCausalLM",
        read_qwen3,
        describe_qwen,
        llama_names((*NORMS, *QKV, *OUT, *MLP, *QK_NORM)),
        gguf=gguf("qwen3"),
    ),
    Family(
        "smollm3",
        "SmolLM3",
        "SmolLM3ForCausalLM",
        _read_smollm3,
        _describe_smollm3,
        LLAMA,
        gguf=gguf("smollm3", interleaved=True),
    ),
    Family(
        "granite",
        "Granite 3",
        "GraniteForCausalLM",
        _read_granite,
        _describe_granite,
        LLAMA,
        gguf=gguf("granite", interleaved=True),
    ),
    Family(
        "olmo2",
        "OLMo 2",
        "Olmo2ForCausalLM",
        _read_olmo2,
        described,
        llama_names((*OLMO2, *QKV, *OUT, *MLP, *QK_NORM)),
        gguf=gguf("olmo2"),
    ),
    Family(
        "phi3",
        "Phi-3, Phi-4",
        "Phi3ForCausalLM",
        _read_phi3,
        _describe_phi3,
        llama_names((*NORMS, QKV_FUSED, *OUT, GATE_UP_FUSED, *MLP[4:])),
        gguf=gguf("phi3"),
    ),
    Family(
        "stablelm",
        "StableLM 2",
        "StableLmForCausalLM",
        _read_stablelm,
        _describe_stablelm,
        llama_names((*NORMS, *QKV, *OUT, *MLP, *STABLELM_NORMS)),
        gguf=STABLELM,
    ),
    Family(
        "cohere",
        "Command R",
        "CohereForCausalLM",
        _read_cohere,
        _describe_cohere,
        llama_names((*NORMS, *QKV, *OUT, *MLP, *QK_NORM)),
        interleaved=True,
        gguf=COMMAND_R,
    ),
)
