"""Packing to a folder tensor by tensor: the files that packing in memory gives, and memory of one weight."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

import trustcore
from tests.convert.folders import hugging_face_folder
from tests.models import families, test_families
from tests.models.packed_folder import write_tokenizer
from tests.models.small import CONFIG, random_decoder, write_as_hugging_face
from trustcore.convert import folder as module
from trustcore.convert import quantize_checkpoint, quantize_to_folder
from trustcore.errors import CheckpointError, ModelError, QuantizationError
from trustcore.quant import QuantizedArray, hqq, report
from trustcore.quant.quantize import is_packable
from trustcore.weights.safetensors_writer import Planned, write_safetensors

SMALL = dataclasses.replace(CONFIG, vocab_size=96, hidden=128)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    write_as_hugging_face(folder, random_decoder(SMALL))
    write_tokenizer(folder, SMALL.vocab_size)
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def in_memory(source, out, format, *, scheme="trustcore", **options):
    """What is compared with: the model loaded, packed and saved. Returns the report."""
    model = trustcore.load(source)
    packed = trustcore.quantize(model, format, requantize=True, **options)
    trustcore.save(packed, out, scheme=scheme)
    return report(model, packed)


@pytest.mark.parametrize(
    ("format", "scheme"),
    [
        ("int4:g32:asym", "gptq"),  # zero points decide the version of the whole file
        ("q4_0", "awq"),
        ("int8:channel", "compressed-tensors"),
        pytest.param("nvfp4", "trustcore", marks=pytest.mark.slow),
    ],
)
def test_the_files_are_those_of_packing_in_memory(source, tmp_path, format, scheme):
    patterns = {"embedding.*": None, "output.*": None, "*": format}
    expected = in_memory(source, tmp_path / "a", patterns, scheme=scheme)
    found = quantize_to_folder(source, tmp_path / "b", patterns, scheme=scheme)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert_equal(found, expected)


def assert_equal(found, expected):
    assert [leaf.path for leaf in found.leaves] == [leaf.path for leaf in expected.leaves]
    for one, other in zip(found.leaves, expected.leaves, strict=True):
        assert (one.shape, one.format, one.bits_per_weight) == (other.shape, other.format, other.bits_per_weight)
        np.testing.assert_allclose(
            [one.sqnr_db, one.max_error, one.cosine], [other.sqnr_db, other.max_error, other.cosine], rtol=1e-5
        )


@pytest.mark.parametrize("format", ["q4_0", pytest.param("fp8_e4m3:128x128", marks=pytest.mark.slow), "int8:tensor"])
def test_matrices_in_several_pieces(source, tmp_path, monkeypatch, format):
    expected = in_memory(source, tmp_path / "a", format, search=False)
    monkeypatch.setattr(module, "PIECE", 1 << 11)
    found = quantize_to_folder(source, tmp_path / "b", format, method="nearest")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert_equal(found, expected)


@pytest.mark.parametrize("family", ["phi3", "qwen3_moe", "bert"])
def test_fused_matrices_and_experts(tmp_path, family):
    (tmp_path / "source").mkdir()
    if family == "bert":
        source = families.read(family).write(tmp_path / "source")
    else:
        source = test_families.write(tmp_path / "source", test_families.recorded(family))
    in_memory(source, tmp_path / "a", "q8_0", search=False)
    quantize_to_folder(source, tmp_path / "b", "q8_0", method="nearest")
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("encoding", ["f32", "f16"])
def test_a_gguf_source(tmp_path, encoding):
    (tmp_path / "source").mkdir()
    hugging_face_folder(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "in.gguf", encoding)
    in_memory(tmp_path / "in.gguf", tmp_path / "a", "q8_0")
    quantize_to_folder(tmp_path / "in.gguf", tmp_path / "b", "q8_0")
    assert "tokenizer.gguf" in files(tmp_path / "b") and files(tmp_path / "a") == files(tmp_path / "b")


def test_a_packed_source_is_packed_anew_where_that_is_allowed(source, tmp_path):
    patterns = {"embedding.*": None, "output.*": None, "*": "int8:channel"}
    quantize_to_folder(source, tmp_path / "a", patterns, method="nearest", scheme="compressed-tensors")
    with pytest.raises(QuantizationError, match="is packed already, and packing it again adds to its error"):
        quantize_to_folder(tmp_path / "a", tmp_path / "b", "int4:g32")
    patterns["*"] = "q4_0"
    in_memory(tmp_path / "a", tmp_path / "b", patterns)
    quantize_to_folder(tmp_path / "a", tmp_path / "c", patterns, requantize=True)
    assert files(tmp_path / "b") == files(tmp_path / "c")


def test_hqq(source, tmp_path):
    quantize_to_folder(source, tmp_path / "a", "int4:g32", method="hqq")
    trustcore.save(hqq(trustcore.load(source), "int4:g32", where=is_packable), tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_an_importance(source, tmp_path):
    importance = np.linspace(0.01, 4, SMALL.features, dtype=np.float32) ** 4
    weights = {f"blk.0.{name}.weight": importance for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")}
    quantize_to_folder(source, tmp_path / "a", "q4_0", importance=weights)
    found, model = trustcore.load(tmp_path / "a"), trustcore.load(source)
    for path, weighted in (("query", True), ("out", False)):
        before = getattr(model.blocks[0].attention, path).kernel.get_value()
        plain, fitted = (QuantizedArray.quantize(before, "q4_0", importance=i) for i in (None, importance))
        packed = getattr(found.blocks[0].attention, path).kernel.get_value()
        np.testing.assert_array_equal(packed.to_blocks(), (fitted if weighted else plain).to_blocks())
        assert not np.array_equal(fitted.to_blocks(), plain.to_blocks())


def test_what_is_kept(source, tmp_path):
    seen = []
    found = quantize_to_folder(
        source, tmp_path / "a", "q8_0", keep=["embed", "output"], progress=lambda *step: seen.append(step)
    )
    kinds = {leaf.path: leaf.format for leaf in found.leaves}
    assert kinds["embedding.table"] == kinds["output.kernel"] == "float32"
    assert kinds["blocks.0.mlp.up.kernel"] == "q8_0"
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "source"]


@pytest.mark.parametrize(
    ("format", "options", "error", "words"),
    [
        ("q9", {}, QuantizationError, "q9"),
        ("int4:g7", {}, QuantizationError, "g7|multiple"),
        ("int4:g32", {"keep": ["head"]}, QuantizationError, "keep: head match no weight"),
        ("int4:g32", {"method": "gptq"}, QuantizationError, "method is 'gptq'; choose from nearest, search, hqq"),
        ("nf4", {"method": "hqq"}, QuantizationError, "hqq: format 'nf4' is none of int2"),
        ("int4:g32", {"scheme": "marlin"}, ModelError, "scheme is 'marlin'; choose from"),
        ("nf4", {"scheme": "gptq"}, ModelError, "gptq holds int2, int3, int4 and int8"),
        ("int4:g32", {"importance": {"blk.9.up.weight": np.ones(64)}}, ModelError, "is no weight of a decoder"),
    ],
)
def test_faults_leave_nothing(source, tmp_path, format, options, error, words):
    with pytest.raises(error, match=words):
        quantize_to_folder(source, tmp_path / "out", format, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_weights_that_cannot_be_packed(source, tmp_path):
    from safetensors.numpy import load_file

    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(QuantizationError, match=r"quantize: blocks\.0\.mlp\.up\.kernel: .*1 of the weights"):
        quantize_to_folder(source, tmp_path / "out", "int4:g32")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match="the folder is not empty"):
        quantize_to_folder(source, tmp_path / "taken", "int4:g32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "taken"]


MEASURE = """
import json
from trustcore.convert import quantize_to_folder

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

