"""The sampler against NumPy in float64: filters exactly, draws by their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trustcore.errors import GenerationError
from trustcore.generation.sampling import History, Sampling, draw, filtered, likeliest, penalize, sample

LOGITS = np.random.default_rng(0).standard_normal((3, 1000)) * 3


def probabilities(sampling, logits=LOGITS):
    weights = filtered(jnp.asarray(logits, jnp.float32), sampling.plan, sampling.values)
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_temperature():
    np.testing.assert_allclose(probabilities(Sampling(temperature=0.7)), softmax(LOGITS / 0.7), rtol=1e-4)


@pytest.mark.parametrize("k", (1, 5, 999, 1000, 5000))
def test_top_k_keeps_exactly_the_k_likeliest(k):
    p = probabilities(Sampling(temperature=1, top_k=k))
    for row, logits in zip(p, LOGITS, strict=True):
        assert set(np.flatnonzero(row)) == set(np.argsort(-logits)[:k])


@pytest.mark.parametrize("top_p", (0.001, 0.3, 0.9, 0.9999))
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p):
    p = probabilities(Sampling(temperature=1, top_p=top_p))
    for row, full in zip(p, softmax(LOGITS), strict=True):
        order = np.argsort(-full)
        count = np.searchsorted(np.cumsum(full[order]), top_p) + 1
        assert set(np.flatnonzero(row)) == set(order[:count])


def test_min_p_is_a_share_of_the_likeliest():
    p = probabilities(Sampling(temperature=1, min_p=0.05))
    full = softmax(LOGITS)
    np.testing.assert_array_equal(p > 0, full >= 0.05 * full.max(-1, keepdims=True))


def test_filters_apply_in_order():
    """top-p counts within what top-k left."""
    p = probabilities(Sampling(temperature=1, top_k=4, top_p=0.9))
    for row, logits in zip(p, LOGITS, strict=True):
        order = np.argsort(-logits)[:4]
        count = np.searchsorted(np.cumsum(softmax(logits[order])), 0.9) + 1
        assert set(np.flatnonzero(row)) == set(order[:count])


@settings(max_examples=60, deadline=None)
@given(uniform=st.floats(0, 1, exclude_max=True, width=32), size=st.sampled_from((1, 5, 255, 256, 257, 1000)))
def test_a_draw_inverts_the_cumulative_distribution(uniform, size):
    weights = np.random.default_rng(size).random(size) * (np.arange(size) % 3 != 0) + (np.arange(size) == size - 1)
    token = int(draw(jnp.asarray(weights[None], jnp.float32), jnp.asarray([uniform], jnp.float32))[0])
    total = np.cumsum(weights) / weights.sum()
    assert weights[token] > 0
    below = total[token - 1] if token else 0.0
    assert below - 1e-5 <= uniform <= total[token] + 1e-5


def test_draws_follow_the_probabilities():
    sampling = Sampling(temperature=1.0)
    weights = filtered(jnp.asarray(LOGITS[:1, :8], jnp.float32), sampling.plan, sampling.values)
    n = 20000
    tokens = draw(jnp.tile(weights, (n, 1)), jax.random.uniform(jax.random.key(0), (n,)))
    found = np.bincount(np.asarray(tokens), minlength=8) / n
    np.testing.assert_allclose(found, softmax(LOGITS[:1, :8])[0], atol=4 * np.sqrt(0.25 / n))


def test_greedy_takes_the_first_of_equals():
    logits = jnp.asarray([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert likeliest(logits).tolist() == [1, 0]
    plan, values = Sampling().plan, Sampling().values
    assert sample(logits, plan, values, History.start(plan, 2, 4), jnp.zeros(2)).tolist() == [1, 0]


def test_penalties():
    sampling = Sampling(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    history = History.start(sampling.plan, 1, 5)
    history = history.prompt(jnp.asarray([[0, 1, 4]]), jnp.asarray([[True, True, False]]))
    history = history.answer(jnp.asarray([2])).answer(jnp.asarray([2])).answer(jnp.asarray([-1]))
    assert history.seen.tolist() == [[True, True, True, False, False]]
    assert history.counts.tolist() == [[0, 0, 2, 0, 0]]
    found = penalize(jnp.asarray([[4.0, -4.0, 4.0, 4.0, 4.0]]), sampling.plan, sampling.values, history)
    np.testing.assert_allclose(found, [[2.0, -8.0, 2.0 - 1.0 - 0.25, 4.0, 4.0]])


def test_no_penalty_keeps_no_history():
    assert History.start(Sampling(temperature=1, top_k=3).plan, 2, 10) == (None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"temperature": -1}, "temperature is -1; it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": 2}, "min_p is 2; it must be from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": None}, "presence_penalty is None"),
    ),
)
def test_errors(options, message):
    with pytest.raises(GenerationError, match=message):
        Sampling(**options)
