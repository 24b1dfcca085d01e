"""Every layer: gradients against finite differences in float64; jit, vmap, scan, remat, eval_shape; abstract layers."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_vjp

import trustcore.nn
from trustcore.nn import (
    MLP,
    Attention,
    BatchNorm,
    Conv1d,
    Conv2d,
    DepthwiseConv,
    Dropout,
    Embedding,
    EncoderAttention,
    Experts,
    ExpertsConfig,
    GroupNorm,
    LatentAttention,
    LatentConfig,
    LayerNorm,
    Linear,
    Mamba,
    Mamba2,
    Recurrent,
    RelativeBias,
    RMSNorm,
    SeparableConv,
    ShelvedStack,
    SpatialDropout,
    Stack,
    SyncBatchNorm,
    run_blocks,
)
from trustcore.ops.rope import RopeConfig, angles

B, T, D = 2, 5, 8
QUICK = {"xla_backend_optimization_level": 0}  # the time of these tests is that of compiling
ROPE = RopeConfig(4, theta=100.0)
ROWS, IMAGES = (B, T, D), (B, 4, 3, D)
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
SEEN = np.random.default_rng(4).random((B, 1, T, T)) < 0.6
MEMORY = np.random.default_rng(5).standard_normal((B, T, 3))
TOKENS = np.array([[3, 1, 0, 6, 2], [6, 6, 5, 4, 0]], np.int32)


@dataclasses.dataclass
class Case:
    """A layer, how it is called, and the shape of its x.

    Attributes:
        make: keyword arguments (dtype, rngs) to the layer.
        call: (layer, x) to an array.
        shape: of x.
        unmoved: how many parameters the result does not depend on smoothly, or at all.
    """

    make: Callable[[dict[str, Any]], nnx.Module]
    call: Callable[[Any, jax.Array], jax.Array] = lambda layer, x: layer(x)
    shape: tuple[int, ...] = ROWS
    unmoved: int = 0


def decoder_attention(**options: Any) -> Case:
    return Case(lambda made: Attention(D, 4, 2, 6, rope=ROPE, **options, **made), turned)


def latent(**options: Any) -> Case:
    return Case(
        lambda made: LatentAttention(D, 3, LatentConfig(6, 4, 5, **options), rope=ROPE, bias=True, **made), turned
    )


def turned(layer: Any, x: jax.Array) -> jax.Array:
    positions = jnp.asarray(POSITIONS)
    return layer(x, angles(positions, ROPE), positions)[0]


def experts(unmoved: int = 0, **options: Any) -> Case:
    return Case(lambda made: Experts(D, ExpertsConfig(6, 2, 7, **options), **made), unmoved=unmoved)


def recurrent(**options: Any) -> Case:
    return Case(lambda made: Recurrent(D, 3, **options, **made))


CASES = {
    "linear": Case(lambda made: Linear(D, 6, bias=True, **made)),
    "embedding": Case(lambda made: Embedding(7, D, **made), lambda layer, x: layer(jnp.asarray(TOKENS)) * x),
    "layer norm": Case(lambda made: LayerNorm(D, **made)),
    "layer norm of heads": Case(
        lambda made: LayerNorm(4, groups=2, **made), lambda layer, x: layer(x.reshape(B, T, 2, 4))
    ),
    "rms norm": Case(lambda made: RMSNorm(D, **made)),
    "group norm": Case(lambda made: GroupNorm(D, 2, **made)),
    "batch norm": Case(lambda made: BatchNorm(D, **made)),
    "batch norm over an axis": Case(
        lambda made: SyncBatchNorm(D, "axis", **made),
        lambda layer, x: jax.vmap(lambda x: nnx.clone(layer)(x), axis_name="axis")(x),  # noqa: PLW0108
    ),
    "gelu mlp": Case(lambda made: MLP(D, 7, activation="gelu_tanh", **made)),
    "geglu": Case(lambda made: MLP(D, 7, activation="gelu", gated=True, **made)),
    "qk norm of heads, sinks": decoder_attention(qk_norm="head", sinks=True),
    "qk norm of all, soft cap, window": decoder_attention(qk_norm="whole", soft_cap=2.0, window=3),
    "qk norm of each, alibi": decoder_attention(qk_norm="each", alibi=1.0),
    "norm behind the turn, chunks": decoder_attention(qk_norm="turned", chunk=3),
    "temperature of queries": Case(
        lambda made: Attention(D, 4, 2, 6, rope=None, temperature=(2.0, 0.5), **made),
        lambda layer, x: layer(x, None, jnp.asarray(POSITIONS))[0],
    ),
    "latent": latent(),
    "latent queries": latent(query_rank=6),
    "self-attention of encoders": Case(
        lambda made: EncoderAttention(D, 2, 3, **made), lambda layer, x: layer(x, mask=jnp.asarray(SEEN))
    ),
    "cross-attention": Case(
        lambda made: EncoderAttention(D, 2, 3, memory_features=3, key_bias=False, **made),
        lambda layer, x: layer(x, jnp.asarray(MEMORY, x.dtype), mask=jnp.asarray(SEEN)),
    ),
    "relative bias": Case(
        lambda made: RelativeBias(2, buckets=8, distance=6, **made),
        lambda layer, x: layer(jnp.arange(4), jnp.arange(4)) * x,
        (1, 2, 4, 4),
    ),
    "experts": experts(normalize=True, shared=5, shared_gate=True),
    "experts by sigmoid in groups": experts(  # the bias of the choice counts for the choice alone
        1, scoring="sigmoid", selection_bias=True, groups=3, active_groups=2, group_score="top2", scale=1.5
    ),
    "experts with biases": experts(scoring="chosen", router_bias=True, bias=True, clip=(7.0, 1.702)),
    "mamba": Case(lambda made: Mamba(D, 6, state_size=3, rank=2, chunk=2, **made), lambda layer, x: layer(x)[0]),
    "mamba 2": Case(lambda made: Mamba2(D, 2, 3, state_size=4, chunk=2, **made), lambda layer, x: layer(x)[0]),
    "rnn": recurrent(cell="rnn"),
    "lstm both ways": Case(
        lambda made: Recurrent(D, 3, both=True, **made), lambda layer, x: layer(x, jnp.asarray([T, 3]))
    ),
    "gru both ways": recurrent(cell="gru", both=True),
    "grouped convolution": Case(lambda made: Conv1d(D, 6, 3, groups=2, stride=2, **made)),
    "convolution of images": Case(lambda made: Conv2d(D, 6, (3, 2), **made), shape=IMAGES),
    "causal depthwise convolution": Case(lambda made: DepthwiseConv(D, (3,), multiplier=2, padding="CAUSAL", **made)),
    "separable convolution": Case(lambda made: SeparableConv(D, 5, (3, 3), **made), shape=IMAGES),
    "dropout": Case(lambda made: Dropout(0.5, rngs=made.get("rngs") or nnx.Rngs(0))),
    "dropout of channels": Case(lambda made: SpatialDropout(0.5, places=1, rngs=made.get("rngs") or nnx.Rngs(0))),
    "stack": Case(
        lambda made: Stack([LayerNorm(D, **made) for _ in range(3)], remat=True),
        lambda layer, x: run_blocks(layer, lambda block, x, _: (jnp.sin(block(x)), None), x)[0],
    ),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def made(name: str) -> tuple[Callable[[Any, jax.Array], jax.Array], Any, jax.Array]:
    """Returns a function of (parameters, x), parameters drawn at random, and x."""
    case, rng = CASES[name], np.random.default_rng(1)
    graph, params, rest = nnx.split(case.make({"dtype": jnp.float64}), nnx.Param, ...)
    if jax.tree.leaves(rest):  # statistics, and keys
        rest = nnx.split(case.make({"dtype": jnp.float64, "rngs": nnx.Rngs(0)}), nnx.Param, ...)[2]
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape)), params)

    def call(params: Any, x: jax.Array) -> jax.Array:
        return case.call(nnx.merge(graph, params, rest, copy=True), x)

    return call, params, jnp.asarray(rng.standard_normal(case.shape))


def options(name: str) -> dict[str, Any] | None:
    # At level 0 the XLA of jax 0.10 makes the exponential of -1e30 a NaN where scores have slopes.
    return None if "alibi" in name else QUICK


def test_the_table_has_every_layer() -> None:
    layers = [value for name in trustcore.nn.__all__ if inspect.isclass(value := getattr(trustcore.nn, name))]
    expected = {layer for layer in layers if issubclass(layer, nnx.Module)}
    assert {type(case.make({})) for case in CASES.values()} == expected - {ShelvedStack}  # tests/memory/test_shelf.py


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    call, params, x = made(name)
    weight = jnp.asarray(np.random.default_rng(2).standard_normal(jax.eval_shape(call, params, x).shape))

    def total(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(call(params, x) * weight)

    run = jax.jit(total, compiler_options=options(name))
    both = jax.jit(jax.value_and_grad(total, (0, 1)), compiler_options=options(name))

    def backward(*args: Any) -> Any:
        value, gradients = both(*args)
        return value, lambda cotangent: jax.tree.map(lambda g: cotangent * g, gradients)

    # Angles and slopes are float32, which is exact enough: they are constants of the function.
    check_vjp(run, backward, (params, x), atol=1e-6, rtol=1e-6)
    moved = [bool(jnp.any(g != 0)) for g in jax.tree.leaves(both(params, x)[1])]
    assert sum(moved) == len(moved) - CASES[name].unmoved


@pytest.mark.parametrize("name", CASES)
def test_layers_are_functions_that_jax_transforms(name: str) -> None:
    call, params, x = made(name)
    both = jnp.stack([x, 2 * x])

    @functools.partial(jax.jit, compiler_options=options(name))
    def transformed(params: Any, both: jax.Array) -> Any:
        gradients = [jax.grad(lambda x, f=f: jnp.sum(f(params, x) ** 2))(both[0]) for f in (call, jax.checkpoint(call))]
        _, scanned = jax.lax.scan(lambda carry, x: (carry, call(params, x)), 0, both)
        return jax.vmap(call, (None, 0))(params, both), scanned, gradients

    run = jax.jit(call, compiler_options=options(name))
    expected = [run(params, each) for each in both]
    shape = jax.eval_shape(call, params, x)
    assert shape.shape == expected[0].shape and shape.dtype == expected[0].dtype == jnp.float64
    mapped, scanned, (plain, again) = transformed(params, both)
    for found in (mapped, scanned):
        np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_allclose(plain, again, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if "dropout" not in name])  # they have no parameters
def test_layers_without_keys_are_abstract(name: str) -> None:
    real, abstract = jax.eval_shape(lambda: CASES[name].make({"rngs": nnx.Rngs(0)})), CASES[name].make({})
    leaves = jax.tree.leaves(abstract)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(real)]
    assert jnp.bfloat16 in [leaf.dtype for leaf in jax.tree.leaves(CASES[name].make({"dtype": jnp.bfloat16}))]
