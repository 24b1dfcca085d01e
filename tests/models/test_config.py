"""Configurations as files hold them: read right, or refused with the key named."""

import pytest

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
