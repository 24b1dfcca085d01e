"""`quantize_checkpoint`: what it writes, byte for byte; what it refuses; that memory does not grow with a model."""

from __future__ import annotations

import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.convert.folders import square_gguf
from tests.models.small import some_tokens, write_as_gguf
from trustcore.convert import quantize, quantize_checkpoint
from trustcore.errors import CheckpointError, QuantizationError
from trustcore.models import decoder_from_checkpoint
from trustcore.quant import QuantizedArray
from trustcore.quant.encode import ENCODERS
from trustcore.weights import open_checkpoint
from trustcore.weights.gguf_types import GGML_IDS
from trustcore.weights.gguf_writer import write_gguf

WRITABLE = [name for name in ENCODERS if name in GGML_IDS and name != "q8_k"]  # which no file holds
WEIGHED = ("iq1", "iq2", "iq3_xxs")  # encoders that want an importance


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "model.gguf"
    square_gguf(path)
    return path


def matrices(path):
    with open_checkpoint(path) as checkpoint:
        return {name: array.numpy() for name, array in checkpoint.items() if len(array.shape) == 2}


@pytest.mark.parametrize("format", WRITABLE)
def test_every_format_is_written_as_the_encoder_packs_it(source, tmp_path, format):
    importance = {name: np.ones(256) for name in matrices(source)} if format.startswith(WEIGHED) else None
    report = quantize_checkpoint(source, tmp_path / "m.gguf", format, pure=True, search=False, importance=importance)
    read_by_gguf = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    with open_checkpoint(tmp_path / "m.gguf") as written, open_checkpoint(source) as original:
        assert list(written) == list(original)
        for tensor in report.tensors:
            array = written[tensor.name]
            if len(array.shape) == 1:
                assert array.encoding == "f32"
                np.testing.assert_array_equal(array.numpy(), original[tensor.name].numpy())
                continue
            assert (array.encoding, tensor.format, array.nbytes) == (format, format, tensor.nbytes)
            packed = QuantizedArray.quantize(
                jnp.asarray(original[tensor.name].numpy().T), format, search=False,
                importance=None if importance is None else importance[tensor.name],
            )  # fmt: skip
            np.testing.assert_array_equal(array.raw(), packed.to_blocks())
            stored = read_by_gguf[tensor.name]
            assert stored.tensor_type.name.lower() == format
            np.testing.assert_array_equal(np.asarray(stored.data).view(np.uint8).reshape(-1), array.raw().reshape(-1))
        assert written.metadata["general.quantization_version"] == 2


def test_the_model_that_was_written_computes_what_its_weights_say(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "m.gguf", "q8_0")
    with open_checkpoint(source) as one, open_checkpoint(tmp_path / "m.gguf") as other:
        before, after = decoder_from_checkpoint(one), decoder_from_checkpoint(other)
    tokens = some_tokens() % 256
    np.testing.assert_allclose(after(tokens), before(tokens), atol=0.1)
    assert not np.array_equal(after(tokens), before(tokens))


@pytest.mark.parametrize("format", ["f32", "f16", "bf16"])
def test_floats_are_written_too(source, tmp_path, format):
    report = quantize_checkpoint(source, tmp_path / "m.gguf", format)
    with open_checkpoint(tmp_path / "m.gguf") as written:
        for name, before in matrices(source).items():
            assert written[name].encoding == format
            np.testing.assert_array_equal(written[name].numpy(), before.astype(written[name].dtype))
        assert written.metadata["general.file_type"] == {"f32": 0, "f16": 1, "bf16": 32}[format]
    exact = [tensor.sqnr_db is None for tensor in report.tensors if len(tensor.shape) == 2]
    assert all(exact) == (format == "f32")


def test_a_file_is_the_same_whatever_the_pieces(source, tmp_path, monkeypatch):
    importance = {"blk.0.ffn_up.weight": np.linspace(0, 1, 256)}
    options = {"importance": importance, "search": False, "keep": ["output"]}
    whole = quantize_checkpoint(source, tmp_path / "whole.gguf", "q4_0", **options)
    monkeypatch.setattr(quantize, "PIECE", 256 * 100)
    pieces = quantize_checkpoint(source, tmp_path / "pieces.gguf", "q4_0", **options)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()
    for one, other in zip(whole.tensors, pieces.tensors, strict=True):
        assert (one.sqnr_db or 0) == pytest.approx(other.sqnr_db or 0, abs=1e-3)


