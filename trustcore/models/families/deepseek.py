"""DeepSeek-V2 and V3: latent attention, and experts of which some layers have none and all tokens share one.

arXiv 2405.04434 and 2412.19437. V3 scores experts by a sigmoid and chooses them with a bias; its layer that predicts
the token after the next is not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trustcore.models.config import DecoderConfig
from trustcore.models.families import gguf_experts
from trustcore.models.families.described import described, scaling
from trustcore.models.families.experts import QWEN, shared_expert
from trustcore.models.families.family import Family
from trustcore.models.families.fields import common, magnitude, over_layers, rope_of
from trustcore.models.families.llama import MLP, NORMS, OUT, llama_names
from trustcore.models.name_map import fused, kernel, plain
from trustcore.models.values import Values
from trustcore.nn.experts import ExpertsConfig
from trustcore.nn.latent import LatentConfig
from trustcore.ops.rope import RopeConfig

_LATENT = (
    kernel("attention.query.kernel", "self_attn.q_proj.weight"),
    kernel("attention.query_down.kernel", "self_attn.q_a_proj.weight"),
    plain("attention.query_down.bias", "self_attn.q_a_proj.bias"),
    plain("attention.query_norm.weight", "self_attn.q_a_layernorm.weight"),
    kernel("attention.query_up.kernel", "self_attn.q_b_proj.weight"),
    fused(["attention.latent.kernel", "attention.turned.kernel"], "self_attn.kv_a_proj_with_mqa.weight"),
    fused(["attention.latent.bias", "attention.turned.bias"], "self_attn.kv_a_proj_with_mqa.bias"),
    plain("attention.latent_norm.weight", "self_attn.kv_a_layernorm.weight"),
    fused(["attention.key_up.kernel", "attention.value_up.kernel"], "self_attn.kv_b_proj.weight", groups="heads"),
)
_NAMES = llama_names(
    (
        *(*NORMS, *_LATENT, *OUT, *MLP, *QWEN, *shared_expert("mlp.shared_experts")),
        plain("mlp.selection_bias", "mlp.gate.e_score_correction_bias"),
    )
)


def _read(values: Values, *, interleaved: bool, **routing: Any) -> dict[str, Any]:
    plain_dim, turned = values.integer("qk_nope_head_dim"), values.integer("qk_rope_head_dim")
    fields = common(values.with_defaults(head_dim=plain_dim + turned))
    rope = rope_of(values, turned, fields["context"], interleaved=interleaved)
    rank = values.get("q_lora_rank")
    dense, layers = values.integer("first_k_dense_replace", 0, least=0), fields["layers"]
    step = values.integer("moe_layer_freq", 1)
    hidden = values.integer("moe_intermediate_size")
    count = values.integer("n_routed_experts", values.integer("num_local_experts", 1))
    experts = ExpertsConfig(
        count,
        values.integer("num_experts_per_tok"),
        hidden,
        scale=values.number("routed_scaling_factor", 1.0),
        shared=hidden * values.integer("n_shared_experts", 0, least=0),
        **routing,
    )
    return {
        **fields,
        "rope": rope,
        "kv_heads": fields["heads"],
        "head_dim": plain_dim + turned,
        "attention_scale": _scale(values, rope, plain_dim + turned),
        "latent": LatentConfig(
            values.integer("kv_lora_rank"),
            plain_dim,
            values.integer("v_head_dim"),
            None if rank is None else values.integer("q_lora_rank"),
        ),
        "experts": experts,
        "expert_layers": over_layers(layers, lambda i: i >= dense and i % step == 0),
    }


def _scale(values: Values, rope: RopeConfig, head_dim: int) -> float:
    """Scores are scaled with the square of YaRN's magnitude where the file says so (`mscale_all_dim`)."""
    given = values.get("rope_parameters", values.get("rope_scaling")) or {}
    weight = Values(given, "config.json: rope_scaling").number("mscale_all_dim", 0.0)
    return head_dim**-0.5 * (magnitude(rope.factor, weight) ** 2 if weight and rope.scaling != "none" else 1.0)


def _read_v2(values: Values) -> Mapping[str, Any]:
    groups = {}
    if values.choice("topk_method", "greedy", {"greedy": False, "group_limited_greedy": True}):
        groups = {"groups": values.integer("n_group"), "active_groups": values.integer("topk_group")}
    return _read(values, interleaved=True, **groups)


def _read_v3(values: Values) -> Mapping[str, Any]:
    return _read(
        values,
        interleaved=values.flag("rope_interleave", True),
        scoring="sigmoid",
        normalize=values.flag("norm_topk_prob", True),
        selection_bias=True,
        groups=values.integer("n_group", 1),
        active_groups=values.integer("topk_group", 1),
        group_score="top2",
    )


def _describe(config: DecoderConfig) -> dict[str, Any]:
    """`head_dim` is left out: files mean by it the size of the turned part, or nothing."""
    rope, latent, experts = config.rope, config.latent, config.experts
    assert rope is not None and latent is not None and experts is not None
    entries = described(config)
    for key in ("head_dim", "partial_rotary_factor"):
        entries.pop(key, None)
    layers = config.expert_layers or (True,) * config.layers
    return {
        **entries,
        "rope_scaling": _scaling(config),
        "kv_lora_rank": latent.rank,
        "q_lora_rank": latent.query_rank,
        "qk_rope_head_dim": rope.size,
        "qk_nope_head_dim": latent.plain_dim,
        "v_head_dim": latent.value_dim,
        "n_routed_experts": experts.count,
        "num_experts_per_tok": experts.active,
        "moe_intermediate_size": experts.hidden,
        "n_shared_experts": experts.shared // experts.hidden,
        "routed_scaling_factor": experts.scale,
        "first_k_dense_replace": layers.index(True) if True in layers else config.layers,
        "moe_layer_freq": 1,
        "n_group": experts.groups,
        "topk_group": experts.active_groups,
    }


def _scaling(config: DecoderConfig) -> dict[str, Any] | None:
    """`rope_scaling` with the weights of YaRN's magnitude in cosine and sine over that of scores, and in scores."""
    assert config.rope is not None
    entries, plain_scale = scaling(config.rope, config.context), config.head_dim**-0.5
    share = math.sqrt((config.attention_scale or plain_scale) / plain_scale)
    if entries is None or math.isclose(share, 1.0, rel_tol=1e-9):
        return entries
    slope = magnitude(config.rope.factor, 1.0) - 1.0
    if slope:
        entries["mscale_all_dim"] = (share - 1) / slope
        entries["mscale"] = (config.rope.magnitude * share - 1) / slope
        entries.pop("attention_factor", None)
    return entries


def _describe_v2(config: DecoderConfig) -> dict[str, Any]:
    entries = _describe(config)
    return {**entries, "topk_method": "group_limited_greedy" if entries["n_group"] > 1 else "greedy"}


def _describe_v3(config: DecoderConfig) -> dict[str, Any]:
    assert config.experts is not None and config.rope is not None
    return {**_describe(config), "norm_topk_prob": config.experts.normalize, "rope_interleave": True}


FAMILIES = (
    Family(
        "deepseek_v2",
        "DeepSeek-V2",
        "DeepseekV2ForCausalLM",
        _read_v2,
        _describe_v2,
        _NAMES,
        interleaved=True,
        gguf=gguf_experts.DEEPSEEK_V2,
    ),
    Family(
        "deepseek_v3",
        "DeepSeek-V3, R1",
        "DeepseekV3ForCausalLM",
        _read_v3,
        _describe_v3,
        _NAMES,
        interleaved=True,
        gguf=gguf_experts.DEEPSEEK_V3,
    ),
)
