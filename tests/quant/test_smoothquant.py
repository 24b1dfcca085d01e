"""SmoothQuant: the equations, the function, W8A8 errors, the report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.small import random_decoder, some_tokens
from tests.quant.plain_model import NORM, UP, apply, plain_model, tokens
from trustcore.errors import QuantizationError
from trustcore.models import decoder_links
from trustcore.quant import quantize
from trustcore.quant.activations import quantize_activations
from trustcore.quant.calibration import MinMax, capture
from trustcore.quant.folding import Link, migration, smoothquant


def ranges_of(tree, count=200):
    return {path: np.abs(np.asarray(x)).max(0) for path, x in apply(tree, tokens(count), inputs=True)[1].items()}


@pytest.mark.parametrize("alpha", (0.0, 0.3, 0.5, 1.0))
def test_scales_are_those_of_the_equation(alpha):
    tree = plain_model(outliers=1.0)
    ranges = ranges_of(tree)
    smooth = smoothquant(tree, [NORM], ranges, alpha=alpha)
    gate, up = (np.asarray(tree["layer"][name], np.float64) for name in ("gate", "up"))
    weights = np.maximum(np.abs(gate).max(1), np.abs(up).max(1))
    scale = ranges["layer.gate"].astype(np.float64) ** alpha / weights ** (1 - alpha)
    np.testing.assert_allclose(smooth["layer"]["gain"], tree["layer"]["gain"] / scale, rtol=1e-5)
    np.testing.assert_allclose(smooth["layer"]["gate"], gate * scale[:, None], rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(smooth["layer"]["up"], up * scale[:, None], rtol=1e-5, atol=1e-30)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 3), st.floats(0, 1), st.floats(0, 1))
def test_the_function_stays(seed, outliers, first, second):
    tree = plain_model(seed, outliers)
    smooth = smoothquant(tree, [NORM, UP], ranges_of(tree), alpha=(first, second))
    expected = apply(tree, tokens(20))
    np.testing.assert_allclose(apply(smooth, tokens(20)), expected, atol=1e-4 * np.abs(expected).max())


def test_a_decoder_stays_the_same_function_with_captured_ranges():
    model, t = random_decoder(), some_tokens()
    collect = capture(None, model, MinMax(per_channel=True))
    ranges = collect.finish(collect(t))
    smooth = smoothquant(model, decoder_links(model), ranges)
    run = jax.jit(lambda m, t: m(t))
    expected = run(model, t)
    np.testing.assert_allclose(run(smooth, t), expected, atol=2e-5 * jnp.abs(expected).max())
    link = decoder_links(model)[1]  # values are read by two heads each: the larger of both ranges counts
    assert link.heads == (2, 4)
    largest = ranges["blocks.0.attention.out.kernel"].largest.reshape(2, 2, 16).max(1).reshape(-1)
    weights = np.abs(model.blocks[0].attention.out.kernel.get_value()).max(1).reshape(2, 2, 16).max(1).reshape(-1)
    before, after = (np.abs(m.blocks[0].attention.value.kernel.get_value()) for m in (model, smooth))
    # The values are consumers of the link before as well, which scales their rows.
    rows = after[:, 0] / before[:, 0]
    np.testing.assert_allclose(
        (after / before / rows[:, None])[0], np.sqrt(weights / largest) / np.sqrt(weights / largest)[0], rtol=1e-4
    )


def eight_bits(x, axis):
    scale = np.abs(x).max(axis, keepdims=True) / 127
    return np.round(x / scale) * scale


def test_w8a8_products_gain_where_channels_are_outliers():
    """Activations rounded to 8 bits for each token, weights for each column."""
    tree = plain_model(outliers=2.0)
    ranges = ranges_of(tree)

    def error(tree):
        x = np.asarray(apply(tree, tokens(300, seed=5), inputs=True)[1]["layer.gate"], np.float64)
        w = np.asarray(tree["layer"]["gate"], np.float64)
        return ((eight_bits(x, 1) @ eight_bits(w, 0) - x @ w) ** 2).mean()

    errors = {alpha: error(smoothquant(tree, [NORM], ranges, alpha=alpha)) for alpha in (0.5, 0.8)}
    assert min(errors.values()) < 0.3 * error(tree)


def test_a_decoder_in_w8a8_gains_where_channels_are_outliers():
    model, t = random_decoder(), some_tokens(4, 24)
    for block in model.blocks:
        for norm in (block.attention_norm, block.mlp_norm):
            norm.weight.set_value(jnp.ones(64).at[jnp.array([5, 17])].set(30.0))
    collect = capture(None, model, MinMax(per_channel=True))
    smooth = smoothquant(model, decoder_links(model), collect.finish(collect(t)), alpha=0.5)
    run = jax.jit(lambda m, t: m(t))
    exact = run(model, t)

    def error(tree):
        packed = quantize(
            tree, "int8:channel", where=lambda path, array: path.startswith("blocks.") and array.ndim == 2
        )
        return float(jnp.mean((run(quantize_activations(packed), t) - exact) ** 2))

    assert error(smooth) < 0.5 * error(model)


def test_dead_channels_are_left_alone():
    tree = plain_model()
    tree["layer"]["gain"] = tree["layer"]["gain"].at[3].set(0)
    for name in ("gate", "up"):
        tree["layer"][name] = tree["layer"][name].at[5].set(0)
    smooth = smoothquant(tree, [NORM], ranges_of(tree))
    assert smooth["layer"]["gain"][3] == 0 and smooth["layer"]["gain"][5] == tree["layer"]["gain"][5]
    np.testing.assert_array_equal(smooth["layer"]["gate"][3], tree["layer"]["gate"][3])
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(smooth))


def test_the_report_tells_what_moved():
    tree = plain_model(outliers=2.0)
    ranges = ranges_of(tree)
    found = migration(tree, [NORM, UP], ranges, alpha=(0.5, 0.0))
    first, second = found.links
    assert first.consumers == ("layer.gate", "layer.up") and (first.alpha, second.alpha) == (0.5, 0.0)
    assert first.activations[0] == pytest.approx(ranges["layer.gate"].max())
    assert first.outliers[0] > 4 * first.outliers[1] > 4
    assert first.activations[1] == pytest.approx(
        first.weights[1], rel=1e-4
    )  # alpha 0.5: the same range in each channel
    assert second.weights[1] == pytest.approx(1)  # alpha 0: all of the range in the activations
    lines = str(found).splitlines()
    assert len(lines) == 3 and "layer.gate" in lines[1] and " 0.50 " in lines[1] and "->" in lines[2]


def test_what_does_not_fit_is_refused():
    tree = plain_model()
    ranges = ranges_of(tree)
    with pytest.raises(QuantizationError) as raised:
        smoothquant(
            tree, [NORM, UP, Link(("last",), ("head",))], {"layer.up": -ranges["layer.gate"], "head": np.ones((2, 2))}
        )
    for expected in (
        "smoothquant: ranges of layer.gate are negative; give the largest magnitudes",
        "there are no ranges of layer.down",
        "ranges of head are [2, 2], expected [64]",
    ):
        assert expected in str(raised.value)
    for alpha in (1.5, (0.5,), (0.5, -1), float("nan")):
        with pytest.raises(QuantizationError, match="pass a number from 0 to 1, or one for each of the 2 links"):
            smoothquant(tree, [NORM, UP], ranges, alpha=alpha)
