"""What every checkpoint does, whatever its format: finding the file, being a mapping, closing, releasing."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from trustcore.errors import CheckpointError
from trustcore.weights import LazyArray, open_checkpoint
from trustcore.weights.gguf_writer import write_gguf

TENSORS = {"norm": np.arange(4, dtype=np.float32), "weight": (np.arange(72, dtype=np.uint8).reshape(2, 36), "q4_0")}


@pytest.fixture
def path(tmp_path):
    write_gguf(tmp_path / "model.gguf", {"general.name": "tiny"}, TENSORS)
    return tmp_path / "model.gguf"


def test_a_checkpoint_is_a_read_only_mapping(path):
    with open_checkpoint(str(path)) as checkpoint:
        assert (checkpoint.path, checkpoint.format, checkpoint.metadata) == (path, "gguf", {"general.name": "tiny"})
        assert list(checkpoint) == ["norm", "weight"] and len(checkpoint) == 2 and "norm" in checkpoint
        assert isinstance(checkpoint["norm"], LazyArray)
        assert checkpoint.get("absent") is None
        with pytest.raises(KeyError):
            checkpoint["absent"]
        with pytest.raises(TypeError):
            checkpoint["norm"] = checkpoint["weight"]  # type: ignore[index]
        assert repr(checkpoint) == f"Checkpoint({str(path)!r}, gguf, 2 tensors, 88 bytes)"
        assert repr(checkpoint["weight"]) == "LazyArray('weight', q4_0[2, 64], 72 bytes)"


def test_arrays_that_were_taken_outlive_the_checkpoint(path):
    with open_checkpoint(path) as checkpoint:
        array, numbers, raw = checkpoint["norm"], checkpoint["norm"].numpy(), checkpoint["weight"].raw()
    checkpoint.close()  # a second time does nothing
    np.testing.assert_array_equal(numbers, np.arange(4, dtype=np.float32))
    assert raw.sum() == np.arange(72).sum()
    for read in (array.raw, array.numpy):
        with pytest.raises(CheckpointError, match="the checkpoint is closed; open it again"):
            read()
    array.release()
    with pytest.raises(ValueError, match="read-only"):
        numbers[0] = 1


def test_a_packed_array_has_no_numpy_dtype_and_says_what_to_do(path):
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(CheckpointError, match=r"q4_0 is packed \(32 weights in 18 bytes\).* Take raw\(\)") as caught,
    ):
        checkpoint["weight"].numpy()
    assert caught.value.field == "tensor 'weight'" and caught.value.offset == checkpoint["weight"].offset


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts resident pages in /proc/self/statm")
def test_release_gives_the_pages_back_and_the_data_stay(tmp_path):
    size = 64 * 2**20
    write_gguf(tmp_path / "m.gguf", {}, {"t": np.full(size // 4, 3, np.int32)})

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[2]) * resource.getpagesize()  # pages of files

    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        array = checkpoint["t"]
        before = resident()
        assert array.numpy().max() == 3
        assert resident() - before > size // 2
        array.release()
        assert resident() - before < size // 4
        assert array.numpy().min() == 3


# Finding the file.


def test_a_file_is_recognised_by_what_it_holds(path, tmp_path):
    assert open_checkpoint(path.rename(tmp_path / "no-suffix")).format == "gguf"
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "weights.bin")
    assert open_checkpoint(tmp_path / "weights.bin").format == "safetensors"


def test_the_length_of_a_safetensors_header_is_not_taken_for_another_kind_of_file(tmp_path):
    """35615 is 1f 8b, which a gzip archive starts with."""
    header = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(35615)
    (tmp_path / "model").write_bytes(len(header).to_bytes(8, "little") + header + b"\7")
    assert open_checkpoint(tmp_path / "model")["x"].numpy().tolist() == [7]


def test_a_folder_with_one_checkpoint_opens_it(path, tmp_path):
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "more").mkdir()
    assert open_checkpoint(tmp_path).path == path


def test_a_folder_prefers_its_index_and_then_model_safetensors(tmp_path):
    for name in ("model", "consolidated"):
        save_file({name: np.zeros(2, np.float32)}, tmp_path / f"{name}.safetensors")
    assert list(open_checkpoint(tmp_path)) == ["model"]
    index = '{"weight_map": {"consolidated": "consolidated.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert list(open_checkpoint(tmp_path)) == ["consolidated"]


def test_a_folder_with_several_formats_prefers_safetensors(path, tmp_path):
    np.savez(tmp_path / "weights.npz", npz=np.zeros(2))
    (tmp_path / "training_args.bin").write_bytes(b"no weights")
    assert open_checkpoint(tmp_path).format == "gguf"
    path.unlink()
    assert open_checkpoint(tmp_path).format == "npz"
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).format == "safetensors"


def test_a_folder_with_several_or_no_checkpoints_is_refused(path, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; expected model\.safetensors\.index\.json, a"):
        open_checkpoint(tmp_path / "empty")
    for letter in "abcdefg":
        write_gguf(tmp_path / f"{letter}.gguf", {}, {})
    with pytest.raises(
        CheckpointError, match=r"holds 8 checkpoints \(a\.gguf, .*, \.\.\.\)\. Open one of them: open_c"
    ):
        open_checkpoint(tmp_path)


FOREIGN = {
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html><html>", "web page, not a model.*fetch again"),
    "a part of a zip": (b"PK\x03\x04" + bytes(20), "the archive has no end record: it is cut short"),
    "a pickle": (b"\x80\x02}q\x00." + bytes(20), "a pickle of a dict; expected torch's magic number"),
    "one array": (b"\x93NUMPY\1\0" + bytes(20), r"one array of numpy\.save.*numpy\.savez"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(20), "HDF5 file.*Convert it"),
    "tar": (bytes(257) + b"ustar\x0000" + bytes(80), "tar archive: unpack it"),
    "GGML": (b"tjgg" + bytes(20), "GGML file from before GGUF. Convert"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), "gzip archive. Unpack it"),
    "something else": (b"abcdefghijkl", r"magic at byte 0: the file starts with b'abcdefgh'; expected b'GGUF'"),
    "nothing": (b"", "the file is empty; expected a checkpoint"),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("name", ["model.gguf", "model.bin"])
def test_a_file_of_another_kind_is_named(folder, case, name):
    data, words = FOREIGN[case]
    path = folder.write(data, name)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    for name, words in {
        "absent.gguf": "no such file",
        "pipe.gguf": "not a regular file",
        "loop.gguf": "cannot be opened|no such file",
        "nul\0.gguf": "cannot be opened",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(tmp_path / name)


def test_a_file_that_may_not_be_read_is_refused(path, monkeypatch):
    def refuse(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Permission denied"):
        open_checkpoint(path)


def test_errors_are_value_errors_and_keep_their_place(path):
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="metadata_kv_count at byte 16") as caught:
        open_checkpoint(path)
    assert isinstance(caught.value, CheckpointError)
    assert (caught.value.path, caught.value.field, caught.value.offset) == (path, "metadata_kv_count", 16)


def test_importing_the_readers_imports_no_optional_package():
    code = (
        "import sys, trustcore.weights.gguf, trustcore.weights.gguf_writer, trustcore.weights.safetensors;"
        "import trustcore.weights.pytorch, trustcore.weights.npz, trustcore.weights.flax_msgpack;"
        "import trustcore.weights.orbax;"
        "names = ('safetensors', 'tokenizers', 'gguf', 'torch', 'orbax', 'msgpack', 'tensorstore');"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
