"""`quantize` over trees of every kind: what is packed, what stays, what a model then computes, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import trustcore as tc
from tests.models.small import CONFIG, random_decoder, some_tokens
from tests.quant.samples import importance_of, mean_error, weights_of
from trustcore.errors import QuantizationError
from trustcore.models import Decoder
from trustcore.quant import QuantizedArray, quantize, report
from trustcore.quant.quantize import path_name


def layers(n=2, k=64):
    """A tree of dicts and lists."""
    return {
        "embedding": jnp.asarray(weights_of("gaussian", k, 24)),
        "layers": [
            {"up": jnp.asarray(weights_of("gaussian", k, 40, seed=i).T), "norm": {"scale": jnp.ones((k, k))}}
            for i in range(n)
        ],
        "bias": jnp.zeros(k),
        "ids": jnp.arange(k * k).reshape(k, k),
        "name": "x",
    }


def packed_paths(tree):
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, QuantizedArray))[0]
    return {path_name(path): leaf.format for path, leaf in found if isinstance(leaf, QuantizedArray)}


# ---- what is packed --------------------------------------------------------------------------------------------------


def test_matrices_are_packed_and_the_rest_stays():
    tree = layers()
    before = jax.tree.map(lambda x: x, tree)
    packed = quantize(tree, "q4_0")
    assert packed_paths(packed) == {"embedding": "q4_0", "layers.0.up": "q4_0", "layers.1.up": "q4_0"}
    assert packed["embedding"].transposed and packed["embedding"].shape == (24, 64)
    assert not packed["layers"][0]["up"].transposed and packed["layers"][0]["up"].shape == (64, 40)
    for kept in ("bias", "ids", "name"):
        assert packed[kept] is tree[kept]
    assert packed["layers"][1]["norm"]["scale"] is tree["layers"][1]["norm"]["scale"]
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, tree, before))  # the input is as it was


def test_numpy_arrays_dataclasses_and_bfloat16():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Layer:
        kernel: object
        table: object

    tree = (Layer(weights_of("gaussian", 32, 8).T, jnp.ones((8, 32), jnp.bfloat16)),)
    packed = quantize(tree, "q8_0")
    assert isinstance(packed[0], Layer)
    assert packed_paths(packed) == {"0.kernel": "q8_0", "0.table": "q8_0"}
    np.testing.assert_allclose(packed[0].table.dequantize(), 1, rtol=1e-3)


def test_blocks_that_do_not_divide_are_passed_over_by_default():
    tree = {"wide": jnp.ones((256, 4)), "narrow": jnp.ones((64, 4))}
    assert packed_paths(quantize(tree, "q4_k")) == {"wide": "q4_k"}


def test_formats_by_pattern_and_by_function():
    tree = layers()
    patterns = {"layers.1.*": None, "embedding": "q8_0", "*": "q5_1"}
    assert packed_paths(quantize(tree, patterns)) == {"embedding": "q8_0", "layers.0.up": "q5_1"}
    by_size = quantize(tree, lambda path, array: "bf16" if array.shape[1] == 40 else None)
    assert packed_paths(by_size) == {"layers.0.up": "bf16", "layers.1.up": "bf16"}


def test_where_and_transposed_decide():
    tree = layers()
    packed = quantize(tree, "q4_1", where=lambda path, array: path in ("layers.0.norm.scale", "layers.0.up"))
    assert packed_paths(packed) == {"layers.0.norm.scale": "q4_1", "layers.0.up": "q4_1"}
    stack = {"kernel": jnp.ones((3, 5, 64))}  # a stack of matrices [N, K]
    packed = quantize(stack, "q4_1", where=lambda path, array: True, transposed=lambda path, array: True)
    assert packed["kernel"].shape == (3, 5, 64) and packed["kernel"].transposed
    np.testing.assert_array_equal(packed["kernel"].dequantize(), 1)


def test_packed_matrices_stay_unless_they_are_to_be_packed_anew():
    tree = layers()
    once = quantize(tree, {"layers.0.*": "q8_0"})
    both = quantize(once, "q4_0")
    assert packed_paths(both) == {"embedding": "q4_0", "layers.0.up": "q8_0", "layers.1.up": "q4_0"}
    assert both["layers"][0]["up"] is once["layers"][0]["up"]
    anew = quantize(both, "q4_0", requantize=True)
    assert set(packed_paths(anew).values()) == {"q4_0"}
    assert anew["embedding"] is both["embedding"]  # it was in that format
    direct = QuantizedArray.quantize(once["layers"][0]["up"].dequantize(), "q4_0")
    np.testing.assert_array_equal(anew["layers"][0]["up"].to_blocks(), direct.to_blocks())
    again = quantize({"table": quantize({"table": jnp.ones((4, 64))}, "q8_0")["table"]}, "q4_0", requantize=True)
    assert again["table"].transposed and again["table"].shape == (4, 64)


def test_an_array_in_two_places_is_packed_once():
    shared = jnp.asarray(weights_of("gaussian", 64, 8).T)
    packed = quantize({"a": shared, "b": shared}, "q4_0")
    assert packed["a"] is packed["b"]


def test_importance_goes_to_its_path():
    weights, importance = weights_of("gaussian", 256, 32), importance_of(256)
    tree = {"a": jnp.asarray(weights.T), "b": jnp.asarray(weights.T)}
    packed = quantize(tree, "q3_k", importance={"a": importance})
    errors = {p: mean_error(weights, np.asarray(packed[p].dequantize()).T, importance) for p in "ab"}
    assert errors["a"] < 0.8 * errors["b"]
    direct = QuantizedArray.quantize(weights.T, "q3_k", importance=importance)
    np.testing.assert_array_equal(packed["a"].to_blocks(), direct.to_blocks())


# ---- models ----------------------------------------------------------------------------------------------------------


def test_a_decoder_computes_almost_the_same():
    model, tokens = random_decoder(), some_tokens()
    logits = np.asarray(model(tokens))
    errors = {}
    for name in ("q8_0", "q5_1", "q4_0"):
        packed = tc.quantize(model, name)
        assert isinstance(packed, Decoder) and packed.config == CONFIG
        assert set(packed_paths(packed).values()) == {name} and len(packed_paths(packed)) == 16
        found = np.asarray(jax.jit(lambda m, t: m(t))(packed, tokens))
        errors[name] = np.sqrt(np.mean((found - logits) ** 2) / np.mean(logits**2))
        dense = jax.tree.map(
            lambda leaf: leaf.dequantize() if isinstance(leaf, QuantizedArray) else leaf,
            packed,
            is_leaf=lambda leaf: isinstance(leaf, QuantizedArray),
        )
        np.testing.assert_allclose(found, dense(tokens), atol=2e-4 * np.abs(logits).max())
    assert errors["q8_0"] < 0.03 and errors["q5_1"] < 0.15 and errors["q8_0"] < errors["q5_1"] < errors["q4_0"] < 0.4
    np.testing.assert_array_equal(model(tokens), logits)  # the model is as it was


def test_any_nnx_module():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(64, 48, rngs=rngs)
            self.router = nnx.Linear(64, 4, rngs=rngs)
            self.norm = nnx.LayerNorm(64, rngs=rngs)

        def __call__(self, x):
            return x @ self.inner.kernel.get_value()

    net = Net(nnx.Rngs(0))
    packed = quantize(net, "q8_0")
    assert packed_paths(packed) == {"inner.kernel": "q8_0"}
    x = jnp.ones((2, 64))
    np.testing.assert_allclose(packed(x), net(x), atol=0.02)
    gradient = jax.grad(lambda x: packed(x).sum())(x)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: net(x).sum())(x), atol=0.02)


def test_under_jit():
    tree = {"a": jnp.asarray(weights_of("gaussian", 64, 8).T)}
    np.testing.assert_array_equal(
        jax.jit(lambda t: quantize(t, "q4_0"))(tree)["a"].to_blocks(), quantize(tree, "q4_0")["a"].to_blocks()
    )


# ---- report ----------------------------------------------------------------------------------------------------------


def test_the_report_says_what_it_cost():
    tree = layers(1)
    packed = quantize(tree, {"embedding": "q8_0", "*": "q4_0"})
    found = {leaf.path: leaf for leaf in report(tree, packed).leaves}
    assert set(found) == {"embedding", "layers.0.up", "layers.0.norm.scale", "bias"}  # no integers, no names
    up, before = found["layers.0.up"], np.asarray(tree["layers"][0]["up"], np.float64)
    error = np.asarray(packed["layers"][0]["up"].dequantize(), np.float64) - before
    assert (up.format, up.shape, up.bits_per_weight) == ("q4_0", (64, 40), 4.5)
    assert up.sqnr_db == pytest.approx(10 * np.log10((before**2).sum() / (error**2).sum()), abs=1e-3)
    assert up.max_error == pytest.approx(np.abs(error).max(), rel=1e-5)
    assert found["embedding"].bits_per_weight == 8.5 and found["embedding"].sqnr_db > 40 > up.sqnr_db > 18
    assert (found["bias"].format, found["bias"].sqnr_db, found["bias"].max_error) == ("float32", np.inf, 0)
    whole = report(tree, packed)
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in found.items()}
    expected = sum(found[p].bits_per_weight * n for p, n in sizes.items()) / sum(sizes.values())
    assert whole.bits_per_weight == pytest.approx(expected)
    lines = str(whole).splitlines()
    assert len(lines) == 6 and "layers.0.up" in lines[2] + lines[3] + lines[4] and "bits a weight in all" in lines[-1]


def test_a_report_on_tiny_zero_and_empty_weights():
    tree = {"tiny": jnp.full((32, 2), 1e-30), "zero": jnp.zeros((32, 2)), "empty": jnp.zeros((32, 0))}
    leaves = {leaf.path: leaf for leaf in report(tree, jax.tree.map(lambda x: x * 0.5, tree)).leaves}
    assert leaves["tiny"].sqnr_db == pytest.approx(10 * np.log10(4), abs=1e-3)
    assert leaves["zero"].sqnr_db == leaves["empty"].sqnr_db == np.inf


def test_trees_that_do_not_match_are_named():
    with pytest.raises(QuantizationError) as error:
        report({"a": jnp.ones(2), "b": jnp.ones(2)}, {"b": jnp.ones(3), "c": jnp.ones(2)})
    assert "a is missing; c was not there before; b was [2] and is [3]" in str(error.value)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_all_faults_come_at_once_with_their_paths():
    tree = {
        "odd": jnp.ones((40, 4)),
        "vector": jnp.ones(32),
        "whole": jnp.ones((32, 32), jnp.int32),
        "abstract": jax.ShapeDtypeStruct((32, 4), jnp.float32),
        "word": "x",
        "fine": jnp.ones((32, 4)),
    }
    with pytest.raises(QuantizationError) as error:
        quantize(tree, {"fine": "q9_9", "other*": "q8_0", "*": "q4_0"}, where=lambda p, a: True, importance={"no": 1})
    message = str(error.value)
    for expected in (
        "pattern 'other*' matches no path (paths look like abstract, fine, odd)",
        "importance 'no' is no path of the tree",
        "odd: K=40 is not a multiple of q4_0's block of 32",
        "vector: it is no float matrix but float32[32]; leave it out by `where`",
        "whole: it is no float matrix but int32[32, 32]",
        "abstract: it is abstract; load or initialize the weights first",
        "word: it is no float matrix but str",
        "fine: format 'q9_9' has no encoder; those with one: bf16",
    ):
        assert expected in message


def test_every_matrix_with_a_nan_is_named():
    bad = jnp.ones((32, 4)).at[3, 1].set(jnp.nan)
    with pytest.raises(QuantizationError, match=r"first: q4_0: 1 of .* second: q4_0: 1 of"):
        quantize({"first": bad, "fine": jnp.ones((32, 4)), "second": bad + 0}, "q4_0")


def test_nothing_to_pack_is_an_error():
    with pytest.raises(QuantizationError, match="nothing to pack: a: K=40 is not a multiple of q4_0's block of 32"):
        quantize({"a": jnp.ones((40, 4))}, "q4_0")
    with pytest.raises(QuantizationError, match="nothing to pack: of 1 leaves, `where` and `format` select none"):
        quantize({"a": jnp.ones(40)}, "q4_0")
    with pytest.raises(QuantizationError, match="kernel: it is abstract"):
        quantize(Decoder(CONFIG), "q4_0")


def test_an_unknown_format_is_refused_where_everything_is_packed_already():
    tree = quantize({"w": np.ones((64, 8), np.float32)}, "q8_0")
    for format in ("q9", {"*": "q9"}):
        with pytest.raises(QuantizationError, match="format 'q9' has no encoder; those with one: bf16"):
            quantize(tree, format)
