"""The reader of .npz files against numpy.load, and files that lie."""

from __future__ import annotations

import io
import resource
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from trustcore.errors import CheckpointError
from trustcore.weights import open_checkpoint

RNG = np.random.default_rng(0)
ARRAYS = {
    "f32": RNG.standard_normal((3, 4)).astype(np.float32),
    "layers/0/kernel": RNG.standard_normal((5, 2)).astype(np.float16),
    "fortran": np.asfortranarray(RNG.standard_normal((3, 4, 2))),
    "big": RNG.standard_normal((2, 3)).astype(">f4"),
    "big_fortran": np.asfortranarray(RNG.integers(0, 99, (4, 3))).astype(">i4", order="K"),
    "complex": RNG.standard_normal(3) + 1j,
    "flags": np.array([True, False]),
    "bytes": np.arange(5, dtype=np.uint8),
    "scalar": np.array(2.5),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_reads_what_numpy_writes(tmp_path, touch_all, write):
    write(tmp_path / "model.npz", **ARRAYS)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "npz" and list(checkpoint) == list(ARRAYS)
        assert checkpoint.metadata == {"config": {"model_type": "vit"}}
        touch_all(checkpoint)
        for name, array in ARRAYS.items():
            numbers = checkpoint[name].numpy()
            assert numbers.dtype == array.dtype.newbyteorder("=") and numbers.shape == array.shape
            assert not numbers.flags.writeable
            np.testing.assert_array_equal(numbers, array)
            native = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("="))
            assert checkpoint[name].raw().tobytes() == native.tobytes()
        assert checkpoint["f32"].numpy().flags.owndata is False


def test_bfloat16_which_numpy_writes_without_its_name(tmp_path):
    array = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "m.npz", w=array)
    with open_checkpoint(tmp_path / "m.npz") as checkpoint:
        assert checkpoint["w"].encoding == "bf16"
        np.testing.assert_array_equal(checkpoint["w"].numpy(), array)


def test_compressed_arrays_are_unpacked_when_they_are_asked_for_and_shared_while_they_live(tmp_path):
    np.savez_compressed(tmp_path / "m.npz", w=np.arange(1000))
    with open_checkpoint(tmp_path / "m.npz") as checkpoint:
        first, second = checkpoint["w"].numpy(), checkpoint["w"].numpy()
        assert np.shares_memory(first, second)
    with pytest.raises(CheckpointError, match="the checkpoint is closed"):
        checkpoint["w"].raw()
    assert first[999] == 999


def archive(data: bytes, name: str = "w.npy", method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as packed:
        packed.writestr(name, data)
    return buffer.getvalue()


def array(header: str | bytes, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    length = struct.pack("<H", len(text)) if version == 1 else struct.pack("<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def described(descr="'<f4'", order="False", shape="(2,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


def objects() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}, None], object), allow_pickle=True)
    return buffer.getvalue()


BROKEN = {
    "objects": (objects(), "Python objects is a pickle, which is not read"),
    "no array": (b"text and more text", "starts with b'text and'; expected"),
    "nothing": (b"", "starts with b''; expected"),
    "another version": (array(described(), bytes(8), version=9), "a version from 1 to 3"),
    "a long header": (array(described().ljust(20_000), bytes(8)), "has 20000 bytes; expected at most 10000"),
    "a header past the end": (array(described())[:40], "expected at most 10000, within the 40"),
    "a header that calls": (array("__import__('os').system('x')", bytes(8)), "no description of an array"),
    "a header too deep": (array("(" * 9000, bytes(8)), "no description of an array"),
    "a list": (array("[1]", bytes(8)), "the header is no dictionary"),
    "no shape": (array("{'descr': '<f4', 'fortran_order': False}", bytes(8)), "no shape"),
    "a negative size": (array(described(shape="(-2,)"), bytes(8)), "no integer from 0"),
    "a flag as size": (array(described(shape="(True, 2)"), bytes(8)), "no integer from 0"),
    "many axes": (array(described(shape=str((1,) * 65)), bytes(4)), "no shape of at most 64"),
    "an absurd shape": (array(described(shape="(2**62,)"), bytes(8)), "no description"),
    "a huge shape": (array(described(shape=f"({2**62}, 4)"), bytes(8)), r"2\*\*63 bytes or more"),
    "too few bytes": (array(described(), bytes(7)), "has 7 bytes; expected 8"),
    "too many bytes": (array(described(), bytes(9)), "has 9 bytes; expected 8"),
    "text": (array(described("'<U4'"), bytes(32)), "the dtype is '<U4'; expected one of"),
    "records": (array(described("[('a', '<f4')]"), bytes(8)), "the dtype is "),
    "8-bit floats": (array(described("'|V1'"), bytes(2)), "8-bit floats lose their meaning"),
    "no dtype": (array(described("'zz'"), bytes(8)), "the dtype is 'zz'"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_broken_array_is_one_error_that_names_it(folder, case, method):
    data, words = BROKEN[case]
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(folder.write(archive(data, method=method), "m.npz"))
    assert caught.value.field == "tensor 'w'"


def test_a_bomb_does_not_go_off(folder):
    """64 MB of zeros in 64 kB, as an array of two numbers: refused by what the directory says; where it lies, by what
    the bytes are."""
    bomb = archive(array(described(), bytes(2**26)), method=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**18
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="has 67108864 bytes; expected 8"):
        open_checkpoint(folder.write(bomb, "m.npz"))
    size = len(array(described(), bytes(8)))
    place = bomb.rfind(b"PK\x01\x02") + 24
    lying = bomb[:place] + struct.pack("<L", size) + bomb[place + 4 :]
    with (
        open_checkpoint(folder.write(lying, "m.npz")) as checkpoint,
        pytest.raises(CheckpointError, match=r"the checksum of entry 'w\.npy' is wrong"),
    ):
        checkpoint["w"].numpy()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**14  # kB
    more = bomb[:place] + struct.pack("<L", 2**31) + bomb[place + 4 :]
    with pytest.raises(CheckpointError, match=r"makes 2147483648 bytes of .*, which cannot be"):
        open_checkpoint(folder.write(more, "m.npz"))


def test_damaged_deflate_streams_are_told_when_they_are_read(folder):
    whole = archive(array(described(shape="(4096,)"), RNG.bytes(16384)), method=zipfile.ZIP_DEFLATED)
    place = whole.find(b"w.npy") + 5
    stored = whole.rfind(b"PK\x01\x02") - place
    for cut in (
        whole[: place + 9000] + b"x" + whole[place + 9001 : place + stored],
        whole[: place + 9000] + b"\xff" * (stored - 9000),
        whole[: place + stored - 6] + bytes(6),
    ):
        data = cut + whole[place + stored :]
        with (
            open_checkpoint(folder.write(data, "m.npz")) as checkpoint,
            pytest.raises(CheckpointError, match=r"cannot be unpacked|ends after \d+ of|checksum"),
        ):
            checkpoint["w"].numpy()


def test_an_archive_of_something_else_is_named(folder):
    with pytest.raises(CheckpointError, match=r"zip archive with 'notes.txt'; expected data\.pkl"):
        open_checkpoint(folder.write(archive(b"text", "notes.txt"), "m.npz"))
