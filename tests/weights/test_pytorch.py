"""The PyTorch reader against what torch.load gives, tensor by tensor, bit by bit."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib

import numpy as np
import pytest

from tests.weights.torch_files import RECORDED, archive, legacy, name, recorded, state, storage, tensor, text
from trustcore.errors import CheckpointError
from trustcore.weights import open_checkpoint

FILES = sorted(key.removesuffix("/file") for key in RECORDED if key.endswith("/file"))


def expected(case):
    return {key.split("/", 2)[2]: RECORDED[key] for key in RECORDED if key.startswith(f"{case}/tensor/")}


@pytest.mark.parametrize("case", FILES)
def test_tensors_are_those_that_torch_loads(folder, touch_all, case):
    with open_checkpoint(folder.write(recorded(case), "pytorch_model.bin")) as checkpoint:
        assert checkpoint.format == "pytorch"
        wanted = expected(case)
        assert checkpoint.keys() == wanted.keys()
        touch_all(checkpoint)
        for key, array in checkpoint.items():
            numbers, dtype = array.numpy(), f"{case}/dtype/{key}"
            assert not numbers.flags.writeable
            if dtype in RECORDED:
                assert numbers.dtype.name == str(RECORDED[dtype])
                numbers = np.ascontiguousarray(numbers).view(np.uint8)
            else:
                assert numbers.dtype == wanted[key].dtype and numbers.shape == wanted[key].shape
            np.testing.assert_array_equal(numbers, wanted[key])
            assert array.raw().tobytes() == wanted[key].tobytes()


def test_contiguous_tensors_are_views_and_shared_storages_are_shared(folder):
    with open_checkpoint(folder.write(recorded("zip"), "m.pt")) as checkpoint:
        base, tied, turned, row = (checkpoint[key].numpy() for key in ("base", "tied", "turned", "row"))
        assert not base.flags.owndata and base.flags.c_contiguous
        assert np.shares_memory(base, tied) and np.shares_memory(base, turned) and np.shares_memory(base[2], row)
        np.testing.assert_array_equal(turned, base.T)
        assert checkpoint["base"].offset == checkpoint["tied"].offset
        raw = checkpoint["base"].raw()
        assert not raw.flags.owndata
        assert checkpoint["turned"].raw().shape == (8, 24) and checkpoint["turned"].nbytes == 192


def test_order_is_that_of_the_state_dict(folder):
    with open_checkpoint(folder.write(recorded("zip"), "m.pt")) as checkpoint:
        assert list(checkpoint)[:4] == ["base", "turned", "row", "block"]


def test_a_big_endian_archive(folder):
    data = {"0": np.arange(4, dtype=">f4").tobytes()}
    made = archive(state(w=tensor(), part=tensor(1, (2, 1), (2, 1))), data, byteorder=b"big")
    with open_checkpoint(folder.write(made, "m.pt")) as checkpoint:
        np.testing.assert_array_equal(checkpoint["w"].numpy(), np.arange(4, dtype=np.float32))
        np.testing.assert_array_equal(checkpoint["part"].numpy(), np.float32([[1], [3]]))
        assert checkpoint["part"].raw().tobytes() == np.float32([1, 3]).tobytes()


def test_hand_made_files_are_read_as_torchs(folder):
    """The builders of the hostile tests make good files too, so that what those refuse is what is wrong in them."""
    for made in (archive(state(w=tensor())), legacy(state(w=tensor()))):
        with open_checkpoint(folder.write(made, "m.bin")) as checkpoint:
            np.testing.assert_array_equal(checkpoint["w"].numpy(), np.arange(4, dtype=np.float32))


@pytest.mark.parametrize(
    ("wrapped", "keys"),
    [
        (state(model=state(w=tensor())[2:-1], step=b"K\1"), ["w"]),
        (state(state_dict=state(w=tensor())[2:-1], model=b"N"), ["w"]),
        (state(state_dict=state(model=state(w=tensor())[2:-1])[2:-1], optimizer=state(w=tensor())[2:-1]), ["w"]),
        (state(encoder=state(w=tensor())[2:-1], head=tensor()), ["encoder.w", "head"]),
        (state(model=state(w=tensor())[2:-1], head=tensor()), ["model.w", "head"]),
    ],
)
def test_state_dicts_in_what_a_program_saved(folder, wrapped, keys):
    with open_checkpoint(folder.write(archive(wrapped), "m.pt")) as checkpoint:
        assert list(checkpoint) == keys


def test_a_view_of_an_older_storage(folder):
    """Before 1.0 a storage could be a part of another."""
    view = b"(" + text("v") + b"K\1K\2t"
    pid = b"(" + text("storage") + name("torch.FloatStorage") + text("0") + text("cpu") + b"K\4" + view + b"tQ"
    made = legacy(state(w=tensor(0, (2,), (1,), of=pid)))
    with open_checkpoint(folder.write(made, "m.pt")) as checkpoint:
        np.testing.assert_array_equal(checkpoint["w"].numpy(), np.float32([1, 2]))


def test_shards_with_an_index_and_config(folder):
    for number, key in enumerate("ab", 1):
        data = np.full(4, number, np.float32).tobytes()
        folder.write(archive(state(**{key: tensor()}), {"0": data}), f"pytorch_model-0000{number}-of-00002.bin")
    weight_map = {key: f"pytorch_model-0000{number}-of-00002.bin" for number, key in enumerate("ab", 1)}
    folder.write(
        json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map}).encode(), "pytorch_model.bin.index.json"
    )
    folder.write(b'{"model_type": "llama"}', "config.json")
    folder.write(b"not read", "training_args.bin")
    with open_checkpoint(folder.path) as checkpoint:
        assert checkpoint.format == "pytorch" and checkpoint.metadata["config"] == {"model_type": "llama"}
        assert [float(checkpoint[key].numpy()[0]) for key in "ab"] == [1, 2]
    folder.write(archive(state(other=tensor())), "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError, match="the index places 'b' here, but the file does not hold it"):
        open_checkpoint(folder.path)


def test_a_model_is_loaded_from_pytorch_files(tmp_path):
    """The loader sees no difference to safetensors: names, shapes, encodings, config.json."""
    from tests.models.small import random_decoder, some_tokens, write_as_hugging_face
    from trustcore.models import decoder_from_checkpoint

    write_as_hugging_face(tmp_path, random_decoder())
    with open_checkpoint(tmp_path) as checkpoint:
        arrays = {key: array.numpy() for key, array in checkpoint.items()}
        wanted = decoder_from_checkpoint(checkpoint)(some_tokens())
    keys = {key: str(index) for index, key in enumerate(arrays)}
    parts = {
        key: tensor(0, a.shape, [s // 4 for s in a.strides], of=storage(keys[key], a.size)) for key, a in arrays.items()
    }
    made = archive(state(**parts), {keys[key]: a.tobytes() for key, a in arrays.items()})
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(made)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "pytorch"
        np.testing.assert_array_equal(decoder_from_checkpoint(checkpoint)(some_tokens()), wanted)


def zip64(entries):
    """An archive as those over four gigabytes are: every size and place in 64-bit fields."""
    data, directory = b"", b""
    for key, value in entries.items():
        name, crc, large = key.encode(), zlib.crc32(value), 0xFFFFFFFF
        sizes = struct.pack("<HHQQ", 1, 16, len(value), len(value))
        local = struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 0, crc, large, large, len(name), len(sizes))
        extra = struct.pack("<HHQQQ", 1, 24, len(value), len(value), len(data))
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 45, 45, 0, 0, 0, 0, crc, large, large, len(name), len(extra), 0, 0, 0, 0, large
        )
        directory += name + extra
        data += local + name + sizes + value
    count, start, end = len(entries), len(data), len(data) + len(directory)
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return data + directory + record + locator + last


def test_archives_of_more_than_four_gigabytes(folder):
    floats = np.arange(4, dtype=np.float32).tobytes()
    made = zip64({"m/data.pkl": state(w=tensor()), "m/data/0": floats})
    with zipfile.ZipFile(folder.write(made, "m.pt")) as packed:
        assert packed.read("m/data/0") == floats  # so the builder is right
    with open_checkpoint(folder.path / "m.pt") as checkpoint:
        np.testing.assert_array_equal(checkpoint["w"].numpy(), np.arange(4))
    for place, word in ((made.rfind(b"PK\6\7") + 8, 2**60), (made.rfind(b"PK\6\6") + 48, 2**63)):
        broken = made[:place] + struct.pack("<Q", word) + made[place + 8 :]
        with pytest.raises(CheckpointError, match=r"not where its locator says|does not lie in the file"):
            open_checkpoint(folder.write(broken, "m.pt"))
