"""Weights that quantize their inputs: exact products of codes against NumPy, gradients, trees, refusals."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import trustcore as tc
from tests.models.small import random_decoder, some_tokens
from tests.quant.samples import weights_of
from tests.quant.scaled import codes_of, decoded
from trustcore.errors import ImplementationError, QuantizationError
from trustcore.ops.linear import linear, linear_many
from trustcore.quant import QuantizedArray
from trustcore.quant import activations as module
from trustcore.quant.activations import ActivationQuantized, choose, mx_operands, quantize_activations, quantize_inputs

K, N = 192, 80


def inputs(rows=6, seed=0):
    """Rows of very different sizes, one of zeros, one that is all positive."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, K)) * np.exp(2 * rng.standard_normal((rows, 1)))
    x[1] = 0
    x[2] = np.abs(x[2]) + 1
    return x.astype(np.float32)


def weight(name, **options):
    return QuantizedArray.quantize(weights_of("heavy", K, N).T, name, **options)


def of(w):
    return {name: np.asarray(field) for name, field in w.fields.items()}


def safe(scale):
    return np.where(scale == 0, np.float32(1), scale)


def int8_codes(x, asymmetric=False, scale=None, zero=None):
    """The textbook: codes, scales and zero points, int64 and float32 `[rows, 1]`."""
    f = np.float32
    if scale is not None:
        scale = np.full((1, 1), scale, f)
    elif asymmetric:
        low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
        scale = (high - low) / f(255)
        zero = np.rint(-low * np.where(scale == 0, f(0), f(1) / safe(scale))) - 128
    else:
        scale = np.abs(x).max(1, keepdims=True) / f(127)
    relative = np.rint(x * np.where(scale == 0, f(0), f(1) / safe(scale)))
    if zero is None:
        return np.clip(relative, -127, 127).astype(np.int64), scale, np.zeros((1, 1))
    return np.clip(relative + zero, -128, 127).astype(np.int64), scale, np.asarray(zero).reshape(-1, 1)


CASES = {
    "dynamic": ({}, {}),
    "asymmetric": ({"asymmetric": True}, {"asymmetric": True}),
    "static": ({"input_scale": jnp.float32(0.02)}, {"scale": 0.02}),
    "static with a zero point": (
        {"input_scale": jnp.float32(0.02), "input_zero": jnp.float32(-7)},
        {"scale": 0.02, "zero": -7},
    ),
}


@pytest.mark.parametrize("storage", ("int8:channel", "int8:tensor", "int8:channel:asym"))
@pytest.mark.parametrize("key", CASES)
def test_int8_by_int8_is_exact(key, storage):
    """The sum is one of integers; only the scales, and corrections below 2**24, are rounded."""
    options, oracle = CASES[key]
    w, x = weight(storage), inputs()
    codes, scale, zero = int8_codes(x, **oracle)
    np.testing.assert_array_equal(quantize_inputs(jnp.asarray(x), "int8", **oracle)[0], codes)
    fields = of(w)
    shifted = codes_of("int8", fields).astype(np.int64) - fields.get("zero", np.zeros((1, 1))).astype(np.int64)
    total = (codes - zero.astype(np.int64)) @ shifted
    expected = total * scale.astype(np.float64) * fields["scale"]
    product = jax.jit(lambda x, w: x @ w)
    wrapped = ActivationQuantized(w, **options)
    assert choose(wrapped) == "codes"
    found = np.asarray(product(jnp.asarray(x), wrapped))
    assert np.abs(found - expected).max(1) == pytest.approx(0, abs=3e-7 * np.abs(expected).max())
    if "asym" not in storage and "zero" not in key and key != "asymmetric":
        np.testing.assert_allclose(found, expected, rtol=3e-7)  # no cancellation: exact but for two roundings
    other = jax.jit(lambda x, w: linear(x, w, implementation="dequantize"))(jnp.asarray(x), wrapped)
    np.testing.assert_allclose(other, expected, atol=4e-6 * np.abs(expected).max())
    if key == "dynamic":
        dense = x.astype(np.float64) @ decoded("int8", fields)
        assert np.all(np.abs(found - dense).max(1) <= 0.02 * np.abs(dense).max(1) + 1e-9)


