"""Methods that read a text: the files they lead to are closer to the float model where inputs differ in size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.convert.folders import hugging_face_folder
from trustcore.convert import prepare, quantize_checkpoint
from trustcore.errors import QuantizationError
from trustcore.loading import load
from trustcore.weights import open_checkpoint

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "12",
    "birds",
    "sing",
    "and",
    "345",
    "boats",
    "sail",
    "past",
    "an",
    "old",
    "grey",
    "mill",
]
TEXT = " ".join(WORDS[i * i % len(WORDS)] for i in range(900))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of Hugging Face's layout whose norms make some channels large, as trained models have them."""
    path = tmp_path_factory.mktemp("llama")
    hugging_face_folder(path)
    weights = load_file(path / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, array in weights.items():
        if "layernorm" in name:
            weights[name] = np.exp(rng.normal(0, 1.2, array.shape)).astype(np.float32)
    save_file(weights, path / "model.safetensors")
    return path


def error(model, path):
    """The mean squared difference of hidden states on the text."""
    tokens = jnp.asarray(np.array(model.tokenizer.encode(TEXT)[:512]).reshape(4, 128))
    run = jax.jit(lambda m: m.hidden_states(tokens)[0])
    return float(jnp.mean((run(model) - run(load(path, dtype="float32"))) ** 2))


def written(folder, out, prepared):
    quantize_checkpoint(folder, out, prepared.format, importance=prepared.importance, tensors=prepared.tensors)
    return out


def test_methods_lower_the_error(folder, tmp_path):
    model = load(folder, dtype="float32")
    quantize_checkpoint(folder, tmp_path / "plain.gguf", "q4_0")
    plain = error(model, tmp_path / "plain.gguf")
    for method, bound in {"imatrix": 0.97, "gptq": 0.92, "awq": 0.97}.items():
        prepared = prepare(folder, model, "q4_0", TEXT, method=method)
        found = error(model, written(folder, tmp_path / f"{method}.gguf", prepared))
        assert found < bound * plain, (method, found / plain)


def test_gptq_writes_its_own_codes_in_gguf_order(folder, tmp_path):
    model = load(folder, dtype="float32")
    prepared = prepare(folder, model, "q4_0", TEXT, method="gptq")
    path = written(folder, tmp_path / "m.gguf", prepared)
    with open_checkpoint(path) as file:
        for name, weight in prepared.tensors.items():
            assert file[name].encoding == "q4_0"
            assert np.array_equal(file[name].raw(), weight.to_blocks())
    assert {"blk.0.attn_q.weight", "blk.1.ffn_down.weight"} <= set(prepared.tensors)


def test_formats_keep_a_budget(folder, tmp_path):
    model = load(folder, dtype="float32")
    sizes = []
    for bits in (6.5, 8.0):
        prepared = prepare(folder, model, None, TEXT, bits_per_weight=bits)
        report = quantize_checkpoint(folder, tmp_path / "m.gguf", prepared.format, importance=prepared.importance)
        assert report.bits_per_weight <= bits
        sizes.append((report.nbytes, error(model, tmp_path / "m.gguf")))
    assert sizes[0][0] < sizes[1][0] and sizes[0][1] > sizes[1][1]
    with pytest.raises(QuantizationError, match=r"a budget of 2 bits a weight cannot be kept"):
        prepare(folder, model, None, TEXT, bits_per_weight=2)


def test_what_cannot_be_is_refused(folder):
    model = load(folder, dtype="float32")
    with pytest.raises(QuantizationError, match=r"method 'magic' is not known; choose one of imatrix, gptq, awq"):
        prepare(folder, model, "q4_0", TEXT, method="magic")
    with pytest.raises(QuantizationError, match=r"the calibration text has 2 tokens; at least 512 are needed"):
        prepare(folder, model, "q4_0", "a", method="gptq")
