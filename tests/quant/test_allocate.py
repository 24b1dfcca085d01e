"""The choice of formats under a budget: against brute force, and through to a packed model."""

import itertools
import sys
import xml.etree.ElementTree as ElementTree

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.small import random_decoder, some_tokens
from trustcore.errors import QuantizationError
from trustcore.quant import (
    Option,
    QuantizedArray,
    Reference,
    allocate,
    compare_formats,
    frontier,
    quantize,
    report,
    sensitivity,
)
from trustcore.quant.allocate import to_svg


def brute_force(items, budget):
    best = min(
        (
            (sum(o.cost for o in choice), sum(o.nbytes for o in choice))
            for choice in itertools.product(*items)
            if sum(o.nbytes for o in choice) <= budget
        ),
        default=None,
    )
    return None if best is None else best[0]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 40), st.floats(0, 10, allow_subnormal=False)), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 160),
)
def test_the_best_of_all_choices_is_found(numbers, budget):
    items = [
        [Option(f"m{i}", f"f{j}", nbytes, cost, 10) for j, (nbytes, cost) in enumerate(choices)]
        for i, choices in enumerate(numbers)
    ]
    options, best = [o for item in items for o in item], brute_force(items, budget)
    if best is None:
        with pytest.raises(QuantizationError, match="the smallest formats take"):
            allocate(options, nbytes=budget)
        return
    found = allocate(options, nbytes=budget)
    assert found.nbytes <= budget and found.gap == 0 and set(found.chosen) == {f"m{i}" for i in range(len(items))}
    np.testing.assert_allclose(found.cost, best, rtol=1e-9, atol=1e-12)


def many(n=300, seed=0):
    rng = np.random.default_rng(seed)
    options = []
    for i in range(n):
        size, weight = int(rng.integers(1, 50)) * 1024, float(np.exp(2 * rng.standard_normal()))
        for bits in (2.625, 3.4375, 4.5, 5.5, 6.5625, 8.5):
            cost = weight * 4.0**-bits * float(np.exp(0.3 * rng.standard_normal()))
            options.append(Option(f"m{i}", f"q{bits}", int(size * bits / 8), cost, size))
    return options


def test_many_matrices_within_the_lagrangian_bound(monkeypatch):
    options = many()
    found = allocate(options, bits_per_weight=4.2)
    assert found.gap == 0 and found.bits_per_weight <= 4.2
    uniform = sum(o.cost for o in options if o.format == "q4.5")
    assert found.cost < uniform  # fewer bits and still better than one format for all
    monkeypatch.setattr(sys.modules["trustcore.quant.allocate"], "LIMIT", 50)
    thinned = allocate(options, bits_per_weight=4.2)
    assert found.cost <= thinned.cost <= found.cost + thinned.gap + 1e-12
    assert thinned.gap < 0.02 * found.cost


def test_the_curve_falls_and_is_drawn():
    curve = frontier(many(40), points=8)
    costs, sizes = [a.cost for a in curve], [a.nbytes for a in curve]
    assert costs == sorted(costs, reverse=True) and sizes == sorted(sizes)
    drawing = ElementTree.fromstring(to_svg(curve))
    assert len(drawing.findall(".//{http://www.w3.org/2000/svg}circle")) == len(curve)
    assert "**all**" in curve[0].to_markdown()


@pytest.mark.parametrize(
    ("options", "budget", "message"),
    [
        ([], {"nbytes": 1}, "there are no options"),
        ([Option("a", "x", 1, np.nan, 1)], {"nbytes": 1}, "a as x costs nan"),
        ([Option("a", "x", 1, 1.0, 1)], {}, "either nbytes or bits_per_weight"),
    ],
)
def test_what_is_wrong_is_told(options, budget, message):
    with pytest.raises(QuantizationError, match=message):
        allocate(options, **budget)


def measured(by):
    model, tokens = random_decoder(), [some_tokens(seed=s) for s in range(2)]
    return model, tokens, sensitivity(None, model, tokens, ["q4_0", "q8_0", "q2_k"], by=by, where=kernels)


def kernels(path, leaf):
    return path.endswith("kernel")


