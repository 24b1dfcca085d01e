"""GGUF's words for decoders with experts: stacks `[E, out, in]` of their matrices, and what tells how they are chosen.

Names and keys are those of the public `gguf` package's constants. A file says how many experts there are and how many a
token goes to; what else differs between architectures, readers know by the name, and a model that differs is refused.
Files of earlier programs hold Mixtral's experts one by one, and DeepSeek's keys and values of latents as one matrix.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from trustcore.errors import ModelError
from trustcore.models.config import DecoderConfig
from trustcore.models.families.family import Gguf
from trustcore.models.families.fields import magnitude, over_layers
from trustcore.models.families.gguf import (
    DOWN,
    GATE,
    NORMS,
    OUT,
    QKV,
    UP,
    Fields,
    every_other,
    gguf_names,
    three_of_four,
)
from trustcore.models.name_map import Rule, column, fused, headed, kernel, linear, norm, plain, stacked
from trustcore.models.names import Names
from trustcore.models.values import Values
from trustcore.nn.experts import ExpertsConfig
from trustcore.nn.latent import LatentConfig

_PARTS = ("gate", "up", "down")
_DENSE = (*GATE, *UP, *DOWN)
_ROUTER = linear("mlp.router", "ffn_gate_inp")
_STACKS = tuple(rule for part in _PARTS for rule in linear(f"mlp.experts.{part}", f"ffn_{part}_exps"))
_SHARED = tuple(kernel(f"mlp.shared.{part}.kernel", f"ffn_{part}_shexp.weight") for part in _PARTS)
_EXPERTS = (*_ROUTER, *_STACKS)
_APART = tuple(stacked(f"mlp.experts.{part}.kernel", f"ffn_{part}.{{e}}.weight") for part in _PARTS)

_LATENT = (
    kernel("attention.query.kernel", "attn_q.weight"),
    kernel("attention.query_down.kernel", "attn_q_a.weight"),
    plain("attention.query_norm.weight", "attn_q_a_norm.weight"),
    kernel("attention.query_up.kernel", "attn_q_b.weight"),
    fused(["attention.latent.kernel", "attention.turned.kernel"], "attn_kv_a_mqa.weight"),
    plain("attention.latent_norm.weight", "attn_kv_a_norm.weight"),
)
_KEYS_AND_VALUES: tuple[Rule, ...] = (
    headed("attention.key_up.kernel", "attn_k_b.weight", "heads", rows_first=False),
    headed("attention.value_up.kernel", "attn_v_b.weight", "heads", rows_first=True),
)
_KEYS_WITH_VALUES = fused(["attention.key_up.kernel", "attention.value_up.kernel"], "attn_kv_b.weight", groups="heads")
_OLD_NORMS = (*norm("attention_norm", "attn_norm"), *norm("mlp_norm", "ffn_norm"))
_GPT_OSS_NORMS = (*norm("attention_norm", "attn_norm"), *norm("mlp_norm", "post_attention_norm"))
_CHOICE = plain("mlp.selection_bias", "exp_probs_b.bias")

_SCORINGS = {1: "softmax", 2: "sigmoid"}
_CLIP = (7.0, 1.702)  # gpt-oss
_CHUNK, _TEMPERATURE = 8192, (8192.0, 0.1)  # Llama 4
_WITHOUT_NORMS = 128  # experts by which llama.cpp knows the Llama 4 whose heads are not normalized
_LOG_SCALE = 0.1  # with which files multiply what YaRN's logarithm is multiplied with


def _deepseek_names(*keys_and_values: Rule) -> Names:
    return gguf_names(*(*_OLD_NORMS, *_LATENT, *keys_and_values, *OUT, *_DENSE, *_EXPERTS, *_SHARED, _CHOICE))


# ---- reading ---------------------------------------------------------------------------------------------------------


def _experts(values: Values, hidden: int, **options: Any) -> ExpertsConfig:
    return ExpertsConfig(values.integer("expert_count"), values.integer("expert_used_count"), hidden, **options)


def _mixtral(values: Values, fields: Fields) -> Fields:
    return {"experts": _experts(values, fields["hidden"], normalize=True)}


def _qwen2_moe(values: Values, fields: Fields) -> Fields:
    hidden = values.integer("expert_feed_forward_length", fields["hidden"] // values.integer("expert_used_count"))
    shared = values.integer("expert_shared_feed_forward_length", fields["hidden"])
    return {"qkv_bias": True, "experts": _experts(values, hidden, shared=shared, shared_gate=True)}


def _qwen3_moe(values: Values, fields: Fields) -> Fields:
    hidden = values.integer("expert_feed_forward_length", fields["hidden"] // values.integer("expert_used_count"))
    return {"qk_norm": "head", "experts": _experts(values, hidden, normalize=True)}


def _gpt_oss(values: Values, fields: Fields) -> Fields:
    hidden = values.integer("expert_feed_forward_length", fields["hidden"])
    experts = _experts(values, hidden, scoring="chosen", router_bias=True, bias=True, clip=_CLIP)
    return {
        "qkv_bias": True,
        "out_bias": True,
        "sinks": True,
        "windowed": None if fields["window"] is None else every_other(fields["layers"]),
        "experts": experts,
    }


def _llama4(values: Values, fields: Fields) -> Fields:
    """Chunks, and what queries are scaled by, are known by the architecture's name."""
    hidden = values.integer("expert_feed_forward_length")
    count, step = values.integer("expert_count"), values.integer("interleave_moe_layer_step", 1)
    positioned = three_of_four(fields["layers"])
    return {
        "window": None,
        "positioned": positioned,
        "chunk": _CHUNK,
        "chunked": positioned,
        "qk_norm": None if count == _WITHOUT_NORMS else "turned",
        "temperature": _TEMPERATURE,
        "experts": _experts(values, hidden, scoring="sigmoid", scale_inputs=True, shared=hidden),
        "expert_layers": over_layers(fields["layers"], lambda i: (i + 1) % step == 0),
    }