@pytest.mark.parametrize("implementation", ("codes", "dequantize"))
@pytest.mark.parametrize(
    ("name", "kind", "static"),
    [("fp8_e4m3", "fp8_e4m3", None), ("fp8_e5m2", "fp8_e4m3", 0.01), ("fp8_e4m3", "fp8_e5m2", None)],
)
def test_float8_by_float8(name, kind, static, implementation):
    dtype = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}[kind]
    largest = float(ml_dtypes.finfo(dtype).max)
    w, x = weight(f"{name}:channel"), inputs()
    q, scale, _ = quantize_inputs(jnp.asarray(x), kind, scale=static)
    scale = np.asarray(scale)
    ideal = np.abs(x).max(1, keepdims=True) / largest if static is None else np.full((1, 1), static)
    np.testing.assert_allclose(scale, ideal, rtol=2e-7)
    codes = np.clip(x * (np.float32(1) / safe(scale)), -largest, largest).astype(dtype)
    np.testing.assert_array_equal(np.asarray(q).astype(np.float32), codes.astype(np.float32))
    expected = codes.astype(np.float64) @ decoded(name, of(w)) * scale
    wrapped = ActivationQuantized(w, kind, input_scale=static if static is None else jnp.float32(static))
    found = jax.jit(lambda x, w: linear(x, w, implementation=implementation))(jnp.asarray(x), wrapped)
    assert np.all(np.abs(found - expected).max(1) <= 4e-6 * np.abs(expected).max(1))