@pytest.mark.parametrize("by", ["kl", "hessian"])
def test_from_sensitivity_to_a_packed_model(by):
    model, tokens, options = measured(by)
    assert {o.format for o in options} == {"q4_0", "q8_0"}  # K is no multiple of q2_k's block
    cost = {(o.path, o.format): o.cost for o in options}
    assert all(cost[p, "q8_0"] < 0.1 * cost[p, "q4_0"] for p, _ in cost)
    chosen = allocate(options, bits_per_weight=6.0)
    packed = quantize(model, chosen.format)
    found = {leaf.path: leaf.format for leaf in report(model, packed).leaves if leaf.format != "float32"}
    assert found == {path: o.format for path, o in chosen.chosen.items()}
    assert {"q4_0", "q8_0"} == set(found.values())
    reference = Reference(None, model, tokens)
    mixed, small = reference.compare(packed).kl, reference.compare(quantize(model, "q4_0", where=kernels)).kl
    assert mixed < 0.7 * small
    np.testing.assert_allclose(reference.compare(model), (0, 1), atol=1e-6)


def test_the_measure_is_the_divergence_of_the_logits():
    model, tokens, options = measured("kl")
    option = next(o for o in options if o.path == "blocks.1.mlp.up.kernel" and o.format == "q4_0")
    changed = quantize(model, {option.path: "q4_0"})
    before, after = (np.concatenate([m(t) for t in tokens]).astype(np.float64) for m in (model, changed))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (before, after))
    np.testing.assert_allclose(option.cost, np.mean((p * np.log(p / q)).sum(-1)), rtol=1e-3)
    assert option.nbytes == 64 * 96 * 18 // 32
    parts = report(model, quantize(model, {"blocks.*.up.kernel": "q4_0"}), batches=tokens)
    leaf = next(leaf for leaf in parts.leaves if leaf.path == option.path)
    np.testing.assert_allclose(leaf.kl, option.cost, rtol=1e-3)
    assert next(leaf for leaf in parts.leaves if leaf.format == "float32").kl is None
    assert "KL" in str(parts) and "| cosine |" in parts.to_markdown()


def test_the_cosine_is_that_of_the_weights():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((64, 8)), jnp.float32)
    packed = quantize({"w": w}, "q4_0")
    a, b = np.asarray(w, np.float64).ravel(), np.asarray(packed["w"].dequantize(), np.float64).ravel()
    leaf = report({"w": w}, packed).leaves[0]
    np.testing.assert_allclose(leaf.cosine, a @ b / np.sqrt((a @ a) * (b @ b)), rtol=1e-6)
    assert report({"w": 0 * w}, {"w": 0 * w}).leaves[0].cosine == 1


def test_formats_are_weighed_against_each_other():
    model, tokens = random_decoder(), [some_tokens()]
    found = compare_formats(None, model, tokens, ["q8_0", "q5_1", "q4_0", "q4_1"], where=kernels)
    assert [f.format for f in found.formats] == ["q4_0", "q4_1", "q5_1", "q8_0"]
    assert found.formats[0].recommended and found.formats[-1].recommended
    assert found.formats[-1].kl < 0.01 * found.formats[0].kl and found.formats[-1].bits_per_weight == 8.5
    assert found.within(found.formats[2].kl).kl <= found.formats[2].kl and found.within(-1) is None
    packed = quantize(model, "q5_1", where=kernels)
    np.testing.assert_allclose(Reference(None, model, tokens).compare(packed).kl, found.formats[2].kl, rtol=1e-4)
    assert isinstance(packed.output.kernel.get_value(), QuantizedArray) and "recommended" in str(found)


def test_nothing_that_fits_is_told():
    with pytest.raises(QuantizationError, match="none of q4_k fits w"):
        sensitivity(lambda p, x: x @ p["w"], {"w": jnp.ones((64, 8))}, [jnp.ones((2, 64))], ["q4_k"])
    with pytest.raises(QuantizationError, match="by is 'x'"):
        sensitivity(None, random_decoder(), [some_tokens()], ["q4_0"], by="x")
