"""Embeddings: a padding row whose gradient stays zero, gradients of touched rows alone; and initializers by name."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trustcore.errors import ModelError
from trustcore.nn import Embedding, Linear, initializer, row_value_and_grad, update_rows
from trustcore.ops.linear import linear
from trustcore.quant import QuantizedArray

V, D = 11, 4
TOKENS = jnp.asarray([[3, 0, 5], [3, 9, 0]])


def table_of(layer):
    return np.asarray(layer.table.get_value())


@pytest.mark.parametrize("tied", (False, True))
def test_the_padding_row_has_no_gradient(tied):
    """Looked up it gives zeros, as an output it has a logit; either way its gradient is exactly zero."""
    layer = Embedding(V, D, padding=0, rngs=nnx.Rngs(0))
    outside = TOKENS.at[1, 1].set(-1)  # takes the nearest row, which is that of padding
    plain = Embedding(V, D, rngs=nnx.Rngs(0))
    assert not np.any(table_of(layer)[0]) and np.all(table_of(layer)[1:] != 0)
    layer.table.set_value(jnp.asarray(np.random.default_rng(0).standard_normal((V, D)), jnp.float32))
    plain.table.set_value(layer.table.get_value())

    def loss(layer, x):
        y = layer(outside) + x
        return jnp.sum(jnp.sin(layer.unembed(y) if tied else y))

    x = jnp.ones((2, 3, D))
    found, expected = (jax.jit(jax.value_and_grad(loss, (0, 1)))(each, x) for each in (layer, plain))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1][1], expected[1][1], atol=1e-5)  # of x
    ours, theirs = table_of(found[1][0]), table_of(expected[1][0])
    np.testing.assert_array_equal(ours[0], 0)
    assert np.any(theirs[0]) and np.any(ours[3])
    np.testing.assert_allclose(ours[1:], theirs[1:], atol=1e-5)


def test_padding_of_a_packed_table_and_of_none():
    table = QuantizedArray.quantize(np.random.default_rng(0).standard_normal((V, 32)), "q8_0", transposed=True)
    layer, plain = Embedding(V, 32, padding=2), Embedding(V, 32)
    layer.table.set_value(table)
    plain.table.set_value(table)
    np.testing.assert_array_equal(layer(TOKENS), plain(TOKENS))
    x = jnp.ones((2, 32))
    np.testing.assert_allclose(layer.unembed(x), plain.unembed(x), atol=1e-5)
    with pytest.raises(ModelError, match="padding is row 11 of a table of 11 rows"):
        Embedding(V, D, padding=V)


def loss_of(rows, weight):
    layer = Embedding(V, D)
    layer.table.set_value(rows)
    return jnp.sum(jnp.sin(layer(TOKENS)) * weight)


def test_gradients_of_touched_rows_are_those_of_the_table():
    table = jnp.asarray(np.random.default_rng(1).standard_normal((V, D)), jnp.float32)
    weight = jnp.asarray(np.random.default_rng(2).standard_normal((2, 3, D)), jnp.float32)
    value, (rows, gradients) = jax.jit(lambda t: row_value_and_grad(loss_of, t, TOKENS, weight))(table)
    expected_value, expected = jax.value_and_grad(loss_of)(table, weight)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    assert rows.tolist() == [0, 3, 5, 9, V, V]
    np.testing.assert_allclose(gradients[:4], expected[np.array([0, 3, 5, 9])], atol=1e-6)
    assert not np.any(gradients[4:]) and not np.any(np.delete(np.asarray(expected), [0, 3, 5, 9], axis=0))
    padded = row_value_and_grad(loss_of, table, TOKENS, weight, padding=0)[1]
    assert not np.any(padded.gradients[0]) and np.any(padded.gradients[1])
    (value, more), _ = row_value_and_grad(lambda rows, w: (loss_of(rows, w), 7), table, TOKENS, weight, has_aux=True)
    assert more == 7 and value == pytest.approx(float(expected_value), rel=1e-5)


def test_updates_touch_their_rows_alone():
    table = jnp.asarray(np.random.default_rng(1).standard_normal((V, D)), jnp.float32)
    weight = jnp.ones((2, 3, D))
    momentum = jnp.full((V, D), 0.5)
    gradients = row_value_and_grad(loss_of, table, TOKENS, weight)[1]

    def step(gradient, rows, momentum):
        momentum = 0.9 * momentum + gradient
        return rows - 0.1 * momentum, momentum

    found, kept = update_rows(step, gradients, table, momentum)
    dense = jax.grad(loss_of)(table, weight)
    touched = np.isin(np.arange(V), np.asarray(TOKENS))
    expected = np.where(touched[:, None], 0.9 * 0.5 + dense, 0.5)
    np.testing.assert_allclose(kept, expected, atol=1e-6)
    np.testing.assert_allclose(found, np.where(touched[:, None], table - 0.1 * expected, table), atol=1e-6)
    (alone,) = update_rows(lambda g, rows: rows - g, gradients, table)
    np.testing.assert_allclose(alone, table - dense, atol=1e-6)
    with pytest.raises(ModelError, match="made rows of 1 tables, and there are 2"):
        update_rows(lambda g, *rows: rows[0], gradients, table, momentum)


def test_no_array_of_all_rows_is_made():
    """The compiled step has the donated table and the scatter into it; the plain gradient is one more."""
    rows, width, tokens = 5000, 16, jnp.arange(0, 60, dtype=jnp.int32)

    def loss(table):
        layer = Embedding(rows, width)
        layer.table.set_value(table)
        return jnp.sum(jnp.sin(layer(tokens)))

    def sparse(table):
        _, gradients = row_value_and_grad(loss, table, tokens)
        return update_rows(lambda g, r: r - 0.1 * g, gradients, table)[0]

    def dense(table):
        return table - 0.1 * jax.grad(loss)(table)

    shape = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    compiled = [jax.jit(f, donate_argnums=0).lower(shape).compile() for f in (sparse, dense)]
    memory = [program.memory_analysis().temp_size_in_bytes for program in compiled]
    assert memory[0] < rows * width * 4 // 2
    assert memory[1] >= rows * width * 4
    made = re.findall(rf"= f32\[{rows},{width}\]\S* ([\w-]+)\(", compiled[0].as_text())
    assert "parameter" in made and not {"broadcast", "copy", "add", "multiply"} & set(made)


def test_touched_rows_are_no_whole_table():
    seen = []
    row_value_and_grad(lambda rows: seen.append(rows) or jnp.sum(rows.take(TOKENS)), jnp.ones((V, D)), TOKENS)
    layer = Embedding(V, D)
    layer.table.set_value(seen[0])
    assert seen[0].shape == (V, D)
    for refused in (
        lambda: layer.unembed(jnp.ones((1, D))),
        lambda: linear(jnp.ones((1, V)), seen[0]),
        seen[0].dequantize,
    ):
        with pytest.raises(ModelError, match="a product with a table reads all of its rows, and these are some"):
            refused()


# Variance times K, for a kernel [K, N] with N = K / 2.
VARIANCES = {"lecun": 1.0, "xavier": 4 / 3, "glorot": 4 / 3, "kaiming": 2.0, "he": 2.0}


@pytest.mark.parametrize("name", VARIANCES)
@pytest.mark.parametrize("kind", ("uniform", "normal"))
def test_variances_of_named_initializers(name, kind):
    k, n = 400, 200
    made = np.asarray(Linear(k, n, initializer=f"{name}_{kind}", rngs=nnx.Rngs(0)).kernel.get_value(), np.float64)
    variance = VARIANCES[name] / k
    assert np.var(made) == pytest.approx(variance, rel=0.02)  # 80000 draws: one part in 200
    assert abs(np.mean(made)) < 4 * (variance / made.size) ** 0.5
    top = np.max(np.abs(made)) / variance**0.5
    assert top == pytest.approx(3**0.5, rel=1e-3) if kind == "uniform" else 3.5 < top < 6
    twice = initializer(f"{name}_{kind}", gain=2)(jax.random.key(0), (k, n), jnp.float32)
    assert np.var(np.asarray(twice)) == pytest.approx(4 * variance, rel=0.02)
    stack = initializer(f"{name}_{kind}", batch_axis=(0,))(jax.random.key(0), (3, k, n), jnp.float32)
    assert np.var(np.asarray(stack)) == pytest.approx(variance, rel=0.02)


def test_other_named_initializers():
    key = jax.random.key(1)
    for shape in ((30, 50), (50, 30)):
        made = np.asarray(initializer("orthogonal", gain=3.0)(key, shape, jnp.float32), np.float64)
        small = made @ made.T if shape[0] < shape[1] else made.T @ made
        np.testing.assert_allclose(small, 9 * np.eye(30), atol=1e-4)
    cut = np.asarray(initializer("truncated_normal", std=0.5)(key, (300, 300), jnp.float32))
    assert np.std(cut) == pytest.approx(0.5, rel=0.01) and np.max(np.abs(cut)) <= 1.0 / 0.8796 + 1e-6
    assert np.std(np.asarray(initializer("normal")(key, (300, 300), jnp.float32))) == pytest.approx(0.02, rel=0.01)
    assert isinstance(Linear(3, 4, initializer="orthogonal").kernel.get_value(), jax.ShapeDtypeStruct)
    with pytest.raises(ModelError, match=r"initializer is 'zeros'; choose from lecun_uniform"):
        initializer("zeros")
    with pytest.raises(ModelError, match=r"'orthogonal' has no such option: .*std"):
        initializer("orthogonal", std=1)
