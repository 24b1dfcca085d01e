"""Observers and rules: exact counts in any order, and thresholds that are the best of those tried."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustcore.errors import QuantizationError
from trustcore.quant.calibration import (
    Entropy,
    Hessian,
    Histogram,
    LeastSquares,
    MeanSquare,
    MinMax,
    Percentile,
    Range,
    cross_validate,
)
from trustcore.quant.calibration.ranges import squared_error


def data(rows=300, k=6, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_t(3, (rows, k)) * np.exp(np.arange(k) - 3)).astype(np.float32)


def seen(observer, *parts):
    state = observer.init(parts[0].shape[1])
    for part in parts:
        state = jax.jit(observer.update)(state, jnp.asarray(part))
    return state


OBSERVERS = {
    "mean square": MeanSquare(),
    "hessian": Hessian(),
    "min max": MinMax(),
    "min max by channel": MinMax(per_channel=True),
    "histogram": Histogram(bins=64),
    "histogram by channel": Histogram(bins=64, per_channel=True),
}


@pytest.mark.parametrize("name", OBSERVERS)
def test_merging_parts_in_any_order_is_seeing_all(name):
    observer, x = OBSERVERS[name], data()
    parts = [x[:7], x[7:200] * 0.01, x[200:] * 30]
    whole = observer.finish(seen(observer, np.concatenate(parts)))
    one_by_one = observer.finish(seen(observer, *parts[::-1]))
    a, b, c = (seen(observer, part) for part in parts)
    merged = observer.finish(observer.merge(observer.merge(c, observer.init(6)), observer.merge(b, a)))
    for other in (one_by_one, merged):
        jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=2e-5), _plain(whole), _plain(other))


def _plain(result):
    return (result.low, result.high) if isinstance(result, Range) else result


def test_histogram_against_numpy():
    x = data()
    counts, centres = Histogram(bins=256).finish(seen(Histogram(bins=256), x[:100], x[100:]))
    limit = 2 ** np.ceil(np.log2(np.abs(x).max()))
    expected, edges = np.histogram(x.astype(np.float64), 256, (-limit, limit))
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_allclose(centres, (edges[1:] + edges[:-1]) / 2)
    by_channel, middles = Histogram(bins=256, per_channel=True).finish(
        seen(Histogram(bins=256, per_channel=True), x[:100], x[100:])
    )
    assert by_channel.shape == middles.shape == (6, 256)
    np.testing.assert_array_equal(by_channel.sum(1), 300)
    top = 2 ** np.ceil(np.log2(np.abs(x[:, 2]).max()))
    np.testing.assert_array_equal(by_channel[2], np.histogram(x[:, 2].astype(np.float64), 256, (-top, top))[0])


@pytest.mark.parametrize("value", [0.0, 1e-38, 3e38, -1.0])
def test_extreme_numbers_are_counted(value):
    counts, _ = Histogram(bins=16).finish(seen(Histogram(bins=16), np.full((5, 2), value, np.float32)))
    assert counts.sum() == 10
    odd = np.array([[np.nan, np.inf, -np.inf, 1.0]], np.float32)
    counts, _ = Histogram(bins=16).finish(seen(Histogram(bins=16), odd))
    assert counts.sum() == 3 and counts[0] == counts[-1] == 1


def test_percentile_leaves_out_what_it_says():
    x = np.linspace(-1, 3, 10_001, dtype=np.float32)[:, None]
    found = Histogram(Percentile(90)).finish(seen(Histogram(Percentile(90)), x))
    np.testing.assert_allclose([found.low, found.high], [-0.8, 2.8], atol=0.01)
    everything = Histogram(Percentile(100)).finish(seen(Histogram(Percentile(100)), x))
    assert everything.low <= -1 <= everything.low + 0.01 and everything.high - 0.01 <= 3 <= everything.high


@pytest.mark.parametrize("bits", [4, 8])
def test_least_squares_finds_the_best_threshold(bits):
    x = np.random.default_rng(0).laplace(size=(4000, 1)).astype(np.float32)
    found = Histogram(LeastSquares(bits)).finish(seen(Histogram(LeastSquares(bits)), x))

    def error(threshold):
        top = 2 ** (bits - 1) - 1
        scale = threshold / top
        return np.mean((np.clip(np.round(x / scale), -top, top) * scale - x) ** 2)

    tried = np.linspace(0.05, 1, 200) * np.abs(x).max()
    assert error(float(found.largest)) < 1.02 * min(error(t) for t in tried)
    if bits == 4:
        assert error(float(found.largest)) < 0.6 * error(np.abs(x).max())
    counts, centres = Histogram().finish(seen(Histogram(), x))
    np.testing.assert_allclose(squared_error(counts, centres, 3.0, bits), error(3.0), rtol=0.03)


def test_entropy_clips_an_outlier_and_keeps_an_even_spread():
    rng = np.random.default_rng(0)
    even = rng.uniform(-1, 1, (20_000, 1)).astype(np.float32)
    assert Histogram(Entropy()).finish(seen(Histogram(Entropy()), even)).largest > 0.9
    peaked = np.append(rng.standard_normal(20_000), 60).astype(np.float32)[:, None]
    found = Histogram(Entropy()).finish(seen(Histogram(Entropy()), peaked))
    assert 2.5 < found.largest < 12


def test_scales_of_ranges():
    found = Range(np.array([-1.0, 0.5, 0.0]), np.array([2.0, 4.0, 0.0]))
    np.testing.assert_allclose(found.scale(8), [2 / 127, 4 / 127, 1])
    scale, zero = found.affine(8)
    np.testing.assert_allclose(scale, [3 / 255, 4 / 255, 1])
    np.testing.assert_array_equal(zero, [85, 0, 0])


def test_what_is_wrong_is_told():
    with pytest.raises(QuantizationError, match="percent is 0"):
        Percentile(0)
    with pytest.raises(QuantizationError, match="bins is 100; it must be a power of two"):
        Histogram(bins=100)
    for observer in (MinMax(), Histogram(Entropy())):
        with pytest.raises(QuantizationError, match="no rows were seen"):
            observer.finish(observer.init(4))
    with pytest.raises(QuantizationError, match="4 folds of 1 batches"):
        cross_validate(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 2))}, [jnp.ones((2, 8))])


def test_cross_validation_prefers_the_rule_that_holds_on_other_data():
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((200, 8)).astype(np.float32) for _ in range(4)]
    batches[2][0, 0] = 300  # one outlier in one part
    weights = {"even": jnp.ones((8, 4)), "spiked": jnp.ones((8, 4))}

    def fn(p, x):
        return jnp.clip(x, -3, 3) @ p["even"] + x @ p["spiked"]

    found = cross_validate(fn, weights, batches, bits=4)
    best = found.best
    assert best["even"].rule in ("least squares", "entropy", "99.9%")
    assert best["even"].sqnr_db > 15
    one = {t.rule: t for t in found.trials if t.path == "spiked"}
    assert one["99.9%"].worst_db < one["min-max"].sqnr_db  # what it clips costs most where the outlier is
    rows = np.concatenate([np.clip(b, -3, 3) for b in batches])
    for trial in (t for t in found.trials if t.path == "even"):
        scale = trial.threshold / 7
        noise = np.mean((np.clip(np.round(rows / scale), -7, 7) * scale - rows) ** 2)
        np.testing.assert_allclose(trial.sqnr_db, 10 * np.log10(np.mean(rows**2) / noise), atol=0.5)
    np.testing.assert_allclose(found.ranges["even"].high, best["even"].threshold)
    assert '"best"' in found.to_json() and f"**{best['even'].sqnr_db:.2f}**" in found.to_markdown()
