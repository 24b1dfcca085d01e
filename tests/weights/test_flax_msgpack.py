"""The reader of Flax's msgpack files against flax.serialization, and files that lie."""

from __future__ import annotations

import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trustcore.errors import CheckpointError
from trustcore.weights import open_checkpoint

RNG = np.random.default_rng(0)
TREE = {
    "model": {
        "layers": {
            "0": {"kernel": RNG.standard_normal((3, 4)).astype(np.float32), "bias": np.arange(4, dtype=np.float16)},
            "1": {"kernel": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)},
        },
        "f8": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
        "turned": np.arange(12, dtype=np.int32).reshape(3, 4).T,
        "scalar": np.float32(2.5),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
        "complex": np.arange(3) * 1j,
    },
    "note": "kept out",
    "count": 7,
    "few": -3,
    "rate": 0.5,
    "large": 2**40,
    "lowest": -(2**40),
    "none": None,
    "yes": True,
    "native": 1 + 2j,
}


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif isinstance(value, np.ndarray | np.generic):
            yield prefix + key, np.asarray(value)


def write(folder, tree, name="flax_model.msgpack"):
    return folder.write(serialization.msgpack_serialize(tree), name)


def test_reads_what_flax_writes(folder, touch_all):
    write(folder, TREE)
    folder.write(b'{"model_type": "bert"}', "config.json")
    with open_checkpoint(folder.path) as checkpoint:
        wanted = dict(leaves(TREE))
        assert checkpoint.format == "flax" and checkpoint.keys() == wanted.keys()
        assert checkpoint.metadata == {"config": {"model_type": "bert"}}
        touch_all(checkpoint)
        for name, array in wanted.items():
            numbers = checkpoint[name].numpy()
            assert numbers.dtype == array.dtype and numbers.shape == array.shape and not numbers.flags.writeable
            np.testing.assert_array_equal(numbers, array)
        assert not checkpoint["model.layers.0.kernel"].numpy().flags.owndata


def test_arrays_in_chunks_are_put_together(folder, monkeypatch, touch_all):
    array = RNG.standard_normal((7, 5)).astype(np.float32)
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 48)
    path = write(folder, {"a": {"w": array}, "b": np.arange(3, dtype=np.float32)})
    with open_checkpoint(path) as checkpoint:
        touch_all(checkpoint)
        np.testing.assert_array_equal(checkpoint["a.w"].numpy(), array)
        np.testing.assert_array_equal(checkpoint["b"].numpy(), np.arange(3))
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint["a.w"].numpy()


def test_the_weights_of_a_training_state(folder):
    w = np.ones(2, np.float32)
    state = {"params": {"w": w}, "batch_stats": {"mean": w}, "opt_state": {"0": {"mu": {"w": w}}}, "step": np.int32(3)}
    assert list(open_checkpoint(write(folder, state))) == ["w", "batch_stats.mean"]


def test_large_containers_and_texts(folder):
    tree = {f"{'k' * (i % 300)}{i}": np.zeros(1, np.uint8) for i in range(300)} | {
        "list": {str(i): 0 for i in range(70)}
    }
    assert len(open_checkpoint(write(folder, tree))) == 300
    packed = msgpack.packb({"w": [1] * 20, "many": ["a"] * 70000, "l" * 40: "b" * 70000, "bytes": b"c" * 300})
    with pytest.raises(CheckpointError, match="holds no array"):
        open_checkpoint(folder.write(packed, "m.msgpack"))


def array(shape=(2,), dtype="float32", data=bytes(8), code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, data), use_bin_type=True))


def chunked(shape, chunks):
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}


