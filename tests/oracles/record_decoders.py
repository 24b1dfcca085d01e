"""Records the logits of transformers on a small random model of each decoder family, as `tests/data/decoders/*.npz`.

The oracles are no test dependencies. In a virtual environment of its own (CPU):

    pip install torch transformers==5.23.0
    python tests/oracles/record_decoders.py --out tests/data/decoders [NAME ...]
    python tests/oracles/record_decoders.py --out tests/data/decoders --check     compares instead of writing

A file holds the tensors as `save_pretrained` stores them (`weights/NAME`), its config.json (`config`), the tokens
`[B, T]`, and float32 logits `[B, T, V]`: of all tokens (`plain`), and of rows padded on the left and on the right, for
which `left_mask` and `right_mask` say which tokens count. Positions count the tokens that do, as in generation. Weights
are rounded to bfloat16, which halves the files; vectors are random too, so that a swapped pair shows.
"""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

V, D, F, T = 48, 32, 40, 12
LENGTHS = (12, 7)

LLAMA = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
GEMMA = {**LLAMA, "head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 5}
LATENT = {
    **LLAMA, "num_hidden_layers": 3, "num_key_value_heads": 4, "moe_intermediate_size": 24, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.7,
}  # fmt: skip
LLAMA4 = {
    **LLAMA, "num_hidden_layers": 3, "head_dim": 16, "intermediate_size": 24, "intermediate_size_mlp": F,
    "num_local_experts": 4, "num_experts_per_tok": 1, "no_rope_layer_interval": 3, "attention_chunk_size": 5,
    "floor_scale": 3, "attn_scale": 0.4, "pad_token_id": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
FALCON = {
    "vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
BLOOM = {"vocab_size": V, "hidden_size": D, "n_layer": 2, "n_head": 4}

# Name -> (model class, configuration class, its arguments).
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**LLAMA, "sliding_window": 5, "head_dim": 16}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 16}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**LLAMA, "head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **GEMMA, "num_hidden_layers": 3, "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**LLAMA, "pad_token_id": 0, "sliding_window": 5}),
    "phi3_long": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            **LLAMA, "pad_token_id": 0, "original_max_position_embeddings": 8, "partial_rotary_factor": 0.5,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.5, 3.0], "short_factor": [1.0, 1.25],
                "partial_rotary_factor": 0.5, "original_max_position_embeddings": 8,
            },
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            **LLAMA, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24, "norm_topk_prob": False, "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **LLAMA, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "norm_topk_prob": True,
            "head_dim": 16,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 32},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**NEOX, "rotary_pct": 0.5, "use_parallel_residual": True}),
    "gpt_neox_serial": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**NEOX, "rotary_pct": 1.0, "use_parallel_residual": False, "attention_bias": False},
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", LLAMA),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {**LLAMA, "no_rope_layers": [1, 0], "pad_token_id": 0}),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        {
            **LLAMA, "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "attention_multiplier": 0.3,
            "logits_scaling": 2.0, "tie_word_embeddings": True,
        },
    ),
    "stablelm": (
        "StableLmForCausalLM",
        "StableLmConfig",
        {**LLAMA, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    ),
    "stablelm_parallel": (
        "StableLmForCausalLM",
        "StableLmConfig",
        {**LLAMA, "use_parallel_residual": True, "qk_layernorm": True, "partial_rotary_factor": 0.25},
    ),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**LLAMA, "logit_scale": 0.25}),
    "cohere_norms": ("CohereForCausalLM", "CohereConfig", {**LLAMA, "use_qk_norm": True}),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**FALCON, "multi_query": True}),
    "falcon_grouped": (
        "FalconForCausalLM",
        "FalconConfig",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "falcon_alibi": (
        "FalconForCausalLM",
        "FalconConfig",
        {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": F,
            "max_position_embeddings": 32, "word_embed_proj_dim": D,
        },
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", BLOOM),
    "bloom_heads": ("BloomForCausalLM", "BloomConfig", {**BLOOM, "hidden_size": 24, "n_head": 6}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5, "head_dim": 16,
            "rope_parameters": {**YARN, "truncate": False, "beta_fast": 4.0, "beta_slow": 1.0},
        },
    ),
    "llama4_text": ("Llama4ForCausalLM", "Llama4TextConfig", LLAMA4),
    "llama4_interleaved": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **LLAMA4, "interleave_moe_layer_step": 2, "use_qk_norm": False, "attention_bias": True,
            "attn_temperature_tuning": False, "num_experts_per_tok": 2, "no_rope_layers": [1, 0, 1],
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 1.0, "original_max_position_embeddings": 16,
            },
        },
    ),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {**LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **LATENT, "q_lora_rank": 20, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
        },
    ),
}  # fmt: skip


