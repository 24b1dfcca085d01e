"""GGUF's words for decoders: names of tensors, and metadata. The same for all architectures but for what one fuses.

Names and keys are those of the public `gguf` package's constants (tensor names without `blk.{}.` and `.weight`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trustcore.models.config import DecoderConfig
from trustcore.models.families.family import Gguf, Names
from trustcore.models.name_map import Rule, fused, kernel, plain
from trustcore.models.values import Values

_MODEL = (
    plain("embedding.table", "token_embd.weight"),
    plain("norm.weight", "output_norm.weight"),
    plain("norm.bias", "output_norm.bias"),
    kernel("output.kernel", "output.weight"),
    plain("positions.table", "position_embd.weight"),
)


def _product(path: str, stored: str) -> tuple[Rule, Rule]:
    return kernel(f"{path}.kernel", f"{stored}.weight"), plain(f"{path}.bias", f"{stored}.bias")


def _norm(path: str, stored: str) -> tuple[Rule, Rule]:
    return plain(f"{path}.weight", f"{stored}.weight"), plain(f"{path}.bias", f"{stored}.bias")


_NORMS = (
    *_norm("attention_norm", "attn_norm"),
    *_norm("mlp_norm", "ffn_norm"),
    *_norm("attention_post_norm", "post_attention_norm"),
    *_norm("mlp_post_norm", "post_ffw_norm"),
    plain("attention.query_norm.weight", "attn_q_norm.weight"),
    plain("attention.key_norm.weight", "attn_k_norm.weight"),
)
_QKV = (
    *_product("attention.query", "attn_q"),
    *_product("attention.key", "attn_k"),
    *_product("attention.value", "attn_v"),
)
_PARTS = ("query", "key", "value")
_QKV_FUSED = (
    fused([f"attention.{part}.kernel" for part in _PARTS], "attn_qkv.weight"),
    fused([f"attention.{part}.bias" for part in _PARTS], "attn_qkv.bias"),
)
_OUT = _product("attention.out", "attn_output")
_GATE = _product("mlp.gate", "ffn_gate")
_UP = _product("mlp.up", "ffn_up")
_GATE_UP_FUSED = (fused(["mlp.gate.kernel", "mlp.up.kernel"], "ffn_up.weight"),)
_DOWN = _product("mlp.down", "ffn_down")


def _names(layer: Sequence[Rule]) -> Names:
    layers = tuple(
        Rule(tuple(f"blocks.{{}}.{path}" for path in rule.paths), f"blk.{{}}.{rule.stored}", rule.rows_first, rule.groups)
        for rule in layer
    )
    return Names(_MODEL, layers, ignored=("rope_freqs.weight", ".attn_rot_embd.weight"))


SEPARATE = _names((*_NORMS, *_QKV, *_OUT, *_GATE, *_UP, *_DOWN))
_FUSED = {
    "phi3": _names((*_NORMS, *_QKV_FUSED, *_OUT, *_GATE_UP_FUSED, *_DOWN)),
    "gpt2": _names((*_NORMS, *_QKV_FUSED, *_OUT, *_UP, *_DOWN)),
}


def _qwen2(values: Values, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"qkv_bias": True}


def _qwen3(values: Values, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"qk_norm": "head"}


_READ = {"qwen2": _qwen2, "qwen3": _qwen3}


def gguf(name: str, *, interleaved: bool = False, own: bool = True) -> Gguf:
    """Returns how GGUF files of the architecture `name` hold a family; see `Gguf`."""
    return Gguf(
        name,
        _FUSED.get(name, SEPARATE),
        interleaved=interleaved,
        read=_READ.get(name, lambda values, fields: {}),
        own=own,
    )