BROKEN = {
    "bytes that do not fit": ({"w": array(data=bytes(7))}, "has 7 bytes; expected 8"),
    "a negative size": ({"w": array((-2,))}, "a shape is not at most 64"),
    "an absurd shape": ({"w": array((2**62, 8))}, r"2\*\*63 bytes or more"),
    "many axes": ({"w": array((1,) * 65, data=bytes(4))}, "a shape is not at most 64"),
    "another dtype": ({"w": array(dtype="object")}, "the dtype is 'object'; expected one of"),
    "a dtype that is none": ({"w": array(dtype=[1])}, "the dtype is "),
    "no bytes": ({"w": array(data="12345678")}, "an array's numbers are not bytes"),
    "not three values": ({"w": msgpack.ExtType(1, msgpack.packb([1, 2]))}, "is not \\(shape, dtype, bytes\\)"),
    "more behind an array": ({"w": msgpack.ExtType(1, array().data + b"\1")}, "is not \\(shape, dtype, bytes\\)"),
    "another extension": ({"w": array(code=9)}, "extension 9; Flax writes"),
    "a key that is a list": (b"\x81\x91\1\1", "the file starts with"),
    "an inner key that is a list": (b"\x81\xa1a\x81\x91\1\1", "a key of a map is no text"),
    "a key twice": (b"\x82\xa1a\1\xa1a\2", "or stands twice"),
    "more entries than bytes": (b"\xdf\xff\xff\xff\xff\xa1a\1", "a container has 8589934590 values"),
    "more items than bytes": (b"\x81\xa1a\xdd\xff\xff\xff\xff", "a container has 4294967295 values"),
    "a text past the end": (b"\x81\xa1a\xdb\xff\xff\xff\xffab", "4294967295 bytes are to come and 2 are there"),
    "text that is none": (b"\x81\xa1a\xa1\xff", "a text is not UTF-8"),
    "a byte that starts nothing": (b"\x81\xa1a\xc1", "0xc1 starts no value"),
    "more behind the map": (b"\x81\xa1a\1\1", "nothing behind it"),
    "too deep": (b"\x81\xa1a" * 100 + b"\1", "more than 64 levels"),
    "names that meet": ({"a.b": array(), "a": {"b": array()}}, "two tensors have the name 'a.b'"),
    "no array": ({"a": 1}, "holds no array"),
    "chunks without a shape": ({"w": chunked(None, {"0": array()})}, "no shape or no chunks by number"),
    "no chunks": ({"w": chunked({"0": 2}, {})}, "an array in chunks has none"),
    "chunks that are none": ({"w": chunked({"0": 2}, {"0": 1})}, "or they are no arrays"),
    "chunks too small": ({"w": chunked({"0": 3}, {"0": array()})}, "has 8 bytes; expected 12"),
    "chunks out of order": ({"w": chunked({"0": 2}, {"1": array()})}, "no chunks by number"),
    "chunks of two dtypes": (
        {"w": chunked({"0": 4}, {"0": array(), "1": array(dtype="int32")})},
        "chunks of an array have several dtypes",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_error(folder, case):
    data, words = BROKEN[case]
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(folder.write(data if isinstance(data, bytes) else msgpack.packb(data), "m.msgpack"))


def test_every_truncation_is_one_error(folder):
    data = serialization.msgpack_serialize(TREE)
    for size in range(1, len(data)):
        with pytest.raises(CheckpointError):
            open_checkpoint(folder.write(data[:size], "m.msgpack"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_give_a_checkpoint_or_one_error(shared_folder, touch_all, data):
    whole = bytearray(serialization.msgpack_serialize(TREE))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        with open_checkpoint(shared_folder.write(bytes(whole), "m.msgpack")) as checkpoint:
            touch_all(checkpoint)
    except CheckpointError as error:
        assert str(error)


def test_shards_with_an_index(folder):
    for number, key in enumerate("ab", 1):
        write(folder, {"model": {key: np.full(2, number, np.float32)}}, f"flax_model-0000{number}-of-00002.msgpack")
    weight_map = {f"model.{key}": f"flax_model-0000{number}-of-00002.msgpack" for number, key in enumerate("ab", 1)}
    import json

    folder.write(json.dumps({"weight_map": weight_map}).encode(), "flax_model.msgpack.index.json")
    with open_checkpoint(folder.path) as checkpoint:
        assert [float(checkpoint[f"model.{key}"].numpy()[0]) for key in "ab"] == [1, 2]
