"""Adapters against the merged matrix and finite differences; over float and packed weights; sets of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

import trustcore
from tests.models.small import random_decoder, some_tokens
from tests.nn.adapters import moved
from trustcore.errors import ModelError
from trustcore.models import scan_layers
from trustcore.nn import (
    AdaptedWeight,
    Adapter,
    Embedding,
    Linear,
    adapter_filter,
    adapters_of,
    add_adapters,
    combine_adapters,
    merge_adapters,
    with_adapters,
    without_adapters,
)
from trustcore.ops.linear import linear
from trustcore.quant import QuantizedArray

KEY = jax.random.key(0)
KINDS = pytest.mark.parametrize("magnitude", (False, True), ids=("lora", "dora"))


def by_definition(base, adapter):
    """W' in float64, by the equations."""
    base, down, up = (np.asarray(part, np.float64) for part in (base, adapter.down, adapter.up))
    whole = base + adapter.scale * down @ up
    if adapter.magnitude is None:
        return whole
    return np.asarray(adapter.magnitude, np.float64) * whole / np.linalg.norm(whole, axis=0)


@KINDS
@pytest.mark.parametrize("packed", (False, True), ids=("float", "packed"))
def test_a_product_is_that_of_the_merged_matrix(packed, magnitude):
    rng = np.random.default_rng(0)
    base = jnp.asarray(rng.standard_normal((64, 24)), jnp.float32)
    base = QuantizedArray.quantize(base, "q8_0") if packed else base
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
    tree = add_adapters({"kernel": base}, rank=4, alpha=6, magnitude=magnitude, key=KEY)
    np.testing.assert_allclose(linear(x, tree["kernel"]), linear(x, base), atol=2e-5)  # nothing is added yet
    tree = with_adapters(tree, moved(adapters_of(tree)))
    adapter = tree["kernel"].adapter
    assert adapter.scale == 1.5 and adapter.rank == 4 and (adapter.magnitude is not None) == magnitude
    expected = by_definition(base.dequantize() if packed else base, adapter)
    np.testing.assert_allclose(linear(x, tree["kernel"]), np.asarray(x, np.float64) @ expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tree["kernel"].dequantize(), expected, rtol=1e-4, atol=1e-5)
    if packed:
        with pytest.raises(ModelError, match=r"kernel is packed: QuantizedArray.q8_0.*pass requantize=True"):
            merge_adapters(tree)
        merged = merge_adapters(tree, requantize=True)["kernel"]
        assert merged.format == "q8_0"
        np.testing.assert_allclose(merged.dequantize(), expected, atol=0.03)
    else:
        np.testing.assert_allclose(merge_adapters(tree)["kernel"], expected, rtol=1e-4, atol=1e-5)
    assert without_adapters(tree)["kernel"] is base


@KINDS
def test_gradients_reach_the_adapter_and_not_the_base(magnitude):
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        base, x = (jnp.asarray(rng.standard_normal(shape)) for shape in ((6, 5), (3, 6)))
        tree = add_adapters({"w": base}, rank=2, magnitude=magnitude, key=KEY)
        tree = with_adapters(tree, moved(adapters_of(tree)))
        there = tree["w"].adapter
        norm = np.linalg.norm(np.asarray(base + there.scale * there.down @ there.up), axis=0)

        def total(adapters, x):
            return jnp.sum(jnp.sin(linear(x, with_adapters(tree, adapters)["w"])))

        def held(adapters, x):
            """The same with |V| written as the constant that gradients take it for."""
            a = adapters["w"]
            y = x @ (base + a.scale * a.down @ a.up)
            return jnp.sum(jnp.sin(y if a.magnitude is None else y * jnp.broadcast_to(a.magnitude / norm, y.shape)))

        adapters = adapters_of(tree)
        check_grads(held, (adapters, x), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)
        found, expected = (jax.jit(jax.grad(f, (0, 1)))(adapters, x) for f in (total, held))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), found, expected)
        assert all(bool(jnp.all(leaf != 0)) for leaf in jax.tree.leaves(found))
        whole = jax.grad(lambda tree: jnp.sum(jnp.sin(linear(x, tree["w"]))))(tree)
        assert not np.any(whole["w"].base)
        both = jax.vmap(total, in_axes=(None, 0))(adapters, jnp.stack([x, 2 * x]))
        np.testing.assert_allclose(both[0], total(adapters, x), atol=1e-12)
        np.testing.assert_allclose(jax.checkpoint(total)(adapters, x), both[0], atol=1e-12)
        assert jax.eval_shape(total, adapters, x).shape == ()


