"""The GGUF reader and writer: round trips, split models, and agreement with the `gguf` package and the demo file."""

from __future__ import annotations

import time
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trustcore.errors import CheckpointError
from trustcore.quant.formats import BLOCK_FORMATS
from trustcore.weights import Checkpoint, open_checkpoint
from trustcore.weights.gguf_types import GGML_IDS, GGML_TYPES, SCALARS
from trustcore.weights.gguf_writer import write_gguf

RNG = np.random.default_rng(0)
PLAIN = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.int16, np.int32, np.int64)
PACKED = sorted(name for name, number in GGML_IDS.items() if GGML_TYPES[number].dtype is None)
SETTLED = [name for name in PACKED if GGML_TYPES[GGML_IDS[name]].words is not None]

METADATA = {
    "general.architecture": "llama",
    "text": 'quotes " and \n lines, 日本語, \U0001f600, \0',
    "flag": True,
    "count": 7,
    "negative": -7,
    "large": 2**63,
    "large negative": -(2**40),
    "float": 0.5,
    "u8": np.uint8(200),
    "i8": np.int8(-100),
    "u16": np.uint16(60000),
    "i16": np.int16(-30000),
    "f64": np.float64(0.1),
    "u64": np.uint64(3),
    "tokens": ["a", "", "ü"],
    "types": [1, -2, 3],
    "wide": [1, 2**40],
    "scores": [0.25, -1.0],
    "flags": [True, False],
    "array": np.arange(5, dtype=np.int16),
    "booleans": np.array([True, False, True]),
    "empty": [],
    "nested": [["x", "y"], ["z"]],
    "nested deeper": [[[1], [2, 3]], [[4]]],
}


def packed_rows(name: str, rows: int = 3, blocks: int = 2) -> np.ndarray:
    return RNG.integers(0, 256, (rows, blocks * GGML_TYPES[GGML_IDS[name]].nbytes), np.uint8)


