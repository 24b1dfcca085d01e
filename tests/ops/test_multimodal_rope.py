"""Rotary positions of text beside images against transformers'."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustcore.errors import ModelError
from trustcore.ops.multimodal_rope import multimodal_angles, multimodal_positions, pair_axes
from trustcore.ops.rope import RopeConfig, rope, rotate

SECTIONS, CONFIG = (4, 4, 4), RopeConfig(24, theta=100.0)


@pytest.fixture(scope="module")
def recorded():
    with np.load(Path(__file__).parents[1] / "data" / "layers.npz") as file:
        return {key.removeprefix("rope/"): file[key] for key in file.files if key.startswith("rope/")}


def test_positions_are_those_of_transformers(recorded):
    found = multimodal_positions([3, (1, 2, 3), 2, (3, 4, 2), 2])
    np.testing.assert_array_equal(found, recorded["positions"][:, 0])
    np.testing.assert_array_equal(multimodal_positions([(1, 1, 2)], start=5), [[5, 5], [5, 5], [5, 6]])
    assert multimodal_positions([]).shape == (3, 0)


@pytest.mark.parametrize("kind", ("sections", "interleaved"))
def test_turned_queries_are_those_of_transformers(kind, recorded):
    query = jnp.asarray(recorded["query"]).transpose(0, 2, 1, 3)
    positions = jnp.asarray(recorded["positions"], jnp.int32)

    @jax.jit
    def run(query, positions):
        turn = multimodal_angles(positions, CONFIG, SECTIONS, interleaved=kind == "interleaved")
        return rotate(query, turn, CONFIG)

    np.testing.assert_allclose(run(query, positions).transpose(0, 2, 1, 3), recorded[kind], atol=1e-5)
    assert np.max(np.abs(recorded["sections"] - recorded["interleaved"])) > 0.1


@pytest.mark.parametrize("interleaved", (False, True))
def test_text_has_plain_rotary_positions(interleaved):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3, 24)), jnp.float32)
    places = jnp.asarray([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]], jnp.int32)
    turn = multimodal_angles(jnp.stack([places] * 3), CONFIG, (6, 2, 4), interleaved=interleaved)
    np.testing.assert_allclose(rotate(x, turn, CONFIG), rope(x, places, CONFIG), atol=1e-6)


def test_what_is_refused():
    with pytest.raises(ModelError, match=r"sections \[4, 4\] are no three numbers that add up to 12 pairs"):
        pair_axes(12, (4, 4))
    with pytest.raises(ModelError, match=r"sections \[4, 4, 3\]"):
        pair_axes(12, (4, 4, 3))
    with pytest.raises(ModelError, match=r"a part is \(1, 0, 2\); expected a number of tokens, or"):
        multimodal_positions([(1, 0, 2)])
    with pytest.raises(ModelError, match=r"positions are \[2, 1, 4\]; expected \[3, B, T\]"):
        multimodal_angles(jnp.zeros((2, 1, 4), jnp.int32), CONFIG, SECTIONS)
