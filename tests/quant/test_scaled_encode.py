"""Encoders of scaled formats: the textbook and bitsandbytes without a search, never worse with one, any weights."""

import functools
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quant.samples import importance_of, mean_error, weights_of
from tests.quant.scaled import FLOATS, bits_of, codes_of, decoded, planes_of
from trustcore.errors import QuantizationError
from trustcore.quant import FORMATS, QuantizedArray, quantize, report
from trustcore.quant.encode import encode, no_encoder, tiles
from trustcore.quant.encode.floats import dynamic_map, round_to_float
from trustcore.quant.formats import SCALED_FORMATS
from trustcore.quant.formats.names import parse, storages

RECORDED = np.load(Path(__file__).parents[1] / "data" / "bitsandbytes.npz")
# One of each kind of code and of granularity.
KINDS = (
    "int1:g32", "ternary:g64", "int2:g32", "int2:g32:asym", "int3:channel", "int4:g32", "int4:g64:asym", "int4:tensor",
    "int6:128x128", "int8:channel", "int8:channel:asym", "int8:tensor", "fp8_e4m3:channel", "fp8_e5m2:128x128",
    "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "nf4", "nf4:g64:double", "fp4:g32",
)  # fmt: skip
K, N = 128, 5  # of the small cases; one shape, one program


def of(tree):
    return {name: np.asarray(value) for name, value in tree.items()}


@functools.cache
def encoder(name, search=True):
    """One program for each name."""
    return jax.jit(lambda weights: encode(name, weights, search=search))


def packed(weights, name, **options):
    return np.asarray(QuantizedArray.quantize(weights, name, **options).dequantize())


def base_of(name):
    return name.split(":", maxsplit=1)[0]


def small(seed, exponent=0, style="gaussian"):
    rng = np.random.default_rng(seed)
    weights = {
        "gaussian": lambda: rng.standard_normal((K, N)),
        "heavy": lambda: rng.standard_t(2, (K, N)),
        "positive": lambda: 5 + rng.random((K, N)),
        "sparse": lambda: rng.standard_normal((K, N)) * (rng.random((K, N)) < 0.05),
        "grid": lambda: rng.integers(-3, 4, (K, N)),
        "outlier": lambda: np.where(np.arange(K)[:, None] == 3, 50.0, rng.standard_normal((K, N))),
    }[style]()
    return (weights * 2.0**exponent).astype(np.float32)


STYLES = ("gaussian", "heavy", "positive", "sparse", "grid", "outlier")
some_weights = {"seed": st.integers(0, 2**16), "style": st.sampled_from(STYLES)}


# ---- against the textbook and bitsandbytes ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_without_a_search_symmetric_integers_are_the_textbooks(bits):
    weights = weights_of("heavy", 64, 20).T
    high = 2 ** (bits - 1) - 1
    fields = of(encode(f"int{bits}:channel", weights, search=False))
    scale = np.abs(weights).max(0, keepdims=True) / np.float32(high)
    np.testing.assert_allclose(fields["scale"], scale, rtol=1e-6)
    codes = codes_of(f"int{bits}", fields) - (0 if bits == 8 else 2 ** (bits - 1))
    np.testing.assert_array_equal(codes, np.rint(weights / fields["scale"]))


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_without_a_search_zero_points_are_the_textbooks(bits):
    """Zero is within the range and has a code of its own."""
    weights = weights_of("shifted", 64, 20).T
    weights[:, 0] = np.abs(weights[:, 0]) + 1
    fields = of(encode(f"int{bits}:channel:asym", weights, search=False))
    low, high = np.minimum(weights.min(0), 0), np.maximum(weights.max(0), 0)
    first = 128 if bits == 8 else 0
    np.testing.assert_allclose(fields["scale"][0], (high - low) / (2**bits - 1), rtol=1e-6)
    np.testing.assert_array_equal(fields["zero"][0].astype(int) + first, np.rint(-low / fields["scale"][0]))
    codes = codes_of(f"int{bits}", fields).astype(int) + first
    ideal = np.clip(np.rint(weights / fields["scale"]) + fields["zero"].astype(int) + first, 0, 2**bits - 1)
    np.testing.assert_array_equal(codes, ideal)
    assert fields["zero"].dtype == (np.int8 if bits == 8 else np.uint8)