def _deepseek(values: Values, fields: Fields) -> Fields:
    """Sizes of heads are those of attention head by head; files also tell those of attention over latents."""
    rope, rank = fields["rope"], values.integer("attention.kv_lora_rank")
    head_dim = values.integer("attention.key_length_mla", values.integer("attention.key_length"))
    value_dim = values.integer("attention.value_length_mla", values.integer("attention.value_length"))
    query_rank = values.integer("attention.q_lora_rank", 0, least=0) or None
    scoring = values.integer("expert_gating_func", 1, least=0) or 1
    if scoring not in _SCORINGS:
        raise ModelError(f"metadata: expert_gating_func is {scoring}; supported: 1 (softmax), 2 (sigmoid).")
    sigmoid = _SCORINGS[scoring] == "sigmoid"
    hidden, dense = (
        values.integer("expert_feed_forward_length"),
        values.integer("leading_dense_block_count", 0, least=0),
    )
    experts = _experts(
        values,
        hidden,
        scoring=_SCORINGS[scoring],
        normalize=values.flag("expert_weights_norm", False),
        scale=values.number("expert_weights_scale", 1.0) or 1.0,
        selection_bias=sigmoid,
        groups=values.integer("expert_group_count", 1),
        active_groups=values.integer("expert_group_used_count", 1),
        group_score="top2" if sigmoid else "max",
        shared=hidden * values.integer("expert_shared_count", 0, least=0),
    )
    scale = head_dim**-0.5
    weight = values.number("rope.scaling.yarn_log_multiplier", 0.0) / _LOG_SCALE
    if rope.scaling == "yarn" and weight:
        scale, rope = scale * magnitude(rope.factor, weight) ** 2, dataclasses.replace(rope, attention_factor=1.0)
    return {
        "family": "deepseek_v3" if sigmoid else "deepseek_v2",
        "rope": rope,
        "kv_heads": fields["heads"],
        "head_dim": head_dim,
        "attention_scale": scale,
        "latent": LatentConfig(rank, head_dim - rope.size, value_dim, query_rank),
        "experts": experts,
        "expert_layers": over_layers(fields["layers"], lambda i: i >= dense),
    }


# ---- writing ---------------------------------------------------------------------------------------------------------


