"""Rotation: the function stays, outliers go; Hadamard matrices; structure that does not fit is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trustcore as tc
from tests.models.small import CONFIG, random_decoder, some_tokens
from tests.quant.plain_model import LAST, NORM, STREAM, UP, D, apply, plain_model, tokens
from trustcore.errors import QuantizationError
from trustcore.models import decoder_links, decoder_stream, untie
from trustcore.quant import QuantizedArray, quantize, report
from trustcore.quant.folding import Link, Stream, fold_norms, rotate
from trustcore.quant.folding.orthogonal import hadamard, random_hadamard, random_orthogonal
from trustcore.quant.folding.structure import Leaves, scale_link

# ---- matrices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", (1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 44, 56, 60, 68, 76, 84, 128, 384, 576, 1536))
def test_hadamard_matrices_are_orthogonal_in_integers(size):
    matrix = hadamard(size).astype(np.float64)  # exact, and fast
    assert set(np.unique(matrix)) <= {-1, 1}
    np.testing.assert_array_equal(matrix @ matrix.T, size * np.eye(size))


@pytest.mark.parametrize("size", (3, 6, 22, 92, 116))
def test_sizes_without_a_construction_are_refused(size):
    with pytest.raises(QuantizationError, match=f'no construction of size {size}; .* instead: "orthogonal"'):
        hadamard(size)


@pytest.mark.parametrize("make", (random_hadamard, random_orthogonal))
def test_random_matrices_are_orthogonal_and_follow_their_seed(make):
    a, b = make(48, seed=1), make(48, seed=2)
    np.testing.assert_allclose(a @ a.T, np.eye(48), atol=1e-13)
    np.testing.assert_array_equal(a, make(48, seed=1))
    assert np.abs(a - b).max() > 0.1


def test_random_orthogonal_matrices_are_uniform():
    """Mean zero and variance 1 / n in every place, which QR without the signs does not give."""
    drawn = np.stack([random_orthogonal(4, seed=i) for i in range(3000)])
    assert np.abs(drawn.mean(0)).max() < 4 * 0.5 / np.sqrt(3000)
    np.testing.assert_allclose((drawn**2).mean(0), 0.25, atol=0.03)


# ---- the function stays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", ("hadamard", "orthogonal"))
@pytest.mark.parametrize(
    "changes", ({}, {"tied": True}, {"qkv_bias": True, "out_bias": True, "mlp_bias": True}), ids=str
)
def test_a_decoder_stays_the_same_function(rotation, changes):
    model = with_random_vectors(random_decoder(dataclasses.replace(CONFIG, **changes)))
    untied, t = untie(model), some_tokens()
    rotated = rotate(untied, decoder_stream(untied), rotation=rotation, values=rotation)
    expected = np.asarray(model(t))
    np.testing.assert_allclose(jax.jit(lambda m, t: m(t))(rotated, t), expected, atol=2e-5 * np.abs(expected).max())
    block, before = rotated.blocks[1], model.blocks[1]
    for name in ("query", "value", "out"):  # and it is another model
        new, old = (getattr(b.attention, name).kernel.get_value() for b in (block, before))
        assert np.abs(new - old).max() > 0.1
    np.testing.assert_array_equal(block.mlp_norm.weight.get_value(), 1)
    np.testing.assert_array_equal(rotated.norm.weight.get_value(), 1)
    assert (model.output is None) == model.config.tied  # the model is as it was


@pytest.mark.slow
@pytest.mark.parametrize("rotation", ("hadamard", "orthogonal"))
def test_a_real_model_stays_the_same_function(smollm2_path, rotation):
    """The reference that qualities of formats are measured on: the same logits, weights on no grid."""
    model = untie(tc.load(smollm2_path, dtype="float32"))
    rotated = rotate(model, decoder_stream(model), rotation=rotation, values=rotation)
    t = jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 64)), jnp.int32)
    run = jax.jit(lambda m, t: m(t))
    expected = np.asarray(run(model, t))
    np.testing.assert_allclose(run(rotated, t), expected, atol=2e-5 * np.abs(expected).max())
    grid = quantize(model, "q4_1", where=lambda path, array: path == "blocks.3.mlp.up.kernel")
    spread = quantize(rotated, "q4_1", where=lambda path, array: path == "blocks.3.mlp.up.kernel")
    errors = [report(a, b).leaves for a, b in ((model, grid), (rotated, spread))]
    on_grid, off_grid = ({leaf.path: leaf.sqnr_db for leaf in leaves}["blocks.3.mlp.up.kernel"] for leaves in errors)
    assert on_grid > 50 > 25 > off_grid


def with_random_vectors(model):
    """Gains of all norms and all biases drawn at random."""
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    drawn = [
        jax.random.uniform(key, leaf.shape, minval=0.5, maxval=1.5) if leaf.ndim == 1 else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def test_a_plain_dict_stays_the_same_function():
    tree = plain_model()
    rotated = rotate(tree, STREAM, values=None)
    expected = apply(tree, tokens())
    np.testing.assert_allclose(apply(rotated, tokens()), expected, atol=2e-5 * np.abs(expected).max())
    assert np.abs(rotated["head"] - tree["head"]).max() > 0.1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0, 3))
def test_any_orthogonal_matrix_keeps_the_function(seed, outliers):
    tree = plain_model(seed % 1000, outliers)
    rotated = rotate(tree, STREAM, rotation=random_orthogonal(D, seed=seed))
    expected = apply(tree, tokens(20))
    np.testing.assert_allclose(apply(rotated, tokens(20)), expected, atol=1e-4 * np.abs(expected).max())


def test_gains_fold_by_themselves():
    tree = plain_model()
    folded = fold_norms(tree, [NORM, LAST])
    np.testing.assert_array_equal(folded["last"], 1)
    np.testing.assert_allclose(folded["head"], tree["head"] * tree["last"][:, None], rtol=1e-6)
    expected = apply(tree, tokens())
    np.testing.assert_allclose(apply(folded, tokens()), expected, atol=1e-5 * np.abs(expected).max())


def test_a_table_that_is_also_the_output_rotates_where_there_is_no_gain_to_fold():
    model, t = random_decoder(dataclasses.replace(CONFIG, tied=True)), some_tokens()
    np.testing.assert_array_equal(model.norm.weight.get_value(), 1)
    rotated = rotate(model, decoder_stream(model))
    assert rotated.output is None
    np.testing.assert_allclose(rotated(t), model(t), atol=1e-5)


def test_outliers_spread_so_that_packing_costs_less():
    """Weights whose input channels differ by orders of magnitude, as behind a norm with a wild gain."""
    tree = plain_model(outliers=2.0)
    before, after = (
        quantize(t, "q4_0", where=lambda p, a: p.startswith("layer.") and a.ndim == 2)
        for t in (fold_norms(tree, [NORM]), rotate(tree, STREAM))
    )
    exact = np.asarray(apply(tree, tokens()))
    errors = [np.mean((np.asarray(decoded(t)) - exact) ** 2) for t in (before, after)]
    assert errors[1] < 0.8 * errors[0]  # measured: 0.63


def decoded(tree):
    dense = jax.tree.map(
        lambda w: w.dequantize() if isinstance(w, QuantizedArray) else w,
        tree,
        is_leaf=lambda w: isinstance(w, QuantizedArray),
    )
    return apply(dense, tokens())


@pytest.mark.parametrize("changes", ({}, {"kv_heads": 4}, {"qkv_bias": True, "mlp_bias": True}), ids=str)
def test_scaling_any_link_of_a_decoder_keeps_the_function(changes):
    model, t = with_random_vectors(random_decoder(dataclasses.replace(CONFIG, **changes))), some_tokens()
    leaves = Leaves(model, method="test")
    for i, link in enumerate(decoder_links(model)):
        channels = leaves[link.sources[0]].shape[-1]
        scale_link(leaves, link, jax.random.uniform(jax.random.key(i), (channels,), minval=0.1, maxval=10.0))
    expected = np.asarray(model(t))
    np.testing.assert_allclose(leaves.tree()(t), expected, atol=2e-5 * np.abs(expected).max())


def test_tables_stored_by_outputs_are_scaled_along_their_inputs():
    tree = {
        "gain": jnp.ones(3),
        "table": jnp.ones((2, 3)),
        "up": {"embedding": jnp.ones((3, 4))},
        "down": jnp.ones((3, 2)),
    }
    leaves = Leaves(tree, method="test")
    scale_link(leaves, Link(("gain",), ("table",)), jnp.array([1.0, 2.0, 4.0]))
    np.testing.assert_array_equal(leaves["table"], [[1, 2, 4], [1, 2, 4]])
    scale_link(leaves, Link(("up.embedding",), ("down",)), jnp.array([1.0, 2.0, 4.0]))
    np.testing.assert_array_equal(leaves["up.embedding"], np.array([[1, 1, 1, 1], [0.5] * 4, [0.25] * 4]))
    np.testing.assert_array_equal(leaves["down"][:, 0], [1, 2, 4])


def test_leaves_keep_their_dtypes():
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16), plain_model())
    assert {str(x.dtype) for x in jax.tree.leaves(rotate(tree, STREAM))} == {"bfloat16"}


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_tied_table_asks_to_be_untied():
    model = with_random_vectors(random_decoder(dataclasses.replace(CONFIG, tied=True)))
    with pytest.raises(QuantizationError, match=r"embedding.table is both .* model = trustcore.models.untie\(model\)"):
        rotate(model, decoder_stream(model))


def test_all_faults_of_a_structure_come_at_once():
    tree = plain_model() | {"ids": jnp.arange(4)}
    tree["layer"]["down"] = quantize({"w": tree["layer"]["down"]}, "q8_0")["w"]
    stream = Stream(("embd",), (NORM,), ("layer.down", "ids", "layer"))
    with pytest.raises(QuantizationError) as error:
        rotate(tree, stream)
    for expected in (
        "rotate: embd is no path of the tree (nearest: embed)",
        "layer.down is packed (QuantizedArray(",
        'load(source, dtype="float32")',
        "ids is int32[4]; expected a float vector or a float matrix",
        "layer is no path of the tree",
    ):
        assert expected in str(error.value)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (Stream(("embed",), (NORM,), ("layer.up",)), "widths of the stream differ: embed 64, layer.up 96"),
        (Stream(("embed",), (Link(("layer.up",), ("layer.down",)),), ()), "must be its gain alone, a vector"),
        (
            Stream(("embed",), (Link(("last",), ("layer.down",)),), ()),
            r"channels do not fit, .* last \[64\], layer.down",
        ),
        (Stream(("embed",), (NORM,), (), (dataclasses.replace(UP, heads=(2, 3)),)), "3 heads cannot share 2 evenly"),
        (Stream(("embed",), (Link((), ("head",)),), ()), "has no sources or no consumers"),
    ],
)
def test_structures_that_do_not_fit_are_refused(stream, message):
    with pytest.raises(QuantizationError, match=message):
        rotate(plain_model(), stream)


@pytest.mark.parametrize(
    ("rotation", "message"),
    [
        ("haar", "rotation is 'haar'; choose from hadamard, orthogonal"),
        (np.eye(3), r"rotation is \[3, 3\], expected \[64, 64\]"),
        (2 * np.eye(D), "rotation is not orthogonal: .* by 3"),
        (np.full((D, D), np.nan), "rotation is not orthogonal"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(rotation, message):
    with pytest.raises(QuantizationError, match=message):
        rotate(plain_model(), STREAM, rotation=rotation)
