"""Families before Llama: layer norms with biases, a feed-forward without a gate, fused queries, keys and values.

GPT-2, GPT-NeoX and Pythia, OPT, BLOOM, Falcon.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trustcore.errors import ModelError
from trustcore.models.config import DecoderConfig
from trustcore.models.families.described import activation, positions, scaling, sizes
from trustcore.models.families.family import Family
from trustcore.models.families.fields import ACTIVATIONS, rope_of
from trustcore.models.families.gguf import gguf
from trustcore.models.families.gguf_layer_norm import BLOOM, FALCON, GPT_NEOX
from trustcore.models.families.llama import OUTPUT
from trustcore.models.name_map import Rule, joined, kernel, linear, norm, plain
from trustcore.models.names import Names, under
from trustcore.models.values import Values

_PARTS = ("query", "key", "value")


def _linear_in_out(path: str, stored: str) -> tuple[Rule, Rule]:
    """GPT-2's Conv1D, whose matrices lie [in, out]."""
    return plain(f"{path}.kernel", f"{stored}.weight"), plain(f"{path}.bias", f"{stored}.bias")


_QKV = ("attention.query", "attention.key", "attention.value")


def _blocks(block: str, *rules: Rule) -> tuple[Rule, ...]:
    return under("blocks.{}.", block, rules)


_GPT2 = Names(
    (plain("embedding.table", "wte.weight"), plain("positions.table", "wpe.weight"), *norm("norm", "ln_f")),
    _blocks(
        "h.{}.",
        *(*norm("attention_norm", "ln_1"), *joined(_QKV, "attn.c_attn", rows_first=False), *norm("mlp_norm", "ln_2")),
        *_linear_in_out("attention.out", "attn.c_proj"),
        *_linear_in_out("mlp.up", "mlp.c_fc"),
        *_linear_in_out("mlp.down", "mlp.c_proj"),
    ),
    OUTPUT,
    prefix="transformer.",
    prefixes=("",),
    ignored=("*.attn.bias", "*.attn.masked_bias"),
)
_NEOX = Names(
    (plain("embedding.table", "embed_in.weight"), *norm("norm", "final_layer_norm")),
    _blocks(
        "layers.{}.",
        *norm("attention_norm", "input_layernorm"),
        *norm("mlp_norm", "post_attention_layernorm"),
        *joined(_QKV, "attention.query_key_value", groups="kv_heads"),
        *linear("attention.out", "attention.dense"),
        *linear("mlp.up", "mlp.dense_h_to_4h"),
        *linear("mlp.down", "mlp.dense_4h_to_h"),
    ),
    (kernel("output.kernel", "embed_out.weight"),),
    prefix="gpt_neox.",
    ignored=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
)
_OPT = Names(
    (
        plain("embedding.table", "embed_tokens.weight"),
        plain("positions.table", "embed_positions.weight"),
        *norm("norm", "final_layer_norm"),
    ),
    _blocks(
        "layers.{}.",
        *norm("attention_norm", "self_attn_layer_norm"),
        *norm("mlp_norm", "final_layer_norm"),
        *(rule for part in _PARTS for rule in linear(f"attention.{part}", f"self_attn.{part[0]}_proj")),
        *linear("attention.out", "self_attn.out_proj"),
        *linear("mlp.up", "fc1"),
        *linear("mlp.down", "fc2"),
    ),
    OUTPUT,
    prefix="model.decoder.",
    prefixes=("decoder.",),
)


def _bloom_names(attention_norm: str, mlp_norm: str) -> Names:
    """The names of BLOOM and Falcon, whose norms differ."""
    return Names(
        (
            plain("embedding.table", "word_embeddings.weight"),
            *norm("embedding_norm", "word_embeddings_layernorm"),
            *norm("norm", "ln_f"),
        ),
        _blocks(
            "h.{}.",
            *norm("attention_norm", attention_norm),
            *norm("mlp_norm", mlp_norm),
            *joined(_QKV, "self_attention.query_key_value", groups="kv_heads"),
            *linear("attention.out", "self_attention.dense"),
            *linear("mlp.up", "mlp.dense_h_to_4h"),
            *linear("mlp.down", "mlp.dense_4h_to_h"),
        ),
        OUTPUT,
        prefix="transformer.",
        prefixes=("",),
    )