def test_stacks_of_experts_are_packed_with_an_importance_each(tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "PIECE", 64 * 20)
    rng = np.random.default_rng(0)
    stack = rng.standard_normal((3, 32, 64)).astype(np.float32)
    weight = rng.uniform(0, 1, (3, 64)).astype(np.float32)
    name = "blk.0.ffn_up_exps.weight"
    write_gguf(tmp_path / "in.gguf", {"general.architecture": "x"}, {name: stack})
    quantize_checkpoint(tmp_path / "in.gguf", tmp_path / "out.gguf", "q4_0", importance={name: weight}, search=False)
    with open_checkpoint(tmp_path / "out.gguf") as written:
        for i in range(3):
            packed = QuantizedArray.quantize(jnp.asarray(stack[i].T), "q4_0", importance=weight[i], search=False)
            np.testing.assert_array_equal(written[name].raw()[i], packed.to_blocks())


def test_an_importance_moves_the_error_to_where_it_costs_less(source, tmp_path):
    name = "blk.0.ffn_up.weight"
    weight = np.where(np.arange(256) % 4 == 0, 1.0, 1e-3)
    errors = []
    for importance in ({}, {name: weight}):
        quantize_checkpoint(source, tmp_path / "m.gguf", {name: "q4_0"}, importance=importance)
        with open_checkpoint(tmp_path / "m.gguf") as written:
            after = QuantizedArray.from_blocks("q4_0", written[name].raw(), transposed=True).dequantize()
        errors.append(float(np.sum(weight * (matrices(source)[name] - np.asarray(after)) ** 2)))
    assert errors[1] < 0.7 * errors[0]


def test_patterns_and_functions_choose_by_tensor(source, tmp_path):
    def formats_of(path):
        with open_checkpoint(path) as written:
            return {name: array.encoding for name, array in written.items() if len(array.shape) == 2}

    wanted = {"*attn_*": "q8_0", "*ffn_down*": None, "blk.*": "q4_0"}
    report = quantize_checkpoint(source, tmp_path / "patterns.gguf", wanted)
    found = formats_of(tmp_path / "patterns.gguf")
    assert {found[f"blk.0.attn_{part}.weight"] for part in ("q", "k", "v", "output")} == {"q8_0"}
    assert found["blk.0.ffn_up.weight"] == "q4_0" and found["blk.0.ffn_down.weight"] == "f32"
    assert found["token_embd.weight"] == "f32" and report.format == "by tensor"

    quantize_checkpoint(source, tmp_path / "function.gguf", lambda name, shape: "q8_0" if "ffn" in name else None)
    found = formats_of(tmp_path / "function.gguf")
    assert found["blk.0.ffn_up.weight"] == "q8_0" and found["blk.0.attn_q.weight"] == "f32"


def test_what_is_kept_stays_as_it_is(source, tmp_path):
    report = quantize_checkpoint(source, tmp_path / "m.gguf", "q8_0", keep=["output", "embed", "*ffn_up*"])
    kept = {tensor.name: tensor.format for tensor in report.tensors if tensor.note == "kept"}
    assert kept == {name: "f32" for name in ("token_embd.weight", "output.weight", "blk.0.ffn_up.weight")}


def test_rows_that_blocks_do_not_divide_take_another_format_and_the_report_says_so(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"blk.0.{n}.weight": rng.standard_normal((256, k)) for n, k in (("a", 256), ("b", 96), ("c", 40))}
    write_gguf(tmp_path / "in.gguf", {}, {name: array.astype(np.float32) for name, array in arrays.items()})
    report = quantize_checkpoint(tmp_path / "in.gguf", tmp_path / "out.gguf", "q4_k", search=False)
    found = {tensor.name[6]: (tensor.format, tensor.note) for tensor in report.tensors}
    assert found == {
        "a": ("q4_k", ""), "b": ("q5_0", "q4_k takes rows of 256"), "c": ("f16", "q4_k takes rows of 256")
    }  # fmt: skip


