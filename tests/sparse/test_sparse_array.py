"""Sparse weights against the dense matrices they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.models.small import random_decoder, some_tokens
from trustcore.errors import ImplementationError, ModelError
from trustcore.models import scan_layers
from trustcore.ops.experts import grouped_linear
from trustcore.ops.linear import linear, linear_many
from trustcore.sparse import SparseArray, densify, sparsify
from trustcore.sparse.array import parse_pattern

PATTERNS = ("2:4", "1:4", "1:2", "3:8", "2:12", "5:32")


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def by_definition(weights, pattern, importance=None):
    """The n largest of each m, one group at a time."""
    n, m = map(int, pattern.split(":"))
    weights = np.asarray(weights)
    worth = np.abs(weights) * (1 if importance is None else np.asarray(importance)[:, None])
    found = np.zeros_like(weights)
    for g, o in np.ndindex(weights.shape[0] // m, weights.shape[1]):
        best = g * m + np.argsort(-worth[g * m : (g + 1) * m, o])[:n]
        found[best, o] = weights[best, o]
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_largest_of_each_group_stay(pattern):
    weights = draw(96, 7)
    packed = SparseArray.prune(weights, pattern)
    expected = by_definition(weights, pattern)
    np.testing.assert_array_equal(packed.dequantize(), expected)
    np.testing.assert_array_equal(packed.mask, expected != 0)
    n, m = parse_pattern(pattern)
    bits = {2: 1, 4: 2, 8: 4, 12: 4, 32: 8}[m]
    assert packed.nbytes == 7 * (96 * n // m * 4 + -(-96 * n // m * bits // 8))
    assert (packed.shape, packed.n, packed.size) == ((96, 7), n, 96 * 7)
    np.testing.assert_array_equal(packed.take(jnp.asarray([[3, 95], [0, 200]])), expected[np.array([[3, 95], [0, 95]])])


def test_importance_decides():
    weights, importance = draw(16, 3), np.linspace(0.01, 4, 16)
    found = SparseArray.prune(weights, "2:4", importance=importance).dequantize()
    np.testing.assert_array_equal(found, by_definition(weights, "2:4", importance))
    assert np.any(np.asarray(found) != by_definition(weights, "2:4"))


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16), ids=("float32", "bfloat16"))
def test_products(dtype):
    x, weights = draw(5, 32, dtype=dtype), [SparseArray.prune(draw(32, n, seed=n, dtype=dtype), "2:4") for n in (6, 9)]
    for found, weight in zip(jax.jit(linear_many)(x, weights), weights, strict=True):
        assert found.dtype == dtype
        np.testing.assert_allclose(found, linear(x, weight.dequantize()), atol=1e-6)
        np.testing.assert_allclose(
            found.astype(jnp.float32), x.astype(jnp.float32) @ weight.dequantize().astype(jnp.float32), atol=0.05
        )


@pytest.mark.parametrize(("pattern", "inputs"), [("2:4", 64), ("1:4", 72), ("3:8", 56), ("1:2", 54), ("5:32", 96)])
def test_tiles_are_the_decoded_matrix(pattern, inputs, monkeypatch):
    """Tiles of whole bytes of indices, and a rest; values, gradients, vmap."""
    monkeypatch.setattr("trustcore.sparse.array._TILE", 16 * 6)
    x, weight = draw(2, 3, inputs), SparseArray.prune(draw(inputs, 6), pattern)

    def total(values, x, implementation):
        return jnp.sum(jnp.sin(linear(x, SparseArray(values, weight.indices, weight.m), implementation=implementation)))

    assert "scan" in str(jax.make_jaxpr(linear)(x, weight))
    found, expected = (
        jax.jit(jax.value_and_grad(total, (0, 1)), static_argnums=2)(weight.values, x, name)
        for name in ("tiles", "dot")
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    np.testing.assert_allclose(jax.vmap(linear, (0, None))(x, weight), linear(x, weight), atol=1e-5)


def test_the_whole_matrix_is_never_decoded():
    x, weight = draw(2, 1024), SparseArray.prune(draw(1024, 2048), "2:4")
    tiles, dot = (
        jax.jit(linear, static_argnames="implementation").lower(x, weight, implementation=name).compile()
        for name in (None, "dot")
    )
    assert tiles.memory_analysis().temp_size_in_bytes * 1.3 < dot.memory_analysis().temp_size_in_bytes
    with pytest.raises(ImplementationError, match="'stream' is not one of a sparse weight; choose tiles or dot"):
        linear(x, weight, implementation="stream")


def test_gradients_reach_the_values_that_count():
    with jax.enable_x64(True):
        x, weight = draw(3, 8, dtype=jnp.float64), SparseArray.prune(draw(8, 5, dtype=jnp.float64), "2:4")

        def total(values, x):
            return jnp.sum(jnp.sin(linear(x, SparseArray(values, weight.indices, 4))))

        check_grads(total, (weight.values, x), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)
        dense = jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(weight.dequantize())
        found = SparseArray(jax.grad(total)(weight.values, x), weight.indices, 4).dequantize()
        np.testing.assert_allclose(found, jnp.where(weight.mask, dense, 0), atol=1e-12)
        both = jax.vmap(total, (None, 0))(weight.values, jnp.stack([x, 2 * x]))
        np.testing.assert_allclose(both[1], jax.checkpoint(total)(weight.values, 2 * x), atol=1e-12)
        assert jax.eval_shape(linear, x, weight).shape == (3, 5)


def test_a_decoder_with_sparse_kernels():
    model = random_decoder()
    pruned = sparsify(model, "2:4", where=["blocks.*kernel"])
    kernel = pruned.blocks[1].mlp.up.kernel.get_value()
    assert repr(kernel) == "SparseArray(2:4, float32[64, 96])"
    assert isinstance(model.blocks[1].mlp.up.kernel.get_value(), jax.Array)
    assert pruned.nbytes < 0.7 * model.nbytes
    expected = densify(pruned)(some_tokens())
    np.testing.assert_allclose(pruned(some_tokens()), expected, atol=1e-5)
    np.testing.assert_allclose(scan_layers(pruned)(some_tokens()), expected, atol=1e-5)
    assert np.max(np.abs(model(some_tokens()) - expected)) > 1e-2


def test_stacks_of_matrices():
    stack = SparseArray.prune(draw(3, 8, 4), "1:4")
    x, sizes = draw(5, 8), jnp.asarray([2, 0, 3], jnp.int32)
    np.testing.assert_allclose(grouped_linear(x, stack, sizes), grouped_linear(x, stack.dequantize(), sizes), atol=1e-6)
    _, found = jax.lax.scan(lambda carry, w: (carry, linear(x, w)), 0, stack)
    np.testing.assert_allclose(found, jnp.einsum("rk,ekn->ern", x, stack.dequantize()), atol=1e-5)
    with pytest.raises(ModelError, match="rows of one matrix are looked up, and this is SparseArray"):
        stack.take(jnp.asarray([0]))


@pytest.mark.parametrize("pattern", ("4:4", "0:4", "2", "2:", ":4", "-1:4", "2:257", "a:b", "2:4:8"))
def test_patterns_that_are_none(pattern):
    with pytest.raises(ModelError, match=r"is no pattern; write '2:4'"):
        parse_pattern(pattern)


def test_trees_that_cannot_be_pruned():
    tree = {"a": {"kernel": draw(6, 2)}, "b": {"kernel": draw(7, 2)}, "c": {"bias": draw(4)}}
    with pytest.raises(ModelError, match=r"a.kernel: sparse: 6 inputs .* groups of 4. b.kernel: sparse: 7 inputs"):
        sparsify(tree, "2:4")
    with pytest.raises(ModelError, match="no float matrix is selected"):
        sparsify(tree, "2:4", where=["*bias"])
    made = sparsify(tree, "1:2", where=lambda path, leaf: path == "a.kernel")
    assert isinstance(made["a"]["kernel"], SparseArray) and made["b"]["kernel"] is tree["b"]["kernel"]
