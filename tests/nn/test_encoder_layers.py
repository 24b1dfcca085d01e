"""Layers of encoders, vision and recurrence, against their definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas.attention import xla
from trustcore.errors import ModelError
from trustcore.nn.dropout import SpatialDropout
from trustcore.nn.norm import LayerNorm
from trustcore.nn.positions import alibi, alibi_slopes, rope_2d, sinusoids
from trustcore.nn.recurrent import Recurrent
from trustcore.nn.separable import SeparableConv
from trustcore.ops.activate import ACTIVATIONS, activation
from trustcore.ops.masked_attention import masked_attention


@pytest.fixture(autouse=True)
def _wide() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def made(kind: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The layer with random float64 parameters, none of them zero or one."""
    layer = kind(*args, **options, dtype=jnp.float64, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape) if leaf.dtype == np.float64 else leaf, layer
    )


@pytest.mark.parametrize("heads", [1, 2])
def test_masked_attention_in_blocks(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles give what one gives, forward and backward; a query that sees nothing gives zeros."""
    q, k, v = draw(2, 37, heads, 4), draw(2, 35, heads, 4, seed=1), draw(2, 35, heads, 4, seed=2)
    mask = np.random.default_rng(3).random((2, 1, 37, 35)) < 0.7
    mask[0, 0, 2] = False
    bias = draw(1, heads, 37, 35, seed=5)

    def scores() -> Any:
        def total(q: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = masked_attention(q, k, v, mask=jnp.asarray(mask), bias=bias)
            return jnp.sum(y**2), y

        gradients, y = jax.jit(jax.grad(total, (0, 1), has_aux=True))(q, bias)
        return y, gradients

    expected, gradients = scores()
    plain = np.einsum("btnh,bsnh->bnts", q, k) / 2 + np.asarray(bias)
    shares = np.where(mask, np.exp(plain), 0)
    shares = shares / np.maximum(shares.sum(-1, keepdims=True), 1e-300)
    np.testing.assert_allclose(expected, np.einsum("bnts,bsnh->btnh", shares, v), atol=1e-12)
    assert not np.any(np.asarray(expected)[0, 2])
    monkeypatch.setattr(xla, "ONE_TILE", 0)
    monkeypatch.setattr(xla, "FEWEST_QUERIES", 16)
    monkeypatch.setitem(xla.BLOCK, "cpu", (16, 16))
    found, blocked = scores()
    np.testing.assert_allclose(found, expected, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), blocked, gradients)
    row = masked_attention(q, k, v, mask=jnp.asarray(mask[:, :, :1]))
    np.testing.assert_allclose(
        row[:, 3:4], masked_attention(q[:, 3:4], k, v, mask=jnp.asarray(mask[:, :, :1])), atol=1e-12
    )


def test_layer_norm_by_its_definition() -> None:
    x = np.asarray(draw(3, 5))
    layer = made(LayerNorm, 5)
    weight, bias = (np.asarray(part.get_value()) for part in (layer.weight, layer.bias))
    expected = (x - np.mean(x, -1, keepdims=True)) / np.sqrt(np.var(x, -1, keepdims=True) + 1e-5) * weight + bias
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-12)
    plain = LayerNorm(5, scale=False, bias=False)
    assert plain.weight is None and plain.bias is None
    np.testing.assert_allclose(plain(jnp.asarray(x)), (expected - bias) / weight, atol=1e-12)
    assert layer(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_positions_by_their_definitions() -> None:
    found = np.asarray(sinusoids(jnp.arange(5), 6))
    rates = 10000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(found[:, :3], np.sin(np.arange(5)[:, None] * rates), atol=1e-6)
    np.testing.assert_allclose(found[:, 3:], np.cos(np.arange(5)[:, None] * rates), atol=1e-6)
    with pytest.raises(ModelError, match="7 channels"):
        sinusoids(jnp.arange(2), 7)
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(alibi_slopes(6), [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125])
    bias = alibi(jnp.asarray([4]), jnp.arange(6), 8)
    np.testing.assert_allclose(bias[0, 1, 0], -0.25 * np.array([4, 3, 2, 1, 0, 1]))


def test_rope_in_two_dimensions_depends_on_offsets_alone() -> None:
    q, k = draw(1, 1, 2, 8), draw(1, 1, 2, 8, seed=1)

    def score(row: int, column: int, other_row: int, other_column: int) -> np.ndarray:
        at = [jnp.full((1, 1), n) for n in (row, column, other_row, other_column)]
        return np.asarray(jnp.sum(rope_2d(q, at[0], at[1]) * rope_2d(k, at[2], at[3]), axis=-1))

    np.testing.assert_allclose(score(1, 2, 4, 3), score(3, 7, 6, 8), atol=1e-5)
    assert np.max(np.abs(score(1, 2, 4, 3) - score(1, 2, 3, 4))) > 1e-2
    with pytest.raises(ModelError, match="no multiple of four"):
        rope_2d(draw(1, 1, 1, 6), jnp.zeros((1, 1)), jnp.zeros((1, 1)))


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_recurrence_step_by_step_and_backwards(cell: Any) -> None:
    layer, x = made(Recurrent, 4, 3, cell=cell), draw(2, 5, 4)
    whole = layer(x)
    state = layer.start(2)
    for t in range(5):
        state, out = layer.step(state, x[:, t])
        np.testing.assert_allclose(out, whole[:, t], atol=1e-12)
    both = made(Recurrent, 4, 3, cell=cell, both=True)
    lengths = jnp.asarray([5, 3])
    found = both(x, lengths)
    assert not np.any(np.asarray(found)[1, 3:])
    short = both(x[1:, :3])
    np.testing.assert_allclose(found[1:, :3], short, atol=1e-12)
    alone = nnx.clone(both)
    turned = alone._run(alone.back, x[1:, :3][:, ::-1])[:, ::-1]
    np.testing.assert_allclose(short[..., 3:], turned, atol=1e-12)
    with pytest.raises(ModelError, match="reads both ways"):
        both.step(state, x[:, 0])
    with pytest.raises(ModelError, match="cell is 'qrnn'"):
        Recurrent(4, 3, cell="qrnn")  # pyright: ignore[reportArgumentType]


def test_separable_convolution_is_a_full_one_of_low_rank() -> None:
    layer, x = made(SeparableConv, 4, 5, (3, 3), bias=False), draw(2, 6, 7, 4)
    deep, point = (np.asarray(part.kernel.get_value()) for part in (layer.depthwise, layer.pointwise))
    kernel = np.einsum("hwic,co->hwco", deep, point[0, 0])
    dims = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    expected = jax.lax.conv_general_dilated(x, jnp.asarray(kernel), (1, 1), "SAME", dimension_numbers=dims)
    np.testing.assert_allclose(layer(x), expected, atol=1e-12)


def test_spatial_dropout_drops_whole_channels() -> None:
    layer = SpatialDropout(0.5, rngs=nnx.Rngs(0))
    x = jnp.ones((4, 3, 3, 16))
    y = np.asarray(layer(x))
    assert set(np.unique(y)) == {0.0, 2.0}
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], y.shape))
    assert 0 < y.mean() < 2
    row = np.asarray(SpatialDropout(0.5, places=1, rngs=nnx.Rngs(1))(jnp.ones((4, 5, 16))))
    np.testing.assert_array_equal(row, np.broadcast_to(row[:, :1], row.shape))
    layer.eval()
    np.testing.assert_array_equal(layer(x), x)


def test_activations_by_name() -> None:
    x = jnp.linspace(-3.0, 3.0, 7)
    assert all(activation(name)(x).shape == x.shape for name in ACTIVATIONS)
    np.testing.assert_allclose(activation("quick_gelu")(x), x / (1 + np.exp(-1.702 * np.asarray(x))), atol=1e-12)
    np.testing.assert_allclose(activation("relu2")(x), np.maximum(x, 0) ** 2)
    with pytest.raises(ModelError, match="activation 'cube' is not known; choose from silu"):
        activation("cube")
