"""Orbax checkpoints against Orbax itself, in both directions, and what is said where the package is missing."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from trustcore.errors import CheckpointError
from trustcore.weights import open_checkpoint
from trustcore.weights.orbax import write_orbax
from trustcore.weights.safetensors_writer import Planned

ocp = pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint (pip install 'trustcore[orbax]')")

RNG = np.random.default_rng(0)
ARRAYS = {
    "model.layers.0.kernel": RNG.standard_normal((3, 4)).astype(np.float32),
    "model.layers.0.bias": np.arange(4, dtype=np.float16),
    "model.norm": np.arange(4).astype(ml_dtypes.bfloat16),
    "head": np.arange(6, dtype=np.int32).reshape(3, 2).T,
}
TREE = {
    "model": {
        "layers": {"0": {"kernel": ARRAYS["model.layers.0.kernel"], "bias": ARRAYS["model.layers.0.bias"]}},
        "norm": ARRAYS["model.norm"],
    },
    "head": ARRAYS["head"],
}


def assert_arrays(checkpoint, wanted=ARRAYS):
    assert checkpoint.format == "orbax" and checkpoint.keys() == wanted.keys()
    for name, array in wanted.items():
        numbers = checkpoint[name].numpy()
        assert numbers.dtype == array.dtype and numbers.shape == array.shape and not numbers.flags.writeable
        np.testing.assert_array_equal(numbers, array)


def test_reads_what_orbax_writes(tmp_path, touch_all):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "standard", TREE)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "arrays", ocp.args.PyTreeSave(jax.tree.map(jnp.asarray, TREE)))
    for name in ("standard", "arrays"):
        with open_checkpoint(tmp_path / name) as checkpoint:
            touch_all(checkpoint)
            assert_arrays(checkpoint)
            assert checkpoint.metadata == {}
        with pytest.raises(CheckpointError, match="closed"):
            checkpoint["head"].numpy()


def test_an_item_of_a_step_is_found_and_the_weights_in_it(tmp_path):
    state = {"params": TREE, "opt_state": {"mu": TREE}, "step": np.zeros((), np.int32)}
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(7, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    with open_checkpoint(tmp_path / "run") as checkpoint:
        assert checkpoint.path.name == "default" and checkpoint.path.parent.name == "7"
        assert_arrays(checkpoint)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(8, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    with pytest.raises(CheckpointError, match=r"holds 2 Orbax checkpoints \(7/default, 8/default\)\. Open one of them"):
        open_checkpoint(tmp_path / "run")
    assert_arrays(open_checkpoint(tmp_path / "run" / "8"))


def test_orbax_reads_what_is_written(tmp_path):
    write_orbax(tmp_path / "m", {name: Planned.of(array) for name, array in ARRAYS.items()})
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "m")
    assert jax.tree.structure(found) == jax.tree.structure(TREE)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(TREE), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with open_checkpoint(tmp_path) as checkpoint:
        assert_arrays(checkpoint)
        assert checkpoint.metadata["config"] == {"model_type": "llama"}


def test_tensors_are_made_one_at_a_time(tmp_path):
    import weakref

    alive = []

    def make(index):
        def one():
            assert not any(flag() is not None for flag in alive), "the tensor before is still held"
            array = np.full((64, 64), index, np.float32)
            alive.append(weakref.ref(array))
            return array

        return one

    tensors = {f"t{i}": Planned((64, 64), np.dtype(np.float32), make(i)) for i in range(5)}
    write_orbax(tmp_path / "m", tensors)
    assert len(alive) == 5
    assert [float(array.numpy()[0, 0]) for _, array in sorted(open_checkpoint(tmp_path / "m").items())] == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_names_that_make_no_tree_are_refused(tmp_path):
    tensors = {name: Planned.of(np.zeros(2)) for name in ("a", "a.b")}
    with pytest.raises(CheckpointError, match=r"'a' is a tensor and 'a\.b' would lie below it"):
        write_orbax(tmp_path / "m", tensors)
    assert not (tmp_path / "m").exists()


def test_a_broken_checkpoint_is_one_error(tmp_path):
    write_orbax(tmp_path / "m", {name: Planned.of(array) for name, array in ARRAYS.items()})
    checkpoint = open_checkpoint(tmp_path / "m")
    for file in (tmp_path / "m").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="Orbax refuses the folder"):
        checkpoint["head"].numpy()
    (tmp_path / "m" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="Orbax refuses the folder"):
        open_checkpoint(tmp_path / "m")


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    (tmp_path / "_METADATA").write_text("{}")
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(CheckpointError, match=r"need the package orbax-checkpoint: pip install 'trustcore\[orbax\]'"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"trustcore\[orbax\]"):
        write_orbax(tmp_path / "m", {})
