"""Experts in GGUF files, and packed: stacks stay packed, older spellings give the same model, saving keeps both."""

import functools

import gguf
import jax
import numpy as np
import pytest

import trustcore
from tests.models import gguf_models as small
from tests.models.test_families import load, logits
from trustcore.errors import ModelError
from trustcore.models.families import gguf_of
from trustcore.models.model import parameters_of
from trustcore.models.to_gguf import gguf_metadata
from trustcore.quant import QuantizedArray
from trustcore.weights.gguf_writer import write_gguf


@functools.cache
def model_of(name):
    return small.random_model(name)


def packed_file(path, model, encoding):
    """Writes matrices and stacks packed, those that the blocks divide; returns how many weights were."""
    kind, packed = getattr(gguf.GGMLQuantizationType, encoding.upper()), 0
    tensors = {}
    for name, array in small.gguf_tensors_of(model).items():
        if (
            name.endswith(".weight")
            and array.ndim > 1
            and "gate_inp" not in name
            and array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        ):
            rows = gguf.quants.quantize(array.reshape(-1, array.shape[-1]), kind).view(np.uint8)
            tensors[name], packed = (rows.reshape(*array.shape[:-1], -1), encoding), packed + array.size
        else:
            tensors[name] = array
    write_gguf(path, {**gguf_metadata(model.config), "tokenizer.ggml.model": "none"}, tensors)
    return packed


@pytest.mark.parametrize(
    ("name", "encoding"), [("mixtral", "q8_0"), ("qwen2_moe", "q4_0"), ("gpt_oss", "q8_0"), ("deepseek_v3", "f16")]
)
def test_what_is_packed_stays_packed(tmp_path, name, encoding):
    count = packed_file(tmp_path / "m.gguf", model_of(name), encoding)
    model = load(tmp_path / "m.gguf")
    held = {path: p.get_value() for path, p in parameters_of(model).items()}
    assert sum(w.size for w in held.values() if isinstance(w, QuantizedArray)) == count
    assert isinstance(held[f"blocks.{model.config.layers - 1}.mlp.experts.gate.kernel"], QuantizedArray)
    tokens = small.TOKENS[None]
    plain = load(tmp_path / "m.gguf", dtype="float32")
    assert not any(isinstance(p.get_value(), QuantizedArray) for p in parameters_of(plain).values())
    np.testing.assert_allclose(logits(model, tokens), logits(plain, tokens), atol=5e-5)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2"])
def test_names_of_earlier_programs(tmp_path, name):
    """Experts one by one; the keys and values of latents as one matrix, without the sizes that came with its parts."""
    model = model_of(name)
    values = {path: np.asarray(p.get_value()) for path, p in parameters_of(model).items()}
    (names,) = gguf_of(model.config).older.values()
    tensors = {}
    for rule in names.rules(model.config):
        if rule.paths[0] in values:
            pieces = map(np.ascontiguousarray, rule.join([values[path] for path in rule.paths]))
            tensors |= dict(zip(rule.names, pieces, strict=True))
    metadata = gguf_metadata(model.config)
    if name == "deepseek_v2":
        for size in ("key_length", "value_length"):
            metadata[f"deepseek2.attention.{size}"] = metadata.pop(f"deepseek2.attention.{size}_mla")
        metadata["deepseek2.attention.head_count_kv"] = model.config.heads
        assert tensors["blk.0.attn_kv_b.weight"].shape == (4 * (16 + 12), 24)
    else:
        assert tensors["blk.1.ffn_down.3.weight"].shape == (64, 96)
    write_gguf(tmp_path / "m.gguf", metadata, tensors)
    found = load(tmp_path / "m.gguf")
    for path, parameter in parameters_of(found).items():
        np.testing.assert_array_equal(np.asarray(parameter.get_value()), values[path], err_msg=path)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_quantize_packs_stacks_and_save_keeps_them(tmp_path, name):
    model = trustcore.quantize(model_of(name), "q8_0")
    path = "blocks.0.mlp.experts.down.kernel"
    packed = parameters_of(model)[path].get_value()
    assert isinstance(packed, QuantizedArray) and packed.shape == (4, 96, 64)
    assert not isinstance(parameters_of(model)["blocks.0.mlp.router.kernel"].get_value(), QuantizedArray)
    trustcore.save(model, tmp_path / "saved")
    back = load(tmp_path / "saved" / "model.safetensors")
    np.testing.assert_array_equal(parameters_of(back)[path].get_value().dequantize(), packed.dequantize())
    tokens = small.TOKENS[None]
    floats = jax.tree.map(
        lambda w: w.dequantize() if isinstance(w, QuantizedArray) else w,
        model,
        is_leaf=lambda w: isinstance(w, QuantizedArray),
    )
    np.testing.assert_allclose(logits(back, tokens), logits(floats, tokens), atol=5e-5)


def test_an_architecture_with_and_without_experts(tmp_path):
    metadata = gguf_metadata(model_of("mixtral").config)
    assert metadata["general.architecture"] == "llama"
    tensors = {"token_embd.weight": np.zeros((64, 64), np.float32)}
    write_gguf(tmp_path / "m.gguf", {**metadata, "llama.expert_count": 1 << 20}, tensors)
    with pytest.raises(ModelError, match="1048576 of them; more than 65536 are not believed"):
        load(tmp_path / "m.gguf")
    metadata = gguf_metadata(model_of("qwen2_moe").config)
    del metadata["qwen2moe.expert_count"]
    write_gguf(tmp_path / "m.gguf", metadata, tensors)
    with pytest.raises(ModelError, match=r"architecture 'qwen2moe' has no experts \(expert_count\); others have some"):
        load(tmp_path / "m.gguf")


def test_the_gate_of_a_shared_expert_is_a_vector_in_the_file():
    model = model_of("qwen2_moe")
    kernel = parameters_of(model)["blocks.1.mlp.shared_gate.kernel"].get_value()
    assert kernel.shape == (64, 1)
    np.testing.assert_array_equal(small.gguf_tensors_of(model)["blk.1.ffn_gate_inp_shexp.weight"], kernel[:, 0])
