"""llama.cpp's importance matrices: files written by the `gguf` package and by hand, round trips, broken files."""

import struct

import gguf
import numpy as np
import pytest

from tests.models.small import random_decoder, some_tokens
from trustcore.errors import CheckpointError, ModelError
from trustcore.models import importance_by_path, importance_by_tensor
from trustcore.quant import quantize
from trustcore.quant.calibration import MeanSquare, capture
from trustcore.weights import Imatrix, read_imatrix, write_imatrix
from trustcore.weights.imatrix import Entry

RNG = np.random.default_rng(0)
SUMS = {"blk.0.ffn_down.weight": RNG.random((1, 96)) * 50, "blk.0.ffn_up_exps.weight": RNG.random((4, 64)) * 9}
COUNTS = {"blk.0.ffn_down.weight": [25.0], "blk.0.ffn_up_exps.weight": [3.0, 0.0, 7.0, 1.0]}


def gguf_by_package(path):
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["some text"])
    writer.add_uint32("imatrix.chunk_count", 5)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, sums in SUMS.items():
        writer.add_tensor(f"{name}.in_sum2", sums.astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.array(COUNTS[name], np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dat_by_hand(path, tail):
    data = struct.pack("<i", 1)
    name = b"blk.0.ffn_down.weight"
    values = (SUMS[name.decode()][0] / 25 * 5).astype("<f4")  # means times calls
    data += struct.pack("<i", len(name)) + name + struct.pack("<ii", 5, 96) + values.tobytes() + tail
    path.write_bytes(data)


def test_a_gguf_file_of_the_package(tmp_path):
    gguf_by_package(tmp_path / "a.gguf")
    found = read_imatrix(tmp_path / "a.gguf")
    assert (found.datasets, found.chunks, found.chunk_size) == (("some text",), 5, 512)
    down, up = (found.importance[name] for name in SUMS)
    np.testing.assert_allclose(down, SUMS["blk.0.ffn_down.weight"][0] / 25, rtol=1e-6)
    assert up.shape == (4, 64)
    np.testing.assert_allclose(up[2], SUMS["blk.0.ffn_up_exps.weight"][2] / 7, rtol=1e-6)
    np.testing.assert_array_equal(up[1], 1)  # that expert saw nothing


@pytest.mark.parametrize("tail", [b"", struct.pack("<ii", 5, 9) + b"some text"])
def test_a_dat_file(tmp_path, tail):
    dat_by_hand(tmp_path / "a.dat", tail)
    found = read_imatrix(tmp_path / "a.dat")
    np.testing.assert_allclose(found.importance["blk.0.ffn_down.weight"], SUMS["blk.0.ffn_down.weight"][0] / 25, 1e-6)
    assert found.datasets == (("some text",) if tail else ()) and found.chunks == (5 if tail else 0)


@pytest.mark.parametrize("name", ["b.gguf", "b.dat"])
def test_what_we_write_we_read(tmp_path, name):
    entries = {
        "blk.0.ffn_down.weight": Entry(RNG.random(96).astype(np.float32), np.array([40], np.float32)),
        "blk.1.ffn_up_exps.weight": Entry(RNG.random((4, 64)).astype(np.float32), np.full(4, 40, np.float32)),
    }
    write_imatrix(tmp_path / name, Imatrix(entries, ("x",), 3, 512))
    found = read_imatrix(tmp_path / name, experts={"blk.1.ffn_up_exps.weight": 4})
    for tensor, entry in entries.items():
        np.testing.assert_allclose(found.entries[tensor].mean, entry.mean, rtol=1e-6)
        np.testing.assert_array_equal(found.entries[tensor].counts, entry.counts)
    assert (found.datasets, found.chunks) == (("x",), 3)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_the_package_reads_what_we_write(tmp_path):
    write_imatrix(tmp_path / "c.gguf", Imatrix.of({"blk.0.attn_q.weight": np.arange(8.0)}, rows=6, datasets=["x"]))
    reader = gguf.GGUFReader(tmp_path / "c.gguf")
    tensors = {t.name: t for t in reader.tensors}
    assert list(tensors["blk.0.attn_q.weight.in_sum2"].shape) == [8, 1]
    assert list(tensors["blk.0.attn_q.weight.counts"].shape) == [1, 1]
    np.testing.assert_allclose(tensors["blk.0.attn_q.weight.in_sum2"].data.reshape(-1), 6 * np.arange(8.0))
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["x"]
    assert reader.get_field("imatrix.chunk_size").types == [gguf.GGUFValueType.UINT32]


def test_from_a_model_to_a_file_and_back(tmp_path):
    model, tokens = random_decoder(), some_tokens()
    collect = capture(None, model, MeanSquare())
    importance = collect.finish(collect(tokens))
    write_imatrix(tmp_path / "m.gguf", Imatrix.of(importance_by_tensor(importance, model.config), rows=tokens.size))
    read = importance_by_path(read_imatrix(tmp_path / "m.gguf").importance, model.config)
    assert set(read) == set(importance) and "blocks.1.mlp.down.kernel" in read
    packed = quantize(model, "q4_0", importance=read)
    assert packed.blocks[0].mlp.down.kernel.get_value().format == "q4_0"
    with pytest.raises(ModelError, match=r"blk\.9\.attn_q\.weight is no weight of a decoder of 2 layers"):
        importance_by_path({"blk.9.attn_q.weight": np.ones(4)}, model.config)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"abc", "the file ends here"),
        (struct.pack("<i", -1), "the number is -1"),
        (struct.pack("<ii", 1, 5) + b"ab", "the file ends here"),
        (struct.pack("<ii", 1, 2) + b"\xff\xff" + bytes(8), "no UTF-8"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 1 << 30), "do not fit the 0 bytes left"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<iif", 1, 1, np.nan), "finite and not negative"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<iif", 1, 1, 1.0) + b"xx", "the file ends here"),
    ],
)
def test_broken_dat_files(tmp_path, data, message):
    (tmp_path / "x.dat").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_imatrix(tmp_path / "x.dat")


def test_broken_gguf_files(tmp_path):
    from trustcore.weights.gguf_writer import write_gguf

    path, ones = tmp_path / "x.gguf", np.ones((2, 4), np.float32)
    for metadata, tensors, message in (
        ({"general.type": "model"}, {}, "the file says 'model'"),
        ({}, {"a.weight": ones}, "no tensor ends in"),
        ({}, {"a.in_sum2": ones}, "its counts are missing"),
        ({}, {"a.in_sum2": ones, "a.counts": ones[:, :2]}, "4 counts for sums"),
        ({}, {"a.in_sum2": -ones, "a.counts": ones[:, :1]}, "finite and not negative"),
        ({"imatrix.chunk_count": "x"}, {"a.in_sum2": ones, "a.counts": ones[:, :1]}, "chunk_count and chunk_size"),
    ):
        write_gguf(path, metadata, tensors)
        with pytest.raises(CheckpointError, match=message):
            read_imatrix(path)
    with pytest.raises(CheckpointError, match="the layout is 'x'"):
        write_imatrix(path, Imatrix({}), layout="x")
    with pytest.raises(CheckpointError, match="expected \\[K\\] and \\[1\\]"):
        write_imatrix(path, Imatrix({"a": Entry(np.ones(4), np.ones(2))}))
