"""The safetensors reader: agreement with the `safetensors` package, shards, config.json, and files that are broken."""

from __future__ import annotations

import json
import struct
from datetime import timedelta
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from trustcore.errors import CheckpointError
from trustcore.weights import open_checkpoint
from trustcore.weights.safetensors import MAX_HEADER_BYTES

RNG = np.random.default_rng(0)
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "I64": np.int64,
    "U64": np.uint64,
    "I32": np.int32,
    "U32": np.uint32,
    "I16": np.int16,
    "U16": np.uint16,
    "I8": np.int8,
    "U8": np.uint8,
    "C64": np.complex64,
}


def build(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file whose fields may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_package_writes(tmp_path, touch_all):
    tensors = {
        "f32": RNG.standard_normal((3, 4)).astype(np.float32),
        "f16": RNG.standard_normal(5).astype(np.float16),
        "i64": np.arange(3),
        "bool": np.array([[True, False, True]]),
        "scalar": np.array(2.5, np.float64),
        "empty": np.zeros((0, 7), np.float32),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "np", "config": "a text of this name is not config.json"})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "safetensors" and checkpoint.metadata == {"format": "np"}
        assert set(checkpoint) == set(tensors)
        for name, expected in tensors.items():
            np.testing.assert_array_equal(checkpoint[name].numpy(), expected, strict=True)
            assert checkpoint[name].raw().tobytes() == expected.tobytes()
            assert expected.size == 0 or np.shares_memory(checkpoint[name].raw(), checkpoint[name].numpy())
        assert checkpoint["bool"].encoding == "bool" and checkpoint["i64"].encoding == "i64"
        assert touch_all(checkpoint) == sum(array.nbytes for array in tensors.values())
        assert [array.offset for array in checkpoint.values()] == sorted(a.offset for a in checkpoint.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_plain_dtype(folder, dtype):
    bits = RNG.integers(0, 256, 6 * np.dtype(DTYPES[dtype]).itemsize, np.uint8)
    data = build({"x": entry(dtype, (2, 3), (0, bits.size))}, bits.tobytes())
    array = open_checkpoint(folder.write(data, "model.safetensors"))["x"]
    assert array.encoding == dtype.lower() and array.dtype == DTYPES[dtype]
    assert array.numpy().tobytes() == bits.tobytes() and array.numpy().shape == (2, 3)


@pytest.mark.parametrize(("dtype", "nbytes"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_packed_dtypes_have_bytes_and_no_numbers(folder, dtype, nbytes):
    data = build({"x": entry(dtype, (3, 8), (0, 3 * nbytes))}, bytes(range(3 * nbytes)))
    array = open_checkpoint(folder.write(data, "model.safetensors"))["x"]
    assert array.dtype is None and array.shape == (3, 8) and array.raw().shape == (3, nbytes)
    with pytest.raises(CheckpointError, match=f"{dtype.lower()} is packed .* Take raw"):
        array.numpy()


def test_a_boolean_that_is_neither_is_refused_when_it_is_read(folder):
    path = folder.write(build({"x": entry("BOOL", (3,), (0, 3))}, b"\0\1\2"), "model.safetensors")
    array = open_checkpoint(path)["x"]
    assert array.raw().tolist() == [0, 1, 2]
    with pytest.raises(CheckpointError, match="other than 0 or 1"):
        array.numpy()


def test_config_json_beside_the_file_stands_in_the_metadata(tmp_path):
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "rope_theta": 1e4, "factor": float("inf"), "list": [1, {"a": None}]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert open_checkpoint(path).metadata == {"config": config}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": ', r"config at byte 6: the text is not JSON"),
        (b'{"\xc3\xa9": x}', r"config at byte 7: the text is not JSON"),
        (b"[1]", "the JSON is an array; expected an object"),
        (b"12", "the JSON is a number; expected an object"),
        (b'{"a": "\xff"}', "config at byte 7: the text is not UTF-8"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b"", "the file is empty"),
        (b'{"a": "' + b"x" * 2**24 + b'"}', "expected at most 16777216"),
        (b'{"a": [' + b"0," * 2**22 + b"0]}", "expected at most 4194304"),
    ],
)
def test_a_broken_config_is_refused(tmp_path, text, words):
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


# Shards.


def write_shards(folder: Path, weight_map: dict | None = None, **index) -> Path:
    save_file(
        {"a": np.zeros(2, np.float32), "more": np.zeros(1, np.int8)}, folder / "s-1.safetensors", {"format": "pt"}
    )
    save_file({"b": np.ones(3, np.float32)}, folder / "s-2.safetensors", {"format": "other"})
    path = folder / "model.safetensors.index.json"
    weight_map = {"b": "s-2.safetensors", "a": "s-1.safetensors"} if weight_map is None else weight_map
    path.write_text(json.dumps({"metadata": {"total_size": 20}, "weight_map": weight_map, **index}))
    return path


def test_an_index_opens_all_its_shards(tmp_path, touch_all):
    path = write_shards(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for given_path in (path, tmp_path):
        with open_checkpoint(given_path) as checkpoint:
            assert list(checkpoint) == ["b", "a"]
            np.testing.assert_array_equal(checkpoint["b"].numpy(), np.ones(3, np.float32))
            assert checkpoint["a"].path.name == "s-1.safetensors"
            assert checkpoint.metadata == {"format": "other", "total_size": 20, "config": {"model_type": "llama"}}
            assert touch_all(checkpoint) == 20


def test_a_shard_opens_alone(tmp_path):
    write_shards(tmp_path)
    assert set(open_checkpoint(tmp_path / "s-1.safetensors")) == {"a", "more"}


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "../s-1.safetensors"}}, "expected the name of a file beside the index"),
        ({"weight_map": {"a": "/etc/passwd"}}, "expected the name of a file beside the index"),
        ({"weight_map": {"a": ".."}}, "expected the name of a file beside the index"),
        ({"weight_map": {"a": ""}}, "expected the name of a file beside the index"),
        ({"weight_map": {"a": 3}}, "expected the name of a file beside the index"),
        ({"weight_map": {"a": "s-9.safetensors"}}, r"s-9\.safetensors: no such file"),
        ({"weight_map": {"a": "s\0.safetensors"}}, "cannot be opened"),
        ({"weight_map": {"a": "\ud800.safetensors"}}, "cannot be opened"),
        ({"weight_map": {"a": "n" * 5000}}, "cannot be opened"),
        ({"weight_map": {"zzz": "s-1.safetensors"}}, "the index places 'zzz' here, but the file does not hold it"),
        ({"weight_map": {"a": "model.safetensors.index.json"}}, "no safetensors file"),
        ({"weight_map": None}, "weight_map: expected an object, found 'None'"),
        ({"weight_map": {}, "metadata": [1]}, r"metadata: expected an object, found '\[1\]'"),
    ],
)
def test_a_broken_index_is_refused(tmp_path, index, words):
    path = write_shards(tmp_path)
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


