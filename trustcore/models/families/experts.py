"""Mixtures of experts with Llama's attention: Mixtral, Qwen2-MoE, Qwen3-MoE, gpt-oss.

arXiv 2401.04088 (Mixtral), 2407.10671 and 2505.09388 (Qwen), 2508.10925 (gpt-oss: sinks, clipped SwiGLU with biases).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trustcore.models.config import DecoderConfig
from trustcore.models.families import gguf_experts
from trustcore.models.families.described import described, window
from trustcore.models.families.family import Family
from trustcore.models.families.fields import common, over_layers, window_of
from trustcore.models.families.llama import (
    MLP,
    NORMS,
    OUT,
    QK_NORM,
    QKV,
    describe_qwen,
    llama_names,
    read_qwen2,
    read_qwen3,
)
from trustcore.models.name_map import Rule, fused, kernel, plain, stacked
from trustcore.models.values import Values
from trustcore.nn.experts import ExpertsConfig


def experts_of(module: str, router: str, names: tuple[str, str, str]) -> tuple[Rule, ...]:
    """Returns the rules of a router and of experts that are tensors of their own: gate, up, down."""
    parts = zip(("gate", "up", "down"), names, strict=True)
    stacks = [stacked(f"mlp.experts.{part}.kernel", f"{module}.experts.{{e}}.{name}.weight") for part, name in parts]
    return kernel("mlp.router.kernel", f"{module}.{router}.weight"), *stacks


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = experts_of("block_sparse_moe", "gate", ("w1", "w3", "w2"))
QWEN = experts_of("mlp", "gate", _PROJECTIONS)


def shared_expert(module: str) -> tuple[Rule, ...]:
    """Returns the rules of the expert that all tokens go through."""
    parts = zip(("gate", "up", "down"), _PROJECTIONS, strict=True)
    return tuple(kernel(f"mlp.shared.{part}.kernel", f"{module}.{name}.weight") for part, name in parts)


_SHARED = (*shared_expert("mlp.shared_expert"), kernel("mlp.shared_gate.kernel", "mlp.shared_expert_gate.weight"))
_GPT_OSS = (
    kernel("mlp.router.kernel", "mlp.router.weight"),
    plain("mlp.router.bias", "mlp.router.bias"),
    fused(
        ["mlp.experts.gate.kernel", "mlp.experts.up.kernel"],
        "mlp.experts.gate_up_proj",
        groups="expert_hidden",
        rows_first=False,
    ),
    fused(["mlp.experts.gate.bias", "mlp.experts.up.bias"], "mlp.experts.gate_up_proj_bias", groups="expert_hidden"),
    plain("mlp.experts.down.kernel", "mlp.experts.down_proj"),
    plain("mlp.experts.down.bias", "mlp.experts.down_proj_bias"),
    plain("attention.sinks", "self_attn.sinks"),
)


def _read_mixtral(values: Values) -> Mapping[str, Any]:
    fields = common(values, default_eps=1e-5, rope={"theta": 1e6})
    experts = ExpertsConfig(
        values.integer("num_local_experts", 8),
        values.integer("num_experts_per_tok", 2),
        fields["hidden"],
        normalize=True,
    )
    return {**fields, **window_of(values, fields["layers"]), "experts": experts}


def _read_qwen2_moe(values: Values) -> Mapping[str, Any]:
    experts = _qwen_experts(
        values,
        normalize=values.flag("norm_topk_prob", False),
        shared=values.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    bias = values.flag("qkv_bias", True)
    return {**read_qwen2(values), "qkv_bias": bias, **experts}


def _read_qwen3_moe(values: Values) -> Mapping[str, Any]:
    return {**read_qwen3(values), **_qwen_experts(values, normalize=values.flag("norm_topk_prob", False))}


def _qwen_experts(values: Values, **options: Any) -> dict[str, Any]:
    """Every `decoder_sparse_step`-th layer has experts, those of `mlp_only_layers` have none."""
    count = values.integer("num_experts", values.integer("num_local_experts", 1))
    dense, step = values.get("mlp_only_layers") or [], values.integer("decoder_sparse_step", 1)
    dense = {i for i in dense if isinstance(i, int)} if isinstance(dense, list) else set()
    layers = over_layers(values.integer("num_hidden_layers"), lambda i: i not in dense and (i + 1) % step == 0)
    config = ExpertsConfig(
        count, values.integer("num_experts_per_tok"), values.integer("moe_intermediate_size"), **options
    )
    return {"experts": config, "expert_layers": layers}


def _read_gpt_oss(values: Values) -> Mapping[str, Any]:
    values = values.with_defaults(attention_bias=True, head_dim=64)
    fields = common(values, default_eps=1e-5, rope={"theta": 150000.0})
    experts = ExpertsConfig(
        values.integer("num_local_experts"),
        values.integer("num_experts_per_tok", values.integer("experts_per_token", 4)),
        fields["hidden"],
        scoring="chosen",
        router_bias=True,
        bias=True,
        clip=(values.number("swiglu_limit", 7.0), values.number("swiglu_alpha", 1.702)),
    )
    window = window_of(values, fields["layers"], lambda i: i % 2 == 0)
    return {**fields, **window, "sinks": True, "experts": experts}


def _counts(config: DecoderConfig) -> ExpertsConfig:
    assert config.experts is not None, f"{config.family}: no experts"
    return config.experts


def _describe_mixtral(config: DecoderConfig) -> dict[str, Any]:
    experts = _counts(config)
    return {
        **described(config),
        **window(config),
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.active,
    }


def _describe_qwen_moe(config: DecoderConfig) -> dict[str, Any]:
    experts, layers = _counts(config), config.expert_layers or (True,) * config.layers
    return {
        **describe_qwen(config),
        "num_experts": experts.count,
        "num_experts_per_tok": experts.active,
        "moe_intermediate_size": experts.hidden,
        "norm_topk_prob": experts.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, holds in enumerate(layers) if not holds],
    }


def _describe_qwen2_moe(config: DecoderConfig) -> dict[str, Any]:
    shared = _counts(config).shared
    return {**_describe_qwen_moe(config), "shared_expert_intermediate_size": shared, "qkv_bias": config.qkv_bias}


def _describe_gpt_oss(config: DecoderConfig) -> dict[str, Any]:
    experts = _counts(config)
    limit, alpha = experts.clip or (None, None)
    windowed = config.windowed or (config.window is not None,) * config.layers
    return {
        **described(config),
        "sliding_window": config.window,
        "layer_types": [("full", "sliding")[holds] + "_attention" for holds in windowed],
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.active,
        "experts_per_token": experts.active,
        "swiglu_limit": limit,
        "swiglu_alpha": alpha,
    }


FAMILIES = (
    Family(
        "mixtral",
        "Mixtral",
        "MixtralForCausalLM",
        _read_mixtral,
        _describe_mixtral,
        llama_names((*NORMS, *QKV, *OUT, *_MIXTRAL)),
        gguf=gguf_experts.MIXTRAL,
    ),
    Family(
        "qwen2_moe",
        "Qwen1.5-MoE, Qwen2-MoE",
        "Qwen2MoeForCausalLM",
        _read_qwen2_moe,
        _describe_qwen2_moe,
        llama_names((*NORMS, *QKV, *OUT, *MLP, *QWEN, *_SHARED)),
        gguf=gguf_experts.QWEN2_MOE,
    ),
    Family(
        "qwen3_moe",
        "Qwen3-MoE",
        "Qwen3MoeForCausalLM",
        _read_qwen3_moe,
        _describe_qwen_moe,
        llama_names((*NORMS, *QKV, *OUT, *MLP, *QK_NORM, *QWEN)),
        gguf=gguf_experts.QWEN3_MOE,
    ),
    Family(
        "gpt_oss",
        "gpt-oss",
        "GptOssForCausalLM",
        _read_gpt_oss,
        _describe_gpt_oss,
        llama_names((*NORMS, *QKV, *OUT, *_GPT_OSS)),
        gguf=gguf_experts.GPT_OSS,
    ),
)
