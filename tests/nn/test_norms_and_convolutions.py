"""Normalization over groups and batches, and convolutions, against loops over their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trustcore.errors import ModelError
from trustcore.nn import BatchNorm, Conv1d, Conv2d, DepthwiseConv, GroupNorm, SyncBatchNorm


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def moved(layer):
    """The layer with random scale and bias."""
    rng = np.random.default_rng(1)
    layer.scale.set_value(jnp.asarray(rng.uniform(0.5, 1.5, layer.scale.shape), jnp.float32))
    layer.bias.set_value(jnp.asarray(rng.standard_normal(layer.bias.shape), jnp.float32))
    return layer, np.asarray(layer.scale.get_value()), np.asarray(layer.bias.get_value())


def test_groups_are_normalized_by_themselves():
    x = draw(2, 5, 6, 8) + 1000  # E[x^2] - E[x]^2 would have no digit left
    layer, scale, bias = moved(GroupNorm(8, 4, rngs=nnx.Rngs(0)))
    wide = x.astype(np.float64)
    expected = np.empty_like(wide)
    for b in range(2):
        for g in range(4):
            part = wide[b, :, :, 2 * g : 2 * g + 2]
            expected[b, :, :, 2 * g : 2 * g + 2] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    np.testing.assert_allclose(jax.jit(lambda layer, x: layer(x))(layer, x), expected * scale + bias, atol=2e-3)
    plain = GroupNorm(8, 1, scale=False, bias=False, rngs=nnx.Rngs(0))
    near = x - 1000
    np.testing.assert_allclose(plain(near)[0], (near[0] - near[0].mean()) / np.sqrt(near[0].var() + 1e-5), atol=1e-4)
    with pytest.raises(ModelError, match="8 channels do not fall into 3 groups"):
        GroupNorm(8, 3)


def test_a_batch_is_normalized_and_remembered():
    layer, scale, bias = moved(BatchNorm(4, momentum=0.8, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(layer)

    @jax.jit
    def train(state, x):
        layer = nnx.merge(graph, state)
        y = layer(x)
        return y, nnx.state(layer)

    mean, var = np.zeros(4), np.ones(4)
    for seed in (0, 1):
        x = 3 * draw(6, 5, 4, seed=seed) + 2
        y, state = train(state, x)
        here = x.astype(np.float64).mean((0, 1)), x.astype(np.float64).var((0, 1))
        np.testing.assert_allclose(y, (x - here[0]) / np.sqrt(here[1] + 1e-5) * scale + bias, atol=1e-4)
        mean, var = 0.8 * mean + 0.2 * here[0], 0.8 * var + 0.2 * here[1]
    layer = nnx.merge(graph, state)
    np.testing.assert_allclose(layer.mean.get_value(), mean, rtol=1e-5)
    np.testing.assert_allclose(layer.var.get_value(), var, rtol=1e-5)
    layer.eval()
    expected = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(layer(x), expected, atol=1e-4)
    np.testing.assert_allclose(layer(x[:1, :1]), expected[:1, :1], atol=1e-4)  # whatever else is in the batch
    np.testing.assert_allclose(layer.mean.get_value(), mean, rtol=1e-5)  # nothing is remembered
    assert {type(v) for v in jax.tree.leaves(state, is_leaf=lambda v: isinstance(v, nnx.Variable))} == {
        nnx.Param,
        nnx.BatchStat,
    }


def test_statistics_of_a_named_axis():
    x = draw(4, 3, 5, 2)
    layer, other = SyncBatchNorm(2, "devices", rngs=nnx.Rngs(0)), BatchNorm(2, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def train(state, x):
        layer = nnx.merge(graph, state)
        return layer(x), layer.mean.get_value()

    y, mean = jax.vmap(train, in_axes=(None, 0), axis_name="devices")(state, x)
    np.testing.assert_allclose(y.reshape(12, 5, 2), other(x.reshape(12, 5, 2)), atol=1e-5)
    np.testing.assert_allclose(mean, jnp.stack([other.mean.get_value()] * 4), atol=1e-6)


SOURCE = """
    import jax, jax.numpy as jnp, numpy as np
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec as P
    from trustcore.nn import BatchNorm, SyncBatchNorm

    mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (12, 5, 2)) + jnp.arange(12.0)[:, None, None]
    weight = jax.random.normal(jax.random.key(1), x.shape)

    def train(layer, x, weight):
        def loss(layer):
            y = layer(x)
            return jnp.sum(y * weight), (y, layer.mean.get_value(), layer.var.get_value())
        gradient, rest = jax.grad(loss, has_aux=True)(layer)
        return rest, gradient.scale.get_value()

    def spread(layer, x, weight):
        (y, *running), gradient = train(layer, x, weight)
        return (y, *running), jax.lax.psum(gradient, "devices")

    alone = SyncBatchNorm(2, "devices", rngs=nnx.Rngs(0))
    run = jax.shard_map(spread, mesh=mesh, in_specs=(P(), P("devices"), P("devices")),
                        out_specs=((P("devices"), P(), P()), P()), check_vma=False)
    found, expected = jax.jit(run)(alone, x, weight), jax.jit(train)(BatchNorm(2, rngs=nnx.Rngs(0)), x, weight)
    split = jax.device_put(x, NamedSharding(mesh, P("devices")))
    for each in (found, jax.jit(train)(BatchNorm(2, rngs=nnx.Rngs(0)), split, weight)):
        for one, other in zip(jax.tree.leaves(each), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-4, rtol=1e-4)
    print("the same")
