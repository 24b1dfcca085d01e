"""Fake quantization against its equations in NumPy: values, straight-through gradients, first scales."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trustcore.errors import QuantizationError
from trustcore.quant.training import Scheme, fake_quantize, pact
from trustcore.quant.training.fake import start_of
from trustcore.quant.training.inputs import Inputs, observing
from trustcore.quant.training.scheme import FORMATS

K, N = 192, 160
GRANULARITIES = ("tensor", "channel", "g16", "g64", "128x128")
INTEGERS = [name for name in FORMATS if name.startswith("int") and name != "int1"]


def texts():
    for name in FORMATS:
        for grain in GRANULARITIES:
            yield f"{name}:{grain}"
            if name in INTEGERS:
                yield f"{name}:{grain}:asym"


def wide(scale, scheme, k=K, n=N):
    """Scales [G, C] written out to [K, N], entry by entry."""
    rows, columns = scheme.rows or k, scheme.columns or n
    return np.asarray(scale)[np.arange(k)[:, None] // rows, np.arange(n)[None, :] // columns]


def nearest(v, text):
    name = text.split(":")[0]
    if name == "int1":
        return np.where(v >= 0, 1.0, -1.0), -1.0, 1.0
    if name.startswith("fp8"):
        kind = ml_dtypes.float8_e4m3fn if name == "fp8_e4m3" else ml_dtypes.float8_e5m2
        top = float(ml_dtypes.finfo(kind).max)
        return np.clip(v, -top, top).astype(np.float32).astype(kind).astype(np.float64), -top, top
    if name == "ternary":
        low, high = -1, 1
    else:
        bits = int(name[3:])
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        if text.endswith("asym") and bits < 8:
            low, high = 0, 2**bits - 1
    return np.clip(np.round(v), low, high), low, high


def some(seed=0, k=K, n=N):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((k, n)), jnp.float32)


def cases():
    for text in texts():
        name, grain, *_ = text.split(":")
        quick = name in ("int4", "fp8_e4m3") or grain == "g16"
        yield pytest.param(text, True, marks=() if quick else pytest.mark.slow)
        if name == "int4":
            yield pytest.param(text, False)


@pytest.mark.parametrize(("text", "clipped"), list(cases()))
def test_values_and_gradients_are_those_of_the_equations(text, clipped):
    scheme, x = Scheme.parse(text), some()
    scale, offset = start_of(x, scheme, "range")
    scale = scale * 0.7  # so that some numbers lie outside
    g = some(1)

    def run(x, scale, offset):
        return jnp.sum(g * fake_quantize(x, scale, offset, format=text, clipped=clipped))

    y = fake_quantize(x, scale, offset, format=text)
    found = jax.grad(run, (0, 1, 2) if scheme.asymmetric else (0, 1))(x, scale, offset)

    s, x, g = wide(scale, scheme), np.asarray(x), np.asarray(g)
    o = wide(offset, scheme) if scheme.asymmetric else np.float32(0)
    v = (x - o) / s
    q, low, high = nearest(v, text)
    np.testing.assert_allclose(y, s * q + o, rtol=1e-5, atol=1e-5)
    inside = (v >= low) & (v <= high)
    assert clipped is False or not inside.all() or high > 1000
    step = q if text.startswith("int1") else np.where(inside, q - v, q)
    np.testing.assert_allclose(found[0], np.where(inside, g, 0) if clipped else g)

    def shared(each):
        total = np.zeros(scale.shape)
        rows, columns = scheme.rows or K, scheme.columns or N
        np.add.at(total, (np.arange(K)[:, None] // rows, np.arange(N)[None, :] // columns), each)
        return total

    np.testing.assert_allclose(found[1], shared(g * step), rtol=1e-3, atol=2e-4 * high)
    if scheme.asymmetric:
        np.testing.assert_allclose(found[2], shared(np.where(inside, 0, g)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", [case.values[0] for case in cases() if case.values[1] and not case.marks])
def test_first_scales(text):
    scheme, x = Scheme.parse(text), some(3)
    lsq, ranged = start_of(x, scheme, "lsq"), start_of(x, scheme, "range")
    rows, columns = scheme.rows or K, scheme.columns or N
    part = np.asarray(x)[:rows, :columns]  # of the first scale
    _, low, high = nearest(np.zeros(1), text)
    if scheme.asymmetric:
        np.testing.assert_allclose(ranged.scale[0, 0], (max(part.max(), 0) - min(part.min(), 0)) / (high - low), 1e-6)
        edges = ranged.scale * low + ranged.offset, ranged.scale * high + ranged.offset
        np.testing.assert_allclose(edges[0][0, 0], min(part.min(), 0), atol=1e-5)
        np.testing.assert_allclose(edges[1][0, 0], max(part.max(), 0), atol=1e-5)
    else:
        mean = np.abs(part).mean()
        expected = mean if text.startswith("int1") else 2 * mean / np.sqrt(high)
        np.testing.assert_allclose(lsq.scale[0, 0], expected, rtol=1e-5)
        expected = mean if text.startswith(("int1", "ternary")) else np.abs(part).max() / high
        np.testing.assert_allclose(ranged.scale[0, 0], expected, rtol=1e-5)
        assert lsq.offset is None
    assert lsq.scale.shape == ranged.scale.shape == scheme.scale_shape(x.shape)
    assert (start_of(jnp.zeros((K, N)), scheme, "lsq").scale > 0).all()


@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from(FORMATS),
    grain=st.sampled_from(GRANULARITIES),
    size=st.floats(1e-8, 1e8),
    seed=st.integers(0, 99),
    k=st.sampled_from((128, 320)),
    n=st.sampled_from((5, 130)),
)
def test_codes_of_codes_are_the_same(name, grain, size, seed, k, n):
    """Idempotence, whatever the size; the error stays within half a step where nothing is clipped."""
    text = f"{name}:{grain}"
    scheme, x = Scheme.parse(text), some(seed, k, n) * size
    scale, _ = start_of(x, scheme, "range")
    y = fake_quantize(x, scale, format=text)
    assert (fake_quantize(y, scale, format=text) == y).all()
    if name.startswith("int") and name != "int1":
        assert (np.abs(y - x) <= 0.5001 * wide(scale, scheme, k, n)).all()


def test_half_precision_stays_half_precision():
    x = some().astype(jnp.bfloat16)
    scale = start_of(x, Scheme.parse("int4"), "lsq").scale
    y, pull = jax.vjp(lambda x: fake_quantize(x, scale, format="int4"), x)
    assert y.dtype == pull(y)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("signed", (False, True))
def test_pact_is_its_paper(signed):
    """Choi et al., eq. 1 to 3: the gradient of alpha is 1 where x >= alpha, else 0."""
    x, alpha, g = some() * 2, jnp.float32(1.3), some(1)
    y, pull = jax.vjp(lambda x, a: pact(x, a, bits=4, signed=signed), x, alpha)
    dx, da = pull(g)
    x, g = np.asarray(x), np.asarray(g)
    low, steps = (-1.3, 7) if signed else (0, 15)
    clipped = np.clip(x, np.float32(low), np.float32(1.3))
    np.testing.assert_allclose(y, np.round(clipped * steps / np.float32(1.3)) * np.float32(1.3) / steps, atol=1e-6)
    np.testing.assert_array_equal(dx, np.where((x >= low) & (x <= 1.3), g, 0))
    expected = g[x >= 1.3].sum() - (g[x <= -1.3].sum() if signed else 0)
    np.testing.assert_allclose(da, expected, rtol=1e-4)


def test_what_is_observed_comes_back_through_jit_scan_and_vmap():
    x = some(4, 6, 8).reshape(3, 2, 8)

    @jax.jit
    def seen(x, meter):
        def body(total, rows):
            return total + observing(rows, meter).sum(), None

        return jax.lax.scan(body, 0.0, x)[0]

    found = jax.grad(seen, 1)(x, jnp.zeros(3))
    size = np.abs(np.asarray(x)).reshape(3, -1)
    np.testing.assert_allclose(found, [size.mean(1).sum(), size.max(1).sum(), 3], rtol=1e-5)
    each = jax.grad(lambda m: jax.vmap(lambda row: observing(row, m).sum())(x).sum())(jnp.zeros(3))
    np.testing.assert_allclose(each, found, rtol=1e-5)
    inputs = Inputs.parse("int8", "lsq")
    np.testing.assert_allclose(inputs.start(found), 2 * size.mean() / np.sqrt(127), rtol=1e-5)
    np.testing.assert_allclose(Inputs.parse("int8", "pact").start(found), size.max(1).mean() / 127, rtol=1e-5)


def test_tokens_take_their_own_scale():
    x = some(5, 4, 64) * jnp.asarray([[1e-3], [1.0], [50.0], [0.0]])
    y = Inputs.parse("int8:token", "lsq")(x, None)
    top = np.abs(np.asarray(x)).max(1, keepdims=True)
    assert (np.abs(y - x) <= top / 254 * 1.0001).all() and (y[3] == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: Scheme.parse("q4_k"), "format 'q4_k' cannot be trained; choose from int1, ternary"),
        (lambda: Scheme.parse("int4:row"), "'row' is no option. Write 'int4', or one granularity"),
        (lambda: Scheme.parse("int4:g0"), "'g0' is no option"),
        (lambda: Scheme.parse("ternary:asym"), "'asym' goes with int2 to int8, not with ternary"),
        (lambda: Inputs.parse("int8:g32", "lsq"), "activations 'int8:g32' are not known; write int8"),
        (lambda: Inputs.parse("int8", "best"), "activation_method is 'best'; choose from lsq, pact"),
        (
            lambda: fake_quantize(jnp.ones((64, 4)), jnp.ones((1, 4)), format="int4:g32"),
            r"scale \[1, 4\] does not fit x \[64, 4\] in int4:g32; it must be \[2, 4\]",
        ),
    ),
)
def test_errors(call, message):
    with pytest.raises(QuantizationError, match=message):
        call()