def test_what_stands_in_for_tensors_is_written(source, tmp_path):
    rng = np.random.default_rng(1)
    floats, norm = rng.standard_normal((256, 256)).astype(np.float32), np.full(256, 2.0, np.float32)
    packed = QuantizedArray.quantize(jnp.asarray(floats), "q4_1", transposed=True)
    given = {"blk.0.ffn_up.weight": packed, "blk.0.ffn_gate.weight": floats, "output_norm.weight": norm}
    report = quantize_checkpoint(source, tmp_path / "m.gguf", "q8_0", tensors=given)
    with open_checkpoint(tmp_path / "m.gguf") as written:
        np.testing.assert_array_equal(written["blk.0.ffn_up.weight"].raw(), packed.to_blocks())
        assert written["blk.0.ffn_up.weight"].encoding == "q4_1"
        expected = QuantizedArray.quantize(jnp.asarray(floats.T), "q8_0").to_blocks()
        np.testing.assert_array_equal(written["blk.0.ffn_gate.weight"].raw(), expected)
        np.testing.assert_array_equal(written["output_norm.weight"].numpy(), norm)
    assert next(t for t in report.tensors if t.name == "blk.0.ffn_up.weight").sqnr_db < 3  # other weights altogether


def test_what_is_packed_already_needs_leave(tmp_path):
    model = square_gguf(tmp_path / "unused.gguf")
    write_as_gguf(tmp_path / "q8.gguf", model, "q8_0")
    with pytest.raises(QuantizationError, match=r"blk\.0\.attn_q\.weight is q8_0 already, .*--requantize"):
        quantize_checkpoint(tmp_path / "q8.gguf", tmp_path / "m.gguf", "q4_0")
    assert not (tmp_path / "m.gguf").exists()
    quantize_checkpoint(tmp_path / "q8.gguf", tmp_path / "again.gguf", "q8_0")
    with open_checkpoint(tmp_path / "q8.gguf") as one, open_checkpoint(tmp_path / "again.gguf") as other:
        for name in one:
            np.testing.assert_array_equal(one[name].raw(), other[name].raw())
    quantize_checkpoint(tmp_path / "q8.gguf", tmp_path / "f32.gguf", "f32")  # decoding loses nothing
    quantize_checkpoint(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "q4_0", requantize=True, search=False)
    with open_checkpoint(tmp_path / "f32.gguf") as decoded, open_checkpoint(tmp_path / "q4.gguf") as again:
        name = "blk.0.attn_q.weight"
        expected = QuantizedArray.quantize(jnp.asarray(decoded[name].numpy().T), "q4_0", search=False).to_blocks()
        np.testing.assert_array_equal(again[name].raw(), expected)


def test_metadata_are_handed_on(tmp_path):
    metadata = {
        "general.architecture": "x", "general.alignment": 64, "x.block_count": 3, "x.scale": 0.5, "x.flag": True,
        "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 1], "tokenizer.ggml.scores": [0.0, 1.0],
        "tokenizer.ggml.precompiled_charsmap": np.arange(4, dtype=np.uint8), "split.no": 0, "split.count": 1,
    }  # fmt: skip
    write_gguf(tmp_path / "in.gguf", metadata, {"a": np.zeros(3, np.float16)}, alignment=64)
    quantize_checkpoint(tmp_path / "in.gguf", tmp_path / "out.gguf", "q4_0")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert not {"split.no", "split.count", "general.alignment"} & set(fields)
    T = gguf.GGUFValueType
    for key, kinds in {
        "x.block_count": [T.UINT32], "x.scale": [T.FLOAT32], "x.flag": [T.BOOL],
        "tokenizer.ggml.token_type": [T.ARRAY, T.INT32], "tokenizer.ggml.scores": [T.ARRAY, T.FLOAT32],
        "tokenizer.ggml.precompiled_charsmap": [T.ARRAY, T.UINT8], "general.file_type": [T.UINT32],
    }.items():  # fmt: skip
        assert fields[key].types == kinds
    assert fields["general.file_type"].contents() == 2
    with open_checkpoint(tmp_path / "out.gguf") as written:
        assert written["a"].encoding == "f32"