_BLOOM = _bloom_names("input_layernorm", "post_attention_layernorm")


def _falcon_names(config: DecoderConfig) -> Names:
    """The norms of a parallel block with two of them have names of their own."""
    two = config.parallel and not config.shared_norm
    return _bloom_names("ln_attn", "ln_mlp") if two else _BLOOM


def _shape(values: Values, names: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a decoder whose every head has keys of its own; `names` are the keys of the file."""
    heads, features = values.integer(names["heads"]), values.integer(names["features"])
    context = values.integer(names["context"], 2048)
    if features % heads:
        raise ModelError(f"config.json: {heads} heads do not divide {names['features']} = {features}.")
    return {
        "vocab_size": values.integer("vocab_size"),
        "features": features,
        "layers": values.integer(names["layers"]),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": features // heads,
        "hidden": values.integer(names["hidden"], 4 * features) if "hidden" in names else 4 * features,
        "context": context,
        "rope": None,
        "norm": "layer",
        "norm_bias": True,
        "norm_eps": values.number(names["eps"], 1e-5),
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "gated": False,
        "tied": values.flag("tie_word_embeddings", True),
    }


_LLAMA_KEYS = {
    "heads": "num_attention_heads", "features": "hidden_size", "context": "max_position_embeddings",
    "layers": "num_hidden_layers", "hidden": "intermediate_size", "eps": "layer_norm_eps",
}  # fmt: skip
_GPT2_KEYS = {
    "heads": "n_head", "features": "n_embd", "context": "n_positions", "layers": "n_layer", "hidden": "n_inner",
    "eps": "layer_norm_epsilon",
}  # fmt: skip


def _read_gpt2(values: Values) -> Mapping[str, Any]:
    _refuse(values, "scale_attn_by_inverse_layer_idx", "add_cross_attention")
    fields = _shape(values.with_defaults(n_positions=1024), _GPT2_KEYS)
    scaled = values.flag("scale_attn_weights", True)
    return {
        **fields,
        "activation": values.choice("activation_function", "gelu_new", ACTIVATIONS),
        "learned_positions": fields["context"],
        "attention_scale": None if scaled else 1.0,
    }


def _read_neox(values: Values) -> Mapping[str, Any]:
    fields = _shape(values, _LLAMA_KEYS)
    bias = values.flag("attention_bias", True)
    return {
        **fields,
        "rope": rope_of(
            values,
            fields["head_dim"],
            fields["context"],
            theta=values.number("rotary_emb_base", 10000.0),
            partial=values.number("rotary_pct", 0.25),
        ),
        "activation": values.choice("hidden_act", "gelu", ACTIVATIONS),
        "parallel": values.flag("use_parallel_residual", True),
        "qkv_bias": bias,
        "out_bias": bias,
        "tied": values.flag("tie_word_embeddings", False),
    }


def _read_opt(values: Values) -> Mapping[str, Any]:
    fields = _shape(values, {**_LLAMA_KEYS, "hidden": "ffn_dim"})
    if values.integer("word_embed_proj_dim", fields["features"]) != fields["features"]:
        raise ModelError(
            f"config.json: word_embed_proj_dim is {values.get('word_embed_proj_dim')}; embeddings of another width "
            "than the model's are not supported."
        )
    if not values.flag("do_layer_norm_before", True):
        raise ModelError("config.json: do_layer_norm_before is false; norms on the stream itself are not supported.")
    if not values.flag("layer_norm_elementwise_affine", True):
        raise ModelError("config.json: layer_norm_elementwise_affine is false; norms need a gain.")
    bias = values.flag("enable_bias", True)
    return {
        **fields,
        "activation": values.choice("activation_function", "relu", ACTIVATIONS),
        "learned_positions": fields["context"] + 2,  # its first two rows are of padding
        "position_offset": 2,
        "last_norm": not values.flag("_remove_final_layer_norm", False),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bias,
    }


def _read_bloom(values: Values) -> Mapping[str, Any]:
    _refuse(values, "apply_residual_connection_post_layernorm")
    features = "hidden_size" if "hidden_size" in values else "n_embed"
    keys = {**_GPT2_KEYS, "features": features, "context": "seq_length"}
    del keys["hidden"]  # always four times the width
    return {**_shape(values, keys), "activation": "gelu_tanh", "embedding_norm": True, "alibi": 1.0}


def _read_falcon(values: Values) -> Mapping[str, Any]:
    fields = _shape(values, {**_LLAMA_KEYS, "hidden": "ffn_hidden_size", "eps": "layer_norm_epsilon"})
    grouped = values.flag("new_decoder_architecture", False)
    shared_keys = values.flag("multi_query", True)
    kv_heads = values.integer("num_kv_heads", fields["heads"]) if grouped else 1 if shared_keys else fields["heads"]
    parallel = grouped or values.flag("parallel_attn", True)
    bias = values.flag("bias", False)
    alibi = values.flag("alibi", False)
    return {
        **fields,
        "kv_heads": kv_heads,
        "rope": None if alibi else rope_of(values, fields["head_dim"], fields["context"]),
        "alibi": fields["head_dim"] ** -0.5 if alibi else None,  # it is added before scores are scaled
        "activation": values.choice("activation", "gelu", ACTIVATIONS),
        "parallel": parallel,
        "shared_norm": parallel and not (grouped and values.integer("num_ln_in_parallel_attn", 2) == 2),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bias,
    }


def _refuse(values: Values, *flags: str) -> None:
    for flag in flags:
        if values.flag(flag, False):
            raise ModelError(f"config.json: {flag} is true; that is not supported.")


def _describe_gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.features,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_positions": config.context,
        "n_inner": config.hidden,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": activation(config),
        "scale_attn_weights": config.attention_scale is None,
        "tie_word_embeddings": config.tied,
    }


def _describe_neox(config: DecoderConfig) -> dict[str, Any]:
    rope = config.rope
    assert rope is not None
    return {
        **sizes(config),
        "layer_norm_eps": config.norm_eps,
        "rotary_pct": rope.size / config.head_dim,
        "rotary_emb_base": rope.theta,
        "rope_scaling": scaling(rope, config.context),
        "use_parallel_residual": config.parallel,
        "attention_bias": config.qkv_bias,
    }


def _describe_opt(config: DecoderConfig) -> dict[str, Any]:
    entries = sizes(config)
    entries["activation_function"] = entries.pop("hidden_act")
    entries["ffn_dim"] = entries.pop("intermediate_size")
    return {
        **entries,
        "word_embed_proj_dim": config.features,
        "do_layer_norm_before": True,
        "enable_bias": config.qkv_bias,
        "_remove_final_layer_norm": not config.last_norm,
    }


def _describe_bloom(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.features,
        "n_layer": config.layers,
        "n_head": config.heads,
        "seq_length": config.context,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }


def _describe_falcon(config: DecoderConfig) -> dict[str, Any]:
    entries = sizes(config)
    entries["activation"] = entries.pop("hidden_act")
    entries["ffn_hidden_size"] = entries.pop("intermediate_size")
    grouped = config.parallel and (not config.shared_norm or config.kv_heads not in (1, config.heads))
    return {
        **entries,
        **positions(config),
        "layer_norm_epsilon": config.norm_eps,
        "new_decoder_architecture": grouped,
        "num_ln_in_parallel_attn": 1 if config.shared_norm else 2,
        "num_kv_heads": config.kv_heads,
        "multi_query": config.kv_heads == 1,
        "parallel_attn": config.parallel,
        "bias": config.qkv_bias,
        "alibi": config.alibi is not None,
    }


FAMILIES = (
    Family("gpt2", "GPT-2", "GPT2LMHeadModel", _read_gpt2, _describe_gpt2, _GPT2, gguf=gguf("gpt2")),
    Family("gpt_neox", "GPT-NeoX, Pythia", "GPTNeoXForCausalLM", _read_neox, _describe_neox, _NEOX, gguf=GPT_NEOX),
    Family("opt", "OPT", "OPTForCausalLM", _read_opt, _describe_opt, _OPT),
    Family("bloom", "BLOOM", "BloomForCausalLM", _read_bloom, _describe_bloom, _BLOOM, gguf=BLOOM),
    Family("falcon", "Falcon", "FalconForCausalLM", _read_falcon, _describe_falcon, _falcon_names, gguf=FALCON),
)
