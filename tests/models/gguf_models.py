"""Small random decoders of the families that GGUF files hold, from a seed alone, and their files."""

import zlib

import jax.numpy as jnp
import numpy as np

from trustcore.models import Decoder, DecoderConfig
from trustcore.models.families import gguf_of
from trustcore.models.model import parameters_of
from trustcore.models.to_gguf import gguf_divisors, gguf_metadata
from trustcore.weights.gguf_writer import write_gguf

SHAPE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
GEMMA = {**SHAPE, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 5}
LONG = {
    "rope_type": "longrope", "long_factor": [1.0 + i / 4 for i in range(8)],
    "short_factor": [1.0 + i / 9 for i in range(8)], "original_max_position_embeddings": 32,
}  # fmt: skip
CONFIGS = {
    "llama": {**SHAPE, "model_type": "llama"},
    "qwen2": {**SHAPE, "model_type": "qwen2"},
    "qwen3": {**SHAPE, "model_type": "qwen3", "head_dim": 32},
    "gemma": {**SHAPE, "model_type": "gemma", "head_dim": 32, "num_key_value_heads": 1},
    "gemma2": {
        **GEMMA, "model_type": "gemma2", "num_hidden_layers": 3, "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 9.0,
    },
    "gemma3": {
        **GEMMA, "model_type": "gemma3_text", "num_hidden_layers": 7, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3": {**SHAPE, "model_type": "phi3"},
    "phi3_long": {**SHAPE, "model_type": "phi3", "rope_scaling": LONG},
    "gpt2": {"model_type": "gpt2", "vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
}  # fmt: skip
EXPERTS = {**SHAPE, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 48}
LATENT = {
    **SHAPE, "num_hidden_layers": 3, "num_key_value_heads": 4, "moe_intermediate_size": 32, "kv_lora_rank": 24,
    "q_lora_rank": 40, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS |= {
    "mixtral": {**SHAPE, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**EXPERTS, "model_type": "qwen3_moe", "norm_topk_prob": True, "head_dim": 32},
    # A ramp of YaRN's that begins before the first pair and ends behind the last: llama.cpp rounds its ends.
    "gpt_oss": {
        **SHAPE, "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5,
        "head_dim": 32, "rope_theta": 2.0,
        "rope_scaling": {**YARN, "original_max_position_embeddings": 64, "truncate": False},
    },
    "deepseek_v2": {
        **LATENT, "model_type": "deepseek_v2", "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
    },
    "deepseek_v3": {
        **LATENT, "model_type": "deepseek_v3", "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
    },
}  # fmt: skip
CONFIGS |= {
    "llama4": {
        **SHAPE, "model_type": "llama4_text", "num_hidden_layers": 5, "head_dim": 32, "intermediate_size_mlp": 48,
        "num_local_experts": 4, "num_experts_per_tok": 2, "interleave_moe_layer_step": 2, "attention_chunk_size": 8192,
    },
    "smollm3": {**SHAPE, "model_type": "smollm3", "num_hidden_layers": 5},
    "granite": {
        **SHAPE, "model_type": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 0.4,
        "attention_multiplier": 0.2, "logits_scaling": 2.5,
    },
    "olmo2": {**SHAPE, "model_type": "olmo2"},
    "stablelm": {**SHAPE, "model_type": "stablelm", "use_qkv_bias": True, "partial_rotary_factor": 0.25},
    "stablelm_parallel": {
        **SHAPE, "model_type": "stablelm", "head_dim": 16, "qk_layernorm": True, "use_parallel_residual": True,
    },
    "cohere": {**SHAPE, "model_type": "cohere", "logit_scale": 0.25},
    "gpt_neox": {**SHAPE, "model_type": "gpt_neox", "rotary_pct": 0.5, "num_key_value_heads": 4},
    "gpt_neox_sequential": {**SHAPE, "model_type": "gpt_neox", "rotary_pct": 0.25, "use_parallel_residual": False},
    "bloom": {"model_type": "bloom", "vocab_size": 64, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "falcon": {**SHAPE, "model_type": "falcon", "multi_query": True},
    "falcon_grouped": {**SHAPE, "model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
}  # fmt: skip
TOKENS = np.random.default_rng(7).integers(0, 64, 14)


def random_model(name):
    model = Decoder(DecoderConfig.from_hugging_face(CONFIGS[name]))
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for path, parameter in sorted(parameters_of(model).items()):
        shape = parameter.get_value().shape
        spread = 0.2 if len(shape) == 1 else 0.5 if path.endswith("table") else 1.2 / shape[-2] ** 0.5
        values = rng.standard_normal(shape) * spread + (path.endswith("norm.weight"))
        parameter.set_value(jnp.asarray(values, jnp.float32))
    return model


def gguf_tensors_of(model):
    """Returns the arrays of the file by name, made by the name map from the model itself."""
    values = {path: np.asarray(parameter.get_value()) for path, parameter in parameters_of(model).items()}
    rules = [rule for rule in gguf_of(model.config).names.rules(model.config) if rule.paths[0] in values]
    return {rule.stored: np.ascontiguousarray(rule.join([values[p] for p in rule.paths])[0]) for rule in rules}


def write(path, model):
    """Writes a file of weights alone: it takes and gives token ids."""
    metadata = {**gguf_metadata(model.config), "tokenizer.ggml.model": "none"}
    write_gguf(path, metadata, {**gguf_divisors(model.config), **gguf_tensors_of(model)})
