"""GPTQ against a float64 oracle, against rounding to nearest, over whole models, stopped and taken up again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.small import CONFIG, random_decoder, some_tokens
from trustcore.errors import QuantizationError
from trustcore.quant import QuantizedArray, quantize
from trustcore.quant.calibration import Hessian, capture
from trustcore.quant.calibration.stages import _Plan
from trustcore.quant.gptq import GRIDS, gptq, grid_of, output_error, round_rows, round_to_nearest


def problem(k=64, n=24, rows=200, seed=0, skew=1.0):
    """Weights and a Hessian of inputs that go together; `skew` spreads their sizes."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k, k)) / np.sqrt(k) + np.eye(k)
    x = rng.standard_normal((rows, k)) @ mix * np.exp(skew * rng.standard_normal(k))
    return rng.standard_normal((k, n)).astype(np.float32), (x.T @ x / rows).astype(np.float32)


def oracle(w, hessian, bits, group, damping, act_order):
    """GPTQ as the paper's Algorithm 1 has it, one column at a time with the inverse Hessian, in float64."""
    w, hessian = w.astype(np.float64), hessian.astype(np.float64)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(len(w))
    w, hessian = w[order], hessian[np.ix_(order, order)]
    hessian = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(w))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    codes = np.zeros(w.shape)
    values = np.zeros(w.shape)
    reach = 2 ** (bits - 1)
    for i in range(len(w)):
        if i % group == 0:
            block = w[i : i + group]
            scale = (np.abs(block).max(0) / (reach - 1)).astype(np.float16 if group <= 256 else np.float32)
        codes[i] = np.clip(np.round(w[i] / scale), -reach, reach - 1)
        values[i] = codes[i] * scale
        w[i:] -= np.outer(upper[i, i:], (w[i] - values[i]) / upper[i, i])
    back = np.argsort(order)
    return codes + reach, values[back]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 16), (4, 320)])
def test_codes_are_those_of_the_oracle(bits, group, act_order):
    w, hessian = problem(192 if group < 192 else group)
    grid = grid_of(f"int{bits}:g{group}", search=False)
    found = round_rows(w, hessian, grid, act_order=act_order)
    codes, values = oracle(w, hessian, bits, group, 0.01, act_order)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_allclose(found.values, values, atol=1e-4)


def error_of(w, hessian, values):
    d = w.astype(np.float64) - np.asarray(values, np.float64)
    return np.trace(d.T @ hessian.astype(np.float64) @ d) / np.trace(w.T @ hessian @ w)


USUAL = ("int3", "nf4", "q4_1", "q8_0", "int4:g64:asym")


@pytest.mark.parametrize(
    "format", [*USUAL, *(pytest.param(f, marks=pytest.mark.slow) for f in (*GRIDS, "int5:channel") if f not in USUAL)]
)
def test_products_change_less_than_by_rounding_to_nearest(format):
    w, hessian = problem(256 if format.endswith("_k") else 128, 16)
    grid = grid_of(format)
    found = round_rows(w, hessian, grid)
    packed = grid.pack(found.codes, found.params, found.order)
    np.testing.assert_allclose(packed.dequantize(), found.values, rtol=1e-3, atol=1e-6)
    nearest = round_to_nearest(w, np.diag(hessian), grid)
    error = error_of(w, hessian, found.values)
    assert error < 0.8 * error_of(w, hessian, nearest.values)
    np.testing.assert_allclose(output_error(w, found.values, hessian), error, rtol=1e-3)
    if format in ("q4_0", "q4_k", "q3_k", "q6_k", "q8_0"):
        plain = QuantizedArray.quantize(w, format, importance=np.diag(hessian))
        assert error < 0.85 * error_of(w, hessian, plain.dequantize())


def test_an_order_helps_where_inputs_differ_in_size():
    ratios = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((400, 16)) @ rng.standard_normal((16, 128)) + 0.5 * rng.standard_normal((400, 128))
        x *= np.exp(rng.standard_normal(128))
        w, hessian = rng.standard_normal((128, 32)).astype(np.float32), (x.T @ x / 400).astype(np.float32)
        options = ({}, {"act_order": True}, {"act_order": True, "static_groups": True})
        errors = [error_of(w, hessian, round_rows(w, hessian, grid_of("int3"), **each).values) for each in options]
        ratios.append([errors[1] / errors[0], errors[2] / errors[0]])
    assert np.all(np.mean(ratios, axis=0) < 0.6)  # 0.27 to 0.41 on average over other seeds


