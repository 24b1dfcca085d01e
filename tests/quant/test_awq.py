"""AWQ: the grid against NumPy float64, clipping against trying every group by itself, errors on skewed data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.small import random_decoder, some_tokens
from tests.quant.plain_model import LAST, NORM, UP, apply, plain_model, tokens
from trustcore.errors import QuantizationError
from trustcore.models import decoder_links
from trustcore.quant import QuantizedArray, quantize
from trustcore.quant.calibration import Sample, capture
from trustcore.quant.folding import Link, awq
from trustcore.quant.folding.awq import ALPHAS, CLIPS

LAYER = ("layer.gate", "layer.up", "layer.down")


def in_layer(path, array):
    return path in LAYER


def samples_of(tree, count=200):
    return {path: np.asarray(x) for path, x in apply(tree, tokens(count), inputs=True)[1].items()}


def decoded(tree):
    return jax.tree.map(
        lambda w: w.dequantize() if isinstance(w, QuantizedArray) else w,
        tree,
        is_leaf=lambda w: isinstance(w, QuantizedArray),
    )


def rounded(matrix, **options):
    return np.asarray(QuantizedArray.quantize(matrix.astype(np.float32), "q4_0", **options).dequantize(), np.float64)


def numpy_scale(x, matrices, alphas):
    """The scale of smallest output error, by the equations, float64."""
    x, best = x.astype(np.float64), (np.inf, None)
    for alpha in alphas:
        scale = np.maximum(np.abs(x).mean(0) ** alpha, 1e-4)
        scale /= np.sqrt(scale.max() * scale.min())
        errors = [((x / scale) @ rounded(scale[:, None] * w, search=False) - x @ w) ** 2 for w in matrices]
        best = min(best, (sum(e.sum() for e in errors), alpha), key=lambda pair: pair[0])
    return best[1], np.maximum(np.abs(x).mean(0) ** best[1], 1e-4)


def test_the_scale_of_each_link_is_that_of_the_grid():
    tree = plain_model(outliers=1.5)
    samples = samples_of(tree)
    scaled = awq(
        tree,
        "q4_0",
        [NORM, UP],
        samples,
        where=in_layer,
        importance=False,
        search=False,
        pack=False,
        alphas=ALPHAS[::4],
    )
    x, y = samples["layer.gate"], samples["layer.down"]
    layer = {name: np.asarray(leaf, np.float64) for name, leaf in tree["layer"].items()}
    alpha, expected = numpy_scale(x, [layer["gate"], layer["up"]], ALPHAS[::4])
    found = layer["gain"] / np.asarray(scaled["layer"]["gain"], np.float64)
    np.testing.assert_allclose(found, expected / np.sqrt(expected.max() * expected.min()), rtol=1e-5)
    assert alpha > 0.2
    alpha, expected = numpy_scale(y, [layer["down"]], ALPHAS[::4])
    found = layer["up_bias"] / np.asarray(scaled["layer"]["up_bias"], np.float64)
    np.testing.assert_allclose(found, expected / np.sqrt(expected.max() * expected.min()), rtol=1e-4)
    logits = np.asarray(apply(tree, tokens()))  # and in float it is the same function
    np.testing.assert_allclose(apply(scaled, tokens()), logits, atol=2e-5 * np.abs(logits).max())


def test_clips_are_those_that_every_group_would_choose():
    """Where the ranges of whole groups are clipped, under inputs that hang together."""
    rng = np.random.default_rng(0)
    tree = {"w": jnp.asarray(rng.standard_t(3, (64, 12)), jnp.float32)}
    x = (rng.standard_normal((100, 64)) @ rng.standard_normal((64, 64)) * 0.3).astype(np.float32)
    packed = awq(tree, "q4_0", (), {"w": x})["w"].dequantize()
    weights = np.asarray(tree["w"], np.float64)
    chosen = []
    for g in range(2):
        rows = slice(32 * g, 32 * g + 32)
        for c in range(12):
            group = weights[rows, c : c + 1]
            tried = [
                rounded(np.clip(group, -r * np.abs(group).max(), r * np.abs(group).max()), search=False) for r in CLIPS
            ]
            errors = [(((x[:, rows].astype(np.float64)) @ (group - t)) ** 2).sum() for t in tried]
            chosen.append(int(np.argmin(errors)))
            np.testing.assert_array_equal(packed[rows, c : c + 1], tried[chosen[-1]])
    assert len(set(chosen)) > 2


@pytest.mark.parametrize(
    ("format", "options"), [("q4_0", {}), ("q4_0", {"search": True, "importance": True}), ("int3:g32:asym", {})]
)
def test_output_errors_are_below_plain_packing_on_skewed_data(format, options):
    """Of the products that read the skewed inputs, on data that was not calibrated with."""
    tree = plain_model(outliers=1.5)
    samples = samples_of(tree)
    plain = quantize(tree, format, where=in_layer, search=options.get("search", False))
    aware = awq(tree, format, [NORM, UP], samples, where=in_layer, **options)
    assert {type(leaf) for leaf in aware["layer"].values() if leaf.ndim == 2} == {QuantizedArray}
    errors = []
    for packed in (plain, aware):
        total = 0.0
        for name in ("gate", "up"):
            x = [
                np.asarray(apply(decoded(t), tokens(400, seed=9), inputs=True)[1]["layer.gate"]) for t in (tree, packed)
            ]
            exact, found = x[0] @ tree["layer"][name], x[1] @ packed["layer"][name].dequantize()
            # Products of a scaled link come out scaled where it is the source of the next: compare their shapes.
            ratio = jnp.sum(exact * found, 0) / jnp.sum(found * found, 0)
            total += float(jnp.sum((found * ratio[None] - exact) ** 2))
        errors.append(total)
    assert errors[1] < 0.7 * errors[0]  # measured: 0.62 and 0.58


def test_a_decoder_from_captured_samples():
    """Grouped heads, biases, the capture of inputs, and products with what comes out."""
    model, t = random_decoder(), some_tokens(4, 24)
    for i, block in enumerate(model.blocks):
        for norm in (block.attention_norm, block.mlp_norm):
            norm.weight.set_value(jnp.ones(64).at[jnp.array([5 + i, 17, 40])].set(12.0))  # a few outlying channels
    collect = capture(None, model, Sample(64))
    samples = collect.finish(collect(t))
    assert samples["blocks.1.mlp.down.kernel"].shape == (64, 96)

    def in_blocks(path, array):
        return path.startswith("blocks.") and array.ndim == 2

    options = {"alphas": (0, 0.3, 0.6), "clips": (1, 0.9, 0.8, 0.7)}
    links = decoder_links(model)
    kernels = {path: rows for path, rows in samples.items() if in_blocks(path, np.zeros((1, 1)))}
    aware = awq(model, "q4_0", links, kernels, where=in_blocks, **options)
    plain = quantize(model, "q4_0", where=in_blocks)
    run = jax.jit(lambda m, t: m(t))
    exact = run(model, t)
    errors = [float(jnp.mean((run(m, t) - exact) ** 2)) for m in (plain, aware)]
    assert errors[1] < 0.8 * errors[0]
    scaled = awq(model, "q4_0", links, kernels, where=in_blocks, pack=False, **options)
    np.testing.assert_allclose(run(scaled, t), exact, atol=2e-5 * jnp.abs(exact).max())
    assert jnp.any(
        scaled.blocks[1].attention.out.kernel.get_value() != model.blocks[1].attention.out.kernel.get_value()
    )


def test_links_that_are_not_packed_are_left_alone():
    tree = plain_model(outliers=1.5)
    packed = awq(tree, {"layer.down": "q8_0", "*": None}, [NORM, UP], samples_of(tree), alphas=(0, 0.5), clips=(1,))
    np.testing.assert_array_equal(packed["layer"]["gate"], tree["layer"]["gate"])
    assert packed["layer"]["down"].format == "q8_0"


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_a_sample_is_of_rows_spread_over_the_batches():
    observer = Sample(16)
    batches = [jnp.asarray(np.arange(100 * i, 100 * i + 100)[:, None] * np.ones(3), jnp.float32) for i in range(4)]
    parts = [observer.update(observer.init(3), batch) for batch in batches]
    whole = parts[0]
    for part in parts[1:]:
        whole = observer.merge(whole, part)
    rows = observer.finish(whole)
    assert rows.shape == (16, 3) and (rows == rows[:, :1]).all()
    assert len(set(rows[:, 0])) == 16
    np.testing.assert_array_equal(np.bincount((rows[:, 0] // 100).astype(int)), [4, 4, 4, 4])
    few = observer.finish(observer.update(observer.init(3), batches[1][:5]))
    np.testing.assert_array_equal(np.sort(few[:, 0]), np.arange(100, 105))
    assert observer.finish(observer.init(3)).shape == (0, 3)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    tree = plain_model()
    samples = samples_of(tree)
    wrong = {"layer.gate": samples["layer.gate"][:, :5], "layer.down": samples["layer.down"] * np.nan}
    with pytest.raises(QuantizationError) as raised:
        awq(tree, "q4_0", [NORM, UP, LAST], wrong)
    for expected in (
        "awq: samples of layer.gate are [200, 5], expected [rows, 64]",
        f"samples of layer.down are NaN or infinite in {200 * 96} places",
        "there are no samples of head",
    ):
        assert expected in str(raised.value)
    with pytest.raises(QuantizationError, match="samples name nowhere, which is no path of the tree"):
        awq(tree, "q4_0", (), {"nowhere": samples["layer.gate"]})
    with pytest.raises(QuantizationError, match=r"layer.dwn is no path of the tree \(nearest: layer.down\)"):
        awq(tree, "q4_0", [Link(("layer.up",), ("layer.dwn",))], samples)
    with pytest.raises(QuantizationError, match="format 'q9' has no encoder"):
        awq(tree, "q9", [NORM], samples)
    for options in ({"alphas": ()}, {"clips": (1, 0)}, {"clips": (1.5,)}):
        with pytest.raises(QuantizationError, match="must not be empty, and clips"):
            awq(tree, "q4_0", [NORM], samples, **options)
    assert max(CLIPS) == 1
