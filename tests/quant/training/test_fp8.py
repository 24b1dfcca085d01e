"""Products in 8-bit floats against NumPy with ml_dtypes: codes, scales, histories, gradients, counters."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trustcore.errors import ImplementationError, QuantizationError
from trustcore.ops.linear import linear
from trustcore.quant import QuantizedArray
from trustcore.quant.training import (
    BlockScaling,
    CurrentScaling,
    DelayedScaling,
    Fp8Weight,
    convert,
    fp8_dot,
    fp8_join,
    fp8_prepare,
    fp8_value_and_grad,
)
from trustcore.quant.training.fp8 import E4M3, E5M2, Fp8State, amax_scale, measure, started, to_float8, updated

LARGEST = {E4M3: np.float32(448), E5M2: np.float32(57344)}
M, K, N = 12, 160, 136


def some(*shape, seed=0, size=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


def codes(x, scale, dtype):
    """The oracle: float8 numbers as float64."""
    scaled = np.clip(np.float32(x) * np.float32(scale), -LARGEST[dtype], LARGEST[dtype])
    return scaled.astype(dtype).astype(np.float64)


@pytest.mark.parametrize("dtype", (E4M3, E5M2))
def test_every_code_and_every_tie_rounds_as_ml_dtypes_does(dtype):
    numbers = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    numbers = np.sort(numbers[np.isfinite(numbers)])
    halves = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate(
        [numbers, halves, np.nextafter(halves, np.inf), np.nextafter(halves, -np.inf), [1e9, -1e9, 1e-9]]
    )
    x = x.astype(np.float32)
    found = jax.jit(lambda x: to_float8(x, jnp.float32(1), dtype))(x)
    expected = np.clip(x, -LARGEST[dtype], LARGEST[dtype]).astype(dtype)
    np.testing.assert_array_equal(np.asarray(found).view(np.uint8), expected.view(np.uint8))


class TransformerEngine:
    """Delayed scaling in NumPy, step by step as its documentation and kernel have it: one tensor."""

    def __init__(self, recipe, largest):
        self.recipe, self.largest = recipe, np.float32(largest)
        self.history, self.scale, self.step = np.zeros(recipe.history, np.float32), np.float32(1), 0

    def update(self, amax):
        self.history[0] = amax
        chosen = np.fmax.reduce(self.history) if self.recipe.algorithm == "max" else self.history[0]
        self.history = np.roll(self.history, -1)
        self.history[0] = 0
        self.step += 1
        if self.step % self.recipe.interval == 0 and chosen > 0 and np.isfinite(chosen):
            with np.errstate(over="ignore"):
                scale = np.float32(self.largest / chosen) / np.float32(2.0**self.recipe.margin)
            self.scale = scale if np.isfinite(scale) else np.finfo(np.float32).max


@settings(max_examples=6, deadline=None)
@given(
    amaxes=st.lists(st.sampled_from((0.0, 1e-40, 0.3, 1.0, 7.5, 1e4, float("inf"), float("nan"))), max_size=12),
    history=st.sampled_from((1, 2, 5)),
    interval=st.sampled_from((1, 3)),
    margin=st.sampled_from((0, 2)),
    algorithm=st.sampled_from(("max", "most_recent")),
)
def test_scales_and_histories_are_those_of_transformer_engine(amaxes, history, interval, margin, algorithm):
    recipe = DelayedScaling(margin, interval, history, algorithm)
    oracles = [TransformerEngine(recipe, top) for top in (448, 448, 57344)]
    state = started(jnp.ones((4, 4)) * 448, recipe)
    for step, seen in enumerate(amaxes):
        amax = 0.0 if seen < 1e-38 else seen  # XLA takes subnormal numbers for zero on the CPU
        state = updated(state, jnp.full((3, 3), amax).at[:, 1:].set(step), recipe)
        for i, oracle in enumerate(oracles):
            oracle.scale = np.float32(2.0**-margin) if step == 0 and i == 1 else oracle.scale
            oracle.update(np.float32(amax))
            np.testing.assert_array_equal(state.history[i], oracle.history)
            np.testing.assert_allclose(state.scale[i], oracle.scale, rtol=3e-7)
        assert state.step == step + 1 and state.overflow.tolist() == [step * (step + 1) // 2] * 3


def test_counters_stay_at_the_largest():
    recipe = DelayedScaling(history=2)
    state = started(jnp.ones((2, 2)), recipe)._replace(overflow=jnp.full((3,), 2**31 - 5, jnp.int32))
    state = updated(state, jnp.full((3, 3), 1e12), recipe)
    assert state.overflow.tolist() == [2**31 - 1] * 3 and state.underflow.tolist() == [2**30] * 3


def test_what_is_measured():
    x = jnp.asarray([0.0, 1e-6, 2.0, -500.0, 448.0, 1.0])
    np.testing.assert_array_equal(measure(x, jnp.float32(1), E4M3), [500, 1, 1])
    np.testing.assert_array_equal(measure(x, jnp.float32(2), E4M3), [500, 2, 1])
    np.testing.assert_array_equal(measure(x, jnp.float32(1), E5M2), [500, 0, 1])


def state_of(scales, recipe):
    return started(jnp.ones((2, 2)), recipe)._replace(scale=jnp.asarray(scales, jnp.float32))


@pytest.mark.parametrize("hybrid", (True, False))
@pytest.mark.parametrize("kind", ("delayed", "current"))
def test_forward_and_gradients_against_numpy(kind, hybrid):
    x, w, g = some(M, K), some(K, N, seed=1, size=0.05), some(M, N, seed=2, size=1e-3)
    x[0, :3] = 0, 1e-9, 400  # nothing, underflow, overflow
    grad_type = E5M2 if hybrid else E4M3
    if kind == "delayed":
        recipe = DelayedScaling(history=4, hybrid=hybrid)
        scales = [2.0, 1000.0, 3e5 if hybrid else 1e5]
        state = state_of(scales, recipe)
    else:
        recipe, state = CurrentScaling(margin=1, hybrid=hybrid), None
        tops = (LARGEST[E4M3], LARGEST[E4M3], LARGEST[grad_type])
        scales = [top / np.abs(a).max() / np.float32(2) for top, a in zip(tops, (x, w, g), strict=True)]

    @jax.jit
    def run(x, w, state):
        y, pull = jax.vjp(lambda x, w, s: fp8_dot(x, w, s, recipe=recipe), x, w, state)
        return y, pull(jnp.asarray(g))

    y, (dx, dw, ds) = run(x, w, state)
    xq, wq, gq = (codes(a, s, d) for a, s, d in zip((x, w, g), scales, (E4M3, E4M3, grad_type), strict=True))
    sx, sw, sg = (np.float64(s) for s in scales)
    for found, expected in ((y, xq @ wq / (sx * sw)), (dx, gq @ wq.T / (sg * sw)), (dw, xq.T @ gq / (sx * sg))):
        assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()
    # Straight through: near the float gradients, though each factor has 3 bits (the gradient 2).
    assert np.corrcoef(dx.ravel(), (g @ w.T).ravel())[0, 1] > 0.99
    if kind == "delayed":
        tensors, types = (x, w, g), (E4M3, E4M3, grad_type)
        for row, a, s, d in zip(ds.measured, tensors, scales, types, strict=True):
            over = (np.abs(a) * np.float32(s) > LARGEST[d]).sum()
            under = ((codes(a, s, d) == 0) & (a != 0)).sum()
            np.testing.assert_array_equal(row, np.float32([np.abs(a).max(), over, under]))
        assert ds.measured[0, 1] > 0 and ds.measured[0, 2] > 0
        assert all((leaf == 0).all() for leaf in (ds.history, ds.scale))
        assert ds.step.dtype == jax.dtypes.float0


def blocks_of(a, size, axis):
    """Largest magnitudes of runs along an axis, written out to the shape of a."""
    tops = np.abs(a).astype(np.float32)
    for i in range(0, a.shape[axis], size):
        run = [slice(None)] * 2
        run[axis] = slice(i, i + size)
        tops[tuple(run)] = tops[tuple(run)].max(axis, keepdims=True)
    return tops


@pytest.mark.parametrize("powers", (True, False))
def test_block_scaling_against_numpy(powers):
    x, w, g = some(M, K), some(K, N, seed=1, size=0.05), some(M, N, seed=2, size=1e-3)
    x[:, :128] *= 1e4  # a scale for all of x would flush the rest
    x[3] = 0

    def decoded(a, tops):
        scale = LARGEST[E4M3] / np.where(tops > 0, tops, 448)
        scale = np.float32(2.0 ** np.floor(np.log2(scale))) if powers else np.float32(scale)
        return codes(a, scale, E4M3) / np.float64(scale)

    y, pull = jax.jit(lambda x, w: jax.vjp(lambda *a: fp8_dot(*a, recipe=BlockScaling(powers)), x, w))(x, w)
    dx, dw = pull(jnp.asarray(g))
    wq = decoded(w, blocks_of(blocks_of(w, 128, 0), 128, 1))
    expected = (
        decoded(x, blocks_of(x, 128, 1)) @ wq,
        decoded(g, blocks_of(g, 128, 1)) @ wq.T,
        decoded(x.T, blocks_of(x.T, 128, 1)) @ decoded(g, blocks_of(g, 128, 0)),
    )
    for found, right in zip((y, dx, dw), expected, strict=True):
        assert np.abs(found - right).max() <= 2e-6 * np.abs(right).max()


@pytest.mark.parametrize("recipe", (DelayedScaling(history=2), CurrentScaling(), BlockScaling()), ids=repr)
def test_the_products_of_the_program_take_float8(recipe):
    state = started(jnp.ones((K, N)), recipe) if isinstance(recipe, DelayedScaling) else None

    def loss(x, w, state):
        return jnp.sum(fp8_dot(x, w, state, recipe=recipe) ** 2)

    both = jax.jit(jax.grad(loss, (0, 1)))
    text = both.lower(jnp.ones((M, K)), jnp.ones((K, N)), state).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    grad = "f8E4M3FN" if isinstance(recipe, BlockScaling) else "f8E5M2"
    assert len(dots) == 3
    assert all(line.count("xf8E4M3FN>") + line.count("xf8E5M2>") == 2 and "xf32>" in line for line in dots)
    assert sum(f"x{grad}>" in line for line in dots) >= 2


def test_amax_scales():
    tops = jnp.asarray([0.0, 448.0, 1.0, 3.0, jnp.inf, 1e-37])
    largest = np.finfo(np.float32).max
    np.testing.assert_allclose(amax_scale(tops, E4M3), [1, 1, 448, 448 / 3, 1, largest], rtol=1e-6)
    np.testing.assert_allclose(amax_scale(tops, E4M3, 1)[1:3], [0.5, 224], rtol=1e-6)
    assert amax_scale(tops, E4M3, powers=True).tolist()[:4] == [1, 1, 256, 128]


def model(seed=0):
    return {"up": jnp.asarray(some(K, 64, seed=seed) / 8), "norm": jnp.ones(K), "down": jnp.asarray(some(64, N) / 4)}


def apply(tree, x):
    return linear(jax.nn.relu(linear(x * tree["norm"][None], tree["up"])), tree["down"])


def test_a_step_brings_the_next_scales_along():
    recipe = DelayedScaling(history=3)
    parameters, states = fp8_prepare(model(), recipe)
    assert sorted(states) == ["down", "up"] and isinstance(parameters["up"], Fp8Weight)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(parameters))
    x = jnp.asarray(some(M, K, seed=5))
    step = jax.jit(fp8_value_and_grad(lambda tree, x: jnp.mean(apply(tree, x) ** 2)))
    value, gradients, states = step(parameters, states, x)
    assert jax.tree.structure(gradients) == jax.tree.structure(parameters) and value > 0
    up = states["up"]
    assert up.step == 1 and (up.measured == 0).all()
    np.testing.assert_allclose(up.history[:2, -1], [np.abs(x).max(), np.abs(parameters["up"].values).max()])
    np.testing.assert_allclose(up.scale[0], 448 / np.abs(x).max(), rtol=1e-6)
    near = apply(fp8_join(parameters, states), x)
    exact = apply(model(), x)
    assert 0 < jnp.sqrt(jnp.mean((near - exact) ** 2)) < 0.06 * jnp.std(exact)
    for _ in range(3):
        value, gradients, states = step(parameters, states, x)
    assert (states["up"].history[:, 1:] > 0).all()  # all slots but the one that is being written


@pytest.mark.parametrize("recipe", (DelayedScaling(history=2), CurrentScaling(margin=1), BlockScaling()), ids=repr)
def test_packed_weights_are_the_codes_of_the_products(recipe):
    parameters, states = fp8_prepare(model(), recipe)
    joined = fp8_join(parameters, states)
    packed = convert(joined)
    assert isinstance(packed["up"], QuantizedArray) and packed["up"].format == "fp8_e4m3"
    eye = jnp.eye(K)
    np.testing.assert_allclose(linear(eye, joined["up"]), packed["up"].dequantize(), rtol=1e-6)
    error = np.abs(packed["up"].dequantize() - parameters["up"].values)
    assert (error <= np.abs(parameters["up"].values) / 16 + 1e-3).all()


def test_two_uses_in_a_step_count_twice_and_bound_the_amax():
    recipe = DelayedScaling(history=2)
    x, w = jnp.asarray(some(4, 8)), jnp.asarray(some(8, 8, seed=1))
    state = started(w, recipe)
    twice = jax.grad(lambda s: jnp.sum(fp8_dot(fp8_dot(x, w, s, recipe=recipe), w, s, recipe=recipe)), allow_int=True)
    measured = twice(state).measured
    np.testing.assert_allclose(measured[1, 0], 2 * np.abs(w).max(), rtol=1e-6)


def test_half_precision_and_leading_axes():
    x, w = jnp.asarray(some(2, 3, 8)).astype(jnp.bfloat16), jnp.asarray(some(8, 4))
    y, pull = jax.vjp(lambda x, w: fp8_dot(x, w, recipe=CurrentScaling()), x, w)
    dx, dw = pull(jnp.ones_like(y))
    assert y.shape == (2, 3, 4) and y.dtype == dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    (
        (lambda: DelayedScaling(algorithm="last"), QuantizationError, "algorithm is 'last'; choose from max, most_rec"),
        (lambda: DelayedScaling(history=0), QuantizationError, "history is 0 and interval 1; both must be at least 1"),
        (
            lambda: fp8_dot(jnp.ones((2, 3)), jnp.ones((4, 3)), recipe=CurrentScaling()),
            QuantizationError,
            r"x \[2, 3\] and w \[4, 3\] do not fit",
        ),
        (
            lambda: fp8_dot(jnp.ones((2, 3)), jnp.ones((3, 3)), recipe=DelayedScaling()),
            QuantizationError,
            "DelayedScaling needs a state",
        ),
        (lambda: fp8_prepare({"b": jnp.ones(3)}, CurrentScaling()), QuantizationError, "`where` selects no leaf"),
        (
            lambda: fp8_prepare({"b": jnp.ones(3)}, CurrentScaling(), where=lambda *_: True),
            QuantizationError,
            "b: it is no float matrix",
        ),
        (lambda: convert(fp8_prepare(model(), DelayedScaling())[0]), QuantizationError, "call fp8_join first"),
        (
            lambda: linear(jnp.ones((1, K)), Fp8Weight(jnp.ones((K, N)), None, CurrentScaling()), implementation="x"),
            ImplementationError,
            "'x' was asked for, but the product is one of float8 operands",
        ),
    ),
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_state_is_a_pytree_of_arrays():
    state = started(jnp.ones((4, 4)), DelayedScaling(history=7))
    assert isinstance(state, Fp8State) and state.history.shape == (3, 7)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert ml_dtypes.finfo(E4M3).max == 448 and ml_dtypes.finfo(E5M2).max == 57344