def test_an_order_is_kept_with_the_weight():
    w, hessian = problem(128, 32, skew=1.5)
    grid = grid_of("int4", search=False)
    found = round_rows(w, hessian, grid, act_order=True)
    packed = grid.pack(found.codes, found.params, found.order)
    np.testing.assert_array_equal(packed.fields["order"], np.argsort(-np.diag(hessian), kind="stable"))
    np.testing.assert_allclose(packed.dequantize(), found.values, rtol=1e-5, atol=1e-6)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 128)), jnp.float32)
    np.testing.assert_allclose(x @ packed, x @ found.values, rtol=1e-4, atol=1e-4)
    static = round_rows(w, hessian, grid, act_order=True, static_groups=True)
    assert static.order is None
    np.testing.assert_allclose(grid.pack(static.codes, static.params, None).dequantize(), static.values, atol=1e-6)
    assert error_of(w, hessian, static.values) < 1.5 * error_of(w, hessian, found.values)


def test_inputs_that_never_fire_and_inputs_that_go_together():
    w, hessian = problem(64)
    hessian[5] = hessian[:, 5] = 0
    found = round_rows(w, hessian, grid_of("int4", search=False))
    assert np.all(np.isfinite(found.values)) and np.abs(w[5] - found.values[5]).max() < 1
    low_rank, _ = problem(64, rows=3)
    singular = np.ones((64, 64), np.float32)
    assert np.all(np.isfinite(round_rows(low_rank, singular, grid_of("int4", search=False)).values))
    with pytest.raises(QuantizationError, match="the Hessian holds NaN"):
        round_rows(w, np.full((64, 64), np.nan, np.float32), grid_of("int4"))
    with pytest.raises(QuantizationError, match=r"the Hessian is \[64, 64\], expected \[32, 32\]"):
        round_rows(w[:32], hessian, grid_of("int4"))
    with pytest.raises(QuantizationError, match="not positive definite"):
        round_rows(w, -100 * np.eye(64, dtype=np.float32), grid_of("int4"))


# ---- whole functions -------------------------------------------------------------------------------------------------


def layers(k=64, f=96, n=3, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-2]), jnp.float32)  # noqa: E731
    return {"up": make(n, k, f), "down": make(n, f, k), "out": make(k, 8)}


def scanned(p, x):
    def layer(x, q):
        return x + jnp.tanh(x @ q["up"]) @ q["down"], None

    x, _ = jax.lax.scan(layer, x, {"up": p["up"], "down": p["down"]})
    return x @ p["out"]


def looped(p, x):
    for up, down in zip(p["up"], p["down"], strict=True):
        x = x + jnp.tanh(x @ up) @ down
    return x @ p["out"]


def inputs(count=3, rows=40, k=64):
    rng = np.random.default_rng(5)
    mix = rng.standard_normal((k, k)) / np.sqrt(k)
    return [jnp.asarray(rng.standard_normal((rows, k)) @ mix, jnp.float32) for _ in range(count)]


def by_hand(p, batches, grid):
    """Layer after layer, each on what the quantized layers before it give."""
    xs = list(batches)
    packed = {"up": [], "down": [], "out": None}

    def one(w, xs):
        rows = np.concatenate([np.asarray(x) for x in xs]).astype(np.float64)
        found = round_rows(w, (rows.T @ rows / len(rows)).astype(np.float32), grid)
        return found.values

    for up, down in zip(p["up"], p["down"], strict=True):
        packed["up"].append(one(up, xs))
        hidden = [jnp.tanh(x @ packed["up"][-1]) for x in xs]
        packed["down"].append(one(down, hidden))
        xs = [x + h @ packed["down"][-1] for x, h in zip(xs, hidden, strict=True)]
    packed["out"] = one(p["out"], xs)
    return packed


def every(path, leaf):
    return True


@pytest.mark.parametrize("form", ["scan", pytest.param("loop", marks=pytest.mark.slow)])
def test_each_layer_sees_what_the_quantized_ones_before_it_give(form):
    p, batches, seen = layers(), inputs(), []
    if form == "loop":
        p = {"up": list(p["up"]), "down": list(p["down"]), "out": p["out"]}
    fn = scanned if form == "scan" else looped
    packed = gptq(fn, p, batches, format="int4", where=every, search=False, progress=seen.append)
    expected = by_hand(p, batches, grid_of("int4", search=False))
    for name in ("up", "down"):
        for i in range(3):
            w = packed[name].dequantize()[i] if form == "scan" else packed[name][i].dequantize()
            # Hessians summed in another order may tip a weight between two codes, or a scale to the next float16.
            assert np.mean(np.abs(w - expected[name][i]) > 2e-3) < 0.01
    assert [layer.done for layer in seen] == list(range(1, 8)) and seen[-1].total == 7
    assert all(layer.error <= layer.nearest for layer in seen)
    exact = [np.asarray(fn(p, x)) for x in batches]
    errors = {}
    for name, q in {"gptq": packed, "nearest": quantize(p, "q4_0", where=every)}.items():
        dense = jax.tree.map(
            lambda leaf: leaf.dequantize() if isinstance(leaf, QuantizedArray) else leaf,
            q,
            is_leaf=lambda leaf: isinstance(leaf, QuantizedArray),
        )
        errors[name] = sum(np.sum((np.asarray(fn(dense, x)) - e) ** 2) for x, e in zip(batches, exact, strict=True))
    assert errors["gptq"] < 0.5 * errors["nearest"]