def test_signs_and_threes_without_a_search():
    weights = weights_of("gaussian", 64, 20).T
    mean = np.abs(weights).mean(0, keepdims=True)
    np.testing.assert_allclose(packed(weights, "int1:channel"), np.sign(weights) * mean, rtol=1e-5)
    threes = np.clip(np.rint(weights / mean), -1, 1)
    np.testing.assert_allclose(packed(weights, "ternary:channel", search=False), threes * mean, rtol=1e-5)


@pytest.mark.parametrize("name", ("fp8_e4m3", "fp8_e5m2"))
def test_without_a_search_8_bit_floats_are_the_nearest(name):
    weights = weights_of("heavy", 256, 200).T
    largest = float(ml_dtypes.finfo(FLOATS[name]).max)
    for grain, axis in (("channel", 0), ("tensor", None)):
        fields = of(encode(f"{name}:{grain}", weights, search=False))
        np.testing.assert_allclose(fields["scale"], np.abs(weights).max(axis, keepdims=True) / largest, rtol=1e-6)
        # The scale is a power of two times what the encoder divides by, so quotients are rounded alike but for the last
        # digit; a code may then be the other of two equally near ones.
        expected = (weights / fields["scale"]).astype(FLOATS[name]).astype(np.float32)
        assert np.mean(fields["codes"].astype(np.float32) != expected) <= 1e-4


def test_squares_of_128_have_each_their_scale():
    weights = weights_of("heavy", 200, 300).T
    fields = of(encode("fp8_e4m3:128x128", weights, search=False))
    assert fields["scale"].shape == (2, 3)
    for i in range(2):
        for j in range(3):
            square = weights[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            np.testing.assert_allclose(fields["scale"][i, j], np.abs(square).max() / 448, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in FLOATS if name.startswith("mx")])
