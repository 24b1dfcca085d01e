"""Tensors from disk to devices: values, shardings, casts; what is read ahead; how much memory it takes."""

from __future__ import annotations

import json
import sys
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from trustcore.errors import CheckpointError
from trustcore.weights import load_arrays, open_checkpoint, place, prefetch
from trustcore.weights.gguf_writer import write_gguf
from trustcore.weights.safetensors_writer import Planned, write_safetensors

RNG = np.random.default_rng(0)
ARRAYS = {
    "matrix": RNG.standard_normal((6, 8)).astype(np.float32),
    "half": RNG.standard_normal((4, 4)).astype(np.float16),
    "small": np.arange(8).astype(ml_dtypes.bfloat16),
    "whole": np.arange(4, dtype=np.int32),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.fixture
def checkpoint(tmp_path):
    save_file(ARRAYS, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path) as found:
        yield found


def test_tensors_on_the_default_device(checkpoint):
    found = load_arrays(checkpoint)
    assert found.keys() == checkpoint.keys()
    for name, array in ARRAYS.items():
        assert isinstance(found[name], jax.Array) and found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_casts_on_the_way(checkpoint):
    assert place(checkpoint["matrix"], dtype="bfloat16").dtype == jnp.bfloat16
    expected = ARRAYS["matrix"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(place(checkpoint["matrix"], dtype=jnp.bfloat16), expected)
    np.testing.assert_array_equal(place(checkpoint["half"], dtype=jnp.float32), ARRAYS["half"].astype(np.float32))


def test_kernels_are_turned_on_the_way(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr("trustcore.weights.placement.PIECE", 64)  # two rows at a time
    turned = place(checkpoint["matrix"], dtype="bfloat16", transposed=True)
    np.testing.assert_array_equal(turned, ARRAYS["matrix"].T.astype(ml_dtypes.bfloat16))
    stack = RNG.standard_normal((3, 4, 5)).astype(np.float32)
    save_file({"w": stack}, tmp_path / "stack.safetensors")
    with open_checkpoint(tmp_path / "stack.safetensors") as found:
        np.testing.assert_array_equal(place(found["w"], transposed=True), np.swapaxes(stack, 1, 2))
    with pytest.raises(CheckpointError, match=r"tensor 'whole': the shape \[4\] has no two axes to swap"):
        place(checkpoint["whole"], transposed=True)


def test_an_array_does_not_depend_on_the_file(tmp_path):
    save_file({"w": np.ones(1000, np.float32)}, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        placed = place(checkpoint["w"])
    with open(tmp_path / "m.safetensors", "r+b") as file:
        file.seek(-4000, 2)
        file.write(bytes(4000))
    assert float(placed.sum()) == 1000


def test_only_what_is_asked_for_is_read(checkpoint, monkeypatch):
    read = []
    original = type(checkpoint["matrix"]).numpy
    monkeypatch.setattr(type(checkpoint["matrix"]), "numpy", lambda self: read.append(self.name) or original(self))
    assert list(load_arrays({"half": checkpoint["half"]})) == ["half"]
    assert read == ["half"]


def test_packed_tensors_and_missing_shardings_are_told(tmp_path, checkpoint):
    write_gguf(tmp_path / "m.gguf", {}, {"w": (np.zeros((2, 36), np.uint8), "q4_0")})
    with (
        open_checkpoint(tmp_path / "m.gguf") as packed,
        pytest.raises(CheckpointError, match="q4_0 is packed") as caught,
    ):
        place(packed["w"])
    assert caught.value.field == "tensor 'w'"
    with pytest.raises(CheckpointError, match=r"no sharding for .*half.*: give one for each name"):
        load_arrays(checkpoint, {"matrix": jax.sharding.SingleDeviceSharding(jax.devices()[0])})


def test_each_of_eight_devices_gets_its_slice(tmp_path, fresh_python):
    save_file(ARRAYS, tmp_path / "m.safetensors")
    np.savez_compressed(tmp_path / "m.npz", turned=np.asfortranarray(ARRAYS["matrix"].T))
    printed = fresh_python(
        f"""
        import json, jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from trustcore.weights import checkpoint as module, load_arrays, open_checkpoint, place
        mesh = jax.make_mesh((2, 4), ("data", "model"))
        specs = dict(matrix=P("data", "model"), half=P(None, "model"), small=P(("data", "model")), whole=P("model"),
                     scalar=P(), empty=P())
        found = open_checkpoint({str(tmp_path / "m.safetensors")!r})
        placed = load_arrays(found, lambda array: NamedSharding(mesh, specs[array.name]))
        by_name = load_arrays(found, {{name: NamedSharding(mesh, spec) for name, spec in specs.items()}}, "float32")
        for name, array in found.items():
            numbers = array.numpy()
            assert placed[name].sharding == NamedSharding(mesh, specs[name]) and placed[name].dtype == numbers.dtype
            assert len(placed[name].addressable_shards) == 8 and by_name[name].dtype == np.float32
            for one in (placed, by_name):
                for shard in one[name].addressable_shards:
                    np.testing.assert_array_equal(np.asarray(shard.data), numbers[shard.index].astype(shard.data.dtype))
        turned = place(open_checkpoint({str(tmp_path / "m.npz")!r})["turned"], NamedSharding(mesh, P("model", "data")))
        np.testing.assert_array_equal(turned, found["matrix"].numpy().T)
        kernel = place(found["matrix"], NamedSharding(mesh, P("model", "data")), "float16", transposed=True)
        np.testing.assert_array_equal(kernel, found["matrix"].numpy().T.astype(np.float16))
        assert kernel.addressable_shards[0].data.shape == (2, 3)
        try:
            place(found["matrix"], NamedSharding(mesh, P("model")))
        except ValueError as error:
            assert "6" in str(error), error
        else:
            raise AssertionError("6 rows on 4 devices")
        total = jax.jit(lambda x: x.sum())(placed["whole"])
        print(json.dumps([str(placed["matrix"].addressable_shards[0].data.shape), str(total)]))
        """,
        devices=8,
    )
    assert json.loads(printed) == ["(3, 2)", "6"]


# Reading ahead.


class Recorded:
    """Stands in for a tensor: says when it was brought near."""

    def __init__(self, name, nbytes, log, fault=None):
        self.name, self.nbytes, self._log, self._fault = name, nbytes, log, fault

    def prefetch(self):
        if self._fault:
            raise self._fault
        self._log.append(self.name)


def settled(log, count):
    end = time.monotonic() + 20
    while len(log) < count and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(0.02)  # so that one too many would show
    return len(log)


def test_tensors_are_brought_near_ahead_of_the_consumer_and_no_further():
    log: list[int] = []
    coming = prefetch([Recorded(i, 10, log) for i in range(8)], ahead=30)
    for index, array in enumerate(coming):
        assert array.name == index
        assert settled(log, min(index + 3, 8)) == min(index + 3, 8)
    assert log == list(range(8))


def test_a_tensor_larger_than_the_room_still_comes():
    log: list[int] = []
    assert [array.name for array in prefetch([Recorded(i, 100, log) for i in range(3)], ahead=10)] == [0, 1, 2]


def test_a_broken_tensor_is_told_to_the_consumer():
    log: list[int] = []
    arrays = [Recorded(0, 1, log), Recorded(1, 1, log, CheckpointError("broken"))]
    coming = prefetch(arrays)
    assert next(coming).name == 0
    with pytest.raises(CheckpointError, match="broken"):
        next(coming)


def test_a_consumer_that_leaves_stops_the_thread():
    log: list[int] = []
    coming = prefetch([Recorded(i, 10, log) for i in range(100)], ahead=20)
    next(coming)
    coming.close()
    assert len(log) <= 3 and not [t for t in threading.enumerate() if t.name == "trustcore-prefetch"]


def test_compressed_arrays_are_unpacked_ahead(tmp_path, monkeypatch):
    from trustcore.weights import npz

    made = []
    original = npz.inflated
    np.savez_compressed(tmp_path / "m.npz", a=np.arange(1000), b=np.arange(1000))
    with open_checkpoint(tmp_path / "m.npz") as checkpoint:
        monkeypatch.setattr(npz, "inflated", lambda *args: made.append(args[1].name) or original(*args))
        for array in prefetch(checkpoint.values()):
            settled(made, 2)
            assert made == ["a.npy", "b.npy"]
            assert array.numpy()[999] == 999
        assert made == ["a.npy", "b.npy"]


# Memory.

MEASURE = """
import json
import jax, numpy as np
from trustcore.weights import load_arrays, open_checkpoint

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

jax.block_until_ready(jax.device_put(np.zeros(4)))
checkpoint = open_checkpoint({path!r})
load_arrays({{"warm": checkpoint["norm.0"]}})
sharding = None
if jax.device_count() > 1:
    mesh = jax.make_mesh((jax.device_count(),), ("model",))
    split, whole = (jax.sharding.PartitionSpec(*axes) for axes in (["model"], []))
    sharding = lambda a: jax.sharding.NamedSharding(mesh, whole if a.name.startswith("norm") else split)
with open("/proc/self/clear_refs", "w") as file:  # the peak counts from here on
    file.write("5")
before = status("VmRSS")
found = load_arrays(checkpoint, sharding, {dtype!r})
jax.block_until_ready(found)
peak = status("VmHWM")
size = sum(array.nbytes for array in found.values())
print(json.dumps(dict(size=size, growth=peak - before, stays=status("VmRSS") - before)))
"""


def write_model(path, layers, features, vocab):
    """A float32 model of Llama's shapes: numbers that no page shares, made and written one tensor at a time."""

    def planned(*shape):
        return Planned(shape, np.dtype(np.float32), lambda: RNG.standard_normal(shape, np.float32))

    tensors = {"embed": planned(vocab, features)}
    for i in range(layers):
        tensors[f"norm.{i}"] = planned(features)
        tensors |= {f"layer.{i}.{n}": planned(features, features) for n in ("q", "o")}
        tensors |= {f"layer.{i}.{n}": planned(features // 3, features) for n in ("k", "v")}
        tensors |= {f"layer.{i}.{n}": planned(features * 8 // 3, features) for n in ("gate", "up", "down")}
    write_safetensors(path, tensors)
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(("dtype", "devices"), [(None, 1), ("bfloat16", 1), (None, 8)])
def test_loading_takes_the_size_of_the_parameters(tmp_path, fresh_python, dtype, devices):
    """The small twin of the test below. Counted: growth of the process's resident memory from before the first tensor
    to its peak, pages of the mapped file included. (`ru_maxrss` would count the process that this one was forked off.)
    """
    size = write_model(tmp_path / "m.safetensors", 12, 384, 49152)
    found = json.loads(fresh_python(MEASURE.format(path=str(tmp_path / "m.safetensors"), dtype=dtype), devices=devices))
    assert found["size"] == (size if dtype is None else size // 2)
    # 8 MB of the file are in memory at a time, a slice of a device, and what allocators keep: 16 MB in all.
    assert found["growth"] < found["size"] + 2**24, found


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("devices", [1, 8])
def test_loading_135_million_parameters_peaks_at_ten_percent_more_than_they_take(tmp_path, fresh_python, devices):
    size = write_model(tmp_path / "m.safetensors", 30, 576, 49152)
    found = json.loads(fresh_python(MEASURE.format(path=str(tmp_path / "m.safetensors"), dtype=None), devices=devices))
    assert found["size"] == size > 4 * 130e6
    assert found["growth"] < 1.1 * size, found
    print(devices, {key: f"{value / 1e6:.1f} MB" for key, value in found.items()})