@pytest.mark.parametrize(
    ("format", "options", "words"),
    [
        ("q9_9", {}, "format 'q9_9' is not known; choose one of f32, f16"),
        ({"*": "q9_9"}, {}, "format 'q9_9' is not known"),
        ({"*nothing*": "q4_0"}, {}, r"pattern '\*nothing\*' matches no matrix \(names look like"),
        ("q8_k", {}, "q8_k is what llama.cpp makes of activations on the way; no file of weights has it. Choose q8_0"),
        ("q4_0", {"keep": ["head"]}, "keep: 'head' matches no tensor; give 'output', 'embed' or a name like"),
        ("q4_0", {"importance": {"x": np.ones(4)}}, "importance: there is no tensor x"),
        ("q4_0", {"importance": {"output.weight": np.ones(4)}}, r"the importance is \[4\], expected .*: \[256\]"),
        ("q4_0", {"tensors": {"x": np.ones(4)}}, "tensors: there is no tensor x"),
        ("q4_0", {"tensors": {"output.weight": np.ones((2, 2))}}, r"has shape \[2, 2\], expected \[256, 256\]"),
    ],
)
def test_faults_are_told_before_anything_is_written(source, tmp_path, format, options, words):
    with pytest.raises(QuantizationError, match=words):
        quantize_checkpoint(source, tmp_path / "m.gguf", format, **options)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_packed_leave_the_old_file(tmp_path):
    bad = np.ones((4, 64), np.float32)
    bad[2, 5] = np.nan
    write_gguf(tmp_path / "in.gguf", {}, {"a.weight": np.ones((4, 64), np.float32), "b.weight": bad})
    (tmp_path / "out.gguf").write_text("old")
    with pytest.raises(QuantizationError, match=r"b\.weight, rows 0 to 4: q4_0: 1 of the weights"):
        quantize_checkpoint(tmp_path / "in.gguf", tmp_path / "out.gguf", "q4_0")
    assert (tmp_path / "out.gguf").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "in.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError):
        quantize_checkpoint(tmp_path / "in.gguf", tmp_path / "out.gguf", "q4_0")
    save_file({"a": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"there is no config\.json beside the weights"):
        quantize_checkpoint(tmp_path / "model.safetensors", tmp_path / "out.gguf", "q4_0")


def test_progress_reaches_the_end_and_the_report_adds_up(source, tmp_path):
    seen = []
    report = quantize_checkpoint(source, tmp_path / "m.gguf", "q8_0", progress=lambda *step: seen.append(step))
    assert seen == sorted(seen) and seen[-1] == (report.source_bytes, report.source_bytes)
    found = json.loads(json.dumps(report.as_json(), allow_nan=False))
    with open_checkpoint(tmp_path / "m.gguf") as written:
        assert found["nbytes"] == sum(array.nbytes for array in written.values())
        assert [t["name"] for t in found["tensors"]] == list(written)
    assert found["parameters"] == 9 * 256 * 256 + 3 * 256
    assert 8.5 < found["bits_per_weight"] < 8.6


def test_memory_does_not_grow_with_the_model(fresh_python, tmp_path):
    """A model of eight matrices of 32 MB takes hardly more than one of a single matrix."""
    source = """
        import resource, sys
        import numpy as np
        from trustcore.convert import quantize_checkpoint
        from trustcore.weights.gguf_writer import StreamedTensor, write_gguf
        rows = np.random.default_rng(0).standard_normal((512, 4096), np.float32)
        tensors = {f"blk.{i}.a.weight": StreamedTensor((2048, 4096), "f32", lambda: [rows] * 4) for i in range(COUNT)}
        write_gguf("FOLDER/in.gguf", {}, tensors)
        quantize_checkpoint("FOLDER/in.gguf", "FOLDER/out.gguf", "q8_0", search=False)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    """.replace("FOLDER", str(tmp_path))
    one, eight = (int(fresh_python(source.replace("COUNT", count))) for count in ("1", "8"))
    assert eight - one < 32 << 20, (one, eight)
