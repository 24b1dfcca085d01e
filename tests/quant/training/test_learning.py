"""What training in few bits is for: losses after training, side by side, on one small task.

A network of two hidden layers learns what a smaller random one computes, in float32 and then in few bits. Losses
measured (jax 0.10.2, CPU), quantized afterwards, trained with fixed scales, trained with LSQ:

    int4  0.099 0.0264 0.0228        int3  0.478 0.055 0.027        int2  2.2 0.37 0.048
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trustcore.ops.linear import linear
from trustcore.quant.training import (
    BlockScaling,
    CurrentScaling,
    DelayedScaling,
    convert,
    fp8_prepare,
    fp8_value_and_grad,
    kinds,
    prepare,
)

STEPS, WIDTH, TEACHER = 800, 64, 16


def network(seed, width=WIDTH):
    sizes = (8, width, width, 4)
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = zip(keys, sizes, sizes[1:], strict=False)
    return {f"layer{i}": jax.random.normal(key, (k, n)) * (2 / k) ** 0.5 for i, (key, k, n) in enumerate(shapes)}


def apply(tree, x):
    for i in range(3):
        x = linear(x if i == 0 else jax.nn.gelu(x), tree[f"layer{i}"])
    return x


@pytest.fixture(scope="module")
def batches():
    x = jax.random.normal(jax.random.key(7), (STEPS, 128, 8))
    return x, jax.jit(apply)(network(1, TEACHER), x)


def loss_of(tree, x, y):
    return jnp.mean((apply(tree, x) - y) ** 2)


@jax.jit
def trained(tree, x, y):
    """Returns the tree after one pass over the batches, and the loss of each."""
    words = kinds(tree)
    rates = {"weight": optax.cosine_decay_schedule(3e-3, STEPS), "scale": optax.cosine_decay_schedule(3e-3, STEPS)}
    parts = {name: optax.adam(rate) for name, rate in rates.items()}
    optimizer = optax.multi_transform({**parts, "fixed": optax.set_to_zero()}, words)

    def step(carry, batch):
        tree, state = carry
        loss, gradients = jax.value_and_grad(loss_of)(tree, *batch)
        updates, state = optimizer.update(gradients, state, tree)
        return (optax.apply_updates(tree, updates), state), loss

    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        (tree, _), losses = jax.lax.scan(step, (tree, optimizer.init(tree)), (x, y))
    return tree, losses


@pytest.fixture(scope="module")
def full(batches):
    return trained(network(0), *batches)


@pytest.mark.parametrize(("bits", "gain"), ((4, 1.0), (3, 0.7), pytest.param(2, 0.4, marks=pytest.mark.slow)))
def test_qat_beats_quantizing_afterwards_and_lsq_beats_fixed_scales(bits, gain, full, batches):
    """Loss on the last batches, from the float32 student on."""
    tree, _ = full
    x, y = (part[-20:].reshape(-1, part.shape[-1]) for part in batches)
    format = f"int{bits}:tensor"
    loss = jax.jit(loss_of)
    losses = {"float32": loss(tree, x, y)}
    for method in ("ste", "lsq"):
        made = prepare(tree, format, method=method)
        if method == "ste":
            losses["afterwards"] = loss(made, x, y)
        tuned, _ = trained(made, *batches)
        losses[method] = loss(tuned, x, y)
        packed = convert(tuned)
        np.testing.assert_allclose(loss(packed, x, y), losses[method], rtol=1e-2)
    assert losses["ste"] < 0.5 * losses["afterwards"]
    assert losses["lsq"] < gain * losses["ste"]


@pytest.mark.parametrize(
    "recipe",
    (DelayedScaling(history=16), CurrentScaling(), pytest.param(BlockScaling(), marks=pytest.mark.slow)),
    ids=repr,
)
def test_training_in_fp8_follows_float32(recipe, full, batches):
    """Mean loss over windows of 50 steps: within 10% of float32's and 1% of the first window's.

    Measured at the end: delayed 8.6%, current 9.1%, blocks 8.3% above float32, which has 0.0375.
    """
    parameters, states = fp8_prepare(network(0), recipe)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))
    value_and_grad = fp8_value_and_grad(loss_of)

    @jax.jit
    def run(parameters, states, x, y):
        def step(carry, batch):
            parameters, states, state = carry
            with jax.numpy_dtype_promotion("strict"):
                loss, gradients, states = value_and_grad(parameters, states, *batch)
            updates, state = optimizer.update(gradients, state, parameters)
            return (optax.apply_updates(parameters, updates), states, state), loss

        with jax.numpy_dtype_promotion("standard"):
            return jax.lax.scan(step, (parameters, states, optimizer.init(parameters)), (x, y))

    (_, states, _), losses = run(parameters, states, *batches)
    ours, exact = (np.asarray(part).reshape(-1, 50).mean(1) for part in (losses, full[1]))
    assert exact[-1] < 0.1 * exact[0]
    assert (np.abs(ours - exact) <= 0.1 * exact + 0.01 * exact[0]).all()
    for state in states.values():
        assert state.step == STEPS and (state.history[:, 1:] > 0).all()
