"""`capture` over functions of every kind: which products are found, and what goes into the observers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.small import CONFIG, random_decoder, some_tokens
from trustcore.errors import QuantizationError
from trustcore.quant import quantize
from trustcore.quant.calibration import Hessian, MeanSquare, MinMax, capture


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def mean_square(x):
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return (x * x).mean(0)


def statistics(fn, params, *batch, observer=None, **options):
    collect = capture(fn, params, observer or MeanSquare(), **options)
    return collect.finish(collect(*batch))


X = array(5, 3, 8, seed=9)
W = array(8, 6)


def doubled(w):
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, g))
    return product


FORMS = {
    "matmul": lambda p, x: x @ p["w"],
    "einsum": lambda p, x: jnp.einsum("bti,io->obt", x, p["w"]),
    "weight first": lambda p, x: jnp.einsum("io,bti->bto", p["w"], x),
    "dot of a cast": lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
    "transposed and back": lambda p, x: jax.lax.dot_general(x, p["w"].T, (((2,), (1,)), ((), ()))),
    "reshaped": lambda p, x: jnp.einsum("btxy,xyo->bto", x.reshape(5, 3, 2, 4), p["w"].reshape(2, 4, 6)),
    "heads": lambda p, x: jnp.einsum("bti,inh->btnh", x, p["w"].reshape(8, 3, 2)),
    "jit": lambda p, x: jax.jit(jnp.matmul)(x, p["w"]),
    "checkpoint": lambda p, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(p["w"], x),
    "custom_vjp": lambda p, x: doubled(p["w"])(x, p["w"]),
    "scan, not over it": lambda p, x: jax.lax.scan(lambda c, x: (c, x @ p["w"]), 0, x)[1],
    "vmap": lambda p, x: jax.vmap(lambda x: x @ p["w"])(x),
    "halves": lambda p, x: (x @ p["w"][:, :3], x @ p["w"][:, 3:]),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_input_of_a_product_is_found(form):
    found = statistics(FORMS[form], {"w": W}, X)
    expected = mean_square(X.astype(jnp.bfloat16).astype(jnp.float32) if "cast" in form else X)
    np.testing.assert_allclose(found["w"], expected, rtol=1e-5)


def test_batches_add_up_and_the_order_does_not_matter():
    x, other = array(4, 3, 8), 5 * array(7, 3, 8, seed=1)
    collect = capture(lambda p, x: x @ p["w"], {"w": W}, {"square": MeanSquare(), "hessian": Hessian()})
    both = collect.finish(collect(other, state=collect(x)))["w"]
    rows = np.concatenate([np.asarray(x).reshape(-1, 8), np.asarray(other).reshape(-1, 8)]).astype(np.float64)
    np.testing.assert_allclose(both["square"], mean_square(rows), rtol=1e-5)
    np.testing.assert_allclose(both["hessian"].mean, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)
    assert both["hessian"].rows == len(rows)
    merged = collect.finish(collect.merge(collect(other), collect(x)))["w"]
    np.testing.assert_allclose(merged["square"], both["square"], rtol=1e-6)


def test_a_weight_that_is_used_twice_sees_both_inputs():
    w = array(8, 8)
    found = statistics(lambda p, x: (x @ p["w"]) @ p["w"], {"w": w}, X)
    expected = (mean_square(X) + mean_square(np.asarray(X @ w))) / 2
    np.testing.assert_allclose(found["w"], expected, rtol=1e-5)


@pytest.mark.parametrize(("remat", "reverse"), [(True, False), (False, True)])
def test_layers_of_a_scan_have_their_own_statistics(remat, reverse):
    layers = {"up": array(3, 8, 12), "down": array(3, 12, 8, seed=1), "shared": array(8, 8, seed=2)}

    def layer(x, p):
        return x + jnp.tanh(x @ p["up"]) @ p["down"] + x @ layers["shared"], None

    def fn(p, x):
        stacked = {name: p[name] for name in ("up", "down")}

        def layer(x, q):
            return x + jnp.tanh(x @ q["up"]) @ q["down"] + x @ p["shared"], None

        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, stacked, reverse=reverse)[0]

    collect = capture(fn, layers, {"square": MeanSquare(), "range": MinMax(per_channel=True)})
    found = collect.finish(collect(X, state=collect(2 * X)))
    up, down = [None] * 3, [None] * 3
    for start in (X, 2 * X):
        x = start
        for i in range(2, -1, -1) if reverse else range(3):
            hidden = jnp.tanh(x @ layers["up"][i])
            for into, value in ((up, x), (down, hidden)):
                rows = np.asarray(value).reshape(-1, value.shape[-1])
                into[i] = rows if into[i] is None else np.concatenate([into[i], rows])
            x = x + hidden @ layers["down"][i] + x @ layers["shared"]
    assert found["up"]["square"].shape == (3, 8) and found["down"]["square"].shape == (3, 12)
    for i in range(3):
        np.testing.assert_allclose(found["up"]["square"][i], mean_square(up[i]), rtol=1e-4)
        np.testing.assert_allclose(found["down"]["square"][i], mean_square(down[i]), rtol=1e-4)
        np.testing.assert_allclose(found["down"]["range"].high[i], down[i].max(0), rtol=1e-5)
    np.testing.assert_allclose(found["shared"]["square"], mean_square(np.concatenate(up)), rtol=1e-4)


def test_layers_that_are_indexed_and_experts():
    layers = {"w": array(3, 8, 8), "experts": array(4, 8, 6, seed=1)}

    def fn(p, x):
        for i in range(3):
            x = jnp.sin(x @ p["w"][i])
        return jnp.einsum("etd,edf->etf", jnp.stack([x.reshape(-1, 8) * e for e in range(4)]), p["experts"])

    found = statistics(fn, layers, X)
    x = X
    for i in range(3):
        np.testing.assert_allclose(found["w"][i], mean_square(x), rtol=1e-4)
        x = jnp.sin(x @ layers["w"][i])
    for e in range(4):
        np.testing.assert_allclose(found["experts"][e], mean_square(e * x), rtol=1e-4)


def test_any_nnx_module():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(8, 16, rngs=rngs)
            self.attend = nnx.MultiHeadAttention(2, 16, rngs=rngs, decode=False)

        def __call__(self, x):
            return self.attend(nnx.relu(self.first(x)))

    net = Net(nnx.Rngs(0))
    found = statistics(None, net, X, where=lambda path, leaf: path.endswith("kernel"))
    hidden = nnx.relu(net.first(X))
    np.testing.assert_allclose(found["first.kernel"], mean_square(X), rtol=1e-5)
    np.testing.assert_allclose(found["attend.query.kernel"], mean_square(hidden), rtol=1e-5)
    assert found["attend.out.kernel"].shape == (16,)  # heads and their sizes are summed over together


@pytest.mark.parametrize("format", [None, "q8_0"])
def test_a_decoder(format):
    model, tokens = random_decoder(), some_tokens()
    model = model if format is None else quantize(model, format)
    found = statistics(None, model, tokens)
    assert len(found) == 15 and "embedding.table" not in found  # it is looked up only
    block = model.blocks[0]
    x = model.embedding(tokens)
    np.testing.assert_allclose(
        found["blocks.0.attention.query.kernel"], mean_square(block.attention_norm(x)), rtol=1e-4
    )
    np.testing.assert_array_equal(found["blocks.0.mlp.gate.kernel"], found["blocks.0.mlp.up.kernel"])
    hidden, _ = model.hidden_states(tokens)
    np.testing.assert_allclose(found["output.kernel"], mean_square(hidden), rtol=2e-4)


def test_a_table_that_is_the_output_layer_too():
    model, tokens = random_decoder(dataclasses.replace(CONFIG, tied=True)), some_tokens()
    found = statistics(None, model, tokens, where=["embedding.table"])
    np.testing.assert_allclose(found["embedding.table"], mean_square(model.hidden_states(tokens)[0]), rtol=1e-4)


def test_paths_choose_and_the_rest_stays_packed():
    model, tokens = quantize(random_decoder(), "q8_0"), some_tokens()
    path = "blocks.1.mlp.down.kernel"
    collect = capture(None, model, Hessian(), where=[path])
    found = collect.finish(collect(tokens))
    assert list(found) == [path] and found[path].mean.shape == (96, 96) and found[path].rows == tokens.size


@pytest.mark.parametrize(
    ("fn", "params", "message"),
    [
        (lambda p, x: x * p["w"][None, None, :, 0], {"w": W}, "w takes part in no product"),
        (lambda p, x: x @ (p["w"] * 2), {"w": W}, "w takes part in no product"),
        (lambda p, x: x[..., :4] @ p["w"][:4], {"w": W}, "w takes part in no product"),
        (lambda p, x: jax.lax.cond(True, lambda: x @ p["w"], lambda: x @ p["w"]), {"w": W}, "while_loop, cond"),
        (lambda p, x: (x @ p["w"]) @ p["w"].T, {"w": W}, "sum over its axes"),
        (lambda p, x: x @ p["w"][0], {"w": array(2, 8, 6)}, "no product at \\(1,\\)"),
    ],
)
def test_what_cannot_be_found_is_told(fn, params, message):
    with pytest.raises(QuantizationError, match=message):
        statistics(fn, params, X, where=["w"])


def test_paths_that_are_not_there():
    with pytest.raises(QuantizationError, match="v is no path of the tree; paths look like w"):
        capture(lambda p, x: x @ p["w"], {"w": W}, MeanSquare(), where=["v"])
    with pytest.raises(QuantizationError, match="selects none of 1 leaves"):
        capture(lambda p, x: x @ p["w"], {"w": W}, MeanSquare(), where=lambda path, leaf: False)
