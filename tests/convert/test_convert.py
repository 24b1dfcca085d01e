"""Conversion from every kind of checkpoint to every kind: the same numbers, the files beside them, all or nothing."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save_file

from tests.convert.folders import hugging_face_folder
from tests.models import families
from tests.models.small import CONFIG, random_decoder, some_tokens, write_as_gguf
from tests.models.test_packed_checkpoints import gptq_config
from tests.weights.torch_files import archive, state, storage, tensor
from trustcore.convert import convert as module
from trustcore.convert import convert_checkpoint
from trustcore.errors import CheckpointError, ModelError
from trustcore.models import decoder_from_checkpoint
from trustcore.weights import open_checkpoint
from trustcore.weights.folder import appearing

FULL = dataclasses.replace(CONFIG, vocab_size=320, rope=dataclasses.replace(CONFIG.rope, size=CONFIG.head_dim))


def numbers(path):
    with open_checkpoint(path) as checkpoint:
        return {name: np.array(array.numpy()) for name, array in checkpoint.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        np.testing.assert_array_equal(found[name], array)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of Hugging Face's with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    hugging_face_folder(path)
    return path


def as_pytorch(folder, arrays):
    keys = {name: str(index) for index, name in enumerate(arrays)}
    parts = {
        name: tensor(0, a.shape, [s // a.itemsize for s in a.strides], of=storage(keys[name], a.size))
        for name, a in arrays.items()
    }
    data = archive(state(**parts), {keys[name]: a.tobytes() for name, a in arrays.items()})
    (folder / "pytorch_model.bin").write_bytes(data)


def as_flax(folder, arrays):
    tree = {}
    for name, array in arrays.items():
        node = tree
        *parts, last = name.split(".")
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = array
    (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))


SOURCES = {
    "safetensors": lambda folder, arrays: save_file(arrays, folder / "model.safetensors"),
    "pytorch": as_pytorch,
    "npz": lambda folder, arrays: np.savez_compressed(folder / "model.npz", **arrays),
    "flax": as_flax,
}


@pytest.mark.parametrize("source", SOURCES)
def test_any_checkpoint_to_a_folder_of_safetensors(tmp_path, folder, source):
    arrays = numbers(folder)
    (tmp_path / "in").mkdir()
    SOURCES[source](tmp_path / "in", arrays)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "in" / name).write_bytes((folder / name).read_bytes())
    steps = []
    report = convert_checkpoint(tmp_path / "in", tmp_path / "out", progress=lambda *done: steps.append(done))
    assert_same(numbers(tmp_path / "out"), arrays)
    assert report.source_kind == source and report.kind == "safetensors" and report.verification is None
    assert report.tensors == len(arrays) and report.nbytes == sum(a.nbytes for a in arrays.values())
    assert report.files == ("config.json", "tokenizer.json", "tokenizer_config.json")
    assert steps[-1] == (report.source_bytes, report.source_bytes) and steps == sorted(steps)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_a_dtype_and_shards(tmp_path, folder):
    arrays = numbers(folder)
    extra = {**arrays, "ids": np.arange(5), "flags": np.array([True])}
    (tmp_path / "in").mkdir()
    save_file(extra, tmp_path / "in" / "model.safetensors", metadata={"note": "kept"})
    (tmp_path / "in" / "config.json").write_text('{"model_type": "other", "torch_dtype": "float32"}')
    convert_checkpoint(tmp_path / "in", tmp_path / "out", dtype="bfloat16", shard_size="30kB")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 4 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(path.stat().st_size < 45_000 for path in (tmp_path / "out").glob("*.safetensors"))
    wanted = {k: a.astype(ml_dtypes.bfloat16) if a.dtype == np.float32 else a for k, a in extra.items()}
    assert_same(numbers(tmp_path / "out"), wanted)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.metadata["note"] == "kept"
        assert checkpoint.metadata["config"] == {"model_type": "other", "torch_dtype": "bfloat16"}


def test_one_file_goes_alone_and_replaces_what_was_there(tmp_path, folder):
    (tmp_path / "m.safetensors").write_bytes(b"before")
    report = convert_checkpoint(folder, tmp_path / "m.safetensors", verify=True)
    assert os.listdir(tmp_path) == ["m.safetensors"] and report.files == ()
    assert_same(numbers(tmp_path / "m.safetensors"), numbers(folder))
    assert report.verification.max_difference == 0 and report.verification.agreement == 1


def test_orbax_and_back(tmp_path, folder):
    pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint (pip install 'trustcore[orbax]')")
    report = convert_checkpoint(folder, tmp_path / "o", kind="orbax", verify=True)
    assert report.kind == "orbax" and report.verification.max_difference == 0
    assert_same(numbers(tmp_path / "o"), numbers(folder))
    convert_checkpoint(tmp_path / "o", tmp_path / "back")
    assert_same(numbers(tmp_path / "back"), numbers(folder))
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_gguf_and_back(tmp_path, folder):
    """Rotary rows go from halves to pairs and back; what was float32 stays, bit for bit."""
    report = convert_checkpoint(folder, tmp_path / "m.gguf", verify=True)
    assert report.kind == "gguf" and report.verification.max_difference < 1e-4 * report.verification.max_logit
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.metadata["tokenizer.ggml.model"] == "gpt2"
        assert {array.encoding for array in checkpoint.values()} == {"f32"}
    report = convert_checkpoint(tmp_path / "m.gguf", tmp_path / "back", verify=True)
    assert_same(numbers(tmp_path / "back"), numbers(folder))
    assert report.files == ("config.json", "tokenizer.gguf")
    import trustcore

    model, again = trustcore.load(folder), trustcore.load(tmp_path / "back")
    assert again.tokenizer.encode("Hello, world 12") == model.tokenizer.encode("Hello, world 12")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_packed_gguf_file_is_decoded_where_a_dtype_is_given(tmp_path, dtype):
    write_as_gguf(tmp_path / "m.gguf", random_decoder(FULL), "q8_0")
    with pytest.raises(CheckpointError, match=r"stored as q8_0, which this format does not hold\. Give a dtype"):
        convert_checkpoint(tmp_path / "m.gguf", tmp_path / "out")
    report = convert_checkpoint(tmp_path / "m.gguf", tmp_path / "out", dtype=dtype, verify=True)
    assert report.verification.limit == (1e-4 if dtype == "float32" else 0.1)
    with open_checkpoint(tmp_path / "m.gguf") as a, open_checkpoint(tmp_path / "out") as b:
        assert {array.encoding for array in b.values()} == {"f32" if dtype == "float32" else "f16"}
        one, other = (decoder_from_checkpoint(c, dtype=jnp.float32)(some_tokens()) for c in (a, b))
    np.testing.assert_allclose(other, one, atol=2e-5 if dtype == "float32" else 2e-2)
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "n.gguf")  # as it is
    with open_checkpoint(tmp_path / "m.gguf") as a, open_checkpoint(tmp_path / "n.gguf") as b:
        for name, array in a.items():
            np.testing.assert_array_equal(array.raw(), b[name].raw())


def test_packed_models_of_our_own_layout_keep_their_header_in_each_shard(tmp_path):
    import trustcore
    from tests.test_saving import assert_same as assert_models
    from tests.test_saving import load, model_of

    model = model_of("int4:g64:asym")
    trustcore.save(model, tmp_path / "in")
    convert_checkpoint(tmp_path / "in", tmp_path / "out", shard_size="70kB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert_models(load(tmp_path / "out"), model)
    first = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    from trustcore.weights.packed_layout import packed_tensors

    packed_tensors(open_checkpoint(first))  # what a shard says of itself is true of it alone
    with pytest.raises(CheckpointError, match="the matrices are packed, and a dtype would change their scales"):
        convert_checkpoint(tmp_path / "in", tmp_path / "n", dtype="float16")


def test_models_that_other_packages_packed_are_copied_and_not_cast(tmp_path):
    from tests.models import packers
    from tests.models.packed_folder import write_packed

    write_packed(tmp_path / "in", packers.gptq, gptq_config())
    convert_checkpoint(tmp_path / "in", tmp_path / "out", verify=True)
    assert_same(numbers(tmp_path / "out"), numbers(tmp_path / "in"))
    with pytest.raises(CheckpointError, match="quantization_config: the matrices are packed"):
        convert_checkpoint(tmp_path / "in", tmp_path / "n", dtype="float16")


def test_a_difference_is_found_and_nothing_is_left(tmp_path, folder, monkeypatch):
    """What shows that the verification can fail: one number of one matrix is written wrong."""
    original = module._planned

    def spoil(array, dtype, progress):
        planned = original(array, dtype, progress)
        if array.name != "model.layers.0.mlp.up_proj.weight":
            return planned
        return dataclasses.replace(
            planned, make=lambda: np.array(planned.make()) + np.eye(*array.shape, dtype=np.float32)
        )

    monkeypatch.setattr(module, "_planned", spoil)
    with pytest.raises(ModelError, match=r"verify: logits differ by up to .* is not the same model, and was removed"):
        convert_checkpoint(folder, tmp_path / "out", verify=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("out", "options", "words"),
    [
        ("m.gguf", {"kind": "safetensors"}, "safetensors is written to a folder, or the name of a"),
        ("m", {"kind": "gguf"}, r"gguf is written to the name of a \.gguf file"),
        ("m.safetensors", {"kind": "orbax"}, "orbax is written to a folder"),
        ("m", {"kind": "zip"}, "kind is 'zip'; choose from safetensors, gguf, orbax"),
        ("m", {"dtype": "int8"}, "dtype is 'int8'; choose from float32, bfloat16, float16"),
        ("m", {"shard_size": "much"}, "'much' is no size of a file"),
        ("m.safetensors", {"shard_size": "1GB"}, "shards are safetensors files in a folder"),
        ("full", {}, "the folder is not empty"),
        ("full/file", {}, "this is a file; give a folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path, folder, out, options, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(CheckpointError, match=words):
        convert_checkpoint(folder, tmp_path / out, **options)
    assert sorted(os.listdir(tmp_path)) == ["full"] and os.listdir(tmp_path / "full") == ["file"]


def test_a_failure_leaves_nothing_and_what_was_there(tmp_path, folder, monkeypatch):
    from trustcore.weights import safetensors_writer

    (tmp_path / "m.safetensors").write_bytes(b"before")
    monkeypatch.setattr(safetensors_writer.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    for out in ("m.safetensors", "folder"):
        with pytest.raises(OSError, match="no space left"):
            convert_checkpoint(folder, tmp_path / out)
    assert os.listdir(tmp_path) == ["m.safetensors"] and (tmp_path / "m.safetensors").read_bytes() == b"before"


def test_a_folder_that_fills_up_meanwhile_stays(tmp_path):
    with pytest.raises(OSError), appearing(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "other").write_text("y")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["other"]


def test_files_of_other_families_are_told(tmp_path):
    save_file({"w": np.zeros((2, 2), np.float32)}, tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match=r"there is no config\.json beside the weights"):
        convert_checkpoint(tmp_path / "m.safetensors", tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"there is no config\.json"):
        convert_checkpoint(tmp_path / "m.safetensors", tmp_path / "out", verify=True)
    assert os.listdir(tmp_path) == ["m.safetensors"]


MEASURE = """
import json, sys
from trustcore.convert import convert_checkpoint

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