quantize_to_folder({small!r}, {small!r} + "-out", "q8_0", method="nearest", scheme={scheme!r})  # programs are made
with open("/proc/self/clear_refs", "w") as file:  # the peak counts from here on
    file.write("5")
before = status("VmRSS")
quantize_to_folder({large!r}, {large!r} + "-out", "q8_0", method="nearest", scheme={scheme!r})
print(status("VmHWM") - before)
"""


def write_llama(folder, layers, features=512, hidden=2048):
    """A float32 model of `layers` layers of 17 MB, written tensor by tensor; returns its bytes."""
    rng = np.random.default_rng(0)

    def planned(*shape):
        return Planned(shape, np.dtype(np.float32), lambda: rng.standard_normal(shape, np.float32))

    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": features, "vocab_size": 64,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_act": "silu",
        "intermediate_size": hidden, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    tensors = {"model.embed_tokens.weight": planned(64, features), "model.norm.weight": planned(features)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        tensors |= {f"{layer}self_attn.{name}_proj.weight": planned(features, features) for name in "qkvo"}
        tensors |= {f"{layer}mlp.{name}_proj.weight": planned(hidden, features) for name in ("gate", "up")}
        tensors[f"{layer}mlp.down_proj.weight"] = planned(features, hidden)
        tensors |= {f"{layer}{n}.weight": planned(features) for n in ("input_layernorm", "post_attention_layernorm")}
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("scheme", ["trustcore", pytest.param("compressed-tensors", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_model(fresh_python, tmp_path, scheme):
    """Of a model of 203 MB, whose largest matrix has 4 MB, less than half of it is in memory at a time."""
    write_llama(tmp_path / "one", 1)
    assert write_llama(tmp_path / "twelve", 12) > 200e6
    source = MEASURE.format(small=str(tmp_path / "one"), large=str(tmp_path / "twelve"), scheme=scheme)
    growth = int(fresh_python(source))
    assert growth < 100e6, growth