def test_without_a_search_mx_is_the_standards(name):
    """e = floor(log2 max|w|) - emax; elements to nearest, ties to even, saturated."""
    weights = np.concatenate([small(seed, 3 * seed - 8, style) for seed, style in enumerate(STYLES)], axis=1)
    weights[32:64, 1] = 0
    dtype = FLOATS[name]
    emax = {"e4m3": 8, "e5m2": 15, "e2m3": 2, "e3m2": 4}[name[-4:]]
    fields = of(encode(name, weights, search=False))
    blocks = weights.reshape(K // 32, 32, -1)
    largest = np.abs(blocks).max(1)
    exponent = np.floor(np.log2(np.where(largest > 0, largest, 1))) - emax + 127
    np.testing.assert_array_equal(fields["scale"], np.where(largest > 0, exponent, 1))
    limit = float(ml_dtypes.finfo(dtype).max)
    scale = 2.0 ** (fields["scale"].astype(np.float64) - 127)
    elements = np.clip(blocks / scale[:, None], -limit, limit).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(decoded(name, fields), (elements * scale[:, None]).reshape(K, -1))


@pytest.mark.parametrize("dtype", sorted({np.dtype(dtype) for dtype in FLOATS.values()}, key=str), ids=str)
def test_rounding_to_small_floats(dtype):
    """Every number of the float, every tie between two of them, and what is near; bit for bit ml_dtypes'."""
    codes = np.arange(64 if "float6" in str(dtype) else 256, dtype=np.uint8).view(dtype).astype(np.float32)
    numbers = np.sort(codes[np.isfinite(codes)])
    ties = (numbers[1:] + numbers[:-1]) / 2
    values = np.concatenate([numbers, ties, np.nextafter(ties, np.float32(9e9)), np.nextafter(ties, np.float32(-9e9))])
    normal = (np.abs(values) >= np.finfo(np.float32).tiny) | (values == 0)
    found = np.asarray(round_to_float(jnp.asarray(values[normal]), dtype))
    np.testing.assert_array_equal(found, values[normal].astype(dtype).astype(np.float32))
    largest = numbers.max()
    np.testing.assert_array_equal(round_to_float(jnp.asarray([1e9, -1e9], jnp.float32), dtype), [largest, -largest])


def recorded_weights(n, k, seed):
    """As `tests/oracles/record_bitsandbytes.py` makes them."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((n, k)) * np.exp(rng.standard_normal((n, 1)) - 4)
    weights[rng.random((n, k)) < 0.002] *= 20
    weights[1, :128] = 0
    return weights.astype(np.float32)


BITSANDBYTES = {"nf4": (24, 256, 64), "fp4": (24, 256, 64), "nf4_wide": (12, 512, 128), "nf4_tall": (3, 32768, 64)}


@pytest.mark.parametrize("double", (False, True))
@pytest.mark.parametrize("key", BITSANDBYTES)
def test_without_a_search_nf4_and_fp4_are_bitsandbytes(key, double):
    """Its codes and scales, and what it decodes, bit for bit; but the mean of the scales is a sum in another order."""
    n, k, size = BITSANDBYTES[key]
    record = f"{key}/{'double' if double else 'single'}"
    weights = recorded_weights(n, k, list(BITSANDBYTES).index(key))
    fields = of(encode(f"{key[:3]}:g{size}" + ":double" * double, weights.T, search=False))
    pairs = RECORDED[f"{record}/packed"]
    np.testing.assert_array_equal(codes_of(key[:3], fields).T, np.stack([pairs >> 4, pairs & 15], -1).reshape(n, k))
    theirs = {"scale": RECORDED[f"{record}/absmax"].T}
    if double:
        np.testing.assert_array_equal(fields["levels"][:, 0], RECORDED[f"{record}/levels"])
        np.testing.assert_allclose(fields["offset"], RECORDED[f"{record}/offset"], rtol=2e-6)
        assert np.mean(fields["scale"] != theirs["scale"]) <= 0.02
        rows = fields["nested"].shape[0]
        theirs["nested"] = RECORDED[f"{record}/nested"].reshape(-1, rows).T
        theirs["offset"] = RECORDED[f"{record}/offset"].reshape(1, 1)
        np.testing.assert_allclose(fields["nested"], theirs["nested"], rtol=1e-5)
    else:
        np.testing.assert_array_equal(fields["scale"], theirs["scale"])
    if f"{record}/decoded" in RECORDED:
        weight = QuantizedArray(key[:3], {**fields, **theirs})
        np.testing.assert_array_equal(jax.jit(lambda w: w.dequantize())(weight).T, RECORDED[f"{record}/decoded"])


def test_the_levels_of_double_quantization():
    levels = dynamic_map()
    assert levels.shape == (256,) and (np.diff(levels) > 0).all() and 0 in levels and levels[-1] == 1


# ---- what a search gains ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_search_is_never_worse(name):
    """Nor is one with an importance, by that importance; at few bits, in groups, both gain what they should."""
    weights, importance = weights_of("heavy", 256, 96), importance_of(256)
    plain, even, uneven = (
        packed(weights.T, name, **options).T for options in ({"search": False}, {}, {"importance": importance})
    )
    assert mean_error(weights, even) <= 1.0001 * mean_error(weights, plain)
    assert mean_error(weights, uneven, importance) <= 1.0001 * mean_error(weights, even, importance)
    if name in ("int2:g32", "int4:g32", "nf4", "fp4:g32"):
        assert mean_error(weights, even) <= 0.9 * mean_error(weights, plain)
        assert mean_error(weights, uneven, importance) <= 0.9 * mean_error(weights, even, importance)


def test_finer_scales_and_more_bits_are_better():
    weights = weights_of("heavy", 256, 256)

    def error(name):
        return mean_error(weights, packed(weights.T, name).T)

    assert error("int4:g32") < error("int4:g128") < error("int4:channel") < error("int4:128x128") < error("int4:tensor")
    ladder = [error(f"int{bits}:g32") for bits in range(1, 9)]
    assert all(b < a for a, b in itertools.pairwise(ladder))


def test_8_bit_floats_are_chosen_by_their_error():
    even = weights_of("gaussian", 64, 32).T
    wide = (np.exp2(np.random.default_rng(0).uniform(-30, 0, (64, 32)))).astype(np.float32)
    cost = np.where(np.arange(64) < 60, 1.0, 0).astype(np.float32)
    tiny = np.where(np.arange(64)[:, None] < 60, wide * 2.0**-16, 1).astype(np.float32)
    assert QuantizedArray.quantize(even, "fp8").description == "fp8_e4m3:channel"
    assert QuantizedArray.quantize(tiny, "fp8:tensor", importance=cost).description == "fp8_e5m2:tensor"
    assert quantize({"w": even}, "fp8")["w"].format == "fp8_e4m3"
    with pytest.raises(
        QuantizationError, match="fp8: the weights decide between fp8_e4m3:channel and fp8_e5m2:channel"
    ):
        jax.jit(lambda w: QuantizedArray.quantize(w, "fp8"))(even)
    with pytest.raises(QuantizationError, match="'fp8' leaves the format open; name one of fp8_e4m3, fp8_e5m2"):
        encode("fp8", even)


# ---- what holds for all weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=15, deadline=None)
@given(exponent=st.integers(-6, 6), **some_weights)
def test_codes_are_nearest_under_the_stored_scales(name, seed, exponent, style):
    """No other number that a code could stand for lies nearer; checked weight by weight."""
    base = base_of(name)
    weights = small(seed, exponent, style)
    fields = of(encoder(name)(weights))
    found = np.abs(decoded(base, fields) - weights.astype(np.float64))
    ones = {"scale": fields["scale"], **{f: fields[f] for f in ("zero", "levels", "nested", "offset") if f in fields}}
    nearest = np.full(weights.shape, np.inf)
    for values in every_code(base):
        nearest = np.minimum(nearest, np.abs(decoded(base, {**values, **ones}) - weights))
    # Relative to the size of what shares a scale: quotients that are rounded may tie.
    assert np.all(found <= nearest + 1e-5 * np.abs(weights).max())


def every_code(base):
    """Fields in which all weights have one code, for every code that an encoder may use."""
    bits = bits_of(base)
    if bits == 8:
        if base == "int8":
            every = np.arange(-127, 128, dtype=np.int8)
        else:
            every = np.arange(256, dtype=np.uint8).view(FLOATS[base])
            every = every[np.isfinite(every.astype(np.float32))]
        for code in every:
            yield {"codes": np.full((K, N), code)}
        return
    for code in range(3 if base == "ternary" else 1 << bits):
        yield planes_of(np.full((K, N), code), bits)


@pytest.mark.parametrize("name", [name for name in KINDS if base_of(name) not in ("int1", "ternary")])
@settings(max_examples=10, deadline=None)
@given(**some_weights)
def test_encoding_again_changes_nothing_without_a_search(name, seed, style):
    """The largest weight of a scale is a number of its grid, so the same scale comes out."""
    once = np.asarray(decoded(base_of(name), of(encoder(name, False)(small(seed, 0, style)))))
    again = np.asarray(decoded(base_of(name), of(encoder(name, False)(once))))
    # Float16 scales, scales in bytes and zero points that are rounded move a little; a code would move by a step.
    reach = np.abs(once).max()
    steps = {"int2": 1, "int3": 3, "int4": 7, "int6": 31, "int8": 127}.get(base_of(name), 128)
    if "double" in name or "asym" in name:
        assert np.mean((again - once) ** 2) <= 0.05 * np.mean(once**2)
    else:
        assert np.all(np.abs(again - once) <= reach * min(2e-3, 0.3 / steps))


@pytest.mark.parametrize("name", KINDS)
def test_zeros_and_constants(name):
    values = np.array([0.0, 1.0, -1.0, 0.3, -700.0], np.float32)
    if "tensor" in name or "128" in name or "double" in name:
        values = np.array([0.0, 1.0, -1.0, 1.0, -1.0], np.float32)
    found = decoded(base_of(name), of(encode(name, np.tile(values, (K, 1)))))
    # Powers of two leave a number where it lies between those of the float: half a step of two or three bits off.
    near = {"fp8": 2e-2, "mxf": 2.0**-3 if name[-2:] == "m2" else 2.0**-4}.get(
        name[:3], 2e-3 + 1e-2 * ("double" in name)
    )
    if name != "int1:g32":  # which has no zero; its scale of zeros is zero
        np.testing.assert_array_equal(found[:, 0], 0)
    assert np.all(np.abs(found - values) <= np.abs(values) * near)
    zeros = decoded(base_of(name), of(encode(name, np.zeros((K, N), np.float32))))
    np.testing.assert_array_equal(zeros, 0)


@pytest.mark.parametrize("name", KINDS)
def test_tiny_and_huge_weights(name):
    """Nothing becomes NaN or infinite, and nothing grows; within the range of the scales errors scale along."""
    normal = small(7, style="heavy")
    expected = np.sqrt(np.mean((decoded(base_of(name), of(encoder(name)(normal))) - normal) ** 2))
    half = parse(name).scale_dtype == np.float16
    for exponent in (-140, -110, -60, -20, -10, 4) + (() if half else (60, 110)):
        weights = normal * np.float32(2.0**exponent)
        found = decoded(base_of(name), of(encoder(name)(weights)))
        assert np.all(np.isfinite(found))
        error = np.sqrt(np.mean(((found - weights) / np.float32(2.0**exponent)).astype(np.float64) ** 2))
        if not half and exponent > -100:
            assert error <= 1.2 * expected
        unit = 2.0**-24 * 2.0**-exponent if half else 2.0**-119 * 2.0**-exponent
        assert error <= 1.2 * expected + unit


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("value", (np.nan, np.inf))
def test_nan_and_infinity_are_refused(name, value):
    weights = np.zeros((2, K, 3), np.float32)
    weights[1, 7, 2] = value
    with pytest.raises(QuantizationError, match=rf"{name}: 1 of the weights \[2, 128, 3\] are NaN .* at \[1, 7, 2\]"):
        encode(name, weights)


def test_what_scales_cannot_hold_is_refused():
    assert np.isfinite(packed(np.full((32, 1), 7 * 65504.0), "int4:g32")).all()
    with pytest.raises(QuantizationError, match=r"int4:g32: the largest weight is .* the scales of the format reach"):
        encode("int4:g32", np.full((32, 1), 7.1 * 65504))
    with pytest.raises(QuantizationError, match="int8:channel: the largest weight is 3e\\+38"):
        encode("int8:channel", np.full((32, 1), 3e38))


# ---- shapes, importance, stacks, traces ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KINDS, "fp8_e4m3:128x128", "int5:g64:asym", "int7:channel"])
def test_fields_are_those_of_the_storage(name):
    for k, n in ((K, N), (256, 200)):
        shapes = parse(name).field_shapes(k, n)
        fields = encode(name, jnp.ones((k, n), jnp.bfloat16))
        assert {f: (v.shape, v.dtype) for f, v in fields.items()} == {f: (s.shape, s.dtype) for f, s in shapes.items()}
        assert list(fields) == list(shapes) == list(parse(name).format.in_order(fields))
    for shape in ((0, 3), (K, 0), (2, K, 0), (0, K, 3)):
        empty = QuantizedArray.quantize(jnp.zeros(shape), name)
        assert empty.shape == shape and empty.dequantize().shape == shape


@pytest.mark.parametrize("name", ("int4:g32", "int4:channel:asym", "fp8_e4m3:128x128", "nf4:g64:double"))
def test_stacks_pieces_and_traces_give_the_same(name, monkeypatch):
    weights = weights_of("heavy", 256, 300).T.copy()
    weights = np.stack([weights[:, :150], weights[:, 150:]])
    alone = [of(encode(name, matrix, importance=importance_of(256))) for matrix in weights]
    both = of(encode(name, weights, importance=np.stack([importance_of(256)] * 2)))
    traced = of(jax.jit(lambda w: encode(name, w, importance=importance_of(256)))(weights))
    monkeypatch.setattr(tiles, "_PIECE", 256 * 40)
    monkeypatch.setattr(tiles.os, "cpu_count", lambda: 3)
    pieces = of(encode(name, weights, importance=importance_of(256)))
    for field in both:
        expected = np.stack([one[field] for one in alone])
        for found in (both, traced, pieces):
            # Sums add up in another order in other widths, which turns a choice between equals.
            differing = found[field].astype(np.float32) != expected.astype(np.float32)
            assert np.mean(differing) <= 0.02 or np.allclose(found[field], expected, rtol=1e-4)


def test_an_importance_is_one_for_each_row():
    with pytest.raises(QuantizationError, match=r"int4:g32: the importance is \[3\], expected .* \[64\]"):
        encode("int4:g32", np.ones((64, 2), np.float32), importance=np.ones(3))
    # A last square that is shorter weighs its rows alone.
    weights = weights_of("gaussian", 328, 40).T
    weights[:320] *= 10
    importance = np.where(np.arange(328) < 320, 1e-6, 1).astype(np.float32)
    errors = [
        mean_error(weights.T, packed(weights, "int3:128x128", importance=cost).T, importance)
        for cost in (None, importance)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_a_transposed_table_has_its_groups_along_the_rows():
    table = weights_of("gaussian", 64, 10)
    found = QuantizedArray.quantize(table, "int4:g32", transposed=True)
    assert found.shape == table.shape and found.description == "int4:g32"
    other = QuantizedArray.quantize(table.T, "int4:g32")
    for field, value in other.fields.items():
        np.testing.assert_array_equal(found.fields[field], value)
    np.testing.assert_array_equal(found.take(jnp.arange(10)), found.dequantize())


def test_trees_and_reports_take_granularities():
    tree = {"a": weights_of("gaussian", 64, 8).T, "table": weights_of("gaussian", 64, 8), "odd": np.ones((100, 4))}
    tree["odd"] = tree["odd"].astype(np.float32)
    packed_tree = quantize(tree, {"a": "int8:channel", "*": "int4:g64:asym"})
    assert packed_tree["a"].description == "int8:channel"
    # K is one group of 64, which is the whole column.
    assert packed_tree["table"].description == "int4:channel:asym" and packed_tree["table"].transposed
    assert packed_tree["odd"] is tree["odd"]
    again = quantize(packed_tree, {"a": "int8", "*": "int4:g64:asym"}, requantize=True)
    assert again["a"] is packed_tree["a"] and again["table"] is packed_tree["table"]
    other = quantize(packed_tree, {"a": "int8:tensor"}, requantize=True)
    assert other["a"].description == "int8:tensor"
    leaves = {leaf.path: leaf for leaf in report(tree, packed_tree).leaves}
    assert leaves["a"].format == "int8:channel" and leaves["a"].bits_per_weight == 8 + 32 / 64
    assert "int4:channel:asym" in str(report(tree, packed_tree))


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCALED_FORMATS)
def test_a_format_alone_has_the_usual_granularity(name):
    usual = "" if name.startswith("mx") else ":g64" if name in ("nf4", "fp4") else ":g32"
    if name == "int8" or name.startswith("fp8"):
        usual = ":channel"
    assert parse(name).name == name + usual == parse(name + usual).name


def test_every_format_of_blocks_keeps_its_name():
    for name in FORMATS:
        if name not in SCALED_FORMATS:
            assert parse(name).name == name
    assert [s.name for s in storages("fp8:tensor")] == ["fp8_e4m3:tensor", "fp8_e5m2:tensor"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("q9", "Format 'q9' is not known. Known formats: bf16"),
        ("q4_k:g32", "'q4_k:g32': q4_k has blocks of fixed size and takes no options; write 'q4_k'"),
        ("int4:64", "'int4:64': '64' is no option. Write 'int4', or one granularity after it: g64 "),
        ("int4:g0", "'g0' is no option"),
        ("int4:g32:channel", "an option is given twice"),
        ("int4:asym:asym", "an option is given twice"),
        ("int4:double", "'double' goes with nf4 and fp4, not with int4"),
        ("nf4:asym", "'asym' goes with int2 to int8, not with nf4"),
        ("int1:asym", "'asym' goes with int2 to int8, not with int1"),
        ("ternary:asym", "'asym' goes with int2 to int8, not with ternary"),
        ("mxfp8_e4m3:channel", "mxfp8_e4m3 has a scale for each 32 rows, by definition; write 'mxfp8_e4m3'"),
        ("nf4:tensor:double", "'double' needs a group of rows, such as nf4:g64:double"),
        ("int3:g12", "a group of int3 must be a multiple of 8 rows"),
    ],
)
def test_names_that_are_none_say_why(name, message):
    with pytest.raises(QuantizationError) as error:
        parse(name)
    assert message in str(error.value)
    with pytest.raises(QuantizationError):
        quantize({"w": np.ones((256, 8), np.float32)}, name)
    assert no_encoder(name)


@pytest.mark.parametrize(
    ("name", "k", "message"),
    [
        ("int4:g64", 96, "K=96 is not a multiple of int4:g64's group of 64"),
        ("int3:channel", 100, "K=100 is not a multiple of 8, the codes of int3 in whole bytes"),
        ("mxfp6_e2m3", 48, "K=48 is not a multiple of mxfp6_e2m3's group of 32"),
        ("int8:128x128", 192, "K=192 in blocks of 128 would be taken for 2 equal groups"),
        ("fp8_e4m3:g96", 192, "K=192 in groups of 96 would be taken for blocks of 128; use another group"),
    ],
)
def test_sizes_that_do_not_fit_say_why(name, k, message):
    weights = np.ones((k, 140), np.float32)
    with pytest.raises(QuantizationError) as error:
        encode(name, weights)
    assert message.replace(f"K={k}", f"K={k} of weights [{k}, 140]") in str(error.value)
    if padded := re.search(r"Pad K to (\d+)", str(error.value)):
        assert int(padded[1]) > k and not parse(name).refusal(int(padded[1]))
    else:
        assert "another group. Choose a format of smaller blocks" in str(error.value)
    with pytest.raises(QuantizationError, match="nothing to pack: w: K="):
        quantize({"w": weights}, name)
