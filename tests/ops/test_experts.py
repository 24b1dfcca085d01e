"""Routing and ragged products against loops over rows and experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustcore.errors import ModelError
from trustcore.nn import ExpertsConfig
from trustcore.ops.activate import clipped_swiglu
from trustcore.ops.experts import by_expert, grouped_linear, route
from trustcore.quant import QuantizedArray

R, E = 7, 6


def logits(seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((R, E)), jnp.float32)


def test_shares_of_the_best():
    x = logits()
    soft = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    experts, shares = route(x, active=2, scale=3.0)
    for row in range(R):
        best = np.argsort(-soft[row])[:2]
        assert experts[row].tolist() == best.tolist()
        np.testing.assert_allclose(shares[row], 3 * soft[row, best], rtol=1e-5)
    _, normal = route(x, active=2, normalize=True)
    np.testing.assert_allclose(normal.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(normal, route(x, active=2, scoring="chosen")[1], rtol=1e-5)  # the same by algebra


@pytest.mark.parametrize("score", ("max", "top2"))
def test_a_bias_and_groups_count_for_the_choice_alone(score):
    x, bias = logits(1), jnp.linspace(-1, 1, E)
    experts, shares = route(
        x, active=2, scoring="sigmoid", selection_bias=bias, groups=3, active_groups=1, group_score=score
    )
    sigmoid = 1 / (1 + np.exp(-np.asarray(x)))
    for row in range(R):
        ranked = (sigmoid[row] + np.asarray(bias)).reshape(3, 2)
        group = np.argmax(ranked.max(1) if score == "max" else ranked.sum(1))
        assert set(experts[row].tolist()) == {2 * group, 2 * group + 1}
        np.testing.assert_allclose(shares[row], sigmoid[row, experts[row]], rtol=1e-5)


@pytest.mark.parametrize("packed", (False, True))
def test_rows_are_multiplied_by_their_experts_kernel(packed):
    """One expert has all rows but one, some have none."""
    rng = np.random.default_rng(2)
    chosen = jnp.asarray([[2], [2], [2], [2], [2], [2], [4]])
    x, w = rng.standard_normal((R, 32)), rng.standard_normal((E, 32, 5))
    weight = QuantizedArray.quantize(jnp.asarray(w, jnp.float32), "q8_0") if packed else jnp.asarray(w, jnp.float32)
    w = np.asarray(weight.dequantize()) if packed else w
    order, sizes = by_expert(chosen, E)
    assert sizes.tolist() == [0, 0, 6, 0, 1, 0]
    found = grouped_linear(jnp.asarray(x, jnp.float32)[order], weight, sizes)
    expected = np.stack([x[r] @ w[int(chosen[r, 0])] for r in np.asarray(order)])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("rows", (1, 3, 40, 300))
def test_a_packed_stack_is_multiplied_piece_by_piece(rows):
    """Products, and gradients, of few and of many rows: as of the decoded stack, which is never made."""
    rng = np.random.default_rng(4)
    w = QuantizedArray.quantize(jnp.asarray(rng.standard_normal((E, 64, 48)), jnp.float32), "q8_0")
    chosen = jnp.asarray(rng.choice(4, (rows, 1)) ** 2 % E)  # some experts have no row
    order, sizes = by_expert(chosen, E)
    x, g = (jnp.asarray(rng.standard_normal((rows, n)), jnp.float32) for n in (64, 48))

    def packed(x, w):
        return jnp.sum(grouped_linear(x, w, sizes) * g)

    def plain(x, w):
        return jnp.sum(jnp.einsum("rk,rkn->rn", x, w.dequantize()[chosen[order, 0]]) * g)

    found, expected = (jax.jit(jax.value_and_grad(f, (0, 1), allow_int=True))(x, w) for f in (packed, plain))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found[1][0], expected[1][0], atol=2e-4)
    scales = [np.asarray(gradient[1].fields["scale"], np.float32) for gradient in (found[1], expected[1])]
    np.testing.assert_allclose(*scales, atol=2e-3 * np.abs(scales[1]).max())  # they are half-precision numbers
    compiled = jax.jit(grouped_linear).lower(x, w, sizes).compile()
    if rows < 40:
        assert compiled.memory_analysis().temp_size_in_bytes < w.size * 4


def test_a_packed_stack_under_vmap():
    rng = np.random.default_rng(5)
    w = QuantizedArray.quantize(jnp.asarray(rng.standard_normal((E, 32, 5)), jnp.float32), "q8_0")
    x = jnp.asarray(rng.standard_normal((2, 3, 32)), jnp.float32)
    chosen = jnp.asarray([[0, 2, 5], [1, 1, 4]])
    sizes = jnp.asarray([by_expert(row[:, None], E)[1] for row in chosen])
    found = jax.vmap(grouped_linear, (0, None, 0))(x, w, sizes)
    np.testing.assert_allclose(found, jnp.einsum("brk,brkn->brn", x, w.dequantize()[chosen]), atol=1e-4)


def test_second_gradients_of_a_ragged_product():
    rng = np.random.default_rng(3)
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((4, 3), (2, 3, 5)))
    sizes, experts = jnp.asarray([1, 3], jnp.int32), jnp.asarray([0, 1, 1, 1])

    def ragged(x, w):
        return jnp.sum(jnp.sin(grouped_linear(x, w, sizes)))

    def dense(x, w):
        return jnp.sum(jnp.sin(jnp.einsum("rk,rkn->rn", x, w[experts])))

    for order in (
        lambda f: jax.grad(f, (0, 1)),
        lambda f: jax.grad(lambda x, w: jnp.sum(jax.grad(f)(x, w) ** 2), (0, 1)),
    ):
        for found, expected in zip(order(ragged)(x, w), order(dense)(x, w), strict=True):
            np.testing.assert_allclose(found, expected, atol=2e-5)


def test_clipped_swiglu():
    gate, up = jnp.asarray([9.0, -9.0, 0.5]), jnp.asarray([9.0, -9.0, 0.5])
    clipped = np.array([7.0, -9.0, 0.5])
    expected = clipped / (1 + np.exp(-1.7 * clipped)) * (np.array([7.0, -7.0, 0.5]) + 1)
    np.testing.assert_allclose(clipped_swiglu(gate, up, limit=7.0, alpha=1.7), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 7}, "7 of 6 are active; at least one, and no more than all"),
        ({"hidden": 0}, "hidden sizes 0 and 0"),
        ({"groups": 4}, "1 of 4 groups of 6 experts; groups must divide the experts"),
        ({"groups": 3, "active": 3}, "3 active ones do not fit 1 groups"),
        ({"groups": 6, "active": 1, "group_score": "top2"}, "scored by their best two, and have one each"),
    ],
)
def test_what_no_layer_of_experts_can_be(options, message):
    with pytest.raises(ModelError, match=message):
        ExpertsConfig(**{"count": 6, "active": 2, "hidden": 8, **options})
