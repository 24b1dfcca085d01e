"""HQQ against its loop in NumPy float64, on what it promises of any weights, and on trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.small import random_decoder, some_tokens
from tests.quant.samples import weights_of
from trustcore.errors import QuantizationError
from trustcore.quant import QuantizedArray
from trustcore.quant.hqq import hqq, hqq_codes

P, BETA, KAPPA = 0.7, 10.0, 1.01


def numpy_hqq(weights, bits, group, iterations, p=P, beta=BETA):
    """Codes, scales and zero points, one group after the other."""
    k, n = weights.shape
    first, levels = (-128 if bits == 8 else 0), 2**bits - 1
    codes, scales, zeros = np.zeros((k, n)), np.zeros((k // group, n)), np.zeros((k // group, n))
    for g in range(k // group):
        for c in range(n):
            w = weights[g * group : (g + 1) * group, c].astype(np.float64)
            scale = max((w.max() - w.min()) / levels, np.abs(w).max() / 1024) or 1.0
            scale = float(np.float16(scale))
            y, zero = w / scale, float(np.float16(first - w.min() / scale))
            best, least, b = zero, np.inf, beta
            for _ in range(iterations + 1):
                q = np.clip(np.round(y + zero), first, first + levels)
                r = y - (q - zero)
                if (error := (np.abs(r) ** p).sum()) < least:
                    best, least = zero, error
                size = np.abs(r)
                e = np.sign(r) * np.maximum(size - np.where(size > 0, size, 1) ** (p - 1) / b, 0)
                zero = float(np.float16(np.mean(q - (y - e))))
                b *= KAPPA
            codes[g * group : (g + 1) * group, c] = np.clip(np.round(y + best), first, first + levels)
            scales[g, c], zeros[g, c] = scale, best
    return codes, scales, zeros


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 64), (8, 128)])
@pytest.mark.parametrize("distribution", ["heavy", "shifted"])
def test_codes_equal_the_loop_in_float64(bits, group, distribution):
    weights = weights_of(distribution, 128, 24).T
    codes, scale, zero = (np.asarray(a) for a in hqq_codes(jnp.asarray(weights), bits, group, P, BETA, KAPPA, 20))
    expected = numpy_hqq(weights, bits, group, 20)
    np.testing.assert_array_equal(scale, expected[1])
    # A code on the edge between two may fall differently in float32, and the zero point of its group follows.
    same = zero == expected[2]
    assert same.mean() > 0.9
    per_code = np.repeat(same, group, axis=0)
    np.testing.assert_array_equal(codes[per_code], expected[0][per_code])


def error(weights, packed, p):
    """Errors to the power p in steps of their groups, summed over each group."""
    scale = np.asarray(packed.fields["scale"], np.float64)
    steps = (weights - np.asarray(packed.dequantize(), np.float64)).reshape(scale.shape[0], -1, scale.shape[1])
    return (np.abs(steps / scale[:, None]) ** p).sum(1)


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_no_group_is_worse_than_plain_rounding_and_outliers_gain_most(bits):
    weights = weights_of("heavy", 512, 64).T
    plain, fitted = (hqq({"w": jnp.asarray(weights)}, f"int{bits}:g64", iterations=i)["w"] for i in (0, 20))
    before, after = error(weights, plain, P), error(weights, fitted, P)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.mean() < 0.97 * before.mean()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([2, 3, 8]),
    st.floats(-10, 4),
    st.sampled_from([0.0, 1.0, 100.0]),
)
def test_any_weights_decode_to_within_a_step(seed, bits, exponent, mean):
    rng = np.random.default_rng(seed)
    weights = (10.0**exponent / (1 + mean) * (rng.standard_normal((64, 8)) + mean)).astype(np.float32)
    weights = np.clip(weights, -6e4, 6e4)
    packed = hqq({"w": weights}, f"int{bits}:g32")["w"]
    assert packed.shape == (64, 8) and packed.dequantize().dtype == jnp.float32
    scale = np.repeat(np.asarray(packed.fields["scale"], np.float32), 32, axis=0)
    # Clipping gives outliers away, but never most of a group.
    off = np.abs(weights - np.asarray(packed.dequantize())) / scale
    assert np.isfinite(off).all() and np.median(off) <= 0.51 and off.max() < 2**bits


@pytest.mark.parametrize("value", (0.0, 1.0, -0.02, 3e4, 1e-7))
def test_constants_come_back(value):
    packed = hqq({"w": np.full((64, 4), value, np.float32)}, "int3:g64")["w"]
    np.testing.assert_allclose(packed.dequantize(), value, rtol=2e-3, atol=4e-8)


def test_planes_hold_the_codes():
    weights = jnp.asarray(weights_of("gaussian", 128, 16).T)
    for bits in (3, 4, 7, 8):
        codes, scale, zero = hqq_codes(weights, bits, 32, P, BETA, KAPPA, 3)
        packed = hqq({"w": weights}, f"int{bits}:g32", iterations=3)["w"]
        assert packed.format == f"int{bits}" and packed.fields["zero"].dtype == jnp.float16
        by_group = codes.reshape(4, 32, 16).astype(jnp.float32)
        expected = ((by_group - zero[:, None]) * scale[:, None]).reshape(128, 16)
        np.testing.assert_array_equal(packed.dequantize(), expected)


def test_trees_tables_and_what_is_passed_over():
    tree = {
        "table": jnp.asarray(weights_of("gaussian", 64, 24)),
        "up": jnp.asarray(weights_of("gaussian", 128, 40).T),
        "odd": jnp.ones((40, 4)),
        "norm": {"scale": jnp.ones((64, 64))},
        "bias": jnp.zeros(3),
    }
    packed = hqq(tree)
    assert isinstance(packed["table"], QuantizedArray) and packed["table"].transposed
    assert packed["table"].shape == (24, 64) and packed["up"].description == "int4:g64:asym"
    np.testing.assert_allclose(packed["table"].dequantize(), tree["table"], atol=0.01)
    assert packed["norm"]["scale"] is tree["norm"]["scale"]
    for path in ("odd", "bias"):
        assert packed[path] is tree[path]
    by_channel = hqq(tree, "int8:channel", where=lambda path, array: path == "odd")
    assert by_channel["odd"].description == "int8:channel:asym"
    np.testing.assert_allclose(by_channel["odd"].dequantize(), 1, rtol=1e-3)


def test_a_decoder_computes_almost_the_same():
    model, tokens = random_decoder(), some_tokens()
    run = jax.jit(lambda m, t: m(t))
    exact, found = run(model, tokens), run(hqq(model, "int8:g32"), tokens)
    assert jnp.mean((found - exact) ** 2) < 1e-3 * jnp.mean(exact**2)


def test_what_cannot_be_packed_is_refused_at_once():
    tree = {
        "odd": jnp.ones((40, 4)),
        "bad": jnp.full((64, 2), jnp.nan),
        "vector": jnp.ones(64),
        "fine": jnp.ones((64, 2)),
    }
    with pytest.raises(QuantizationError) as raised:
        hqq(tree, where=lambda path, array: True)
    for expected in (
        "hqq: bad: its largest weight is nan; weights must be finite",
        "odd: K=40 is not a multiple of the group of 64",
        "vector is float32[64]; expected a float matrix",
    ):
        assert expected in str(raised.value)
    with pytest.raises(QuantizationError, match="nothing to pack: odd: K=40 is not"):
        hqq({"odd": jnp.ones((40, 4))})
    with pytest.raises(QuantizationError, match="K=12 is not a multiple of 8, which int3 packs together"):
        hqq({"w": jnp.ones((12, 4))}, "int3:channel", where=lambda path, array: True)
    for format in ("int9", "q4_0", "int4:64", "int4:g0", "int4:g64:asym"):
        with pytest.raises(QuantizationError, match="is none of int2, int3"):
            hqq(tree, format)
    with pytest.raises(QuantizationError, match=r"p=2.*p lies in \(0, 1\]"):
        hqq(tree, p=2)
