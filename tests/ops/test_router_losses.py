"""Losses of routers against transformers' and against their definitions; losses that are attached."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trustcore.nn import Experts, ExpertsConfig
from trustcore.ops.router_losses import attach_loss, balance, load_balancing_loss, router_z_loss


@pytest.fixture(scope="module")
def recorded():
    with np.load(Path(__file__).parents[1] / "data" / "layers.npz") as file:
        return {key.removeprefix("router/"): file[key] for key in file.files if key.startswith("router/")}


@pytest.mark.parametrize("name", ("balance", "masked"))
def test_balance_is_that_of_transformers(name, recorded):
    logits = [jnp.asarray(layer) for layer in recorded["logits"]]
    mask = jnp.asarray(recorded["mask"].reshape(-1), bool) if name == "masked" else None
    value, gradients = jax.value_and_grad(lambda x: load_balancing_loss(x, active=2, mask=mask))(logits)
    np.testing.assert_allclose(value, recorded[name], rtol=1e-5)
    np.testing.assert_allclose(jnp.stack(gradients), recorded[f"{name}_gradient"], atol=1e-7)


def test_z_loss_is_that_of_transformers(recorded):
    logits = jnp.asarray(recorded["logits"][0])
    np.testing.assert_allclose(router_z_loss(logits), recorded["z"], rtol=1e-5)
    np.testing.assert_allclose(router_z_loss(logits, mask=jnp.arange(14) < 5), router_z_loss(logits[:5]), rtol=1e-5)


def test_an_even_router_has_the_least_balance():
    even = jnp.full((12, 6), 1 / 6)
    turns = jnp.stack([jnp.arange(12) % 6, (jnp.arange(12) + 1) % 6], axis=1)
    np.testing.assert_allclose(balance(even, turns), 2, rtol=1e-6)
    np.testing.assert_allclose(balance(jnp.eye(6)[jnp.zeros(12, int)], jnp.zeros((12, 1), int)), 6, rtol=1e-6)


def test_an_attached_loss_adds_its_gradient():
    x = jnp.asarray([1.0, 2.0])

    def inner(x):
        return attach_loss(jnp.sin(x), 3 * jnp.sum(x**2))

    expected = jnp.cos(x) + 6 * x
    for run in (inner, jax.jit(inner), jax.checkpoint(inner)):
        np.testing.assert_allclose(jax.grad(lambda x, run=run: jnp.sum(run(x)))(x), expected, rtol=1e-6)
    np.testing.assert_array_equal(inner(x), jnp.sin(x))

    def scanned(x):
        return jnp.sum(jax.lax.scan(lambda carry, _: (attach_loss(carry, jnp.sum(carry)), None), x, length=3)[0])

    np.testing.assert_allclose(jax.grad(scanned)(x), [4, 4], rtol=1e-6)


@pytest.mark.parametrize("scoring", ("softmax", "sigmoid"))
def test_a_layer_attaches_its_losses(scoring):
    options = {"count": 5, "active": 2, "hidden": 6, "scoring": scoring, "normalize": True}
    layer = Experts(8, ExpertsConfig(**options, balance_loss=0.3, z_loss=0.1), rngs=nnx.Rngs(0))
    plain = Experts(8, ExpertsConfig(**options), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 8)), jnp.float32)

    def by_hand(layer, x):
        logits = layer.router(x).reshape(-1, 5)
        scores = jax.nn.sigmoid(logits) if scoring == "sigmoid" else jnp.exp(logits)
        scores = scores / jnp.sum(scores, axis=-1, keepdims=True)
        more = 0.3 * balance(scores, jax.lax.top_k(scores, 2)[1])
        return jnp.sum(jnp.sin(layer(x))) + more + 0.1 * jnp.mean(jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) ** 2)

    found = jax.jit(jax.grad(lambda layer, x: jnp.sum(jnp.sin(layer(x))), (0, 1)))(layer, x)
    expected = jax.jit(jax.grad(by_hand, (0, 1)))(plain, x)
    without = jax.jit(jax.grad(lambda layer, x: jnp.sum(jnp.sin(layer(x))), (0, 1)))(plain, x)
    np.testing.assert_array_equal(layer(x), plain(x))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.max(np.abs(found[0].router.kernel.get_value() - without[0].router.kernel.get_value())) > 1e-3