convert_checkpoint({small!r}, {out!r} + "-small", kind={kind!r}, dtype={dtype!r})
with open("/proc/self/clear_refs", "w") as file:  # the peak counts from here on
    file.write("5")
before = status("VmRSS")
report = convert_checkpoint({source!r}, {out!r}, kind={kind!r}, dtype={dtype!r})
print(json.dumps([report.nbytes, status("VmHWM") - before]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("safetensors", "bfloat16"),
        pytest.param("safetensors", None, marks=pytest.mark.slow),
        pytest.param("orbax", None, marks=pytest.mark.slow),
    ],
)
def test_memory_is_that_of_a_tensor_and_not_of_the_model(tmp_path, fresh_python, kind, dtype):
    if kind == "orbax":
        pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint (pip install 'trustcore[orbax]')")
    rng = np.random.default_rng(0)
    arrays = {f"w{i}": rng.standard_normal((1024, 1024), np.float32) for i in range(40)}
    save_file(arrays, tmp_path / "m.safetensors")
    save_file({"w": np.ones((4, 4), np.float32)}, tmp_path / "s.safetensors")
    paths = {"source": str(tmp_path / "m.safetensors"), "small": str(tmp_path / "s.safetensors")}
    source = MEASURE.format(**paths, out=str(tmp_path / "out"), kind=kind, dtype=dtype)
    nbytes, growth = json.loads(fresh_python(source).splitlines()[-1])
    assert nbytes == 40 * 2**22 // (1 if dtype is None else 2)
    # A tensor is 4 MB. Orbax holds some of them, compressed, until it writes a file.
    assert growth < (12 if kind == "safetensors" else 80) * 2**20, growth


