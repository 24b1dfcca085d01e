"""What the GGUF writer refuses, the types it chooses, and that it writes all or nothing."""

from __future__ import annotations

import os
import weakref

import gguf
import numpy as np
import pytest

from trustcore.errors import CheckpointError
from trustcore.weights import open_checkpoint
from trustcore.weights.gguf_writer import StreamedTensor, write_gguf

T = gguf.GGUFValueType


@pytest.mark.parametrize(
    ("value", "kinds"),
    [
        (True, [T.BOOL]),
        (0, [T.UINT32]),
        (2**32 - 1, [T.UINT32]),
        (-1, [T.INT32]),
        (2**32, [T.UINT64]),
        (-(2**31) - 1, [T.INT64]),
        (1.5, [T.FLOAT32]),
        ("x", [T.STRING]),
        (np.float64(1.5), [T.FLOAT64]),
        (np.float32(1.5), [T.FLOAT32]),
        (np.bool_(True), [T.BOOL]),
        (np.uint16(1), [T.UINT16]),
        ([1, 2], [T.ARRAY, T.INT32]),
        ([2**31], [T.ARRAY, T.UINT32]),
        ([-1, 2**31], [T.ARRAY, T.INT64]),
        ([2**63], [T.ARRAY, T.UINT64]),
        ([0.5], [T.ARRAY, T.FLOAT32]),
        (["x"], [T.ARRAY, T.STRING]),
        ([True], [T.ARRAY, T.BOOL]),
        (np.zeros(2, np.int8), [T.ARRAY, T.INT8]),
        ([np.uint8(1), np.uint8(2)], [T.ARRAY, T.UINT8]),
    ],
)
def test_the_types_of_metadata(tmp_path, value, kinds):
    write_gguf(tmp_path / "m.gguf", {"key": value}, {})
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["key"].types == kinds


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "metadata 'key': a NoneType cannot be stored; expected bool, int, float, str, a NumPy number or a list"),
        ({"a": 1}, "a dict cannot be stored"),
        (b"bytes", "a bytes cannot be stored"),
        ({1}, "a set cannot be stored"),
        (2**64, "the integers do not fit 64 bits"),
        ([-1, 2**63], "the integers do not fit 64 bits"),
        (1e39, r"1e\+39 does not fit float32; give numpy\.float64\(1e\+39\)"),
        ([0.5, -1e39], "does not fit float32"),
        ([1, "x"], "the elements differ in type"),
        ([1, 0.5], "the elements differ in type"),
        ([1, True], "the elements differ in type"),
        ("\ud800", "no UTF-8 text"),
        (np.float16(1), r"an array float16\[\] cannot be stored"),
        (np.zeros((2, 2), np.int32), r"an array int32\[2, 2\] cannot be stored; expected at most one dimension"),
    ],
)
def test_metadata_that_cannot_be_stored_are_refused(tmp_path, value, words):
    with pytest.raises(CheckpointError, match=words):
        write_gguf(tmp_path / "m.gguf", {"key": value}, {})
    assert list(tmp_path.iterdir()) == []


def test_lists_may_be_nested_as_deep_as_the_reader_goes_and_no_deeper(tmp_path):
    value: list = [1]
    for _ in range(15):
        value = [value]
    write_gguf(tmp_path / "m.gguf", {"key": value}, {})
    assert open_checkpoint(tmp_path / "m.gguf").metadata["key"] == value
    with pytest.raises(CheckpointError, match="lists are nested deeper than 16"):
        write_gguf(tmp_path / "m.gguf", {"key": [value]}, {})


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (np.zeros(2, np.uint8), "the dtype is uint8; expected f32, f16, bf16"),
        (np.zeros(2, np.complex64), "the dtype is complex64"),
        (np.zeros((1,) * 5, np.float32), "5 dimensions; expected at most 4"),
        ((np.zeros(18, np.uint8), "q9_9"), "the encoding is 'q9_9'; expected one of f32"),
        ((np.zeros(18, np.int8), "q4_0"), r"no uint8 array; expected uint8 \[\.\.\., bytes_per_row\]"),
        ((np.zeros((2, 19), np.uint8), "q4_0"), "a row has 19 bytes; expected a multiple of q4_0's block of 18 bytes"),
        ([1.0], "a list is no tensor"),
    ],
)
def test_tensors_that_cannot_be_stored_are_refused(tmp_path, tensor, words):
    with pytest.raises(CheckpointError, match="tensor 't': .*" + words):
        write_gguf(tmp_path / "m.gguf", {}, {"t": tensor})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"version": 1}, "the version is 1; expected 2 or 3"),
        ({"byte_order": "middle"}, "'middle' is no byte order; expected 'little' or 'big'"),
        ({"alignment": 24}, "the alignment is 24; expected a power of two"),
        ({"alignment": 0}, "the alignment is 0; expected a power of two"),
        ({"alignment": 2**32}, "expected a power of two"),
        ({"metadata": {"general.alignment": 64}}, "the metadata say 64, the argument 32; expected one value"),
        ({"metadata": {"k" * 2**16: 1}}, "the name has 65536 bytes; expected at most 65535"),
    ],
)
def test_options_that_make_no_file_are_refused(tmp_path, options, words):
    with pytest.raises(CheckpointError, match=words):
        write_gguf(tmp_path / "m.gguf", **{"metadata": {}, "tensors": {}, **options})


