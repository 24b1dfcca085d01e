"""Trees on disk, models whose layers lie there, and a process that has half the memory that the model needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trustcore as tc
from tests.models.small import random_decoder
from trustcore.errors import ModelError, ProgramError
from trustcore.generation import generate_tokens
from trustcore.memory import Shelf
from trustcore.models import random_model, spill_layers, unscan_layers
from trustcore.models.model import parameters_of
from trustcore.nn import ShelvedStack

ROOT = Path(__file__).parents[2]
SIZES = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
TOKENS = jnp.arange(8, dtype=jnp.int32)[None]


def generated(model, prompt=(1, 2, 3), count=12) -> list[int]:
    steps = list(generate_tokens(model, [list(prompt)], max_tokens=count))
    return np.concatenate([step.tokens for step in steps], axis=1)[0].tolist()


def test_trees_come_back_as_they_were_put() -> None:
    shelf = Shelf()
    trees = [
        {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": jnp.full(5, 0.5, jnp.bfloat16)},
        {"w": np.zeros((0, 4), np.int8), "b": jnp.int32(7)},
    ]
    numbers = [shelf.put(tree) for tree in trees]
    assert numbers == [0, 1] and len(shelf) == 2 and shelf.nbytes == 24 + 10 + 4
    for number, tree in zip(numbers, trees, strict=True):
        found = shelf.fetch(number, following=1)
        jax.tree.map(np.testing.assert_array_equal, found, tree)
        assert jax.tree.map(lambda s: (s.shape, s.dtype), shelf.shapes(number)) == jax.tree.map(
            lambda x: (x.shape, x.dtype), found
        )
    assert (shelf.fetched, shelf.ahead) == (2, 1)
    view = shelf.fetch(0)["w"]
    shelf.close()
    assert view.sum() == 15  # what was fetched stays
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_files_that_cannot_be_made_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProgramError, match=r"no file can be made in .*file"):
        Shelf(tmp_path / "file")
    shelf = Shelf(tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []  # it has no name
    shelf.close()
    with pytest.raises(ProgramError, match="cannot be written"):
        shelf.put(np.zeros(3))


def test_layers_on_disk_compute_the_same() -> None:
    model = random_model({"model_type": "llama", "num_hidden_layers": 3, "num_key_value_heads": 2, **SIZES})
    spilled = spill_layers(model)
    assert len(jax.tree.leaves(spilled)) == len(jax.tree.leaves(model)) - len(jax.tree.leaves(model.blocks))
    np.testing.assert_array_equal(spilled(TOKENS), model(TOKENS))
    assert generated(spilled) == generated(model)
    shelf = spilled.blocks.shelf
    assert shelf.fetched >= 3 * 13 and shelf.ahead >= shelf.fetched - 2  # all but the first of a program
    for name, value in parameters_of(unscan_layers(spilled)).items():
        np.testing.assert_array_equal(value.get_value(), parameters_of(model)[name].get_value())
    with pytest.raises(ModelError, match="spill_layers: a Linear has no list of blocks"):
        spill_layers(_linear())


def _linear():
    from flax import nnx

    from trustcore.nn import Linear

    return Linear(4, 4, rngs=nnx.Rngs(0))


def test_packed_layers_and_layers_of_several_kinds() -> None:
    model = tc.quantize(random_decoder(), "q8_0")
    np.testing.assert_array_equal(spill_layers(model)(TOKENS), model(TOKENS))
    gemma = {"model_type": "gemma2", "num_hidden_layers": 5, "head_dim": 16, "sliding_window": 4, **SIZES}
    model = random_model({**gemma, "num_key_value_heads": 2})
    spilled = spill_layers(model)
    assert (spilled.blocks.periods, spilled.blocks.repeats) == ((2, 1), (2, 1))
    np.testing.assert_array_equal(spilled(TOKENS), model(TOKENS))
    assert generated(spilled) == generated(model)


def test_encoder_and_decoder_lie_on_disk_both(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2}
    model = random_model({"model_type": "t5", **sizes})
    tc.save(model, tmp_path / "model")
    spilled = tc.load(tmp_path / "model", spill=True, dtype="float32")
    assert isinstance(spilled.blocks, ShelvedStack) and isinstance(spilled.decoder, ShelvedStack)
    np.testing.assert_array_equal(spilled(*spilled.example()), model(*model.example()))


def test_weights_are_constants_to_derivatives() -> None:
    model = random_model({"model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 2, **SIZES})
    score = lambda table, model: jnp.sum(_with_table(model, table)(TOKENS) ** 2)  # noqa: E731
    table = model.embedding.table.get_value()
    found = jax.grad(score)(table, spill_layers(model))
    np.testing.assert_allclose(found, jax.grad(score)(table, model), rtol=1e-4, atol=1e-5)


def _with_table(model, table):
    copy = jax.tree.map(lambda leaf: leaf, model)
    copy.embedding.table.set_value(table)
    return copy


CHILD = """
import resource, sys
import jax, jax.numpy as jnp
import trustcore as tc
from trustcore.generation import generate_tokens
from trustcore.heap import trim_heap
from trustcore.models import random_model, spill_layers

def data():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData")) * 1024

sizes = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 64}
small = random_model({"model_type": "llama", "num_hidden_layers": 2, **sizes})
list(generate_tokens(spill_layers(small), [[1]], max_tokens=2))  # jax, its compiler and its threads are there
trim_heap()
budget = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (data() + budget, data() + budget))
model = tc.load(sys.argv[1], spill=sys.argv[3] == "spilled")
steps = generate_tokens(model, [[1, 2, 3]], max_tokens=int(sys.argv[4]))
print(",".join(str(t) for step in steps for t in step.tokens[0]))
"""


def under(path: Path | str, budget: int, how: str, count: int = 6) -> subprocess.CompletedProcess[str]:
    """Loads and generates in a process that may take `budget` bytes beyond what it has once a small model has run."""
    command = [sys.executable, "-c", CHILD, str(path), str(budget), how, str(count)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="sizes are read from /proc")
def test_a_model_of_twice_the_budget_generates(tmp_path: Path) -> None:
    sizes = {"vocab_size": 256, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    model = random_model({"model_type": "llama", "num_hidden_layers": 20, "num_key_value_heads": 2, **sizes})
    tc.save(model, tmp_path / "model")
    spilled, plain = (under(tmp_path / "model", model.nbytes // 2, how) for how in ("spilled", "plain"))
    assert spilled.returncode == 0, spilled.stderr
    assert [int(t) for t in spilled.stdout.split(",")] == generated(model, count=6)
    assert plain.returncode != 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sizes are read from /proc")
def test_the_floats_of_the_real_model_in_half_their_memory(smollm2_path: Path, tmp_path: Path) -> None:
    model = tc.load(smollm2_path, dtype="float32")
    tc.save(model, tmp_path / "floats")
    prompt, expected = [504, 3575, 282, 4649, 314], [7042, 30, 198, 198]
    child = CHILD.replace("[1, 2, 3]", str(prompt))
    found = {}
    for how in ("spilled", "plain"):
        command = [sys.executable, "-c", child, str(tmp_path / "floats"), str(model.nbytes // 2), how, "4"]
        found[how] = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert found["spilled"].returncode == 0, found["spilled"].stderr
    assert [int(t) for t in found["spilled"].stdout.split(",")] == expected
    assert found["plain"].returncode != 0