def test_nothing_is_placed_on_a_device(tmp_path, monkeypatch):
    """Between formats that have names alone, no array of jax's is made."""
    save_file({"w": np.zeros((2, 2), np.float32)}, tmp_path / "m.safetensors")
    monkeypatch.setattr(jax, "device_put", lambda *_, **__: pytest.fail("an array was put on a device"))
    convert_checkpoint(tmp_path / "m.safetensors", tmp_path / "out", dtype="float16")


@pytest.mark.parametrize(
    "name", ["bert", *(pytest.param(n, marks=pytest.mark.slow) for n in ("t5", "whisper", "clip", "mamba2", "resnet"))]
)
def test_every_family_is_converted_and_verified(tmp_path, name):
    case = families.read(name)
    (tmp_path / "a").mkdir()
    longer = {n: a * np.float32(1.001) for n, a in case.weights.items() if a.dtype == np.float32}  # than 16 bits
    report = convert_checkpoint(case.write(tmp_path / "a", **longer), tmp_path / "b", dtype="bfloat16", verify=True)
    assert report.files == ("config.json",) and 0 < report.verification.max_difference < 0.1
    with open_checkpoint(tmp_path / "b") as checkpoint:
        assert set(checkpoint) == set(case.weights)
        assert {array.encoding for array in checkpoint.values()} <= {"bf16", "i64"}


def test_gguf_is_for_decoders(tmp_path):
    with pytest.raises(ModelError, match=r"GGUF files hold decoders here, and this is a bert model\. Give a folder"):
        convert_checkpoint(families.read("bert").write(tmp_path), tmp_path / "m.gguf")
