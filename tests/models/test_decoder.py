"""The decoder against a plain NumPy model in float64, as a pure function, and with its cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas.attention import attention_oracle
from tests.models.small import CONFIG, arrays, random_decoder, some_tokens
from trustcore.errors import ModelError
from trustcore.models import Decoder, scan_layers
from trustcore.nn.attention import Attention
from trustcore.ops.attention import LayerCache
from trustcore.ops.rope import RopeConfig


def numpy_decoder(model, tokens):
    """Logits by the equations of the papers, float64, one head and one position at a time where that is plainest."""
    c = model.config
    w = {name.path: array.astype(np.float64) for name, array in arrays(model).items()}

    def norm(x, weight):
        return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)

    def turn(x, position):  # [H]
        pairs = x[: c.rope.size].reshape(-1, 2)
        angle = position * c.rope.theta ** -(np.arange(0, c.rope.size, 2) / c.rope.size)
        z = (pairs[:, 0] + 1j * pairs[:, 1]) * np.exp(1j * angle)
        return np.concatenate([np.stack([z.real, z.imag], -1).reshape(-1), x[c.rope.size :]])

    out = []
    for row in np.asarray(tokens):
        h = w["embedding.table"][row]
        for i in range(c.layers):
            p = f"blocks.{i}."
            x = norm(h, w[p + "attention_norm.weight"])
            q, k, v = (x @ w[f"{p}attention.{n}.kernel"].T for n in ("query", "key", "value"))
            q, k, v = (y.reshape(len(row), -1, c.head_dim) for y in (q, k, v))
            y = np.zeros_like(q)
            for n in range(c.heads):
                kv = n // (c.heads // c.kv_heads)
                for t in range(len(row)):
                    seen = range(max(0, t - c.window + 1) if c.window else 0, t + 1)
                    scores = np.array([turn(q[t, n], t) @ turn(k[s, kv], s) for s in seen]) / np.sqrt(c.head_dim)
                    share = np.exp(scores - scores.max())
                    y[t, n] = (share / share.sum()) @ np.array([v[s, kv] for s in seen])
            h = h + y.reshape(len(row), -1) @ w[p + "attention.out.kernel"].T
            x = norm(h, w[p + "mlp_norm.weight"])
            gate, up = (x @ w[f"{p}mlp.{n}.kernel"].T for n in ("gate", "up"))
            h = h + (gate / (1 + np.exp(-gate)) * up) @ w[p + "mlp.down.kernel"].T
        h = norm(h, w["norm.weight"])
        out.append(h @ (w["embedding.table"] if c.tied else w["output.kernel"]).T)
    return np.array(out)


@pytest.mark.parametrize("changes", ({}, {"tied": True}, {"window": 5}), ids=str)
def test_logits_equal_the_equations(changes):
    model = random_decoder(dataclasses.replace(CONFIG, **changes))
    tokens = some_tokens()
    np.testing.assert_allclose(jax.jit(lambda m, t: m(t))(model, tokens), numpy_decoder(model, tokens), atol=2e-5)


def test_a_model_is_a_pure_function_under_jit_grad_and_vmap():
    model, tokens = random_decoder(), some_tokens()
    logits = model(tokens)
    np.testing.assert_allclose(jax.jit(lambda m, t: m(t))(model, tokens), logits, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda t: model(t[None])[0])(tokens), logits, atol=1e-5)

    def loss(model):
        scores = jax.nn.log_softmax(model(tokens[:, :-1]))
        return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], -1))

    grads = jax.jit(jax.grad(loss))(model)
    assert jax.tree.structure(grads) == jax.tree.structure(model)
    assert all(jnp.isfinite(g).all() and jnp.any(g != 0) for g in jax.tree.leaves(grads))
    step = 1e-2 / jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    moved = jax.tree.map(lambda w, g: w - step * g, model, grads)
    assert loss(moved) < loss(model)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "int8"))
def test_a_cache_changes_nothing_but_the_work(dtype):
    """Prompts of different lengths in one padded batch, in two chunks, then token by token."""
    model, tokens = random_decoder(), some_tokens(2, 14)
    full = model(tokens)
    cache = model.new_cache(2, 32, dtype=dtype)
    step = jax.jit(lambda m, t, c, n: m(t, cache=c, lengths=n), donate_argnums=2)
    lengths = np.array([9, 6])
    chunks = [(0, 6), (6, 6)]  # the second is padded for both rows
    for first, size in chunks:
        here = np.clip(lengths - first, 0, size)
        padded = jnp.where(jnp.arange(size)[None] < here[:, None], tokens[:, first : first + size], 0)
        logits, cache = step(model, padded, cache, jnp.asarray(here, jnp.int32))
    assert cache.length.tolist() == [9, 6]
    tolerance = {"float32": 2e-5, "bfloat16": 0.05, "int8": 0.1}[dtype]
    np.testing.assert_allclose(logits[0, 2], full[0, 8], atol=tolerance)
    for _ in range(4):
        at = jnp.array(cache.length)  # a copy: the cache is donated
        token = jnp.take_along_axis(tokens, at[:, None], 1)
        logits, cache = step(model, token, cache, jnp.ones(2, jnp.int32))
        for row in range(2):
            np.testing.assert_allclose(logits[row, 0], full[row, at[row]], atol=tolerance)
    assert cache.length.tolist() == [13, 10]


def test_dynamic_rope_uses_the_calls_context():
    rope = RopeConfig(16, scaling="dynamic", factor=2.0, original_context=8)
    plain = RopeConfig(16, original_context=8)
    short, long = some_tokens(1, 8), some_tokens(1, 20)
    scaled, other = (random_decoder(dataclasses.replace(CONFIG, rope=r)) for r in (rope, plain))
    np.testing.assert_allclose(scaled(short), other(short), atol=1e-6)
    assert jnp.max(jnp.abs(scaled(long) - other(long))) > 1e-3


def test_a_block_is_traced_once_for_all_layers():
    model = random_decoder(dataclasses.replace(CONFIG, layers=6))
    text = jax.jit(lambda m, t: m(t)).lower(model, some_tokens()).as_text()
    assert text.count("call @_run_block") == 6
    assert text.count("func.func private @_run_block") == 1


def test_abstract_models_hold_shapes_alone():
    model = Decoder(CONFIG)
    leaves = jax.tree.leaves(model)
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_repr_is_one_line():
    model = random_decoder()
    text = repr(model)
    assert "\n" not in text and "2 layers" in text and "parameters" in text and str(model) == text
    assert model.parameters == sum(a.size for a in arrays(model).values())
    assert model.nbytes == 4 * model.parameters
    assert nnx.state(model, nnx.Param)


def test_packed_texts_are_those_texts_alone():
    """Two texts behind each other in a row: logits and gradients of each are those of it by itself."""
    model, tokens = random_decoder(), jnp.asarray(np.random.default_rng(0).integers(0, 60, (1, 11)))
    segments = jnp.asarray([[3] * 4 + [1] * 7])

    def packed(model):
        return model(tokens, segments=segments)[0]

    def alone(model):
        return jnp.concatenate([model(tokens[:, :4])[0], model(tokens[:, 4:])[0]])

    with jax.enable_x64(True):  # gradients of hundreds: float32 has not the digits
        wide = Decoder(model.config, dtype=jnp.float64, rngs=nnx.Rngs(0))
        found, expected = (
            jax.jit(jax.value_and_grad(lambda m, f=f: (jnp.sum(jnp.sin(f(m))), f(m)), has_aux=True))(wide)
            for f in (packed, alone)
        )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    np.testing.assert_allclose(scan_layers(model)(tokens, segments=segments)[0], alone(model), atol=1e-4)
    with pytest.raises(ModelError, match="segments are of whole rows; they come without a cache, lengths and mask"):
        model(tokens, segments=segments, lengths=jnp.asarray([11]))


def test_chunks_of_packed_texts_begin_with_each_text():
    layer = Attention(16, 4, 2, 4, rope=None, chunk=3, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 9, 16))
    positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = layer(x, None, positions, segments=jnp.asarray([[5] * 4 + [2] * 5]))[0]
    alone = [layer(x[:, part], None, positions[:, part])[0] for part in (slice(0, 4), slice(4, 9))]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=1e-5)
    third = layer(x[:, 3:4], None, positions[:, 3:4])[0]  # the first of its chunk: it sees itself alone
    np.testing.assert_allclose(packed[:, 3:4], third, atol=1e-5)


def test_weights_of_a_layer_are_dropped_with_a_key():
    layer = Attention(16, 4, 2, 4, rope=None, dropout=0.4, rngs=nnx.Rngs(0))
    x, positions, key = (
        jax.random.normal(jax.random.key(1), (2, 9, 16)),
        jnp.arange(9)[None].repeat(2, 0),
        jax.random.key(2),
    )

    def heads(y):
        return y.reshape(2, 9, -1, 4)

    query, keys, value = (heads(product(x)) for product in (layer.query, layer.key, layer.value))
    expected = attention_oracle(query, keys, value, dropout=0.4, dropout_key=key)
    found = layer(x, None, positions, dropout_key=key)[0]
    np.testing.assert_allclose(found, layer.out(expected.reshape(2, 9, 16)), atol=1e-5)
    assert jnp.max(jnp.abs(found - layer(x, None, positions)[0])) > 1e-2
    with pytest.raises(ModelError, match="a cache takes neither"):
        layer(x, None, positions, LayerCache.zeros(2, 2, 16, 4, jnp.float32), dropout_key=key)