def main() -> None:
    """Writes the files, or compares them with what the library says now."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of the cases; all where none is given")
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--check", action="store_true", help="compare with the files that are there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.names or CASES:
        found = record(*CASES[name])
        path = args.out / f"{name}.npz"
        if args.check:
            with np.load(path) as kept:
                for key in ("plain", "left", "right"):
                    np.testing.assert_allclose(found[key], kept[key], atol=1e-5, err_msg=f"{name}: {key}")
        else:
            np.savez_compressed(path, **found)
        print(f"{name}: {path.stat().st_size} bytes, logits up to {np.abs(found['plain']).max():.2f}")


def record(model_class: str, config_class: str, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the arrays of one file."""
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**options)
    # Eager attention of Falcon adds ALiBi to the scores that have it from their mask already.
    config._attn_implementation = "sdpa" if options.get("alibi") else "eager"
    model = getattr(transformers, model_class)(config).float().eval()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for key, value in state.items():
            if key.endswith(("inv_freq", "attn.bias", "masked_bias", "embed_scale")) or not value.is_floating_point():
                continue
            if value.ndim == 1:
                value += 0.3 * torch.randn_like(value)
            else:
                value.copy_(
                    torch.randn_like(value) * (0.5 if "embed" in key or "wte" in key else 1.2 / value.shape[-1] ** 0.5)
                )
            value.copy_(value.bfloat16().float())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder) / "model.safetensors")
        described = json.loads((Path(folder) / "config.json").read_text())
    arrays: dict[str, Any] = {f"weights/{key}": value for key, value in weights.items()}
    arrays["config"] = np.array(json.dumps(described))
    arrays["versions"] = np.array(f"transformers {transformers.__version__}, torch {torch.__version__}")
    tokens = torch.randint(1, V, (2, T))
    scaled = described.get("attn_temperature_tuning", False)
    count = torch.arange(T)[None]
    lengths = torch.tensor(LENGTHS)[:, None]
    masks = {"plain": None, "left": count >= T - lengths, "right": count < lengths}
    arrays["tokens"] = tokens.numpy()
    for key, mask in masks.items():
        arrays[key] = logits_of_rows(model, tokens, mask) if scaled and key == "left" else logits(model, tokens, mask)
        if mask is not None:
            arrays[f"{key}_mask"] = mask.numpy()
    return arrays


def logits(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None) -> np.ndarray:
    """Returns the library's logits; `mask` says which tokens count."""
    given: dict[str, Any] = {}
    if mask is not None:
        given["attention_mask"] = mask.long()
        if "position_ids" in inspect.signature(model.forward).parameters:
            given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False, **given).logits.numpy()


def logits_of_rows(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """Returns the logits of each row without its padding, in its place, and zeros elsewhere.

    For Llama 4, where the library counts padding in the positions that scale queries, and nowhere else.
    """
    found = np.zeros((*tokens.shape, V), np.float32)
    for row, keep, place in zip(tokens, mask, found, strict=True):
        place[keep.numpy()] = logits(model, row[keep][None], None)[0]
    return found


if __name__ == "__main__":
    main()