def _described(config: DecoderConfig, name: str, known: ExpertsConfig) -> dict[str, Any]:
    """What all have; refuses what readers take for granted and this model has otherwise. `known` is what they take."""
    c = config.experts
    assert c is not None, f"{name}: no experts"
    given, taken = dataclasses.asdict(c), dataclasses.asdict(known)
    wrong = [f"{key} is {given[key]!r}, not {taken[key]!r}" for key in taken if given[key] != taken[key]]
    if wrong:
        raise ModelError(f"GGUF files of {name} cannot say that of experts {'; '.join(wrong)}.")
    return {"expert_count": c.count, "expert_used_count": c.active}


def _everywhere(config: DecoderConfig, name: str) -> None:
    if config.expert_layers is not None:
        raise ModelError(f"GGUF files of {name} cannot say that some layers have no experts.")


def _write_mixtral(config: DecoderConfig) -> Fields:
    c = config.experts
    assert c is not None
    _everywhere(config, "mixtral")
    return _described(config, "mixtral", ExpertsConfig(c.count, c.active, config.hidden, normalize=True))


def _write_qwen2_moe(config: DecoderConfig) -> Fields:
    c = config.experts
    assert c is not None
    _everywhere(config, "qwen2moe")
    known = ExpertsConfig(c.count, c.active, c.hidden, shared=c.shared, shared_gate=True)
    return {
        **_described(config, "qwen2moe", known),
        "expert_feed_forward_length": c.hidden,
        "expert_shared_feed_forward_length": c.shared,
    }


def _write_qwen3_moe(config: DecoderConfig) -> Fields:
    c = config.experts
    assert c is not None
    _everywhere(config, "qwen3moe")
    known = ExpertsConfig(c.count, c.active, c.hidden, normalize=True)
    return {**_described(config, "qwen3moe", known), "expert_feed_forward_length": c.hidden}


def _write_gpt_oss(config: DecoderConfig) -> Fields:
    c = config.experts
    assert c is not None
    if config.window is None or config.windowed != every_other(config.layers):
        raise ModelError("GGUF files of gpt-oss cannot say that other layers than every second one have a window.")
    known = ExpertsConfig(c.count, c.active, c.hidden, scoring="chosen", router_bias=True, bias=True, clip=_CLIP)
    return {**_described(config, "gpt-oss", known), "expert_feed_forward_length": c.hidden}


def _write_llama4(config: DecoderConfig) -> Fields:
    c, layers = config.experts, config.expert_layers or (True,) * config.layers
    assert c is not None
    known = ExpertsConfig(c.count, c.active, c.hidden, scoring="sigmoid", scale_inputs=True, shared=c.hidden)
    described = _described(config, "llama4", known)
    step = layers.index(True) + 1 if True in layers else config.layers + 1
    usual = three_of_four(config.layers)
    normalized = None if c.count == _WITHOUT_NORMS else "turned"
    if over_layers(config.layers, lambda i: (i + 1) % step == 0) != config.expert_layers:
        raise ModelError("GGUF files of llama4 cannot say that other layers than every n-th one have experts.")
    given = (config.positioned, config.chunked, config.chunk, config.temperature, config.qk_norm)
    if given != (usual, usual, _CHUNK, _TEMPERATURE, normalized):
        raise ModelError(
            f"GGUF files of llama4 hold models with chunks of {_CHUNK} and positions in all layers but every fourth, "
            f"with queries scaled there (floor_scale {_TEMPERATURE[0]:.0f}, attn_scale {_TEMPERATURE[1]}), and with "
            f"heads that are normalized unless there are {_WITHOUT_NORMS} experts. Save a folder of safetensors."
        )
    return {**described, "expert_feed_forward_length": c.hidden, "interleave_moe_layer_step": step}