def test_arrays_of_any_layout_are_written_row_major(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tensors = {"transposed": base.T, "strided": base[:, ::2], "big-endian": base.astype(">f4")}
    packed = np.arange(72, dtype=np.uint8).reshape(18, 4).T  # [4, 18]
    write_gguf(tmp_path / "m.gguf", {}, {**tensors, "packed": (packed, "q4_0")})
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        for name, expected in tensors.items():
            np.testing.assert_array_equal(checkpoint[name].numpy(), expected)
        np.testing.assert_array_equal(checkpoint["packed"].raw(), packed)


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    write_gguf(path, {"which": "old"}, {"t": np.zeros(8, np.float32)})
    before = path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_gguf(path, {"which": "new"}, {"t": np.ones(8, np.float32)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_open_keeps_its_bytes_when_it_is_replaced(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, {}, {"t": np.zeros(8, np.float32)})
    with open_checkpoint(path) as old:
        write_gguf(path, {}, {"t": np.ones(2, np.float32)})
        assert old["t"].numpy().tolist() == [0.0] * 8
    assert open_checkpoint(path)["t"].numpy().tolist() == [1.0] * 2


def test_the_file_ends_with_a_whole_padding(tmp_path):
    write_gguf(tmp_path / "m.gguf", {}, {"t": np.zeros(1, np.int8)}, alignment=256)
    assert (tmp_path / "m.gguf").stat().st_size % 256 == 0


def test_a_streamed_tensor_writes_the_bytes_of_the_whole_one(tmp_path):
    table = np.arange(48, dtype=np.float32).reshape(6, 8)
    packed = np.arange(6 * 36, dtype=np.uint8).reshape(6, 36)
    streamed = {
        "plain": StreamedTensor((6, 8), "f32", lambda: (table[i : i + 4] for i in (0, 4))),
        "packed": StreamedTensor((6, 64), "q4_0", lambda: iter([packed[:1], packed[1:]])),
        "empty": StreamedTensor((0, 8), "f16", lambda: ()),
    }
    for order in ("little", "big"):
        write_gguf(tmp_path / "whole.gguf", {}, {"plain": table, "packed": (packed, "q4_0"),
                   "empty": np.zeros((0, 8), np.float16)}, byte_order=order)  # fmt: skip
        write_gguf(tmp_path / "pieces.gguf", {}, streamed, byte_order=order)
        assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()


def test_streamed_tensors_are_made_one_after_another(tmp_path):
    """Nothing of a tensor exists before it is its turn, and nothing of it is kept after."""
    alive: list[weakref.ref] = []
    most = 0

    def make(value):
        def pieces():
            nonlocal most
            for _ in range(3):
                piece = np.full((4, 8), value, np.float32)
                alive.append(weakref.ref(piece))
                most = max(most, sum(ref() is not None for ref in alive))
                yield piece
                del piece

        return pieces

    write_gguf(tmp_path / "m.gguf", {}, {f"t{i}": StreamedTensor((12, 8), "f32", make(i)) for i in range(5)})
    assert len(alive) == 15 and most <= 2
    assert open_checkpoint(tmp_path / "m.gguf")["t4"].numpy().tolist() == np.full((12, 8), 4.0).tolist()


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (StreamedTensor((4,), "f32", lambda: [np.zeros(3, np.float32)]), "12 bytes were made; expected 16, for f32"),
        (StreamedTensor((4,), "f32", lambda: [np.zeros(5, np.float32)]), "more than 16 bytes were made; expected 16"),
        (StreamedTensor((4,), "f32", lambda: [np.zeros(4)]), "a piece of f32 is float64; expected an array of float32"),
        (StreamedTensor((4,), "f32", lambda: [[0.0] * 4]), "a piece of f32 is list"),
        (StreamedTensor((32,), "q4_0", lambda: [np.zeros(9, np.uint8)]), "9 bytes, no whole blocks of 18"),
        (StreamedTensor((33,), "q4_0", lambda: []), "a row of 33 weights is not a multiple of q4_0's block"),
        (StreamedTensor((32,), "q9_9", lambda: []), "the encoding is 'q9_9'; expected one of f32"),
        (StreamedTensor((1,) * 5, "f32", lambda: []), "5 dimensions; expected at most 4"),
    ],
)
def test_streamed_tensors_that_are_not_what_they_said_are_refused(tmp_path, tensor, words):
    with pytest.raises(CheckpointError, match="tensor 't': .*" + words):
        write_gguf(tmp_path / "m.gguf", {}, {"t": tensor})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_a_streamed_tensor_that_fails_leaves_nothing(tmp_path, stop):
    def pieces():
        yield np.zeros(2, np.float32)
        raise stop

    with pytest.raises(stop):
        write_gguf(tmp_path / "m.gguf", {}, {"t": StreamedTensor((4,), "f32", pieces)})
    assert list(tmp_path.iterdir()) == []