@KINDS
def test_a_decoder_trains_its_adapters_alone(magnitude):
    model = trustcore.quantize(random_decoder(), {"blocks.0.*.kernel": "q8_0", "*": None})
    tokens = some_tokens()
    adapted = add_adapters(model, rank=2, magnitude=magnitude, key=KEY)
    assert len(adapters_of(adapted)) == 14  # seven matrices a layer; neither embedding nor output
    np.testing.assert_allclose(adapted(tokens), model(tokens), atol=2e-5)

    @jax.jit
    def step(adapters):
        def loss(adapters):
            return jnp.mean(jnp.square(with_adapters(adapted, adapters)(tokens)))

        value, gradients = jax.value_and_grad(loss)(adapters)
        return value, jax.tree.map(lambda a, g: a - 1.0 * g, adapters, gradients)

    adapters = adapters_of(adapted)
    values = []
    for _ in range(4):
        value, adapters = step(adapters)
        values.append(float(value))
    assert values == sorted(values, reverse=True) and values[-1] < 0.98 * values[0]
    trained = with_adapters(adapted, adapters)
    scanned = scan_layers(trained)  # layer 0 is packed
    np.testing.assert_allclose(scanned(tokens), trained(tokens), atol=2e-5)
    mask = jax.tree_util.tree_map_with_path(adapter_filter, adapted)
    assert sum(jax.tree.leaves(mask)) == (3 if magnitude else 2) * 14


def test_layers_that_scan_with_adapters():
    model = random_decoder()
    adapted = add_adapters(model, rank=2, where=["*.query.kernel", "*.down.kernel"], key=KEY)
    names = [f"blocks.{i}.{name}.kernel" for i in (0, 1) for name in ("attention.query", "mlp.down")]
    assert sorted(adapters_of(adapted)) == names
    adapted = with_adapters(adapted, moved(adapters_of(adapted)))
    scanned = scan_layers(adapted)
    assert scanned.blocks.repeats == (2,)
    np.testing.assert_allclose(scanned(some_tokens()), adapted(some_tokens()), atol=2e-5)


def test_tables_and_sets_of_adapters():
    tree = {"table": jnp.asarray(np.random.default_rng(0).standard_normal((7, 4)), jnp.float32)}
    made = (add_adapters(tree, rank=rank, where=["table"], key=KEY) for rank in (2, 1))
    first, second = (moved(adapters_of(each), seed) for seed, each in enumerate(made))
    one, other = (each["table"].down @ each["table"].up for each in (first, second))
    layer = Embedding(7, 4)
    layer.table.set_value(with_adapters(tree, combine_adapters(first, second, weights=(1.0, -0.5)))["table"])
    merged = np.asarray(tree["table"] + one - 0.5 * other)
    np.testing.assert_allclose(layer(jnp.asarray([3, 6, 3])), merged[np.array([3, 6, 3])], atol=1e-5)
    x = jnp.ones((2, 4))
    np.testing.assert_allclose(layer.unembed(x), np.ones((2, 4)) @ merged.T, atol=1e-5)
    switched = with_adapters(with_adapters(tree, first), second)
    np.testing.assert_allclose(switched["table"].dequantize(), tree["table"] + other, atol=1e-6)


def test_what_adapters_cannot_do():
    layer = Linear(4, 6, rngs=nnx.Rngs(0))
    adapted = add_adapters(layer, rank=2, magnitude=True, key=KEY)
    assert repr(adapted.kernel.get_value()) == "AdaptedWeight(DoRA, rank 2, [4, 6])"
    with pytest.raises(ModelError, match="rank is 0; it must be positive"):
        add_adapters(layer, rank=0, key=KEY)
    with pytest.raises(ModelError, match="no leaf is selected; the paths are such as kernel"):
        add_adapters(layer, rank=2, where=["*.query"], key=KEY)
    with pytest.raises(ModelError, match="kernel has an adapter"):
        add_adapters(adapted, rank=2, key=KEY)
    with pytest.raises(ModelError, match="kernel is no matrix that is there"):
        add_adapters(Linear(4, 6), rank=2, where=["kernel"], key=KEY)
    wrong = {
        "kernal": Adapter(jnp.zeros((4, 2)), jnp.zeros((2, 6))),
        "kernel": Adapter(jnp.zeros((4, 2)), jnp.zeros((2, 5))),
    }
    with pytest.raises(ModelError, match=r"kernal is not there \(nearest: kernel\); kernel is \[4, 6\], and up of its"):
        with_adapters(layer, wrong)
    with pytest.raises(ModelError, match="2 weights for 1 sets"):
        combine_adapters({}, weights=(1, 2))
    with pytest.raises(ModelError, match="kernel has a magnitude; such adapters do not add"):
        combine_adapters(adapters_of(adapted))
    with pytest.raises(ModelError, match="take: the adapter has a magnitude"):
        adapted.kernel.get_value().take(jnp.asarray([0]))
    assert isinstance(adapted.kernel.get_value(), AdaptedWeight)
