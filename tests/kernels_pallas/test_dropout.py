"""Dropout from a counter: its hash by NumPy, its statistics, its gradient, and what it keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas.dropout import dropout
from trustcore.nn import Dropout

KEY = jax.random.key(3)


def mixed(x: np.ndarray) -> np.ndarray:
    """The finalizer "lowbias32"."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def by_definition(shape: tuple[int, ...], rate: float) -> np.ndarray:
    a, b = np.asarray(jax.random.bits(KEY, (2,), jnp.uint32))
    row, column = np.indices((int(np.prod(shape[:-1])), shape[-1])).astype(np.uint32)
    bits = mixed(mixed(row ^ a) + column * np.uint32(0x9E3779B9) ^ b)
    return np.where((bits >> np.uint32(8)) < round(rate * 2**24), 0.0, 1 / (1 - rate)).reshape(shape)


@pytest.mark.parametrize(("shape", "rate"), [((3, 5, 70), 0.25), ((64,), 0.9), ((2, 0, 4), 0.5)])
def test_values_and_gradients_are_the_hash(shape: tuple[int, ...], rate: float) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    keep = by_definition(shape, rate)
    np.testing.assert_allclose(jax.jit(lambda x: dropout(x, KEY, rate=rate))(x), x * keep, rtol=1e-6)
    found = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(dropout(x, KEY, rate=rate)))))(x)
    np.testing.assert_allclose(found, np.cos(x * keep) * keep, atol=1e-5)


def test_shares_and_independence() -> None:
    """Of 2**20 numbers: the mean within five deviations; neighbours along either axis are not correlated."""
    dropped = np.asarray(dropout(jnp.ones((1024, 1024)), KEY, rate=0.3)) == 0
    deviation = np.sqrt(0.3 * 0.7 / dropped.size)
    assert abs(dropped.mean() - 0.3) < 5 * deviation
    for pair in ((dropped[1:], dropped[:-1]), (dropped[:, 1:], dropped[:, :-1])):
        assert abs(np.mean(pair[0] & pair[1]) - 0.09) < 5 * np.sqrt(0.09 * 0.91 / dropped.size)
    other = np.asarray(dropout(jnp.ones((1024, 1024)), jax.random.key(4), rate=0.3)) == 0
    assert abs(np.mean(dropped & other) - 0.09) < 5 * np.sqrt(0.09 * 0.91 / dropped.size)


def test_shared_axes_and_ends() -> None:
    x = jnp.ones((4, 6, 64), jnp.bfloat16)
    found = np.asarray(dropout(x, KEY, rate=0.5, shared=(1,)), np.float32)
    assert found.dtype == np.float32 and set(np.unique(found)) == {0.0, 2.0}
    assert (found == found[:, :1]).all() and (found != found[:1]).any()
    assert dropout(x, KEY, rate=0.0) is x and not np.asarray(dropout(x, KEY, rate=1.0), np.float32).any()
    many = jax.vmap(lambda k: dropout(jnp.ones(64), k, rate=0.5))(jax.random.split(KEY, 3))
    assert (many[0] != many[1]).any()


def test_the_backward_pass_keeps_two_words() -> None:
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    pulled = jax.eval_shape(lambda x: jax.vjp(lambda x: dropout(x, KEY, rate=0.1), x)[1], x)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pulled)) <= 8


def test_the_layer() -> None:
    layer, x = Dropout(0.5, rngs=nnx.Rngs(0)), jnp.ones((8, 32))
    first, second = layer(x), layer(x)
    assert set(np.unique(first)) == {0.0, 2.0} and (first != second).any()
    np.testing.assert_array_equal(layer(x, rngs=KEY), dropout(x, KEY, rate=0.5))
    np.testing.assert_array_equal(layer(x, rngs=nnx.Rngs(dropout=1)), layer(x, rngs=nnx.Rngs(dropout=1)))
    layer.eval()
    assert layer(x) is x
    with pytest.raises(ValueError, match="no `rngs` argument"):
        Dropout(0.5)(x)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"rate is 1.5; it must lie within 0 and 1"):
        dropout(jnp.ones(3), KEY, rate=1.5)
    with pytest.raises(ValueError, match="x is int32; it must be floats"):
        dropout(jnp.ones(3, jnp.int32), KEY, rate=0.5)