def _write_deepseek(config: DecoderConfig) -> Fields:
    c, latent, rope = config.experts, config.latent, config.rope
    assert c is not None and latent is not None and rope is not None
    sigmoid = c.scoring == "sigmoid"
    known = ExpertsConfig(
        c.count,
        c.active,
        c.hidden,
        scoring="sigmoid" if sigmoid else "softmax",
        normalize=c.normalize,
        scale=c.scale,
        groups=c.groups,
        active_groups=c.active_groups,
        group_score="top2" if sigmoid else "max",
        selection_bias=sigmoid,
        shared=c.shared,
    )
    described = _described(config, "deepseek2", known)
    layers = config.expert_layers or (True,) * config.layers
    dense = layers.index(True) if True in layers else config.layers
    if not all(layers[dense:]) or c.shared % c.hidden or config.norm_eps != config.latent_norm_eps:
        raise ModelError(
            "GGUF files of deepseek2 hold models whose first layers alone have no experts, whose shared expert is as "
            f"large as several others (F {c.hidden}, shared {c.shared}), and whose norms have one epsilon."
        )
    return {
        **described,
        "expert_feed_forward_length": c.hidden,
        "expert_shared_count": c.shared // c.hidden,
        "expert_weights_scale": c.scale,
        "expert_weights_norm": c.normalize,
        "expert_gating_func": next(number for number, name in _SCORINGS.items() if name == c.scoring),
        "leading_dense_block_count": dense,
        **({"expert_group_count": c.groups, "expert_group_used_count": c.active_groups} if c.groups > 1 else {}),
        "attention.head_count_kv": 1,
        "attention.key_length": latent.rank + rope.size,
        "attention.value_length": latent.rank,
        "attention.key_length_mla": config.head_dim,
        "attention.value_length_mla": latent.value_dim,
        "attention.kv_lora_rank": latent.rank,
        **({} if latent.query_rank is None else {"attention.q_lora_rank": latent.query_rank}),
        **_deepseek_scaling(config),
    }


def _deepseek_scaling(config: DecoderConfig) -> Fields:
    """How much of YaRN's magnitude scores are scaled with; readers scale cosine and sine with none of it then."""
    rope, plain_scale = config.rope, config.head_dim**-0.5
    assert rope is not None
    share = math.sqrt((config.attention_scale or plain_scale) / plain_scale)
    if rope.scaling != "yarn":
        if not math.isclose(share, 1.0, rel_tol=1e-6):
            raise ModelError(f"GGUF files of deepseek2 cannot say that scores are scaled by {config.attention_scale}.")
        return {}
    if share <= 1 or not math.isclose(rope.magnitude, 1.0, rel_tol=1e-6):
        raise ModelError(
            "GGUF files of deepseek2 with YaRN hold models whose mscale and mscale_all_dim are the same, and not zero."
        )
    weight = (share - 1) / (magnitude(rope.factor, 1.0) - 1)
    return {"rope.scaling.yarn_log_multiplier": _LOG_SCALE * weight, "rope.scaling.attn_factor": 1.0}


MIXTRAL = Gguf(
    "llama",
    gguf_names(*(*NORMS, *QKV, *OUT, *_EXPERTS)),
    interleaved=True,
    read=_mixtral,
    write=_write_mixtral,
    experts=True,
    older={"blk.0.ffn_gate.0.weight": gguf_names(*(*NORMS, *QKV, *OUT, *_ROUTER, *_APART))},
)
QWEN2_MOE = Gguf(
    "qwen2moe",
    gguf_names(*NORMS, *QKV, *OUT, *_EXPERTS, *_SHARED, column("mlp.shared_gate.kernel", "ffn_gate_inp_shexp.weight")),
    read=_qwen2_moe,
    write=_write_qwen2_moe,
    experts=True,
)
QWEN3_MOE = Gguf(
    "qwen3moe", gguf_names(*(*NORMS, *QKV, *OUT, *_EXPERTS)), read=_qwen3_moe, write=_write_qwen3_moe, experts=True
)
GPT_OSS = Gguf(
    "gpt-oss",
    gguf_names(*(*_GPT_OSS_NORMS, *QKV, *OUT, *_EXPERTS, plain("attention.sinks", "attn_sinks.weight"))),
    read=_gpt_oss,
    write=_write_gpt_oss,
    experts=True,
    whole_pairs=False,
)
LLAMA4 = Gguf(
    "llama4",
    gguf_names(*NORMS, *QKV, *OUT, *_DENSE, *_EXPERTS, *_SHARED),
    interleaved=True,
    read=_llama4,
    write=_write_llama4,
    experts=True,
)
DEEPSEEK_V2 = Gguf(
    "deepseek2",
    _deepseek_names(*_KEYS_AND_VALUES),
    interleaved=True,
    read=_deepseek,
    write=_write_deepseek,
    experts=True,
    older={"blk.0.attn_kv_b.weight": _deepseek_names(_KEYS_WITH_VALUES)},
)
DEEPSEEK_V3 = dataclasses.replace(DEEPSEEK_V2, own=False)