def python_value(value):
    """What a value that was written reads back as."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
@pytest.mark.parametrize("byte_order", ["little", "big"])
@pytest.mark.parametrize("version", [2, 3])
def test_what_is_written_reads_back(tmp_path, version, byte_order, alignment):
    path = tmp_path / "model.gguf"
    plain = {f"plain.{np.dtype(dtype)}": RNG.integers(-100, 100, (2, 3, 5)).astype(dtype) for dtype in PLAIN}
    plain["vector"], plain["scalar"] = np.arange(7, dtype=np.float32), np.array(1.5, np.float32)
    plain["none"] = np.zeros((0, 4), np.float32)
    packed = {name: packed_rows(name) for name in SETTLED}
    write_gguf(
        path,
        METADATA,
        {**plain, **{name: (rows, name) for name, rows in packed.items()}},
        version=version,
        byte_order=byte_order,
        alignment=alignment,
    )
    with open_checkpoint(path) as checkpoint:
        extra = {} if alignment == 32 else {"general.alignment": alignment}
        assert checkpoint.metadata == {key: python_value(value) for key, value in METADATA.items()} | extra
        assert type(checkpoint.metadata["flag"]) is bool and type(checkpoint.metadata["u8"]) is int
        assert list(checkpoint) == [*plain, *packed]
        for name, expected in plain.items():
            array = checkpoint[name]
            assert (array.shape, array.dtype, array.nbytes) == (expected.shape, expected.dtype, expected.nbytes)
            np.testing.assert_array_equal(array.numpy(), expected, strict=True)
            assert not array.numpy().flags.writeable and not array.raw().flags.writeable
            assert array.raw().tobytes() == expected.tobytes()
        for name, rows in packed.items():
            array = checkpoint[name]
            assert (array.encoding, array.dtype) == (name, None)
            assert array.shape == (3, 2 * GGML_TYPES[GGML_IDS[name]].weights)
            np.testing.assert_array_equal(array.raw(), rows, strict=True)
        assert all(array.offset % alignment == 0 for array in checkpoint.values())


@pytest.mark.parametrize("byte_order", ["little", "big"])
def test_raw_is_a_view_of_the_file_where_the_byte_order_allows(tmp_path, byte_order):
    path = tmp_path / "model.gguf"
    tensors = {"a": np.arange(6, dtype=np.float32), "b": (packed_rows("q4_1"), "q4_1"), "c": np.zeros(4, np.int8)}
    write_gguf(path, {}, tensors, byte_order=byte_order)
    checkpoint = open_checkpoint(path)
    shared = {name: np.shares_memory(array.raw(), array.raw()) for name, array in checkpoint.items()}
    assert shared == {"a": byte_order == "little", "b": byte_order == "little", "c": True}


def test_big_endian_blocks_whose_order_is_not_settled_are_refused_by_name(tmp_path):
    unsettled = [name for name in PACKED if name not in SETTLED]
    assert len(unsettled) == 7
    for name in unsettled:
        with pytest.raises(CheckpointError, match=f"tensor 't': the byte order of {name} blocks"):
            write_gguf(tmp_path / "m.gguf", {}, {"t": (packed_rows(name), name)}, byte_order="big")
    write_gguf(tmp_path / "m.gguf", {}, {"t": (packed_rows("q2_k"), "q2_k")}, byte_order="big")
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    place = data.index((10).to_bytes(4, "big"), 40)
    data[place : place + 4] = GGML_IDS["iq2_xxs"].to_bytes(4, "big")  # smaller, so that the data fit
    (tmp_path / "n.gguf").write_bytes(data)
    array = open_checkpoint(tmp_path / "n.gguf")["t"]
    with pytest.raises(CheckpointError, match="the byte order of iq2_xxs blocks in a big-endian file is not settled"):
        array.raw()


# The `gguf` package as the oracle.


def test_the_table_of_types_is_that_of_the_gguf_package():
    for kind, (weights, nbytes) in gguf.GGML_QUANT_SIZES.items():
        encoding = GGML_TYPES[int(kind)]
        # The package counts the float32 pair of an older q8_1; ggml-common.h has two float16.
        expected = 36 if kind.name == "Q8_1" else nbytes
        assert (encoding.name, encoding.weights, encoding.nbytes) == (kind.name.lower(), weights, expected)
    assert set(GGML_TYPES) - {int(kind) for kind in gguf.GGML_QUANT_SIZES} <= {42}
    assert {int(kind) for kind in gguf.GGUFValueType} == {*SCALARS, 7, 8, 9}


def test_the_table_of_types_is_that_of_the_packed_formats():
    shared = [name for name in BLOCK_FORMATS if name in GGML_IDS]
    assert {"q4_1", "q8_0"} <= set(shared)
    for name in shared:
        encoding, spec = GGML_TYPES[GGML_IDS[name]], BLOCK_FORMATS[name]
        assert (spec.block, spec.bytes_per_block) == (encoding.weights, encoding.nbytes), name


def assert_same_as_oracle(checkpoint: Checkpoint, reader: gguf.GGUFReader, keys=None) -> None:
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert set(fields) == set(checkpoint.metadata)
    for name, field in fields.items():
        if keys is None or name in keys:
            assert field.contents() == checkpoint.metadata[name], name
    assert [tensor.name for tensor in reader.tensors] == list(checkpoint)
    for tensor in reader.tensors:
        array = checkpoint[tensor.name]
        assert tensor.tensor_type.name.lower() == array.encoding
        assert tuple(tensor.shape.tolist()) == array.shape[::-1]
        assert tensor.data_offset == array.offset
        expected = tensor.data.reshape(-1)
        if array.dtype is not None and expected.dtype != np.uint8:
            np.testing.assert_array_equal(array.numpy().reshape(-1).astype(expected.dtype), expected)
        else:
            np.testing.assert_array_equal(array.raw().reshape(-1), expected)


# What the oracle reads as well: it knows no empty array and no array of arrays.
FLAT = {key: value for key, value in METADATA.items() if not key.startswith(("nested", "empty"))}


@pytest.mark.parametrize("byte_order", ["little", "big"])
def test_the_gguf_package_reads_what_the_writer_writes(tmp_path, byte_order):
    path = tmp_path / "model.gguf"
    tensors: dict = {f"plain.{np.dtype(dtype)}": np.arange(12).reshape(3, 4).astype(dtype) for dtype in PLAIN}
    if byte_order == "little":  # it leaves packed blocks and bfloat16 of a big-endian file as they are
        names = [name for name in PACKED if name.upper() in gguf.GGMLQuantizationType.__members__ and name != "q8_1"]
        tensors |= {name: (packed_rows(name), name) for name in names}
    else:
        del tensors["plain.bfloat16"]
    write_gguf(path, FLAT, tensors, byte_order=byte_order)
    reader = gguf.GGUFReader(path)
    with open_checkpoint(path) as checkpoint:
        assert_same_as_oracle(checkpoint, reader)
    del reader


@pytest.mark.parametrize("endian", list(gguf.GGUFEndian))
def test_reads_what_the_gguf_package_writes(tmp_path, endian):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    writer.add_custom_alignment(128)
    writer.add_uint8("u8", 3)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_array("tokens", ["a", "bc", "é"])
    writer.add_array("scores", [0.5, -2.0])
    weights = RNG.standard_normal((4, 64)).astype(np.float32)
    writer.add_tensor("f32", weights)
    writer.add_tensor("i32", np.arange(6, dtype=np.int32).reshape(2, 3))
    if endian == gguf.GGUFEndian.LITTLE:
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor("q4_1", gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata["tokens"] == ["a", "bc", "é"] and checkpoint.metadata["f64"] == 0.1
        np.testing.assert_array_equal(checkpoint["f32"].numpy(), weights, strict=True)
        np.testing.assert_array_equal(checkpoint["i32"].numpy(), np.arange(6, dtype=np.int32).reshape(2, 3))
        assert all(array.offset % 128 == 0 for array in checkpoint.values())
        assert_same_as_oracle(checkpoint, gguf.GGUFReader(path))


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "q4_k", "q6_k", "mxfp4", "nvfp4"])
def test_big_endian_blocks_are_those_of_the_gguf_package(tmp_path, name):
    """The package's own converter, on every packed type that it knows."""
    from types import SimpleNamespace

    from gguf.scripts.gguf_convert_endian import byteswap_tensors

    rows = packed_rows(name)
    write_gguf(tmp_path / "big.gguf", {}, {"t": (rows, name)}, byte_order="big")
    array = open_checkpoint(tmp_path / "big.gguf")["t"]
    tensor = SimpleNamespace(data=rows.reshape(-1).copy())
    swap = byteswap_tensors[gguf.GGMLQuantizationType[name.upper()]]
    for start in range(0, rows.size, GGML_TYPES[GGML_IDS[name]].nbytes):
        swap(tensor, start)
    stored = (tmp_path / "big.gguf").read_bytes()[array.offset : array.offset + array.nbytes]
    assert stored == tensor.data.tobytes()
    assert array.raw().tobytes() == rows.tobytes()


