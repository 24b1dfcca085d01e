"""Our own layout: what it promises is proved before it is read, and a header that lies gets one CheckpointError."""

import json

import jax
import numpy as np
import pytest

from tests.models.random_weights import random_weight
from trustcore.errors import CheckpointError
from trustcore.weights import open_checkpoint
from trustcore.weights.packed_layout import KEY, describe, field_tensors, header, packed_tensors
from trustcore.weights.safetensors_writer import Planned, write_safetensors


def write(path, weights, text=None, **changes):
    """Writes weights by name; `changes` replace tensors (dots as `__`), `text` the header."""
    tensors, entries = {}, {}
    for name, weight in weights.items():
        tensors.update(field_tensors(name, weight))
        entries[name] = describe(weight)
    for name, value in changes.items():
        tensors[name.replace("__", ".")] = None if value is None else Planned.of(value)
    metadata = header(entries) if text is None else {KEY: text}
    write_safetensors(path, {name: planned for name, planned in tensors.items() if planned is not None}, metadata)


@pytest.mark.parametrize("kind", ["int3:g64:asym:order", "nf4:g64:double", "fp8_e4m3:128x128", "q4_k", "nvfp4", "bf16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_round_trip_is_exact_and_lazy(tmp_path, kind, transposed):
    weight = random_weight(kind, 256, 192, transposed=transposed)
    write(tmp_path / "w.safetensors", {"a.b": weight})
    with open_checkpoint(tmp_path / "w.safetensors") as checkpoint:
        (found,) = packed_tensors(checkpoint).values()
        assert (found.name, found.format, found.shape) == ("a.b", weight.format, tuple(weight.shape))
        assert found.nbytes == sum(np.asarray(field).nbytes for field in weight.fields.values())
        again = found.read()
    assert jax.tree.structure(again) == jax.tree.structure(weight)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(weight), strict=True):
        np.testing.assert_array_equal(np.asarray(ours).view(np.uint8), np.asarray(theirs).view(np.uint8))


def test_the_header_is_as_documented(tmp_path):
    write(tmp_path / "w.safetensors", {"w": random_weight("int4:g64:asym", 128, 32)})
    with open_checkpoint(tmp_path / "w.safetensors") as checkpoint:
        assert json.loads(checkpoint.metadata["trustcore.weights"]) == {
            "version": 1,
            "weights": {
                "w": {
                    "format": "int4",
                    "shape": [128, 32],
                    "transposed": False,
                    "fields": ["codes", "scale", "zero"],
                }
            },
        }
        assert {name: (t.encoding, t.shape) for name, t in checkpoint.items()} == {
            "w.codes": ("u8", (64, 32)),
            "w.scale": ("f16", (2, 32)),
            "w.zero": ("u8", (2, 32)),
        }


def test_a_file_without_the_header_has_none(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", {"a": Planned.of(np.zeros(3))})
    with open_checkpoint(tmp_path / "w.safetensors") as checkpoint:
        assert packed_tensors(checkpoint) == {}


GOOD = {"format": "int4", "shape": [128, 32], "transposed": False, "fields": ["codes", "scale", "zero"]}


def lying(**changes):
    return json.dumps({"version": 1, "weights": {"w": GOOD | changes}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the text is not JSON"),
        ("[]", "the JSON is an array; expected an object"),
        ("[" * 100_000, "nested too deep"),
        ('{"version": 2, "weights": {}}', "version is '2'; this program reads version 1"),
        ('{"version": 1, "weights": []}', "with an object of weights"),
        ('{"version": 1, "weights": {"w": 3}}', "the entry is '3'; expected an object"),
        (lying(format="int9"), "format is 'int9'; known: "),
        (lying(format=["int4"]), "known: "),
        (lying(format="int8"), r"int8: codes is uint8\[64, 32\]; a weight \[128, 32\] has it as int8\[128, 32\]"),
        (lying(format="nf4"), "zero unknown among the fields"),
        (lying(format="q4_0"), "zero unknown among the fields"),
        (lying(format="int3"), "high missing among the fields"),
        (lying(shape=[128]), "expected a list of 2 to 16 sizes"),
        (lying(shape=[128, -32]), "expected a list of 2 to 16 sizes"),
        (lying(shape=[128, 2**60]), "expected a list of 2 to 16 sizes"),
        (lying(shape=[127, 32]), "K=127 is not a multiple of 2"),
        (lying(shape=[256, 32]), r"codes is uint8\[64, 32\]; a weight \[256, 32\] has it as uint8\[128, 32\]"),
        (lying(shape=[1, 128, 32]), r"has it as uint8\[1, 64, 32\]"),
        (lying(transposed=True), r"a weight \[32, 128\] has it as uint8\[16, 128\]"),
        (lying(transposed=1), "transposed is '1'; expected true or false"),
        (lying(fields="codes"), "expected a list of names"),
        (lying(fields=["codes", "scale", "zero", "order"]), "there is no tensor 'w.order'"),
        (lying(fields=["codes"]), "scale missing among the fields"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, text, message):
    write(tmp_path / "w.safetensors", {"w": random_weight("int4:g64:asym", 128, 32)}, text)
    with (
        open_checkpoint(tmp_path / "w.safetensors") as checkpoint,
        pytest.raises(CheckpointError, match=message) as caught,
    ):
        packed_tensors(checkpoint)
    assert "trustcore.weights" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"w__scale": np.zeros((3, 32), np.float16), "w__zero": np.zeros((3, 32), np.uint8)},
            r"a scale \[3, 32\] does not fit the weights \[128, 32\]",
        ),
        (
            {"w__scale": np.zeros((2, 31), np.float16), "w__zero": np.zeros((2, 31), np.uint8)},
            "does not fit the weights",
        ),
        ({"w__scale": np.zeros((2, 32), np.int32)}, r"scale is int32\[2, 32\]; .* as floating\[2, 32\]"),
        ({"w__zero": np.zeros((2, 1), np.uint8)}, r"zero is uint8\[2, 1\]; .* has it as floating or integer\[2, 32\]"),
        ({"w__codes": np.zeros((64, 32), np.int8)}, r"codes is int8\[64, 32\]"),
        ({"w__codes": np.zeros((63, 32), np.uint8)}, r"codes is uint8\[63, 32\]"),
        ({"w__codes": None}, "there is no tensor 'w.codes'"),
    ],
)
def test_tensors_that_do_not_make_the_weight_are_refused(tmp_path, changes, message):
    write(tmp_path / "w.safetensors", {"w": random_weight("int4:g64:asym", 128, 32)}, **changes)
    with open_checkpoint(tmp_path / "w.safetensors") as checkpoint, pytest.raises(CheckpointError, match=message):
        packed_tensors(checkpoint)


@pytest.mark.parametrize(
    "wrong", [np.zeros(128, np.int32), np.arange(1, 129, dtype=np.int32), np.full(128, -1, np.int32)]
)
def test_an_order_that_is_none_is_refused_as_it_is_read(tmp_path, wrong):
    write(tmp_path / "w.safetensors", {"w": random_weight("int4:g64:order", 128, 32)}, w__order=wrong)
    with open_checkpoint(tmp_path / "w.safetensors") as checkpoint:
        found = packed_tensors(checkpoint)["w"]
        with pytest.raises(CheckpointError, match=r"tensor 'w\.order' at byte \d+: is no order of the 128 rows of 'w'"):
            found.read()