"""


def test_statistics_of_four_devices(fresh_python):
    assert fresh_python(SOURCE, devices=4).endswith("the same\n")


def convolved(x, kernel, *, stride=1, dilation=1, groups=1):
    """The sum of the definition, one output at a time, no padding; images."""
    window, inside, outputs = kernel.shape[:2], kernel.shape[2], kernel.shape[3]
    sizes = [(n - dilation * (w - 1) - 1) // stride + 1 for n, w in zip(x.shape[1:3], window, strict=True)]
    y = np.zeros((x.shape[0], *sizes, outputs))
    for i, j, o in np.ndindex(*sizes, outputs):
        first = o // (outputs // groups) * inside
        for a, b in np.ndindex(*window):
            seen = x[:, i * stride + a * dilation, j * stride + b * dilation, first : first + inside]
            y[:, i, j, o] += seen.astype(np.float64) @ kernel[a, b, :, o]
    return y


@pytest.mark.parametrize("options", ({}, {"stride": 2}, {"dilation": 2}, {"groups": 2}), ids=str)
def test_convolutions_by_their_definition(options):
    x = draw(2, 9, 8, 4)
    layer = Conv2d(4, 6, (3, 2), padding="VALID", rngs=nnx.Rngs(0), **options)
    layer.bias.set_value(jnp.asarray(draw(6)))
    expected = convolved(x, np.asarray(layer.kernel.get_value()), **options) + np.asarray(layer.bias.get_value())
    np.testing.assert_allclose(jax.jit(lambda layer, x: layer(x))(layer, x), expected, atol=1e-4)
    row = Conv1d(4, 6, 3, padding="VALID", bias=False, initializer="kaiming_normal", rngs=nnx.Rngs(1), **options)
    kernel = np.asarray(row.kernel.get_value())
    np.testing.assert_allclose(row(x[:, :, 0]), convolved(x[:, :, :1], kernel[:, None], **options)[:, :, 0], atol=1e-4)


def test_padding_and_depth():
    x = draw(1, 6, 3)
    causal = Conv1d(3, 2, 3, padding="CAUSAL", bias=False, rngs=nnx.Rngs(0))
    later = np.array(x)
    later[:, 4:] = 7
    np.testing.assert_allclose(causal(x)[:, :4], causal(later)[:, :4], atol=1e-6)
    assert causal(x).shape == (1, 6, 2)
    deep = DepthwiseConv(3, (2, 2), multiplier=2, padding="VALID", bias=False, rngs=nnx.Rngs(0))
    image = draw(2, 4, 5, 3)
    expected = convolved(image, np.asarray(deep.kernel.get_value()), groups=3)
    np.testing.assert_allclose(deep(image), expected, atol=1e-5)
    alone = np.array(image)
    alone[..., 1:] = 0
    np.testing.assert_allclose(deep(alone)[..., :2], expected[..., :2], atol=1e-5)
    with pytest.raises(ModelError, match="4 inputs and 6 outputs do not fall into 4 groups"):
        Conv1d(4, 6, 3, groups=4)
