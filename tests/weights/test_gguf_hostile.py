"""Broken and hostile GGUF files: every one gets a CheckpointError that names file, field, byte and expectation."""

from __future__ import annotations

import os
import re
import struct
import time
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trustcore.errors import CheckpointError
from trustcore.weights import open_checkpoint
from trustcore.weights.gguf_header import MAX_DEPTH, MAX_ELEMENTS, MAX_HEADER_BYTES, MAX_PAIRS, MAX_TENSORS
from trustcore.weights.gguf_writer import write_gguf

FUZZ = settings(
    max_examples=300,
    deadline=timedelta(seconds=5),
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# What a GGUF file is made of, built byte by byte and without the writer under test; every field may lie.
U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data) if length is None else length) + data


def head(tensors: int = 0, pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + u32(version) + u64(tensors) + u64(pairs)


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + u32(kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return u32(kind) + u64(count) + items


def tensor(name: str | bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """An entry of the table of tensors; `dims` stand innermost first, as in the file."""
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def model(*tensors: bytes, pairs: tuple[bytes, ...] = ()) -> bytes:
    """A whole file: header, metadata, tensors, padding, and 64 bytes of data."""
    header = head(len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(range(64))


def refused(path) -> CheckpointError:
    """The one error that opening `path` raises, after checking that it names the file."""
    started = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert time.perf_counter() - started < 10
    assert str(path) in str(caught.value)
    return caught.value


# Each case: the bytes, the field, the byte offset, words of the message.
CASES = {
    "magic": (b"GGUG" + u32(3) + u64(0) * 2, "magic", 0, "expected b'GGUF'"),
    "only the magic": (b"GGUF", "version", 4, "expected 4 more bytes; the file has 0 left"),
    "no counts": (b"GGUF" + u32(3), "tensor_count", 8, "cut short"),
    "version 0": (head(version=0), "version", 4, "the version is 0; expected 2 or 3"),
    "version 1": (head(version=1), "version", 4, "version 1 is not supported"),
    "version 4": (head(version=4), "version", 4, "the version is 4; expected 2 or 3"),
    "big-endian version 4": (head(version=4 << 24), "version", 4, "the version is 4; expected 2 or 3"),
    "tensors": (head(tensors=2**63), "tensor_count", 8, "expected at most 0, since an item has 24 bytes"),
    "pairs": (head(pairs=2**64 - 1), "metadata_kv_count", 16, "expected at most 0, since an item has 13 bytes"),
    "key length": (
        head(pairs=1) + text("x" * 40, 2**62),
        "metadata[0].key",
        24,
        f"the text has {2**62} bytes; expected at most 40",
    ),
    "key too long": (
        model(pairs=(pair("k" * 2**16, U8, b"\0"),)),
        "metadata[0].key",
        24,
        "the text has 65536 bytes; expected at most 65535",
    ),
    "key not UTF-8": (model(pairs=(pair(b"ab\xff", U8, b"\0"),)), "metadata[0].key", 34, "not UTF-8"),
    "key twice": (
        model(pairs=(pair("k", U8, b"\0"), pair("k", U8, b"\0"))),
        "metadata",
        38,
        "the key 'k' stands twice",
    ),
    "value type": (model(pairs=(pair("k", 13, u32(1)),)), "metadata 'k'", 33, "the type is 13; expected 0 to 12"),
    "value cut": (head(pairs=1) + pair("kkk", U64, b"\0"), "metadata 'kkk'", 39, "expected 8 more bytes"),
    "boolean": (model(pairs=(pair("k", BOOL, b"\2"),)), "metadata 'k'", 37, "a boolean is 2; expected 0 or 1"),
    "boolean in an array": (
        model(pairs=(pair("k", ARRAY, array(BOOL, 3, b"\0\1\7")),)),
        "metadata 'k'",
        51,
        "a boolean is 7; expected 0 or 1",
    ),
    "text length": (
        model(pairs=(pair("k", STRING, text("abc", 2**40)),)),
        "metadata 'k'",
        37,
        f"the text has {2**40} bytes",
    ),
    "text not UTF-8": (model(pairs=(pair("k", STRING, text(b"a\x80")),)), "metadata 'k'", 46, "not UTF-8"),
    "array type": (
        model(pairs=(pair("k", ARRAY, array(77, 1, u32(1))),)),
        "metadata 'k'",
        37,
        "the element type is 77; expected 0 to 12",
    ),
    "array count": (
        model(pairs=(pair("k", ARRAY, array(F32, 2**62, u32(1))),)),
        "metadata 'k'.count",
        41,
        f"the count is {2**62}; expected at most",
    ),
    "array count, u32(1) too many": (
        head(pairs=1) + pair("k", ARRAY, array(U32, 3, u32(1) * 2)),
        "metadata 'k'.count",
        41,
        "the count is 3; expected at most 2",
    ),
    "strings count": (
        model(pairs=(pair("k", ARRAY, array(STRING, 2**61)),)),
        "metadata 'k'.count",
        41,
        "an item has 8 bytes or more",
    ),
    "string of an array": (
        model(pairs=(pair("k", ARRAY, array(STRING, 2, text("ab") + text("c", 2**50))),)),
        "metadata 'k'[1]",
        59,
        f"the text has {2**50} bytes",
    ),
    "string of an array not UTF-8": (
        model(pairs=(pair("k", ARRAY, array(STRING, 2, text("ab") + text(b"c\xfe"))),)),
        "metadata 'k'[1]",
        68,
        "not UTF-8",
    ),
    "strings cut": (
        head(pairs=1) + pair("k", ARRAY, array(STRING, 2, text("abcdefgh"))),
        "metadata 'k'[1]",
        65,
        "expected 8 more bytes; the file has 0 left",
    ),
    "deep nesting": (
        model(pairs=(pair("k", ARRAY, array(ARRAY, 1) * 5000),)),
        "metadata 'k'" + "[0]" * MAX_DEPTH,
        37 + 12 * (MAX_DEPTH - 1),
        f"arrays are nested deeper than {MAX_DEPTH}",
    ),
    "alignment 0": (
        model(pairs=(pair("general.alignment", U32, u32(0)),)),
        "general.alignment",
        53,
        "the alignment is 0; expected a power of two",
    ),
    "alignment 48": (
        model(pairs=(pair("general.alignment", U32, u32(48)),)),
        "general.alignment",
        53,
        "the alignment is 48; expected a power of two",
    ),
    "alignment is text": (
        model(pairs=(pair("general.alignment", STRING, text("64")),)),
        "general.alignment",
        53,
        "the alignment is '64'; expected a power of two",
    ),
    "alignment beyond the file": (
        model(tensor("t", (2,)), pairs=(pair("general.alignment", U32, u32(2**31)),)),
        "tensor 't'.offset",
        82,
        f"the data are bytes {2**31} to {2**31 + 8}",
    ),
    "tensor twice": (model(tensor("t", (1,)), tensor("t", (1,), offset=32)), "tensor", 57, "'t' stands twice"),
    "dimensions": (model(tensor("t", (1,) * 5)), "tensor 't'.n_dims", 33, "5 dimensions; expected at most 4"),
    "four billion dimensions": (
        model(text("t") + u32(2**32 - 1)),
        "tensor 't'.n_dims",
        33,
        "expected at most 4",
    ),
    "product of dimensions": (
        model(tensor("t", (2**62, 2**62))),
        "tensor 't'.dims",
        37,
        "has 2**63 bytes or more",
    ),
    "product of dimensions with a zero": (
        model(tensor("t", (2**62, 2**62, 0))),
        "tensor 't'.dims",
        37,
        "has 2**63 bytes or more",
    ),
    "row of a packed tensor": (
        model(tensor("t", (33,), kind=8)),
        "tensor 't'.dims",
        37,
        "a row of 33 weights is not a multiple of q8_0's block of 32 weights",
    ),
    "ggml type": (
        model(tensor("t", (32,), kind=999)),
        "tensor 't'.type",
        45,
        "the ggml type is 999; expected one of 0 (f32), 1 (f16)",
    ),
    "ggml type that was removed": (
        model(tensor("t", (32,), kind=31)),
        "tensor 't'.type",
        45,
        "31 (q4_0_4_4), which ggml took back",
    ),
    "offset not aligned": (
        model(tensor("t", (1,), offset=4)),
        "tensor 't'.offset",
        49,
        "the offset is 4; expected a multiple of the alignment 32",
    ),
    "offset beyond the file": (
        model(tensor("t", (1,), offset=2**63)),
        "tensor 't'.offset",
        49,
        f"the data are bytes {64 + 2**63} to {68 + 2**63}, but the file has 128",
    ),
    "data beyond the file": (
        model(tensor("t", (17,))),
        "tensor 't'.offset",
        49,
        "the data are bytes 64 to 132, but the file has 128: it is cut short or broken",
    ),
    "overlap": (
        model(tensor("a", (9,)), tensor("b", (1,), offset=32)),
        "tensor 'b'.offset",
        82,
        "the data start at byte 128, but those of tensor 'a' end at 132; expected no overlap",
    ),
    "overlap at the same byte": (
        model(tensor("a", (1,)), tensor("b", (1,))),
        "tensor 'b'.offset",
        82,
        "expected no overlap",
    ),
    "part of a split model under another name": (
        model(pairs=(pair("split.count", U32, u32(2)),)),
        "split.count",
        47,
        "is not called NAME-0000N-of-00002.gguf",
    ),
    "split count is text": (
        model(pairs=(pair("split.count", STRING, text("two")),)),
        "split.count",
        47,
        "the value is 'two'; expected an integer of 0 or more",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_header_is_refused_by_field_and_byte(folder, case):
    data, field, offset, words = CASES[case]
    error = refused(folder.write(data))
    assert words in str(error)
    assert (error.field, error.offset) == (field, offset)
    assert f"{field} at byte {offset}" in str(error)


def test_the_cases_differ_from_a_good_file_only_in_their_fault(folder, touch_all):
    good = model(
        tensor("a", (8,)),
        tensor("b", (32,), kind=8, offset=32),
        pairs=(pair("k", ARRAY, array(STRING, 2, text("ab") + text("c"))), pair("flag", BOOL, b"\1")),
    )
    with open_checkpoint(folder.write(good + bytes(2))) as checkpoint:
        assert checkpoint.metadata == {"k": ["ab", "c"], "flag": True}
        assert checkpoint["a"].shape == (8,) and checkpoint["b"].encoding == "q8_0"
        assert touch_all(checkpoint) == 32 + 34


def test_a_tensor_of_no_bytes_may_stand_anywhere(folder):
    data = model(tensor("empty", (0, 3), offset=2**40), tensor("scalar", ()))
    with open_checkpoint(folder.write(data)) as checkpoint:
        assert checkpoint["empty"].numpy().shape == (3, 0)
        assert checkpoint["scalar"].numpy().shape == () and checkpoint["scalar"].raw().shape == (4,)


# A sparse file takes no disk and may claim any size, so that no count is beyond "what is left".
SPARSE = {
    "array": (head(pairs=1) + pair("k", ARRAY, array(U8, 2**40)), 2**36, "bytes of header are left"),
    "elements": (head(pairs=1) + pair("k", ARRAY, array(U8, MAX_ELEMENTS + 1)), 2**36, "the limit of this reader"),
    "strings": (head(pairs=1) + pair("k", ARRAY, array(STRING, MAX_ELEMENTS + 1)), 2**36, "the limit of this reader"),
    "arrays": (head(pairs=1) + pair("k", ARRAY, array(ARRAY, 2**17)), 2**36, "at most 65536, the limit of this"),
    "elements of two arrays": (
        head(pairs=2)
        + pair("a", ARRAY, array(U8, MAX_ELEMENTS // 2, bytes(MAX_ELEMENTS // 2)))
        + pair("b", ARRAY, array(U8, MAX_ELEMENTS // 2 + 1)),
        2**36,
        f"the count is {MAX_ELEMENTS // 2 + 1}; expected at most {MAX_ELEMENTS // 2}, the limit of this reader",
    ),
    "arrays of two arrays": (
        head(pairs=2)
        + pair("a", ARRAY, array(ARRAY, 2**15, bytes(12 * 2**15)))
        + pair("b", ARRAY, array(ARRAY, 2**15 + 1)),
        2**36,
        "the count is 32769; expected at most 32768, the limit of this reader",
    ),
    "pairs": (head(pairs=MAX_PAIRS + 1), 2**36, f"at most {MAX_PAIRS}, the limit of this reader"),
    "tensors": (head(tensors=MAX_TENSORS + 1), 2**36, f"at most {MAX_TENSORS}, the limit of this reader"),
    "names": (head(tensors=MAX_TENSORS), 2**36, "the tensor '' stands twice"),
    "text": (head(pairs=1) + pair("k", STRING, u64(2**40)), 2**36, "the text has 1099511627776 bytes"),
    "a text as long as the header": (
        head(pairs=2) + pair("k", STRING, u64(MAX_HEADER_BYTES - 45)),
        2**36,
        f"expected 8 more bytes; the header may have {MAX_HEADER_BYTES} bytes, of which 0 are left",
    ),
}


@pytest.mark.parametrize("case", SPARSE)
def test_a_sparse_file_cannot_make_opening_slow_or_large(folder, case):
    data, size, words = SPARSE[case]
    path = folder.write(data)
    os.truncate(path, size)
    error = refused(path)
    assert re.search(words, str(error)), error


def test_the_largest_header_opens_in_seconds(folder):
    """All limits reached at once by a file that is nearly all zeros: the claim behind the limits."""
    pairs = (
        pair("strings", ARRAY, array(STRING, MAX_ELEMENTS // 2, bytes(8 * (MAX_ELEMENTS // 2)))),
        pair("numbers", ARRAY, array(U8, MAX_ELEMENTS // 2, bytes(MAX_ELEMENTS // 2))),
        pair("arrays", ARRAY, array(ARRAY, 2**16, bytes(12 * 2**16))),
    )
    path = folder.write(head(pairs=3) + b"".join(pairs))
    started = time.perf_counter()
    with open_checkpoint(path) as checkpoint:
        assert [len(checkpoint.metadata[name]) for name in ("strings", "numbers", "arrays")] == [2**22, 2**22, 2**16]
    assert time.perf_counter() - started < 20


def small_model() -> tuple[dict, dict]:
    numbers = np.arange(96, dtype=np.float32)
    return (
        {
            "general.architecture": "llama",
            "general.alignment": 64,
            "tokens": ["<s>", "né", "日本", ""],
            "scores": [0.0, -1.5, 2.25, 1e-3],
            "nested": [[1, 2], [], [3]],
            "flag": True,
            "eps": np.float64(1e-5),
        },
        {
            "embed": numbers.reshape(3, 32),
            "norm": numbers[:5],
            "packed": (np.arange(2 * 34, dtype=np.uint8).reshape(1, 68), "q8_0"),
        },
    )


@pytest.fixture(scope="module", params=["little", "big"])
def small_bytes(request, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    write_gguf(path, *small_model(), alignment=64, byte_order=request.param)
    return path.read_bytes()


def test_truncation_at_every_64th_byte_is_refused(folder, small_bytes, touch_all):
    whole = folder.write(small_bytes)
    with open_checkpoint(whole) as checkpoint:
        last = max(array.offset + array.nbytes for array in checkpoint.values())
        assert touch_all(checkpoint) == 96 * 4 + 20 + 68
    cuts = [*range(0, last, 64), last - 1]
    assert len(cuts) > 10
    for cut in cuts:
        refused(folder.write(small_bytes[:cut]))
    with open_checkpoint(folder.write(small_bytes[:last])) as checkpoint:
        touch_all(checkpoint)


def opens_or_refuses(path, touch_all) -> None:
    """The contract of a reader: a checkpoint that can be read to the last byte, or a CheckpointError."""
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        assert len(str(error)) < 2000
        return
    with checkpoint:
        touch_all(checkpoint)


@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=8))
def test_flipped_bytes_give_a_checkpoint_or_a_checkpoint_error(shared_folder, small_bytes, touch_all, flips):
    data = bytearray(small_bytes)
    for place, value in flips:
        data[place % len(data)] = value
    opens_or_refuses(shared_folder.write(bytes(data)), touch_all)


@FUZZ
@given(place=st.integers(4, 2**16), value=st.sampled_from([0, 1, 2**7, 2**15, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1]))
def test_extreme_counts_anywhere_give_a_checkpoint_or_a_checkpoint_error(
    shared_folder, small_bytes, touch_all, place, value
):
    data = bytearray(small_bytes)
    place %= len(data) - 8
    data[place : place + 8] = u64(value)
    opens_or_refuses(shared_folder.write(bytes(data)), touch_all)


@FUZZ
@given(noise=st.binary(max_size=300), counts=st.tuples(st.integers(0, 4), st.integers(0, 4)))
def test_noise_after_a_good_start_gives_a_checkpoint_or_a_checkpoint_error(shared_folder, touch_all, noise, counts):
    opens_or_refuses(shared_folder.write(head(*counts) + noise), touch_all)


@FUZZ
@given(data=st.data())
def test_cuts_and_repeats_give_a_checkpoint_or_a_checkpoint_error(shared_folder, small_bytes, touch_all, data):
    size = len(small_bytes)
    start, end = sorted((data.draw(st.integers(4, size)), data.draw(st.integers(4, size))))
    place = data.draw(st.integers(4, size))
    opens_or_refuses(shared_folder.write(small_bytes[:place] + small_bytes[start:end] + small_bytes[place:]), touch_all)
