"""RMSNorm and rotary embedding against NumPy in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustcore.errors import ModelError
from trustcore.ops.activate import swiglu
from trustcore.ops.attention import alibi_slopes
from trustcore.ops.norm import layer_norm, rms_norm
from trustcore.ops.rope import RopeConfig, rope

RNG = np.random.default_rng(0)


def test_rms_norm():
    x, w = RNG.standard_normal((3, 5, 64)), RNG.standard_normal(64)
    expected = w * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    found = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), eps=1e-5)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    narrow = rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.float32), eps=1e-5)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(narrow, np.float64), expected, atol=0.05)


def test_rms_norm_of_zeros_has_a_gradient():
    grad = jax.grad(lambda x: rms_norm(x, jnp.ones(8)).sum())(jnp.zeros((1, 8)))
    assert jnp.isfinite(grad).all()


def test_swiglu():
    gate, up = RNG.standard_normal((2, 4, 8))
    found = swiglu(jnp.asarray(gate, jnp.float32), jnp.asarray(up, jnp.float32))
    np.testing.assert_allclose(found, gate / (1 + np.exp(-gate)) * up, atol=1e-6)


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("size", (64, 32))
def test_rope_turns_complex_numbers(interleaved, size):
    """Each pair is one complex number times exp(i * angle)."""
    x = RNG.standard_normal((2, 5, 3, 64))
    positions = RNG.integers(0, 3000, (2, 5))
    config = RopeConfig(size, theta=500.0, interleaved=interleaved)
    turned = x[..., :size]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else np.split(turned, 2, -1)
    angle = positions[..., None, None] * 500.0 ** -(np.arange(0, size, 2) / size)
    z = (a + 1j * b) * np.exp(1j * angle)
    expected = np.array(x)
    if interleaved:
        expected[..., :size:2], expected[..., 1:size:2] = z.real, z.imag
    else:
        expected[..., : size // 2], expected[..., size // 2 : size] = z.real, z.imag
    found = rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions), config)
    np.testing.assert_allclose(found, expected, atol=2e-3)  # float32 angles up to 3000
    near = rope(jnp.asarray(x, jnp.float32), jnp.zeros((2, 5), jnp.int32), config)
    np.testing.assert_allclose(near, x, atol=1e-6)


def test_scores_depend_on_distance_alone():
    config = RopeConfig(32)
    q, k = (jnp.asarray(RNG.standard_normal((1, 1, 1, 32)), jnp.float32) for _ in range(2))

    def score(i, j):
        at = [jnp.full((1, 1), p, jnp.int32) for p in (i, j)]
        return jnp.sum(rope(q, at[0], config) * rope(k, at[1], config))

    np.testing.assert_allclose(score(7, 3), score(107, 103), rtol=1e-4)


def test_linear_scaling_divides_positions():
    plain, scaled = RopeConfig(16), RopeConfig(16, scaling="linear", factor=4.0)
    np.testing.assert_allclose(scaled.frequencies(), plain.frequencies() / 4)


def test_dynamic_scaling_begins_beyond_the_original_context():
    config = RopeConfig(64, scaling="dynamic", factor=2.0, original_context=1000)
    np.testing.assert_array_equal(config.frequencies(1000), RopeConfig(64).frequencies())
    # Base of the extended context: theta * (factor * T / T0 - (factor - 1)) ** (R / (R - 2)).
    theta = 10000 * (2 * 3000 / 1000 - 1) ** (64 / 62)
    np.testing.assert_allclose(config.frequencies(3000), theta ** -(np.arange(0, 64, 2) / 64))


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    config = RopeConfig(128, scaling="yarn", factor=4.0, original_context=4096)
    ratio = config.frequencies() / RopeConfig(128).frequencies()
    turns = 4096 * RopeConfig(128).frequencies() / (2 * math.pi)
    np.testing.assert_allclose(ratio[turns > 40], 1)
    np.testing.assert_allclose(ratio[turns < 0.8], 1 / 4)
    assert (np.diff(ratio) <= 1e-12).all()
    assert config.magnitude == pytest.approx(0.1 * math.log(4) + 1)
    assert RopeConfig(128, scaling="yarn", factor=4.0, original_context=9, attention_factor=1.5).magnitude == 1.5


def test_llama3_scaling_has_three_bands():
    config = RopeConfig(128, theta=5e5, scaling="llama3", factor=8.0, original_context=8192)
    plain = RopeConfig(128, theta=5e5).frequencies()
    ratio, wavelength = config.frequencies() / plain, 2 * math.pi / plain
    np.testing.assert_allclose(ratio[wavelength < 8192 / 4], 1)
    np.testing.assert_allclose(ratio[wavelength > 8192], 1 / 8)
    middle = (wavelength > 8192 / 4) & (wavelength < 8192)
    smooth = (8192 / wavelength[middle] - 1) / 3
    np.testing.assert_allclose(ratio[middle], (1 - smooth) / 8 + smooth)
    assert middle.any()


def test_divisors_divide_the_frequencies():
    config = RopeConfig(4, divisors=(1.0, 8.0))
    np.testing.assert_allclose(config.frequencies(), RopeConfig(4).frequencies() / [1, 8])


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"size": 7}, "7 turned channels"),
        ({"size": 8, "theta": float("nan")}, "theta is nan"),
        ({"size": 8, "scaling": "wide"}, "scaling 'wide' is not one of none, linear"),
        ({"size": 8, "scaling": "yarn", "factor": 2.0}, "yarn scaling needs the original context"),
        ({"size": 8, "scaling": "linear", "factor": 0.0}, "scaling factor is 0.0"),
        ({"size": 8, "divisors": (1.0,)}, "1 frequency divisors for 4 pairs"),
    ),
)
def test_errors(options, message):
    with pytest.raises(ModelError, match=message):
        RopeConfig(**options)


def test_layer_norm():
    rng = np.random.default_rng(0)
    x, weight, bias = rng.standard_normal((3, 2, 8)), rng.standard_normal((2, 8)), rng.standard_normal((2, 8))
    centred = x - x.mean(-1, keepdims=True)
    expected = weight * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3)
    given = [jnp.asarray(a, jnp.float32) for a in (x, weight, bias)]
    np.testing.assert_allclose(layer_norm(*given[:2], eps=1e-3), expected, atol=1e-5)
    np.testing.assert_allclose(layer_norm(*given, eps=1e-3), expected + bias, atol=1e-5)
    assert layer_norm(given[0].astype(jnp.bfloat16), given[1]).dtype == jnp.bfloat16


def test_longrope_goes_by_the_context_of_the_call():
    short, long = (1.0, 1.5), (2.0, 4.0)
    config = RopeConfig(4, scaling="longrope", original_context=8, divisors=short, long_divisors=long)
    plain = RopeConfig(4).frequencies()
    np.testing.assert_allclose(config.frequencies(8), plain / short)
    np.testing.assert_allclose(config.frequencies(9), plain / long)
    with pytest.raises(ModelError, match="longrope scaling needs divisors for short and for long contexts"):
        RopeConfig(4, scaling="longrope", original_context=8, divisors=short)


def test_a_ramp_of_yarn_that_is_not_truncated_begins_between_pairs():
    options = {"theta": 1e4, "scaling": "yarn", "factor": 4.0, "original_context": 64, "beta_fast": 4.0}
    whole, between = (RopeConfig(16, truncate=t, **options).frequencies() for t in (True, False))
    assert (np.diff(np.log(between)) < 0).all() and not np.allclose(whole, between, rtol=1e-3)


@pytest.mark.parametrize("heads", (1, 4, 6, 12))
def test_slopes_of_alibi(heads):
    """As the paper's own code has them: heads beyond a power of two take every other slope of twice as many."""

    def of_power(n):
        return [2 ** (-(2 ** -(np.log2(n) - 3)) * (i + 1)) for i in range(n)]

    power = 2 ** int(np.floor(np.log2(heads)))
    expected = of_power(power) + of_power(2 * power)[0::2][: heads - power]
    np.testing.assert_allclose(alibi_slopes(heads), expected, rtol=1e-6)