@pytest.mark.parametrize("format", [pytest.param("int4:g16", marks=pytest.mark.slow), "q4_0"])
def test_a_decoder(format):
    model, tokens = random_decoder(), [some_tokens(seed=s) for s in range(3)]
    packed = gptq(None, model, tokens, format=format, act_order=True, search=False)
    assert packed.config == CONFIG and isinstance(packed.blocks[1].mlp.down.kernel.get_value(), QuantizedArray)
    assert not isinstance(packed.embedding.table.get_value(), QuantizedArray)  # looked up, not multiplied
    plain = quantize(model, "q4_0", where=lambda path, leaf: path.endswith("kernel"))
    exact = np.asarray(model(tokens[0]))
    error, nearest = (np.mean((np.asarray(m(tokens[0])) - exact) ** 2) for m in (packed, plain))
    assert error < 0.6 * nearest


def test_packed_weights_and_patterns():
    model, tokens = quantize(random_decoder(), "q8_0"), [some_tokens()]
    packed = gptq(None, model, tokens, format={"*.down.kernel": "q5_1", "*.mlp.*": "int4:g16:asym"}, search=False)
    block = packed.blocks[0]
    formats = [block.mlp.down, block.mlp.up, block.attention.query]
    assert [layer.kernel.get_value().format for layer in formats] == ["q5_1", "int4", "q8_0"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_run_that_was_stopped_goes_on(tmp_path, after):
    p, batches, seen = layers(), inputs(), []

    def stop(layer):
        if layer.done == after:
            raise Stop

    same = {"format": "int3:g16", "where": every, "search": False}
    whole = gptq(scanned, p, batches, **same)
    with pytest.raises(Stop):
        gptq(scanned, p, batches, **same, folder=tmp_path, progress=stop)
    resumed = gptq(scanned, p, batches, **same, folder=tmp_path, progress=seen.append)
    assert [layer.resumed for layer in seen] == [True] * after + [False] * (7 - after)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    for changes, message in (({"damping": 0.1}, "options"), ({"format": "int4"}, "formats")):
        with pytest.raises(QuantizationError, match=f"belongs to a run with other {message}"):
            gptq(scanned, p, batches, **{**same, "folder": tmp_path, **changes})
    with pytest.raises(QuantizationError, match="belongs to a run with other data"):
        gptq(scanned, p, batches[:2], **same, folder=tmp_path)


def test_layers_of_one_form_share_a_program():
    counts = {}
    for n in (3, 6):
        plan = _Plan(scanned, layers(n=n), (inputs(1)[0],), ["up", "down", "out"], True)
        counts[n] = len({plan.part(number).key for number in range(plan.count)})
        assert plan.count == 2 * n + 1
    assert counts[3] == counts[6] == 4  # what comes before the first, after an up, after a down, after the last down


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "q9"}, "format 'q9' is not known; choose from int1"),
        ({"format": "int8:tensor"}, "scales that columns share"),
        ({"format": "int4:g48", "where": ["out"]}, "out: int4:g48: K=64 is not a multiple of int4:g48's group of 48"),
        ({"format": "q4_k"}, "no selected leaf fits the format"),
        ({"format": "int4", "where": ["nothing"]}, "nothing is no path"),
        ({"format": "int4", "batches": []}, "there are no batches"),
        ({"format": "int4", "batches": [jnp.ones((2, 64)), jnp.ones((3, 64))]}, "batch 1 has the shapes"),
        ({"format": "int4:g8", "where": ["out"], "transposed": every}, "sum over its axes \\[0\\]"),
        ({"format": "q4_0", "where": ["out"], "act_order": True, "static_groups": False}, "cannot keep an order"),
    ],
)
def test_what_is_wrong_is_told(options, message):
    p = layers()
    batches = options.pop("batches", inputs(1))
    with pytest.raises(QuantizationError, match=message):
        gptq(scanned, p, batches, **options)


def test_the_hessian_is_that_of_the_inputs():
    p, x = layers(), inputs(1)[0]
    found = capture(scanned, p, Hessian(), where=["up"])
    mean = found.finish(found(x))["up"].mean
    np.testing.assert_allclose(mean[0], np.asarray(x, np.float64).T @ np.asarray(x) / len(x), rtol=1e-3, atol=1e-4)
