"""Gradients of the layers that families add, against finite differences in float64; jit, vmap, remat, eval_shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_vjp

from trustcore.nn import (
    MLP,
    Attention,
    Conv1d,
    DepthwiseConv,
    Experts,
    ExpertsConfig,
    GroupNorm,
    LatentAttention,
    LatentConfig,
    LayerNorm,
)
from trustcore.ops.rope import RopeConfig, angles

B, T, D = 2, 5, 8
QUICK = {"xla_backend_optimization_level": 0}  # the time of these tests is that of compiling
ROPE = RopeConfig(4, theta=100.0)


def attention(**options):
    return lambda made: Attention(D, 4, 2, 6, rope=ROPE, **options, **made)


def latent(**options):
    return lambda made: LatentAttention(D, 3, LatentConfig(6, 4, 5, **options), rope=ROPE, bias=True, **made)


def experts(**options):
    return lambda made: Experts(D, ExpertsConfig(6, 2, 7, **options), **made)


LAYERS = {
    "layer norm": lambda made: LayerNorm(D, **made),
    "layer norm of heads": lambda made: LayerNorm(4, groups=2, **made),
    "gelu mlp": lambda made: MLP(D, 7, activation="gelu_tanh", **made),
    "geglu": lambda made: MLP(D, 7, activation="gelu", gated=True, **made),
    "qk norm of heads, sinks": attention(qk_norm="head", sinks=True),
    "qk norm of all, soft cap, window": attention(qk_norm="whole", soft_cap=2.0, window=3),
    "qk norm of each, alibi": attention(qk_norm="each", alibi=1.0),
    "latent": latent(),
    "latent queries": latent(query_rank=6),
    "experts": experts(normalize=True, shared=5, shared_gate=True),
    "experts by sigmoid in groups": experts(
        scoring="sigmoid", selection_bias=True, groups=3, active_groups=2, group_score="top2", scale=1.5
    ),
    "group norm": lambda made: GroupNorm(D, 2, **made),
    "grouped convolution": lambda made: Conv1d(D, 6, 3, groups=2, stride=2, **made),
    "causal depthwise convolution": lambda made: DepthwiseConv(D, (3,), multiplier=2, padding="CAUSAL", **made),
    "experts with biases": experts(scoring="chosen", router_bias=True, bias=True, clip=(7.0, 1.702)),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def made(name):
    """Returns a function of (parameters, x), the parameters with no number left at zero or one, and x."""
    layer = LAYERS[name]({"dtype": jnp.float64, "rngs": nnx.Rngs(0)})
    leaves, structure = jax.tree.flatten(layer)
    rng = np.random.default_rng(1)
    leaves = [jnp.asarray(np.asarray(leaf) + 0.3 * rng.standard_normal(leaf.shape), jnp.float64) for leaf in leaves]
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))

    def call(leaves, x):
        layer = jax.tree.unflatten(structure, leaves)
        if isinstance(layer, Attention | LatentAttention):
            return layer(x, angles(positions, ROPE), positions)[0]
        return layer(x.reshape(B, T, 2, 4)) if name == "layer norm of heads" else layer(x)

    return call, leaves, jnp.asarray(rng.standard_normal((B, T, D)))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_finite_differences(name):
    call, leaves, x = made(name)
    weight = jnp.asarray(np.random.default_rng(2).standard_normal(jax.eval_shape(call, leaves, x).shape))

    def total(leaves, x):
        return jnp.sum(call(leaves, x) * weight)

    # At level 0 the XLA of jax 0.10 makes the exponential of -1e30 a NaN where scores have slopes.
    options = None if "alibi" in name else QUICK
    run = jax.jit(total, compiler_options=options)
    both = jax.jit(jax.value_and_grad(total, (0, 1)), compiler_options=options)

    def backward(*args):
        value, gradients = both(*args)
        return value, lambda cotangent: jax.tree.map(lambda g: cotangent * g, gradients)

    # Angles and slopes are float32, which is exact enough: they are constants of the function.
    check_vjp(run, backward, (leaves, x), atol=1e-6, rtol=1e-6)
    moved = [bool(jnp.any(g != 0)) for g in both(leaves, x)[1][0]]
    assert sum(moved) >= len(moved) - (name == "experts by sigmoid in groups")  # its bias counts for the choice alone


@pytest.mark.parametrize("name", ("qk norm of heads, sinks", "latent queries", "experts"))
def test_layers_are_functions_that_jax_transforms(name):
    call, leaves, x = made(name)
    run = jax.jit(call, compiler_options=QUICK)
    expected = run(leaves, x)
    assert jax.eval_shape(call, leaves, x).shape == expected.shape

    @functools.partial(jax.jit, compiler_options=QUICK)
    def transformed(leaves, x, both):
        gradients = [jax.grad(lambda x, f=f: jnp.sum(f(leaves, x) ** 2))(x) for f in (call, jax.checkpoint(call))]
        _, scanned = jax.lax.scan(lambda carry, x: (carry, call(leaves, x)), 0, both)
        return jax.vmap(call, (None, 0))(leaves, both), scanned, gradients

    both = jnp.stack([x, 2 * x])
    mapped, scanned, (plain, again) = transformed(leaves, x, both)
    for found in (mapped, scanned):
        np.testing.assert_allclose(found[0], expected, atol=1e-9)
        np.testing.assert_allclose(found[1], run(leaves, 2 * x), atol=1e-9)
    np.testing.assert_allclose(plain, again, atol=1e-9)
