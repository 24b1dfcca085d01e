"""Models in plain jnp get the kernels: attention, norms and activations in the ways in which people write them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trustcore.graph import optimize

B, T, N, H = 2, 16, 4, 8
SIZES = (B, T, N, H)
Q, K, V = (jax.random.normal(key, SIZES) for key in jax.random.split(jax.random.key(0), 3))


def causal() -> jax.Array:
    return jnp.tril(jnp.ones((T, T), bool))


def like(mask: jax.Array, scores: jax.Array) -> jax.Array:
    return jnp.broadcast_to(mask, scores.shape)


def products(q: jax.Array, k: jax.Array, v: jax.Array, between, scale: float = H**-0.5) -> jax.Array:
    scores = between(jnp.einsum("btnh,bsnh->bnts", q, k) * scale)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)


def unscaled(q, k, v):
    return products(q, k, v, lambda s: s, 1.0)


def tril_and_inf(q, k, v):
    return products(q, k, v, lambda s: jnp.where(like(causal(), s), s / jnp.sqrt(2.0).astype(s.dtype), -jnp.inf))


def matmuls(q, k, v):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    scores = (q * H**-0.5) @ k.transpose(0, 1, 3, 2)
    i = jnp.arange(T, dtype=jnp.int32)
    scores = jnp.where(like(i[:, None] >= i[None, :], scores), scores, jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
    return (weights / jnp.sum(weights, -1, keepdims=True) @ v).swapaxes(1, 2)


def added_mask(q, k, v):
    return products(q, k, v, lambda s: s + like(jnp.where(causal(), 0.0, -1e9), s))


def of_jax(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def heads_repeated(q, k, v):
    return tril_and_inf(q, *(jnp.repeat(x[:, :, :2], 2, axis=2) for x in (k, v)))


def queries_grouped(q, k, v):
    k, v, q = k[:, :, :2], v[:, :, :2], q.reshape(B, T, 2, 2, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * H**-0.5
    scores = jnp.where(like(causal(), scores), scores, -jnp.inf)
    return jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, -1), v).reshape(SIZES)


def mapped(q, k, v):
    def one(q, k, v):
        scores = jnp.where(causal(), q @ k.T / H**0.5, -1e30)
        return jax.nn.softmax(scores) @ v

    return jax.vmap(jax.vmap(one, 1, 1))(q, k, v)


def narrow(q, k, v):
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32) * H**-0.5
    weights = jax.nn.softmax(scores, -1).astype(jnp.bfloat16)
    return jnp.einsum("bnts,bsnh->btnh", weights, v).astype(jnp.float32)


def capped_window(q, k, v):
    i = jnp.arange(T, dtype=jnp.int32)
    near = (i[:, None] >= i[None]) & (i[:, None] - i[None] < 5)
    return products(q, k, v, lambda s: jnp.where(like(near, s), jnp.tanh(s / 20.0) * 20.0, -1e30))


def padding(q, k, v, mask):
    return products(q, k, v, lambda s: jnp.where(like(causal(), s) & like(mask[:, None, None, :], s), s, -jnp.inf))


def biased(q, k, v, bias):
    return products(q, k, v, lambda s: jnp.where(like(~causal(), s), -1e9, s + like(bias[None], s)))


def exponentials(q, k, mask=True):
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
    scores = jnp.where(like(causal(), scores), scores, -1e30) if mask else scores
    return jnp.exp(scores - jnp.max(scores, -1, keepdims=True))


def divided_after(q, k, v):
    weights = exponentials(q, k)
    out, total = jnp.einsum("bnts,bsnh->bnth", weights, v), jnp.sum(weights, -1, keepdims=True)
    return (out / total).swapaxes(1, 2)


def divided_after_transposed(q, k, v):
    weights = exponentials(q, k, mask=False)
    total = jnp.sum(weights, -1).swapaxes(1, 2)[..., None]  # [B, T, N, 1]
    return jnp.einsum("bnts,bsnh->btnh", weights, v) * (1 / total)


MASK = jnp.ones((B, T), bool).at[1, 10:].set(False)
BIAS = jax.random.normal(jax.random.key(3), (N, T, T))
WAYS = [(way, ()) for way in (unscaled, tril_and_inf, matmuls, added_mask, of_jax, heads_repeated, queries_grouped)]
WAYS += [(mapped, ()), (narrow, ()), (capped_window, ()), (padding, (MASK,)), (biased, (BIAS,)), (divided_after, ())]
WAYS += [(divided_after_transposed, ())]


@pytest.mark.parametrize(("way", "more"), WAYS, ids=[way.__name__ for way, _ in WAYS])
def test_ways_to_write_attention(way, more) -> None:
    fast = optimize(way, prove=way in (tril_and_inf, narrow, padding, divided_after))
    found, wanted = fast(Q, K, V, *more), jax.jit(way)(Q, K, V, *more)
    np.testing.assert_allclose(found, wanted, atol=2e-2 if way is narrow else 2e-6)
    assert fast.report is not None and fast.report.count("attention") == 1, str(fast.report)
    (applied,) = fast.report.applied
    assert len(applied.operands) == 3 + len(more)  # a constant mask is none
    if way is heads_repeated:
        assert applied.operands[1] == f"float32[{B},{T},2,{H}]"  # keys as they were before


def test_attention_that_must_stay() -> None:
    def dropped(q, k, v):
        scores = jnp.einsum("btnh,bsnh->bnts", q, k)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, -1) * jnp.cos(scores), v)

    assert not optimize(dropped).explain(Q, K, V).applied

    def shown(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k), -1)
        return jnp.einsum("bnts,bsnh->btnh", weights, v), weights

    assert "within is used elsewhere, as a result" in str(optimize(shown).explain(Q, K, V).refused[0])
    squared = lambda q, k, v: products(q, k, v, lambda s: s * s)  # noqa: E731
    assert "mul lies between" in optimize(squared).explain(Q, K, V).refused[0].reason
    filled = lambda q, k, v: products(q, k, v, lambda s: jnp.where(like(causal(), s), s, 3.0))  # noqa: E731
    assert "something else than a very small number" in optimize(filled).explain(Q, K, V).refused[0].reason
    over_queries = lambda q, k, v: jnp.einsum(  # noqa: E731
        "bnts,bsnh->btnh", jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k), 2), v
    )
    assert "not summed over the axis of their softmax" in optimize(over_queries).explain(Q, K, V).refused[0].reason

    def both(q, k, v):
        weights = exponentials(q, k)
        return jnp.einsum("bnts,bsnh->bnth", weights, v) / jnp.sum(weights, 2).reshape(B, N, T, 1)

    assert not optimize(both).explain(Q, K, V).applied  # divided by the sums over queries

    def with_dropout(q, k, v, key):
        weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k), -1)
        kept = jax.random.bernoulli(key, 0.9, weights.shape)
        return jnp.einsum("bnts,bsnh->btnh", jnp.where(kept, weights / 0.9, 0.0), v)

    told = optimize(with_dropout).explain(Q, K, V, jax.random.key(0))
    assert not told.applied and "dropout of the weights" in told.refused[0].reason
    step = jax.grad(lambda q: jnp.sum(tril_and_inf(q, K, V)))
    assert not optimize(step).explain(Q).applied  # its backward pass uses the weights


X = jax.random.normal(jax.random.key(5), (B, T, 32))
GAIN, SHIFT = jax.random.normal(jax.random.key(6), (2, 32))


def mean(x):
    return jnp.mean(x, axis=-1, keepdims=True)


def variance(x):
    return mean(x**2) - mean(x) ** 2


LAYERS = {
    "rms-norm": [
        lambda x, w, b: x * jax.lax.rsqrt(mean(x * x) + 1e-6) * w[None, None],
        lambda x, w, b: w[None, None] * (x / jnp.sqrt(mean(x**2) + 1e-6)),
        lambda x, w, b: x * (jax.lax.rsqrt(mean(jnp.square(x)) + 1e-6) * jnp.broadcast_to(w[None, None], (1, 1, 32))),
    ],
    "rms-norm-from-one": [lambda x, w, b: x * jax.lax.rsqrt(mean(x * x) + 1e-6) * (1 + w)[None, None]],
    "layer-norm": [
        lambda x, w, b: (x - mean(x)) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 1e-5) * w[None, None] + b[None, None],
        lambda x, w, b: (x - mean(x)) * jax.lax.rsqrt(mean((x - mean(x)) ** 2) + 1e-5) * w[None, None] + b[None, None],
        lambda x, w, b: b[None, None] + w[None, None] * ((x - mean(x)) * jax.lax.rsqrt(variance(x) + 1e-5)),
    ],
    "layer-norm-without-bias": [
        lambda x, w, b: (x - mean(x)) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 1e-5) * w[None, None]
    ],
    "glu-silu": [lambda x, w, b: jax.nn.silu(x) * (x + 1), lambda x, w, b: (x + 1) * (x * jax.nn.sigmoid(x))],
    "glu-gelu_tanh": [lambda x, w, b: jax.nn.gelu(x) * (x + 1)],
    "glu-gelu": [lambda x, w, b: jax.nn.gelu(x, approximate=False) * (x + 1)],
    "bias-relu": [lambda x, w, b: jax.nn.relu(x + b[None, None]), lambda x, w, b: jnp.maximum(b[None, None] + x, 0)],
    "bias-gelu_tanh": [lambda x, w, b: jax.nn.gelu(x + b[None, None])],
}  # fmt: skip


@pytest.mark.parametrize(("rule", "fn"), [(rule, fn) for rule, ways in LAYERS.items() for fn in ways])
def test_norms_and_activations(rule: str, fn) -> None:
    fast = optimize(fn, prove=fn is LAYERS[rule][0])
    np.testing.assert_allclose(fast(X, GAIN, SHIFT), fn(X, GAIN, SHIFT), atol=3e-5, rtol=3e-5)
    assert fast.report is not None and [each.rule for each in fast.report.applied] == [rule], str(fast.report)


def test_in_a_narrow_dtype_the_gain_may_stand_on_either_side() -> None:
    x, w = X.astype(jnp.bfloat16), GAIN.astype(jnp.bfloat16)

    def llama(x, w):
        wide = x.astype(jnp.float32)
        return w[None, None] * (wide * jax.lax.rsqrt(mean(wide**2) + 1e-6)).astype(jnp.bfloat16)

    def flax(x, w):
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(mean(wide**2) + 1e-6) * w.astype(jnp.float32)[None, None]).astype(jnp.bfloat16)

    for fn in (llama, flax):
        fast = optimize(fn)
        np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (fast(x, w), fn(x, w))), rtol=2e-2, atol=1e-3)
        assert fast.report is not None and fast.report.count("rms-norm") == 1, str(fast.report)


def test_layers_of_flax() -> None:
    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norms = nnx.List([nnx.LayerNorm(32, rngs=rngs), nnx.RMSNorm(32, rngs=rngs)])
            self.attention = nnx.MultiHeadAttention(num_heads=N, in_features=32, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 32, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norms[0](x), mask=nnx.make_causal_mask(x[..., 0]))
            return x + self.down(jax.nn.gelu(self.up(self.norms[1](x))))

    block = Block(nnx.Rngs(0))
    fast = optimize(lambda block, x: block(x))
    np.testing.assert_allclose(fast(block, X), block(X), atol=2e-5)
    assert fast.report is not None
    found = sorted(each.rule for each in fast.report.applied)
    assert found == ["attention", "bias-gelu_tanh", "layer-norm", "rms-norm"], str(fast.report)
    assert any("attention" in each.where for each in fast.report.applied)


def transformer(params, x):
    for layer in params:
        h = x * jax.lax.rsqrt(mean(x * x) + 1e-6) * layer["norm"][None, None]
        q, k, v = (jnp.einsum("btd,dnh->btnh", h, layer[name]) for name in "qkv")
        x = x + jnp.einsum("btnh,nhd->btd", tril_and_inf(q, k, v), layer["o"])
        h = x * jax.lax.rsqrt(mean(x * x) + 1e-6) * layer["norm"][None, None]
        x = x + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
    return x


def parameters(layers: int) -> list[dict[str, jax.Array]]:
    shapes = {name: (32, N, H) for name in "qkv"} | {"o": (N, H, 32), "norm": (32,)}
    shapes |= {"gate": (32, 64), "up": (32, 64), "down": (64, 32)}
    keys = iter(jax.random.split(jax.random.key(9), layers * len(shapes)))
    return [{n: 0.2 * jax.random.normal(next(keys), s) for n, s in shapes.items()} for _ in range(layers)]


def test_a_transformer_and_its_gradient() -> None:
    params = parameters(2)
    loss = lambda params, x: jnp.mean(jnp.square(transformer(params, x)))  # noqa: E731
    fast = optimize(loss)
    found, wanted = (jax.jit(jax.value_and_grad(fn))(params, X) for fn in (fast, loss))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    assert fast.report is not None
    assert [fast.report.count(rule) for rule in ("attention", "rms-norm", "glu-silu")] == [2, 4, 2], str(fast.report)
    assert not fast.report.refused
    page = str(fast.report)
    assert "4 x rms-norm" in page and "test_optimize.py:" in page


ROWS = jax.random.normal(jax.random.key(11), (2, 5, 16))
TABLE = 0.3 * jax.random.normal(jax.random.key(12), (16, 4096))
OFFSET = 0.1 * jax.random.normal(jax.random.key(13), (4096,))
LABELS = jnp.array([[3, 4095, -1, 0, 17], [5, -4096, 2, 9999, 7]], jnp.int32)


def picked(x, labels):
    return jnp.take_along_axis(x, labels[..., None], -1)


def one_hot_loss(x, w, b, labels):
    hot = jax.nn.one_hot(labels, 4096, dtype=x.dtype)
    return -jnp.sum(hot * jax.nn.log_softmax(x @ w), -1)


def by_optax(x, w, b, labels):
    import optax

    return optax.softmax_cross_entropy_with_integer_labels(x @ w + b[None, None], labels)


def by_hand(x, w, b, labels):
    logits = jnp.einsum("btd,vd->btv", x, w.T)
    logits = logits - jnp.max(logits, -1, keepdims=True)
    return -picked(logits - jnp.log(jnp.sum(jnp.exp(logits), -1, keepdims=True)), labels)[..., 0]


LOSSES = [
    lambda x, w, b, labels: -picked(jax.nn.log_softmax(x @ w), labels),
    lambda x, w, b, labels: -picked(jax.nn.log_softmax(x @ w + b[None, None]), labels)[..., 0],
    lambda x, w, b, labels: jax.nn.logsumexp(x @ w, -1) - picked(x @ w, labels)[..., 0],
    one_hot_loss,
    by_optax,
    by_hand,
]


@pytest.mark.parametrize("loss", LOSSES, ids=["plain", "bias", "logsumexp", "one_hot", "optax", "by_hand"])
def test_losses_over_a_vocabulary(loss) -> None:
    fast = optimize(loss)
    found, wanted = fast(ROWS, TABLE, OFFSET, LABELS), loss(ROWS, TABLE, OFFSET, LABELS)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert np.isnan(wanted).any() == (loss is not one_hot_loss)
    assert fast.report is not None and [each.rule for each in fast.report.applied] == ["cross-entropy"]

    def total(loss):
        return lambda x, w, b: jnp.sum(jnp.nan_to_num(loss(x, w, b, LABELS)))

    slopes = [jax.grad(total(fn), (0, 1, 2))(ROWS, TABLE, OFFSET) for fn in (fast, loss)]
    for a, b in zip(*slopes, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_losses_that_must_stay() -> None:
    plain = LOSSES[0]
    told = optimize(plain).explain(ROWS, TABLE[:, :100], OFFSET[:100], LABELS)
    assert not told.applied and "100 columns" in told.refused[0].reason

    def shown(x, w, b, labels):
        chances = jax.nn.log_softmax(x @ w)
        return picked(chances, labels), jnp.max(chances)

    assert "within is used elsewhere" in optimize(shown).explain(ROWS, TABLE, OFFSET, LABELS).refused[0].reason

    def clipped(x, w, b, labels):
        return jnp.take_along_axis(jax.nn.log_softmax(x @ w), labels[..., None], -1, mode="clip")

    assert not optimize(clipped).explain(ROWS, TABLE, OFFSET, LABELS).applied