# Any metadata.

_TEXT = st.text(max_size=12)
_LEAF = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(width=32, allow_nan=False), _TEXT, st.just(np.uint8(9))
)
_LISTS = st.one_of(
    st.lists(st.booleans(), max_size=5),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
    st.lists(st.integers(0, 2**64 - 1), max_size=5),
    st.lists(st.floats(width=32, allow_nan=False), max_size=5),
    st.lists(_TEXT, max_size=5),
)
_TREES = st.one_of(_LEAF, st.recursive(_LISTS, lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=8))


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    metadata=st.dictionaries(_TEXT.filter(lambda key: not key.startswith(("general.", "split."))), _TREES, max_size=6),
    byte_order=st.sampled_from(["little", "big"]),
)
def test_any_metadata_round_trips(shared_folder, metadata, byte_order):
    path = shared_folder.path / "metadata.gguf"
    write_gguf(path, metadata, {}, byte_order=byte_order)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata == {key: python_value(value) for key, value in metadata.items()}
        assert list(checkpoint.metadata) == list(metadata)


# Split models.


def write_parts(folder: Path, count: int = 3, change=lambda number, metadata, tensors: None) -> list[Path]:
    paths = []
    for number in range(1, count + 1):
        metadata = {"split.no": np.uint16(number - 1), "split.count": np.uint16(count)}
        metadata["split.tensors.count"] = np.int32(count + 1)
        if number == 1:
            metadata["general.architecture"] = "llama"
        tensors = {f"t{number}": np.full(4, number, np.float32)}
        if number == count:
            tensors["last"] = np.arange(3, dtype=np.int32)
        change(number, metadata, tensors)
        paths.append(folder / f"model-{number:05d}-of-{count:05d}.gguf")
        write_gguf(paths[-1], metadata, tensors)
    return paths


