"""Families in GGUF files: llama.cpp's logits of what we write, and both kinds of files give the same model."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import gguf_models as small
from tests.models.test_families import load, logits, recorded, step, write
from trustcore.errors import ModelError
from trustcore.models import DecoderConfig
from trustcore.models.families import gguf_of
from trustcore.models.to_gguf import gguf_divisors, gguf_metadata, gguf_tensors
from trustcore.weights import open_checkpoint
from trustcore.weights.gguf_writer import write_gguf

RECORDED = Path(__file__).parents[1] / "data" / "gguf_decoders.npz"
# llama.cpp takes GELU from a table of half-precision numbers.
GELU = ("gemma", "gemma2", "gemma3", "gpt2", "gpt_neox", "gpt_neox_sequential", "bloom", "falcon", "falcon_grouped")
TOLERANCE = dict.fromkeys(GELU, 1e-2)


@pytest.mark.parametrize("name", small.CONFIGS)
def test_logits_of_llama_cpp(tmp_path, name):
    with np.load(RECORDED) as file:
        expected, tokens = file[name], jnp.asarray(file["tokens"], jnp.int32)[None]
    small.write(tmp_path / "m.gguf", small.random_model(name))
    model = load(tmp_path / "m.gguf")
    found = step(model, model.new_cache(1, 256), tokens, jnp.ones(tokens.shape, bool))[0][
        0
    ]  # llama.cpp's context: LongRoPE goes by it
    np.testing.assert_allclose(found, expected, atol=TOLERANCE.get(name, 2e-4))


# The files that transformers wrote, with what GGUF cannot say brought to what it takes for granted.
FOLDERS = {
    "llama": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention"] * 3},
    "phi3": {},
    "phi3_long": {},
    "gpt2": {},
    "mixtral": {},
    "qwen3_moe": {},
    "gpt_oss": {},
    "deepseek_v2": {},
    "deepseek_v3": {"rope_parameters": None},
    "llama4_text": {
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "no_rope_layers": [1, 1, 1],
        "layer_types": ["chunked_attention"] * 3,
    },
    "smollm3": {"no_rope_layers": [1, 1]},
    "granite": {},
    "olmo2": {},
    "stablelm": {},
    "cohere": {},
    "gpt_neox": {},
    "bloom": {},
    "falcon": {},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_becomes_a_file_of_the_same_model(tmp_path, name):
    """Norms less one, transposed and fused matrices, rotary rows: each kind of file in its own way."""
    case = recorded(name)
    case["config"] = json.dumps({**json.loads(str(case["config"])), **FOLDERS[name]})
    path = write(tmp_path, case)
    theirs = load(path)
    with open_checkpoint(path) as checkpoint:
        config = DecoderConfig.from_hugging_face(checkpoint.metadata["config"])
        tensors = {}
        for key, (tensor, rows) in gguf_tensors(config, checkpoint).items():
            array = np.array(tensor.numpy() if rows is None else tensor.numpy()[rows])
            assert array.shape == tuple(tensor.shape)
            tensors[key] = array
            tensor.release()
    write_gguf(tmp_path / "m.gguf", gguf_metadata(config), {**gguf_divisors(config), **tensors})
    ours = load(tmp_path / "m.gguf")
    assert ours.config.family == theirs.config.family
    np.testing.assert_allclose(logits(ours, case["tokens"]), logits(theirs, case["tokens"]), atol=2e-5)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "gemma2",
            {"query_pre_attn_scalar": 12},
            "cannot say that scores are scaled by 0.288675; for 2 layers it is 0.25",
        ),
        ("gemma2", {"sliding_window": None}, "cannot say that other layers than the usual ones have a window"),
        ("gemma2", {"attn_logit_softcapping": None}, "always have soft caps of scores and of logits"),
        (
            "gemma3",
            {"attn_logit_softcapping": 2.0, "layer_types": ["sliding_attention"] * 3},
            "know no soft cap of scores",
        ),
        ("qwen2_moe", {}, "cannot say that some layers have no experts"),
        ("qwen2_moe", {"mlp_only_layers": [], "norm_topk_prob": True}, "of experts normalize is True, not False"),
        ("qwen3_moe", {"norm_topk_prob": False}, "of experts normalize is False, not True"),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}, "other layers than every second one"),
        ("gpt_oss", {"swiglu_limit": 5.0}, r"clip is \(5.0, 1.702\), not \(7.0, 1.702\)"),
        ("llama4_text", {}, "hold models with chunks of 8192 and positions in all layers but every fourth"),
        ("llama4_text", {"moe_layers": [0, 1]}, "cannot say that other layers than every n-th one have experts"),
        ("smollm3", {}, "know no window, and positions in all layers but every fourth"),
        ("stablelm", {"tie_word_embeddings": True}, "have an output table; this model's is the embedding table"),
        ("cohere", {"tie_word_embeddings": False}, "have no output table"),
        ("cohere", {"use_qk_norm": True}, "with 2 layers cannot say that heads are normalized"),
        ("gpt_neox", {"attention_bias": False}, "have biases of queries, keys and values; this model has none"),
        ("falcon_alibi", {}, "GGUF files of falcon know no"),
        ("deepseek_v3", {}, "whose mscale and mscale_all_dim are the same, and not zero"),
        ("deepseek_v2", {"moe_layer_freq": 2, "first_k_dense_replace": 0}, "whose first layers alone have no experts"),
    ],
)
def test_what_gguf_cannot_say_is_refused(name, changes, message):
    config = {**json.loads(str(recorded(name)["config"])), "query_pre_attn_scalar": 16, **changes}
    with pytest.raises(ModelError, match=message):
        gguf_metadata(DecoderConfig.from_hugging_face(config))


def test_a_family_without_a_place_in_gguf_is_refused():
    config = DecoderConfig.from_hugging_face(json.loads(str(recorded("opt")["config"])))
    with pytest.raises(ModelError, match="opt has no place in GGUF files here; families that have one: llama, mistral"):
        gguf_of(config)
