"""The safetensors writer: what it writes, the package reads; one tensor in memory; all or nothing."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from trustcore.errors import CheckpointError
from trustcore.weights import open_checkpoint
from trustcore.weights.safetensors_writer import Planned, parse_size, write_safetensors, write_shards

RNG = np.random.default_rng(0)
ARRAYS = {
    "bytes": RNG.integers(0, 256, 7, dtype=np.uint8),
    "float": RNG.standard_normal((3, 4)).astype(np.float32),
    "empty": np.zeros((0, 3), np.int64),
    "scalar": np.array(2.5),
    "flag": np.array([True, False]),
    "turned": np.arange(12, dtype=np.int32).reshape(3, 4).T,
    "half": RNG.standard_normal(5).astype(np.float16),
}


def plan(arrays):
    return {name: Planned.of(array) for name, array in arrays.items()}


def test_the_package_reads_what_is_written(tmp_path):
    write_safetensors(tmp_path / "m.safetensors", plan(ARRAYS), {"note": "grün"})
    found = load_file(tmp_path / "m.safetensors")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert checkpoint.metadata["note"] == "grün"
        for tensor in checkpoint.values():
            assert tensor.dtype is not None and tensor.offset % tensor.dtype.itemsize == 0


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_small_floats(tmp_path, name):
    array = np.arange(1, 9).astype(getattr(ml_dtypes, name))
    write_safetensors(tmp_path / "m.safetensors", plan({"w": array}))
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        np.testing.assert_array_equal(checkpoint["w"].numpy(), array)


def test_tensors_are_made_one_at_a_time_after_the_header_stands(tmp_path):
    alive = []

    def make(index):
        def one():
            assert not any(flag() is not None for flag in alive), "the tensor before is still held"
            import weakref

            array = np.full(10, index, np.float32)
            alive.append(weakref.ref(array))
            return array

        return one

    tensors = {f"t{i}": Planned((10,), np.dtype(np.float32), make(i)) for i in range(4)}
    write_safetensors(tmp_path / "m.safetensors", tensors)
    assert [float(a[0]) for _, a in sorted(load_file(tmp_path / "m.safetensors").items())] == [0, 1, 2, 3]
    assert len(alive) == 4


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"w": Planned((2,), np.dtype(np.float32), lambda: np.zeros(3, np.float32))},
            r"made as float32\[3\], planned as",
        ),
        (
            {"w": Planned((2,), np.dtype(np.float32), lambda: np.zeros(2))},
            r"made as float64\[2\], planned as float32\[2\]",
        ),
        ({"w": Planned.of(np.array(["a"]))}, "the dtype is <U1; expected one of bool, "),
        ({"__metadata__": Planned.of(np.zeros(2))}, "this is no name of a tensor"),
        ({"": Planned.of(np.zeros(2))}, "this is no name of a tensor"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        write_safetensors(tmp_path / "m.safetensors", tensors)
    assert os.listdir(tmp_path) == []


def test_a_failure_keeps_the_file_that_was_there(tmp_path):
    write_safetensors(tmp_path / "m.safetensors", plan({"w": np.zeros(2)}))

    def fails():
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        write_safetensors(tmp_path / "m.safetensors", {"w": Planned((2,), np.dtype(np.float64), fails)})
    assert os.listdir(tmp_path) == ["m.safetensors"]
    np.testing.assert_array_equal(load_file(tmp_path / "m.safetensors")["w"], np.zeros(2))


def test_shards_and_their_index(tmp_path):
    units = {f"u{i}": plan({f"u{i}.a": np.full(10, i, np.float32), f"u{i}.b": np.zeros(3)}) for i in range(5)}
    write_shards(tmp_path, units, lambda names: {"names": " ".join(names)}, shard_bytes=130)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 64, "names": "u0 u1 u2 u3 u4"}
    assert index["weight_map"]["u1.b"] == "model-00001-of-00003.safetensors"
    with open_checkpoint(tmp_path) as checkpoint:
        assert [float(checkpoint[f"u{i}.a"].numpy()[0]) for i in range(5)] == [0, 1, 2, 3, 4]
        assert checkpoint.metadata["names"] == "u0 u1 u2 u3 u4"


@pytest.mark.parametrize(
    ("given", "nbytes"),
    [
        (1, 1),
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        ("1.5 MiB", 3 * 2**19),
        ("70kB", 70_000),
        ("300", 300),
        ("2T", 2 * 10**12),
    ],
)
def test_sizes_as_people_write_them(given, nbytes):
    assert parse_size(given) == nbytes


@pytest.mark.parametrize("given", [0, -1, True, None, 1.5, "", "GB", "-5GB", "5XB", "0.1", "5 5GB", "9" * 400])
def test_what_is_no_size_is_refused(given):
    with pytest.raises(CheckpointError, match="is no size of a file; write a number of bytes, or 5GB"):
        parse_size(given)
