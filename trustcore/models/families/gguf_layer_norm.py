"""GGUF's words for decoders with layer norms: StableLM, Command R, GPT-NeoX, BLOOM, Falcon.

Names and keys are those of the public `gguf` package's constants. Queries, keys and values in one tensor stand one
after the other, as in no other kind of file of these families. Whether there are biases, norms of heads or a second
norm, the metadata do not say: it is read off the tensors.
"""

from __future__ import annotations

from collections.abc import Collection

from trustcore.errors import ModelError
from trustcore.models.config import DecoderConfig
from trustcore.models.families.family import Gguf
from trustcore.models.families.gguf import (
    BIASES,
    DOWN,
    NORMS,
    OUT,
    QKV_FUSED,
    SEPARATE,
    UP,
    Fields,
    gguf_names,
)
from trustcore.models.name_map import norm
from trustcore.models.names import Names
from trustcore.models.values import Values

_ALIBI = 8.0  # the largest exponent of a slope, which is 2 ** -8
_PLAIN = gguf_names(*NORMS, *QKV_FUSED, *OUT, *UP, *DOWN)


def _stablelm(values: Values, fields: Fields) -> Fields:
    return {"norm": "layer", "norm_bias": True}


def _stablelm_tensors(found: Collection[str]) -> Fields:
    parallel = "blk.0.ffn_norm.weight" not in found
    return {
        "qkv_bias": "blk.0.attn_q.bias" in found,
        "qk_norm": "each" if "blk.0.attn_q_norm.weight" in found else None,
        "parallel": parallel,
        "shared_norm": parallel,
    }


def _write_stablelm(config: DecoderConfig) -> Fields:
    if config.tied:
        raise ModelError("GGUF files of stablelm have an output table; this model's is the embedding table.")
    return {"use_parallel_residual": config.parallel}


def _command_r(values: Values, fields: Fields) -> Fields:
    return {
        "norm": "layer",
        "parallel": True,
        "shared_norm": True,
        "logit_scale": values.number("logit_scale", 0.0625),
    }


def _command_r_tensors(found: Collection[str]) -> Fields:
    return {"qk_norm": "each" if "blk.0.attn_q_norm.weight" in found else None}


def _write_command_r(config: DecoderConfig) -> Fields:
    if not config.tied:
        raise ModelError("GGUF files of command-r have no output table; this model's is not the embedding table.")
    if config.qk_norm is not None and config.layers < 64:
        raise ModelError(f"GGUF files of command-r with {config.layers} layers cannot say that heads are normalized.")
    return {"logit_scale": config.logit_scale}


def _neox(values: Values, fields: Fields) -> Fields:
    return {
        "norm": "layer",
        **BIASES,
        "gated": False,
        "activation": "gelu",
        "parallel": values.flag("use_parallel_residual", True),
    }


def _write_neox(config: DecoderConfig) -> Fields:
    if config.tied or not config.qkv_bias:
        lacking = "an output table" if config.tied else "biases of queries, keys and values"
        raise ModelError(f"GGUF files of gptneox have {lacking}; this model has none.")
    return {"use_parallel_residual": config.parallel}


def _bloom(values: Values, fields: Fields) -> Fields:
    return {
        "norm": "layer",
        **BIASES,
        "gated": False,
        "activation": "gelu_tanh",
        "embedding_norm": True,
        "alibi": 1.0,
        "rope": None,
    }


def _write_bloom(config: DecoderConfig) -> Fields:
    return {"attention.max_alibi_bias": _ALIBI}


def _falcon(values: Values, fields: Fields) -> Fields:
    return {"norm": "layer", "norm_bias": True, "gated": False, "activation": "gelu", "parallel": True}


def _falcon_tensors(found: Collection[str]) -> Fields:
    return {"shared_norm": "blk.0.attn_norm_2.weight" not in found}


def _falcon_names(config: DecoderConfig) -> Names:
    """A second norm is that of attention; the first is then that of the feed-forward."""
    if config.shared_norm:
        return _PLAIN
    two = (*norm("attention_norm", "attn_norm_2"), *norm("mlp_norm", "attn_norm"))
    return gguf_names(*two, *QKV_FUSED, *OUT, *UP, *DOWN)


def _write_falcon(config: DecoderConfig) -> Fields:
    for unknown, what in (
        (not config.parallel, "attention ahead of the feed-forward, and not beside it"),
        (config.alibi is not None, "ALiBi"),
        (config.qkv_bias, "biases"),
    ):
        if unknown:
            raise ModelError(f"GGUF files of falcon know no {what}.")
    return {}


STABLELM = Gguf("stablelm", SEPARATE, read=_stablelm, seen=_stablelm_tensors, write=_write_stablelm)
COMMAND_R = Gguf(
    "command-r",
    SEPARATE,
    interleaved=True,
    read=_command_r,
    seen=_command_r_tensors,
    write=_write_command_r,
)
GPT_NEOX = Gguf("gptneox", _PLAIN, read=_neox, write=_write_neox)
BLOOM = Gguf("bloom", _PLAIN, read=_bloom, write=_write_bloom)
FALCON = Gguf("falcon", _PLAIN, variant=_falcon_names, read=_falcon, seen=_falcon_tensors, write=_write_falcon)