def test_a_name_twice_in_an_index_is_refused(tmp_path):
    path = write_shards(tmp_path)
    path.write_text('{"weight_map": {"a": "s-1.safetensors", "a": "s-2.safetensors"}}')
    with pytest.raises(CheckpointError, match="index at byte 16: the key 'a' stands twice"):
        open_checkpoint(path)


# Broken files: bytes, field, byte offset, words.

ZEROS = bytes(8)
CASES = {
    "length cut": (b"\x01\0\0", "header length", 0, "the header has 1 bytes; expected at most 0, since the file has 3"),
    "length": (build(b"{}", length=2**63), "header length", 0, f"the header has {2**63} bytes; expected at most 2"),
    "length, one too many": (build(b"{}", length=3), "header length", 0, "expected at most 2, since the file has 10"),
    "JSON": (build(b'{"x": }'), "header", 14, "the text is not JSON"),
    "no object": (build(b"[]"), "header", 8, "the JSON is an array; expected an object"),
    "not UTF-8": (build(b'{"\xff": 1}'), "header", 10, "the text is not UTF-8"),
    "deep nesting": (build(b"{" + b'"a":{' * 100_000), "header", 8, "nested too deep"),
    "many values": (build(b"{" + b"," * 2**22 + b"}"), "header", 8, "expected at most 4194304"),
    "name twice": (
        build(b'{"y": 1, "x": 1, "x": 2}'),
        "header",
        17,
        "the key 'x' stands twice; expected each key once",
    ),
    "entry": (build({"x": 3}), "tensor 'x'", 9, "the entry is '3'; expected an object with dtype"),
    "dtype": (build({"x": entry("F31")}, ZEROS), "tensor 'x'.dtype", 9, "the dtype is 'F31'; expected one of BOOL, U8"),
    "dtype is a list": (build({"x": entry([])}, ZEROS), "tensor 'x'.dtype", 9, "expected one of BOOL"),
    "negative size": (
        build({"x": entry(shape=[-2])}, ZEROS),
        "tensor 'x'.shape",
        9,
        "the shape is [-2]; expected a list",
    ),
    "size is a float": (build({"x": entry(shape=[2.0])}, ZEROS), "tensor 'x'.shape", 9, "the shape is [2.0]"),
    "size is a boolean": (build({"x": entry(shape=[True])}, ZEROS), "tensor 'x'.shape", 9, "the shape is [True]"),
    "shape is missing": (build({"x": {"dtype": "F32"}}, ZEROS), "tensor 'x'.shape", 9, "the shape is None"),
    "dimensions": (build({"x": entry(shape=[1] * 65)}, ZEROS), "tensor 'x'.shape", 9, "at most 64 integers"),
    "product": (build({"x": entry(shape=[2**62] * 2)}, ZEROS), "tensor 'x'.shape", 9, "has 2**63 bytes or more"),
    "packed row": (
        build({"x": entry("F4", [2, 3])}, ZEROS),
        "tensor 'x'.shape",
        9,
        "not a multiple of f4's block of 2",
    ),
    "offsets": (build({"x": entry(offsets=[0])}, ZEROS), "tensor 'x'.data_offsets", 9, "expected two integers"),
    "span": (
        build({"x": entry(offsets=[0, 4])}, ZEROS),
        "tensor 'x'.data_offsets",
        9,
        "the offsets 0 to 4 span 4 bytes; expected 8, which F32 of shape [2] takes",
    ),
    "end before begin": (build({"x": entry(offsets=[8, 0])}, ZEROS), "tensor 'x'.data_offsets", 9, "span -8 bytes"),
    "data beyond the file": (
        build({"y": entry(), "x": entry(offsets=[8, 16])}, ZEROS),
        "tensor 'x'.data_offsets",
        70,
        "but the file has 139: it is cut short or broken",
    ),
    "overlap": (build({"a": entry(), "b": entry()}, ZEROS), "header", 8, "the safetensors package refuses the file"),
    "gap": (build({"a": entry(offsets=[4, 12])}, bytes(12)), "header", 8, "invalid offset for tensor `a`"),
    "bytes left over": (build({"a": entry()}, bytes(12)), "header", 8, "not fully covered"),
    "metadata": (build({"__metadata__": {"a": 1}}), "header", 8, "expected a string"),
    "metadata is a list": (build({"__metadata__": [1]}), "header", 8, "the safetensors package refuses the file"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_file_is_refused_by_field_and_byte(folder, case):
    data, field, offset, words = CASES[case]
    path = folder.write(data, "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert words in str(caught.value) and str(path) in str(caught.value)
    assert (caught.value.field, caught.value.offset) == (field, offset)


def test_a_header_beyond_the_limit_of_the_format_is_refused_before_it_is_read(folder):
    path = folder.write(build(b"{", length=MAX_HEADER_BYTES + 1), "model.safetensors")
    with open(path, "r+b") as file:
        file.truncate(2**32)
    with pytest.raises(CheckpointError, match=f"expected at most {MAX_HEADER_BYTES}"):
        open_checkpoint(path)


@pytest.fixture(scope="module")
def small_bytes() -> bytes:
    names = ("embed", "norm", "gate")
    header = {name: entry("BF16", [4, 12], [96 * index, 96 * index + 96]) for index, name in enumerate(names)}
    return build({"__metadata__": {"format": "pt"}, **header}, bytes(range(256)) + bytes(range(32)))


def test_truncation_at_every_64th_byte_is_refused(folder, small_bytes, touch_all):
    with open_checkpoint(folder.write(small_bytes, "model.safetensors")) as checkpoint:
        assert touch_all(checkpoint) == 288
    cuts = [*range(0, len(small_bytes), 64), len(small_bytes) - 1]
    assert len(cuts) > 6
    for cut in cuts:
        with pytest.raises(CheckpointError):
            open_checkpoint(folder.write(small_bytes[:cut], "model.safetensors"))


FUZZ = settings(
    max_examples=300, deadline=timedelta(seconds=5), database=None, suppress_health_check=[HealthCheck.too_slow]
)


def opens_or_refuses(path: Path, touch_all) -> None:
    """The contract of a reader: a checkpoint that can be read to the last byte, or a CheckpointError."""
    try:
        with open_checkpoint(path) as checkpoint:
            touch_all(checkpoint)
    except CheckpointError as error:
        assert str(path) in str(error)


@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_bytes_give_a_checkpoint_or_a_checkpoint_error(shared_folder, small_bytes, touch_all, flips):
    data = bytearray(small_bytes)
    for place, value in flips:
        data[place % len(data)] = value
    opens_or_refuses(shared_folder.write(bytes(data), "model.safetensors"), touch_all)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=6,
)
_SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 8, 2**31, 2**62, 2**64]), max_size=4) | _JSON
_ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DTYPES, "F4", "BOOL", "X"]), "shape": _SIZES, "data_offsets": _SIZES}
)


@FUZZ
@given(header=st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), _ENTRY | _JSON, max_size=4))
def test_any_header_gives_a_checkpoint_or_a_checkpoint_error(shared_folder, touch_all, header):
    opens_or_refuses(shared_folder.write(build(header, bytes(16)), "model.safetensors"), touch_all)


@FUZZ
@given(config=st.binary(max_size=60) | _JSON.map(lambda value: json.dumps(value).encode()))
def test_any_index_gives_a_checkpoint_or_a_checkpoint_error(shared_folder, touch_all, config):
    opens_or_refuses(shared_folder.write(config, "any.safetensors.index.json"), touch_all)
