"""Importance matrices in both of llama.cpp's layouts, whole and broken."""

import struct

import numpy as np
import pytest

from trustcore.errors import CheckpointError
from trustcore.weights.gguf_writer import write_gguf
from trustcore.weights.imatrix import read_imatrix


def entry(name, calls, values):
    data = np.asarray(values, "<f4").tobytes()
    return struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values)) + data


def test_a_gguf_file(tmp_path):
    sums = np.arange(8, dtype=np.float32).reshape(1, 8)
    experts = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors = {
        "a.weight.in_sum2": sums, "a.weight.counts": np.full((1, 1), 4, np.float32), "a.weight.in_sum": sums,
        "b.weight.in_sum2": experts, "b.weight.counts": np.array([[2], [0]], np.float32),
    }  # fmt: skip
    write_gguf(tmp_path / "m.gguf", {"general.type": "imatrix"}, tensors)
    found = read_imatrix(tmp_path / "m.gguf")
    assert set(found) == {"a.weight", "b.weight"}
    np.testing.assert_array_equal(found["a.weight"], sums[0] / 4)
    np.testing.assert_array_equal(found["b.weight"], [[0, 0.5, 1], [1, 1, 1]])


def test_the_older_file(tmp_path):
    path = tmp_path / "m.dat"
    path.write_bytes(struct.pack("<i", 2) + entry("a.weight", 2, [2, 4]) + entry("b.weight", 0, [1]) + b"\1\0\0\0")
    found = read_imatrix(path)
    assert found["a.weight"].tolist() == [1, 2] and found["b.weight"].tolist() == [1]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (struct.pack("<i", 1000) + b"x" * 20, "1000 entries in a file of 24 bytes"),
        (struct.pack("<ii", 1, 2**31 - 1) + b"x" * 20, r"entry 0\.name at byte 8: 2147483647 bytes are wanted, 20 are"),
        (struct.pack("<ii", 1, -1) + b"x" * 20, "-1 bytes are wanted"),
        (struct.pack("<i", 1) + entry("a", 1, [1.0] * 4)[:-4], r"entry 0\.values"),
        (struct.pack("<i", 2) + entry("a", 1, [1]) + entry("a", 1, [1, 1, 1]), "'a' has 3 values, or stands twice"),
        (struct.pack("<i", 1) + entry("a", 1, [np.nan, 1]), "numbers that are negative, infinite or NaN"),
        (struct.pack("<i", 1) + entry("a", 1, [-1, 1]), "tensor 'a': the importance has numbers that are negative"),
        (b"xy", "4 bytes are wanted, 2 are left"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, data, words):
    (tmp_path / "m.dat").write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        read_imatrix(tmp_path / "m.dat")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a.weight": np.ones(4, np.float32)}, "it is no importance matrix"),
        ({"a.in_sum2": np.ones((1, 4), np.float32)}, "expected f32 sums .* beside them 'a.counts'"),
        (
            {"a.in_sum2": np.ones((2, 4), np.float32), "a.counts": np.ones((3, 1), np.float32)},
            "3 counts for 2 matrices",
        ),
    ],
)
def test_a_gguf_file_of_another_kind_is_refused(tmp_path, tensors, words):
    write_gguf(tmp_path / "m.gguf", {}, tensors)
    with pytest.raises(CheckpointError, match=words):
        read_imatrix(tmp_path / "m.gguf")