def test_any_part_opens_the_whole_model(tmp_path, touch_all):
    for path in [*write_parts(tmp_path), tmp_path]:
        with open_checkpoint(path) as checkpoint:
            assert list(checkpoint) == ["t1", "t2", "t3", "last"]
            assert checkpoint.metadata["general.architecture"] == "llama"
            assert [array.path.name[6:11] for array in checkpoint.values()] == ["00001", "00002", "00003", "00003"]
            np.testing.assert_array_equal(checkpoint["t2"].numpy(), np.full(4, 2, np.float32))
            assert touch_all(checkpoint) == 3 * 16 + 12


def test_one_part_of_one_is_a_whole_model(tmp_path):
    (path,) = write_parts(tmp_path, 1)
    assert list(open_checkpoint(path)) == ["t1", "last"]
    write_gguf(path, {}, {"t": np.zeros(3, np.float32)})
    assert list(open_checkpoint(path)) == ["t"]


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        (lambda n, m, t: m.update({"split.no": 0}), "split.no", "the file says 0; expected 1, by its name"),
        (lambda n, m, t: m.update({"split.no": 3 - n}), "split.no", "the file says 2; expected 0, by its name"),
        (lambda n, m, t: m.pop("split.no"), "split.no", "the file says nothing; expected 0, by its name"),
        (lambda n, m, t: m.update({"split.no": -1}), "split.no", "the value is -1; expected an integer of 0 or more"),
        (lambda n, m, t: m.update({"split.count": 2}), "split.count", "the name says part 1 of 3, the file says that"),
        (lambda n, m, t: m.update({"split.count": 1}), "split.count", "the file says that there is 1 part"),
        (lambda n, m, t: m.pop("split.count"), "split.count", "the file says that there is 1 part"),
        (lambda n, m, t: m.update({"split.count": 4 if n == 3 else 3}), "split.count", "the file says 4; expected 3"),
        (lambda n, m, t: m.update({"split.tensors.count": 9}), "split.tensors.count", "9 tensors, its 3 parts hold 4"),
        (lambda n, m, t: t.update({"t1": np.zeros(2, np.float32)}), "tensor 't1'", "stands in model-00001-of-00003"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(tmp_path, change, field, words):
    paths = write_parts(tmp_path, change=change)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(paths[0])
    assert caught.value.field == field


def test_a_missing_part_is_named(tmp_path):
    paths = write_parts(tmp_path)
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.gguf: no such file"):
        open_checkpoint(paths[2])


@pytest.mark.parametrize("name", ["model-00000-of-00003.gguf", "model-00004-of-00003.gguf", "other.gguf"])
def test_a_part_under_a_name_that_is_not_its_own_is_refused(tmp_path, name):
    paths = write_parts(tmp_path)
    path = paths[0].rename(tmp_path / name)
    with pytest.raises(CheckpointError, match="Give it back its name"):
        open_checkpoint(path)


# The demo file.


def test_the_demo_file_is_read_as_the_gguf_package_reads_it(smollm2_path):
    with open_checkpoint(smollm2_path) as checkpoint:
        assert len(checkpoint) == 272 and checkpoint.metadata["general.architecture"] == "llama"
        assert {array.encoding for array in checkpoint.values()} == {"q4_1", "q8_0", "f32"}
        assert [len(checkpoint.metadata[f"tokenizer.ggml.{key}"]) for key in ("tokens", "merges")] == [49152, 48900]
        assert_same_as_oracle(checkpoint, gguf.GGUFReader(smollm2_path))


def test_the_demo_file_opens_in_well_under_a_third_of_a_second(smollm2_path):
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        open_checkpoint(smollm2_path).close()
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.3, seconds
