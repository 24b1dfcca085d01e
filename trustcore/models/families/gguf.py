"""GGUF's words for decoders: names of tensors, and metadata. The same for all architectures but for what one fuses.

Names and keys are those of the public `gguf` package's constants (tensor names without `blk.{}.` and `.weight`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trustcore.errors import ModelError
from trustcore.models.config import DecoderConfig
from trustcore.models.families.family import Gguf
from trustcore.models.families.fields import over_layers
from trustcore.models.name_map import Rule, fused, joined, kernel, linear, norm, plain
from trustcore.models.names import Names, under
from trustcore.models.values import Values
from trustcore.ops.rope import RopeConfig

Fields = Mapping[str, Any]

NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight", "*.attn_rot_embd.weight")
_BODY = (
    plain("embedding.table", "token_embd.weight"),
    *norm("norm", "output_norm"),
    *norm("embedding_norm", "token_embd_norm"),
    kernel("output.kernel", "output.weight"),
    plain("positions.table", "position_embd.weight"),
)


NORMS = (
    *norm("attention_norm", "attn_norm"),
    *norm("mlp_norm", "ffn_norm"),
    *norm("attention_post_norm", "post_attention_norm"),
    *norm("mlp_post_norm", "post_ffw_norm"),
    plain("attention.query_norm.weight", "attn_q_norm.weight"),
    plain("attention.key_norm.weight", "attn_k_norm.weight"),
)
QKV = (
    *linear("attention.query", "attn_q"),
    *linear("attention.key", "attn_k"),
    *linear("attention.value", "attn_v"),
)
QKV_FUSED = joined(("attention.query", "attention.key", "attention.value"), "attn_qkv")
OUT = linear("attention.out", "attn_output")
GATE = linear("mlp.gate", "ffn_gate")
UP = linear("mlp.up", "ffn_up")
GATE_UP_FUSED = (fused(["mlp.gate.kernel", "mlp.up.kernel"], "ffn_up.weight"),)
DOWN = linear("mlp.down", "ffn_down")


def gguf_names(*layer: Rule) -> Names:
    """Returns the names of a model whose layers have these rules, written without `blk.{}.`."""
    return Names(_BODY, under("blocks.{}.", "blk.{}.", layer), ignored=NOT_WEIGHTS)


BIASES = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "norm_bias"), True)
SEPARATE = gguf_names(*NORMS, *QKV, *OUT, *GATE, *UP, *DOWN)
_FUSED = {
    "phi3": gguf_names(*NORMS, *QKV_FUSED, *OUT, *GATE_UP_FUSED, *DOWN),
    "gpt2": gguf_names(*NORMS, *QKV_FUSED, *OUT, *UP, *DOWN),
}


# Layers by which llama.cpp knows the largest Gemma 2 and 3, whose scores are scaled by the width of the model.
_LARGEST = {"gemma2": 46, "gemma3": 62}


def _qwen2(values: Values, fields: Fields) -> Fields:
    return {"qkv_bias": True}


def _qwen3(values: Values, fields: Fields) -> Fields:
    return {"qk_norm": "head"}


def _smollm3(values: Values, fields: Fields) -> Fields:
    return {"positioned": three_of_four(fields["layers"])}


def _granite(values: Values, fields: Fields) -> Fields:
    return {
        "embedding_scale": values.number("embedding_scale", 1.0) or 1.0,
        "residual_scale": values.number("residual_scale", 1.0) or 1.0,
        "attention_scale": values.number("attention.scale", 0.0) or None,
        "logit_scale": 1.0 / (values.number("logit_scale", 1.0) or 1.0),
    }


def _olmo2(values: Values, fields: Fields) -> Fields:
    return {"norm_place": "after", "qk_norm": "whole"}


def _gemma(values: Values, fields: Fields) -> Fields:
    return {"activation": "gelu_tanh", "embedding_scale": math.sqrt(fields["features"])}


def _gemma2(values: Values, fields: Fields) -> Fields:
    return {
        **_gemma(values, fields),
        "norm_place": "both",
        "windowed": None if fields["window"] is None else every_other(fields["layers"]),
        "score_cap": values.number("attn_logit_softcapping", 50.0) or None,
        "logit_cap": values.number("final_logit_softcapping", 30.0) or None,
        "attention_scale": _gemma_scale("gemma2", fields),
    }


def _gemma3(values: Values, fields: Fields) -> Fields:
    theta = values.number("rope.freq_base_swa", 10000.0)
    near = RopeConfig(fields["rope"].size, theta=theta, original_context=fields["rope"].original_context)
    return {
        **_gemma(values, fields),
        "norm_place": "both",
        "qk_norm": "head",
        "windowed": None if fields["window"] is None else _five_of_six(fields["layers"]),
        "window_rope": near,
        "logit_cap": values.number("final_logit_softcapping", 0.0) or None,
        "attention_scale": _gemma_scale("gemma3", fields),
    }


def every_other(layers: int) -> tuple[bool, ...] | None:
    """Returns the pattern of a window in the first of every two layers."""
    return over_layers(layers, lambda i: i % 2 == 0)


def three_of_four(layers: int) -> tuple[bool, ...] | None:
    """Returns the pattern of positions in all layers but every fourth."""
    return over_layers(layers, lambda i: i % 4 != 3)


def _five_of_six(layers: int) -> tuple[bool, ...] | None:
    return over_layers(layers, lambda i: i % 6 != 5)


def _gemma_scale(name: str, fields: Fields) -> float:
    wide = fields["layers"] == _LARGEST[name]
    return (fields["features"] // fields["heads"] if wide else fields["head_dim"]) ** -0.5


def _gpt2(values: Values, fields: Fields) -> Fields:
    return {
        "norm": "layer",
        "rope": None,
        "learned_positions": fields["context"],
        "gated": False,
        "activation": "gelu_tanh",
        **BIASES,
    }


def _write_smollm3(config: DecoderConfig) -> Fields:
    if config.window is not None or config.positioned != three_of_four(config.layers):
        raise ModelError("GGUF files of smollm3 know no window, and positions in all layers but every fourth.")
    return {}


def _write_granite(config: DecoderConfig) -> Fields:
    return {
        "embedding_scale": config.embedding_scale,
        "residual_scale": config.residual_scale,
        "attention.scale": config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
        "logit_scale": 1.0 / config.logit_scale,
    }


def _write_gemma2(config: DecoderConfig) -> Fields:
    _hold(config, "gemma2", every_other(config.layers))
    if config.score_cap is None or config.logit_cap is None:
        raise ModelError("GGUF files of gemma2 always have soft caps of scores and of logits; this model lacks one.")
    return {"attn_logit_softcapping": config.score_cap, "final_logit_softcapping": config.logit_cap}


def _write_gemma3(config: DecoderConfig) -> Fields:
    _hold(config, "gemma3", _five_of_six(config.layers))
    near = config.window_rope
    if config.score_cap is not None or near is None or near.scaling != "none":
        raise ModelError("GGUF files of gemma3 know no soft cap of scores, and no scaling in layers with a window.")
    cap = {} if config.logit_cap is None else {"final_logit_softcapping": config.logit_cap}
    return {"rope.freq_base_swa": near.theta, **cap}


def _hold(config: DecoderConfig, name: str, pattern: tuple[bool, ...] | None) -> None:
    """Refuses what readers do not take from the file but know by the architecture's name."""
    scale = _gemma_scale(name, vars(config))
    given = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    if not math.isclose(given, scale, rel_tol=1e-6):
        raise ModelError(
            f"GGUF files of {name} cannot say that scores are scaled by {given:.6g}; for {config.layers} layers it is "
            f"{scale:.6g}."
        )
    if config.window is None or config.windowed != pattern:
        raise ModelError(f"GGUF files of {name} cannot say that other layers than the usual ones have a window.")


_READ = {
    "qwen2": _qwen2, "qwen3": _qwen3, "smollm3": _smollm3, "granite": _granite, "olmo2": _olmo2, "gemma": _gemma,
    "gemma2": _gemma2, "gemma3": _gemma3, "gpt2": _gpt2,
}  # fmt: skip
_WRITE = {
    "smollm3": _write_smollm3, "granite": _write_granite, "gemma2": _write_gemma2, "gemma3": _write_gemma3,
}  # fmt: skip


def gguf(name: str, *, interleaved: bool = False, own: bool = True) -> Gguf:
    """Returns how GGUF files of the architecture `name` hold a family; see `Gguf`."""
    return Gguf(
        name,
        _FUSED.get(name, SEPARATE),
        interleaved=interleaved,
        read=_READ.get(name, lambda values, fields: {}),
        write=_WRITE.get(name, lambda config: {}),
        own=own,
    )
