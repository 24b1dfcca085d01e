"""Configurations as files hold them: read right, or refused with the key named."""

import json

import pytest

from tests.models.test_families import recorded
from trustcore.errors import ModelError
from trustcore.models import DecoderConfig

GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e5,
    "llama.rope.dimension_count": 16,
    "llama.context_length": 512,
}
HUGGING_FACE = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "max_position_embeddings": 512,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}


def gguf(**changes):
    values = {k: v for k, v in {**GGUF, **changes}.items() if v is not None}
    return DecoderConfig.from_gguf(values, vocab_size=100, tied=True)


def hugging_face(**changes):
    return DecoderConfig.from_hugging_face({**HUGGING_FACE, **changes})


def test_both_files_describe_the_same_model_but_for_the_pairing():
    ours, theirs = gguf(), hugging_face()
    assert (ours.features, ours.layers, ours.heads, ours.kv_heads, ours.head_dim, ours.hidden) == (64, 2, 4, 2, 16, 96)
    assert ours.rope.interleaved and not theirs.rope.interleaved
    assert ours.rope.theta == theirs.rope.theta == 1e5
    for name in ("vocab_size", "features", "layers", "heads", "kv_heads", "head_dim", "hidden", "context", "tied"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.norm_eps == theirs.norm_eps == 1e-5


def test_families_and_switches():
    assert hugging_face(model_type="qwen2").qkv_bias and not hugging_face(model_type="qwen2").out_bias
    assert hugging_face(attention_bias=True).out_bias
    assert hugging_face(model_type="mistral", sliding_window=128).window == 128
    assert hugging_face(model_type="qwen2", sliding_window=128, use_sliding_window=False).window is None
    assert hugging_face(head_dim=32).head_dim == 32
    assert hugging_face(partial_rotary_factor=0.5).rope.size == 8


def test_rope_scaling_of_both_files():
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = hugging_face(rope_scaling={**llama3, "original_max_position_embeddings": 256}).rope
    assert (rope.scaling, rope.factor, rope.original_context) == ("llama3", 8.0, 256)
    assert hugging_face(rope_scaling={"type": "linear", "factor": 2.0}).rope.scaling == "linear"
    assert hugging_face(rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope.theta == 7.0
    yarn = gguf(**{"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}).rope
    assert yarn.scaling == "yarn" and yarn.original_context == 512 and yarn.magnitude == pytest.approx(1.1386, abs=1e-4)
    assert gguf(**{"llama.rope.scale_linear": 4.0}).rope.scaling == "linear"


@pytest.mark.parametrize(
    ("read", "changes", "message"),
    (
        (
            gguf,
            {"general.architecture": "mamba"},
            "general.architecture is 'mamba'; supported GGUF architectures: llama",
        ),
        (gguf, {"general.architecture": 7}, "general.architecture is 7"),
        (gguf, {"llama.block_count": None}, "metadata: block_count is missing"),
        (gguf, {"llama.block_count": "two"}, "block_count is 'two'; expected an integer"),
        (gguf, {"llama.block_count": 1 << 40}, "block_count is 1099511627776"),
        (gguf, {"llama.attention.head_count": 0}, "attention.head_count is 0"),
        (gguf, {"llama.attention.head_count_kv": 3}, "3 key-value heads do not divide 4"),
        (gguf, {"llama.attention.head_count_kv": [2, 2]}, r"head_count_kv is \[2, 2\]"),
        (gguf, {"llama.rope.freq_base": float("inf")}, "rope.freq_base is inf; expected a number"),
        (gguf, {"llama.rope.dimension_count": 18}, "rope turns 18 channels of heads that have 16"),
        (gguf, {"llama.rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'; supported: none"),
        (gguf, {"llama.attention.value_length": 8}, "attention.value_length differs"),
        (hugging_face, {"model_type": "gpt9"}, "model_type is 'gpt9'; supported: llama, mistral, qwen2"),
        (hugging_face, {"hidden_act": "softmax"}, "hidden_act is 'softmax'; supported: silu"),
        (hugging_face, {"hidden_size": True}, "hidden_size is True"),
        (hugging_face, {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; expected true or false"),
        (hugging_face, {"rope_scaling": "big"}, "rope_scaling is 'big'; expected an object"),
        (hugging_face, {"rope_scaling": {"type": "su"}}, "rope_scaling type is 'su'"),
    ),
)
def test_errors(read, changes, message):
    with pytest.raises(ModelError, match=message):
        read(**changes)


def recorded_config(name, **changes):
    return {**json.loads(str(recorded(name)["config"])), **changes}


def test_older_spellings_give_the_same_configuration():
    """Files from before `rope_parameters` and `layer_types`."""
    read = DecoderConfig.from_hugging_face
    gemma3 = recorded_config("gemma3", rope_parameters=None, layer_types=None, rope_theta=1e6, rope_local_base_freq=1e4)
    assert read({**gemma3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}) == read(recorded_config("gemma3"))
    gemma2 = recorded_config("gemma2")
    assert read({k: v for k, v in gemma2.items() if k != "layer_types"}) == read(gemma2)
    neox = recorded_config("gpt_neox", rope_parameters=None, rotary_pct=0.5, rotary_emb_base=10000)
    assert read(neox) == read(recorded_config("gpt_neox"))
    qwen3 = recorded_config("qwen3_moe", num_experts=6)
    assert read({k: v for k, v in qwen3.items() if k != "num_local_experts"}) == read(recorded_config("qwen3_moe"))
    llama4 = recorded_config("llama4_text")
    unsaid = ("layer_types", "moe_layers", "no_rope_layers")
    assert read({**{k: v for k, v in llama4.items() if k not in unsaid}, "attn_temperature_tuning": 4}) == read(llama4)
    outer = {"model_type": "gemma3", "text_config": recorded_config("gemma3"), "vision_config": {}}
    assert read(outer) == read(recorded_config("gemma3"))


def test_patterns_over_layers():
    def layers(name, **changes):
        config = DecoderConfig.from_hugging_face(recorded_config(name, **changes))
        return [config.layer(i) for i in range(config.layers)]

    assert [x.window for x in layers("gemma3")] == [5, 5, None]
    assert [x.rope.theta for x in layers("gemma3")] == [1e4, 1e4, 1e6]
    assert [x.rope is None for x in layers("smollm3")] == [False, True]
    assert [x.rope is None for x in layers("smollm3", no_rope_layers=None, no_rope_layer_interval=1)] == [True, True]
    assert [(x.rope is None, x.chunk) for x in layers("llama4_text")] == [(False, 5), (False, 5), (True, None)]
    apart = {"layer_types": ["full_attention", "chunked_attention", "full_attention"], "moe_layers": [0]}
    assert [(x.chunk, x.experts) for x in layers("llama4_text", **apart)] == [(None, True), (5, False), (None, False)]
    assert not any(x.chunk for x in layers("llama4_text", attention_chunk_size=None))
    assert [x.experts for x in layers("qwen2_moe")] == [True, False]
    assert [x.experts for x in layers("qwen2_moe", mlp_only_layers=[], decoder_sparse_step=2)] == [False, True]
    assert [x.experts for x in layers("deepseek_v2")] == [False, True, True]
    window = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1, "layer_types": None}
    assert [x.window for x in layers("qwen3", **window)] == [None, 7]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma2", {"layer_types": ["sliding_attention"]}, "layer_types is .*; expected a list of 2 of str"),
        ("llama4_text", {"layer_types": ["sliding_attention"] * 3}, "layer_types has 'sliding_attention'; known: full"),
        ("llama4_text", {"attention_chunk_size": -5}, "attention_chunk_size is -5"),
        ("llama4_text", {"attn_temperature_tuning": "no"}, "attn_temperature_tuning is 'no'; expected true or false"),
        ("llama4_text", {"floor_scale": 0}, "the temperature of queries steps every 0.0 positions; above 0"),
        ("gemma2", {"layer_types": ["chunked", "full_attention"]}, "layer_types has 'chunked'"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "score_cap is -1.0; it must be positive"),
        ("gemma2", {"num_hidden_layers": 1 << 30, "layer_types": None}, "more than 65536 are not believed"),
        ("gemma3", {"rope_parameters": {"full_attention": 3}}, "rope_scaling is 3; expected an object"),
        ("phi3_long", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1, 1]}}, "no long_factor"),
        (
            "phi3_long",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [0, 1], "long_factor": [1, 1]}},
            "no short_factor of positive numbers",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true; that is not"),
        ("gpt2", {"activation_function": "tanhshrink"}, "activation_function is 'tanhshrink'; supported: silu"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is false"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim is 16"),
        ("mixtral", {"num_experts_per_tok": 5}, "5 of 4 are active"),
        ("mixtral", {"num_local_experts": -1}, "num_local_experts is -1"),
        ("deepseek_v3", {"n_group": 3}, "2 of 3 groups of 8 experts"),
        ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'; supported: greedy"),
        ("bloom", {"hidden_size": 33}, "4 heads do not divide hidden_size = 33"),
    ],
)
def test_what_no_family_can_be(name, changes, message):
    with pytest.raises(ModelError, match=message):
        DecoderConfig.from_hugging_face(recorded_config(name, **changes))
