"""Two runs are matched value by value; the first divergence is where they part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import trustcore as tc
from trustcore.errors import DebugError

X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(4)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def test_the_first_divergence_is_where_a_layer_was_changed():
    model, other = Model(), Model()
    other.layers[2].kernel[...] = model.layers[2].kernel[...] * 1.01
    comparison = tc.debug.compare(other, model)(X)
    assert comparison.first.address.name == "layers/2/dot_general" and comparison.unmatched == ()
    np.testing.assert_allclose(comparison.first.error, 0.01, rtol=0.05)
    assert comparison.ranked[0].error >= comparison.first.error
    assert "First divergence: layers/2/dot_general" in str(comparison)
    assert tc.debug.compare(model, model)(X).first is None


def test_two_dtypes_agree_within_their_rounding():
    model = Model()

    def halved(x):
        return jax.tree.map(lambda w: w.astype(jnp.bfloat16), model)(x.astype(jnp.bfloat16))

    comparison = tc.debug.compare(halved, model)(X)
    assert comparison.first is None and len(comparison.differences) >= 8
    assert 1e-4 < comparison.ranked[0].error < 0.1 and comparison.ranked[0].dtypes == ("bfloat16", "float32")


def test_times_stand_beside_the_errors():
    def run(x, n):
        with jax.named_scope("work"):
            x = jnp.sort(jnp.tile(x, (n, 1)), axis=0)[:3]
        return jnp.tanh(x)

    comparison = tc.debug.compare(lambda x: run(x, 40000), lambda x: run(x, 40000), times=True)(X)
    assert all(min(d.seconds) > 0 for d in comparison.differences)
    slowest = max(comparison.differences, key=lambda d: d.seconds[1])
    assert slowest.address.name == "work/sort" and " ms against " in str(slowest)
    lost = [d.seconds[0] - d.seconds[1] for d in comparison.slower]
    assert lost == sorted(lost, reverse=True) and all(each > 0 for each in lost)
    assert tc.debug.compare(run, run)(X, 2).differences[0].seconds is None


def test_the_turn_in_which_loops_part_is_told():
    def run(x, bump):
        return jax.lax.scan(lambda c, i: (jnp.sin(c) + jnp.where(i == 3, bump, 0.0), None), x, jnp.arange(6))[0]

    comparison = tc.debug.compare(lambda x: run(x, 0.1), lambda x: run(x, 0.0))(X)
    assert comparison.first.turn == 3 and comparison.first.address.path == ("scan",)


def test_recorded_activations_are_matched_by_module():
    model = Model()
    x, recorded = X, {}
    for i, layer in enumerate(model.layers):
        recorded[f"layers.{i}"] = np.asarray(layer(x))
        x = jnp.tanh(layer(x))
    assert tc.debug.compare_recorded(model, recorded)(X).first is None
    recorded["layers.1"] = recorded["layers.1"] + 0.5
    first = tc.debug.compare_recorded(model, recorded)(X).first
    assert first.name.startswith("layers.1 = layers/1/")
    missing = tc.debug.compare_recorded(model, {**recorded, "head": np.ones(3)})(X)
    assert missing.unmatched == ("head",)
    with pytest.raises(DebugError, match="paths are layers/0"):
        tc.debug.compare_recorded(model, {"head": np.ones(3)})(X)


def test_recorded_activations_are_read_from_a_file(tmp_path):
    model, path = Model(), tmp_path / "run.npz"
    np.savez(path, **{"layers.0": np.asarray(model.layers[0](X))})
    assert tc.debug.compare_recorded(model, path)(X).first is None
    np.savez_compressed(path, **{"layers.0": np.asarray(model.layers[0](X)) + 1})
    assert tc.debug.compare_recorded(model, str(path))(X).first.name.startswith("layers.0 = ")
    broken = {"no file": None, "no zip": b"PK\x03\x04 and no more", "empty": b"", "pickled": b"\x80\x04N."}
    for name, data in broken.items():
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(DebugError, match=r"cannot be read as \.npz"):
            tc.debug.compare_recorded(model, tmp_path / "none.npz" if data is None else path)
        assert name
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(DebugError, match="one array without a name"):
        tc.debug.compare_recorded(model, tmp_path / "one.npy")


def test_values_can_be_recorded():
    found = tc.debug.record(lambda x: jnp.sin(x) + 1.0, "sin")(X)
    (name,) = found
    assert name.startswith("sin (test_comparing.py:")
    np.testing.assert_allclose(found[name], jnp.sin(X), rtol=1e-6)


def test_what_is_only_on_one_side_is_infinitely_far():
    comparison = tc.debug.compare(jnp.log, lambda x: jnp.log(jnp.abs(x)))(X)
    assert any(np.isinf(d.error) for d in comparison.differences)