@pytest.mark.parametrize("name", ("mxfp8_e4m3", "mxfp8_e5m2"))
def test_mx_by_mx(name, monkeypatch):
    """The rounded inputs by the decoded weight; and what the hardware's dot is given makes the same sums."""
    w, x = weight(name), inputs()
    rounded = decoded(name, of(QuantizedArray.quantize(x.T, name, search=False))).T
    expected = rounded.astype(np.float64) @ decoded(name, of(w))
    wrapped = ActivationQuantized(w, name)
    assert choose(wrapped) == "dequantize"
    found = jax.jit(lambda x, w: x @ w)(jnp.asarray(x), wrapped)
    assert np.abs(found - expected).max() <= 4e-6 * np.abs(expected).max()
    with pytest.raises(ImplementationError, match=r"'codes' cannot multiply .* compute capability 10 .*this is cpu"):
        linear(jnp.asarray(x), wrapped, implementation="codes")

    def emulated(lhs, rhs, lhs_scales, rhs_scales):
        assert lhs_scales.dtype == rhs_scales.dtype == jnp.float8_e8m0fnu and lhs.dtype == rhs.dtype

        def whole(codes, scales):
            factors = np.repeat(np.asarray(scales).astype(np.float64), codes.shape[-1] // scales.shape[-1], axis=-1)
            return np.asarray(codes).astype(np.float64) * factors

        return jnp.asarray(np.einsum("bmk,bnk->bmn", whole(lhs, lhs_scales), whole(rhs, rhs_scales)), jnp.float32)

    shapes = [operand.shape for operand in mx_operands(jnp.asarray(x), wrapped)]
    assert shapes == [(1, 6, K), (1, N, K), (1, 6, K // 32), (1, N, K // 32)]
    monkeypatch.setattr(module, "_capable", lambda least: True)
    monkeypatch.setattr(jax.nn, "scaled_matmul", emulated)
    assert choose(wrapped) == "codes"
    np.testing.assert_allclose(jnp.asarray(x) @ wrapped, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_rows_in_another_order():
    rng = np.random.default_rng(0)
    order = rng.permutation(K).astype(np.int32)
    plain = weight("int8:channel")
    fields = {"codes": plain.fields["codes"][order], "scale": plain.fields["scale"], "order": jnp.asarray(order)}
    x = jnp.asarray(inputs())
    expected = x @ ActivationQuantized(plain)
    np.testing.assert_array_equal(x @ ActivationQuantized(QuantizedArray("int8", fields)), expected)


def test_gradients():
    """Straight through: those of the rounded x and the decoded weight; none where a calibrated scale clips."""
    w, x = weight("int8:channel"), jnp.asarray(inputs())
    dense = jnp.asarray(decoded("int8", of(w)))
    target = jnp.asarray(np.random.default_rng(1).standard_normal((6, N)), jnp.float32)

    def gradients(w, x):
        return jax.grad(lambda x, w: jnp.sum(target * (x @ w)), argnums=(0, 1), allow_int=True)(x, w)

    dx, dw = jax.jit(gradients)(ActivationQuantized(w), x)
    expected = target @ dense.T
    np.testing.assert_allclose(dx, expected, atol=1e-5 * np.abs(expected).max())
    codes, scale, _ = int8_codes(np.asarray(x))
    dscale = ((codes * scale).T @ np.asarray(target, np.float64) * np.asarray(w.fields["codes"], np.float64)).sum(0)
    np.testing.assert_allclose(dw.weight.fields["scale"][0], dscale, rtol=1e-3, atol=1e-4 * np.abs(dscale).max())

    static = ActivationQuantized(w, input_scale=jnp.float32(0.01), input_zero=jnp.float32(3))
    dx, dw = jax.jit(gradients)(static, x)
    relative = np.rint(np.asarray(x) * (np.float32(1) / np.float32(0.01))) + 3
    clipped = (relative < -128) | (relative > 127)
    assert 0.05 < clipped.mean() < 0.95
    np.testing.assert_allclose(dx, np.where(clipped, 0, expected), atol=1e-5 * np.abs(expected).max())
    assert dw.input_scale == 0 and dw.input_zero == 0


def test_vmap_scan_and_several_at_once():
    layers = [QuantizedArray.quantize(weights_of("gaussian", K, K, seed=seed).T, "int8") for seed in (1, 2)]
    one, two = (ActivationQuantized(layer, input_scale=jnp.float32(0.05)) for layer in layers)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, two)
    assert stack.shape == (2, K, K) and stack.ndim == 3 and stack.size == 2 * K * K
    x = jnp.asarray(inputs())
    y, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, stack)
    np.testing.assert_allclose(y, x @ one @ two, rtol=1e-6)
    each = jax.vmap(lambda w: x @ w)(stack)
    np.testing.assert_allclose(each[1], x @ two, rtol=1e-6)
    both = linear_many(x[None], [one, layers[1]], [None, None])
    np.testing.assert_allclose(both[0][0], x @ one, rtol=1e-6)
    np.testing.assert_allclose(both[1][0], x @ layers[1], rtol=1e-5)
    half = x.astype(jnp.bfloat16)
    assert (half @ one).dtype == jnp.bfloat16


def test_a_table_seen_from_both_sides():
    table = QuantizedArray.quantize(weights_of("gaussian", K, N), "int8", transposed=True)
    wrapped = ActivationQuantized(table)
    assert wrapped.shape == (N, K) and wrapped.T.shape == (K, N) and wrapped.nbytes == table.nbytes
    np.testing.assert_array_equal(wrapped.take(jnp.asarray([3, 1])), table.take(jnp.asarray([3, 1])))
    np.testing.assert_array_equal(wrapped.dequantize(), table.dequantize())
    x = jnp.asarray(inputs())
    assert choose(wrapped.T) == "codes" and choose(wrapped) == "dequantize"
    np.testing.assert_allclose(x @ wrapped.T, x @ table.T, atol=0.02 * float(jnp.abs(x @ table.T).max()))
    z = x[:, :N]
    np.testing.assert_allclose(z @ wrapped, z @ table, atol=0.02 * float(jnp.abs(z @ table).max()))


def test_a_model_of_integers_computes_almost_the_same():
    model, tokens = random_decoder(), some_tokens()
    logits = np.asarray(model(tokens))
    packed = tc.quantize(model, "int8:channel")
    integers = quantize_activations(packed)
    wrapped = [
        leaf
        for leaf in jax.tree.leaves(integers, is_leaf=lambda leaf: isinstance(leaf, ActivationQuantized))
        if isinstance(leaf, ActivationQuantized)
    ]
    assert len(wrapped) == 15  # all but the table
    found = np.asarray(jax.jit(lambda m, t: m(t))(integers, tokens))
    error = np.sqrt(np.mean((found - logits) ** 2) / np.mean(logits**2))
    assert 0 < error < 0.05


def test_trees_take_calibrated_scales_by_path():
    tree = {"a": weight("int8"), "b": weight("int8:tensor"), "c": weight("int4"), "d": jnp.ones(3)}
    found = quantize_activations(tree, input_scales={"a": jnp.float32(0.1)}, input_zeros={"a": jnp.float32(2)})
    assert found["a"].input_scale == 0.1 and found["a"].input_zero == 2 and found["b"].input_scale is None
    assert found["c"] is tree["c"] and found["d"] is tree["d"] and isinstance(tree["a"], QuantizedArray)
    assert repr(found["a"]).endswith("int8 inputs, static)") and repr(found["b"]).endswith("int8 inputs, dynamic)")
    some = quantize_activations(tree, where=lambda path, w: path == "b")
    assert isinstance(some["a"], QuantizedArray) and isinstance(some["b"], ActivationQuantized)
    with pytest.raises(QuantizationError) as error:
        quantize_activations(tree, where=lambda path, w: True, input_scales={"z": 1.0})
    assert "c: QuantizedArray(int4:g32" in str(error.value) and "the weight must be int8" in str(error.value)
    assert "input scale 'z' is no path of the tree" in str(error.value)
    with pytest.raises(QuantizationError, match="no packed weight of the tree goes with inputs of 'fp8_e4m3'"):
        quantize_activations({"a": tree["a"]}, "fp8_e4m3")


def test_what_does_not_go_together_is_named():
    scale = jnp.float32(0.1)
    cases = [
        (weight("int8:g32"), "int8", {}, "must not change along K: write int8:channel or int8:tensor"),
        (weight("fp8_e4m3:128x128"), "fp8_e4m3", {}, "must not change along K: write fp8_e4m3:channel"),
        (weight("int4"), "int8", {}, "the weight must be int8; quantize it so first"),
        (weight("int8"), "fp8_e5m2", {}, "the weight must be fp8_e4m3 or fp8_e5m2"),
        (weight("int8"), "int4", {}, "inputs must be one of int8, fp8_e4m3"),
        (weight("fp8_e4m3"), "fp8_e4m3", {"asymmetric": True}, "asymmetric is for dynamic int8 inputs"),
        (weight("int8"), "int8", {"input_zero": scale}, "an input_zero goes with int8 inputs and a calibrated"),
        (weight("mxfp8_e4m3"), "mxfp8_e4m3", {"input_scale": scale}, "MX inputs have a scale for each 32"),
    ]
    for w, kind, options, message in cases:
        with pytest.raises(QuantizationError, match=message):
            ActivationQuantized(w, kind, **options)
    wrapped = ActivationQuantized(weight("int8"))
    with pytest.raises(
        ImplementationError, match=r"'native' is not known for .*; choose from codes, dequantize or None"
    ):
        linear(jnp.ones((1, K)), wrapped, implementation="native")
    with pytest.raises(ImplementationError, match=r"x float32\[1, 7\] does not fit ActivationQuantized"):
        linear(jnp.ones((1, 7)), wrapped)
    with pytest.raises(ImplementationError, match="its scales belong to the axis that is summed over"):
        linear(jnp.ones((1, N)), wrapped.T, implementation="codes")
