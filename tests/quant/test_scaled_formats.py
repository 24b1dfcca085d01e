"""Scaled formats: decoding weight by weight against NumPy, products, gradients, stacks, shards, refusals."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.quant.blocks import blocks_of
from tests.quant.scaled import FLOATS, INTEGERS, NAMES, decoded, fields_of, planes_of
from trustcore.errors import ImplementationError, QuantizationError
from trustcore.ops.linear import linear
from trustcore.quant import FORMATS, QuantizedArray, get_format
from trustcore.quant.formats import BLOCK_FORMATS, SCALED_FORMATS
from trustcore.quant.formats.format import TILE
from trustcore.quant.formats.names import parse

K, N = 192, 130
# Scales [G, C]: one, by column, by group, by square of 128, by group for all columns.
GRAINS = ((1, 1), (1, N), (6, N), (2, 2), (12, 1))
WIDE = TILE + 80
TOLERANCE = 4e-6  # relative to the largest result: float32 sums of K terms in another order

decode = jax.jit(lambda w: w.dequantize())
look_up = jax.jit(lambda w, ids: w.take(ids))


def weight(name, fields, **options):
    return QuantizedArray(name, {field: jnp.asarray(value) for field, value in fields.items()}, **options)


def close(found, expected, tolerance=TOLERANCE):
    assert np.max(np.abs(np.asarray(found, np.float64) - expected)) <= tolerance * np.max(np.abs(expected))


def decoding_cases():
    for i, name in enumerate(NAMES):
        grains = ((K // 32, N),) if name.startswith("mx") else GRAINS
        for j, grain in enumerate(grains):
            zeros = ("", "codes", "float") if name in INTEGERS else ("",)
            for zero in zeros if j == i % len(grains) else (zeros[(i + j) % len(zeros)],):
                yield name, grain, zero, (i + j) % 2 == 0


def double_fields(k, n, seed=0):
    """Random nf4 weights whose scales are codes; every level occurs."""
    rng = np.random.default_rng(seed)
    fields = fields_of("nf4", k, n, (k // 64, n), seed=seed)
    shape = parse("nf4:g64:double").field_shapes(k, n)["nested"].shape
    return {
        **fields,
        "scale": rng.integers(0, 256, (k // 64, n)).astype(np.uint8),
        "levels": np.sort(rng.standard_normal((256, 1)), axis=0).astype(np.float32),
        "nested": (0.01 + 0.01 * rng.random(shape)).astype(np.float32),
        "offset": np.full((1, 1), 0.05, np.float32),
    }


@pytest.mark.parametrize(("name", "grain", "zero", "order"), list(decoding_cases()))
def test_decoding_is_bit_exact(name, grain, zero, order):
    """Whole, transposed, and row by row of a table."""
    fields = fields_of(name, K, N, grain, zero=zero, order=order)
    w, oracle = weight(name, fields), decoded(name, fields)
    assert w.shape == (K, N) and w.T.shape == (N, K)
    np.testing.assert_array_equal(decode(w), oracle)
    ids = np.array([[3, 0], [N - 1, 129], [7, 7]])
    np.testing.assert_array_equal(look_up(w.T, jnp.asarray(ids)), oracle.T[ids])
    assert w.nbytes == sum(field.nbytes for field in fields.values())
    assert w.bits_per_weight == 8 * w.nbytes / (K * N)


@pytest.mark.parametrize("k", (64, 4096, 64 * 9, 64 * 512))
def test_scales_that_are_codes(k):
    """G divides 256, or is a multiple of it, or neither."""
    n = 40 if k < 10000 else 3
    fields = double_fields(k, n)
    if k == 64 * 9:  # nested scales for 16 columns of 9 scales each
        absolute = fields["levels"][:, 0][fields["scale"]] * np.repeat(fields["nested"], 16, axis=1)[:, :n]
        oracle = decoded("nf4", {f: fields[f] for f in ("codes",)} | {"scale": absolute + fields["offset"]})
    else:
        oracle = decoded("nf4", fields)
    w = weight("nf4", fields)
    np.testing.assert_array_equal(decode(w), oracle)
    np.testing.assert_array_equal(look_up(w.T, jnp.asarray([2, 0, n - 1])), oracle.T[[2, 0, n - 1]])
    assert repr(w).startswith(f"QuantizedArray(nf4:g64:double[{k}, {n}], 4.") or k == 64


@pytest.mark.parametrize("name", FLOATS)
def test_every_code_of_a_small_float(name):
    """Bit for bit ml_dtypes' reading: subnormals, infinities, both zeros; NaN is NaN."""
    bits = 6 if "fp6" in name else 8
    codes = np.arange(1 << bits, dtype=np.uint8)[:, None]
    expected = codes.view(FLOATS[name]).astype(np.float32)
    planes = planes_of(codes, 6) if bits == 6 else {"codes": codes.view(FLOATS[name])}
    blocks = (len(codes) // 32, 1)
    scale = np.full(blocks, 127, np.uint8) if name.startswith("mx") else np.ones((1, 1), np.float32)
    found = np.asarray(decode(weight(name, {**planes, "scale": scale})))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    real = ~np.isnan(expected)
    np.testing.assert_array_equal(found[real].view(np.uint32), expected[real].view(np.uint32))


def test_every_power_of_two():
    scale = np.arange(256, dtype=np.uint8)[None]
    codes = np.ones((32, 256)).astype(ml_dtypes.float8_e4m3fn)
    found = np.asarray(decode(weight("mxfp8_e4m3", {"codes": codes, "scale": scale})))[0]
    np.testing.assert_array_equal(found[1:255], 2.0 ** (np.arange(1, 255) - 127.0))
    assert found[0] in (0, 2.0**-127) and np.isnan(found[255])  # a subnormal: XLA on the CPU takes it for zero


# ---- products --------------------------------------------------------------------------------------------------------

# One of each shape: name, K, [G, C], zero, order.
PRODUCTS = {
    "tensor": ("int8", 96, (1, 1), "", False),
    "channel": ("int8", 96, (1, WIDE), "codes", False),
    "groups": ("int4", 96, (3, WIDE), "", False),
    "float zeros, rows in another order": ("int3", 96, (3, WIDE), "float", True),
    "signs": ("int1", 96, (3, WIDE), "", False),
    "squares": ("fp8_e4m3", 200, (2, 5), "", False),
    "whole squares": ("fp8_e5m2", 256, (2, 5), "", True),
    "shared by columns": ("int5", 96, (3, 1), "codes", False),
    "mx": ("mxfp6_e3m2", 96, (3, WIDE), "", False),
    "table": ("nf4", 128, (2, WIDE), "", False),
}


def case(key, rows=3):
    name, k, grain, zero, order = PRODUCTS[key]
    fields = fields_of(name, k, WIDE, grain, zero=zero, order=order)
    rng = np.random.default_rng(1)
    x, z = (jnp.asarray(rng.standard_normal((rows, size)), jnp.float32) for size in (k, WIDE))
    return weight(name, fields), x, z, decoded(name, fields).astype(np.float64)


@pytest.mark.parametrize("key", PRODUCTS)
@pytest.mark.parametrize("implementation", ("stream", "tiles", "dequantize"))
def test_forward(key, implementation):
    w, x, z, oracle = case(key)
    product = jax.jit(lambda x, w: linear(x, w, implementation=implementation))
    if implementation == "stream" and key == "squares":
        with pytest.raises(ImplementationError, match="its runs of 128 rows do not divide K=200; use 'tiles'"):
            product(x, w)
        return
    close(product(x, w), np.asarray(x, np.float64) @ oracle)
    if implementation != "stream":
        close(product(z, w.T), np.asarray(z, np.float64) @ oracle.T)


@pytest.mark.parametrize("rows", (1, 40))
@pytest.mark.parametrize("key", ("groups", "squares"))
def test_the_default_is_right_under_jit_and_vmap(key, rows):
    w, x, _, oracle = case(key, rows)
    expected = np.asarray(x, np.float64) @ oracle
    close(jax.jit(lambda x, w: x @ w)(x, w), expected)
    stack = jax.tree.map(lambda a: jnp.stack([a, a[::-1] if a.dtype == jnp.uint8 else a]), w)
    both = jax.jit(jax.vmap(lambda w: linear(x, w)))(stack)
    close(both[0], expected)


@pytest.mark.parametrize(
    "key", ("tensor", "float zeros, rows in another order", "squares", "shared by columns", "table", "double")
)
def test_gradients(key):
    """In x, in float scales and zeros, and in what scales are made of: those of the decoded matrix."""
    if key == "double":
        fields = double_fields(128, WIDE)
        w, oracle = weight("nf4", fields), decoded("nf4", fields).astype(np.float64)
        x, z = jnp.ones((3, 128)), jnp.ones((3, WIDE))
    else:
        w, x, z, oracle = case(key)

    @jax.jit
    def gradients(x, z, w):
        def both(product):
            dx, dw = jax.grad(lambda x, w: jnp.sum(product(x, w) ** 2), argnums=(0, 1), allow_int=True)(x, w)
            return dx, dw.fields, jax.grad(lambda w: jnp.sum(product(z, w.T) ** 2), allow_int=True)(w).fields

        return both(linear), both(lambda x, w: jnp.matmul(x, w.dequantize(), precision="highest"))

    (dx, forward, backward), (_, *whole) = gradients(x, z, w)
    close(dx, 2 * (np.asarray(x, np.float64) @ oracle) @ oracle.T)
    trained = w.spec.trained(w.fields)
    assert set(trained) >= {"scale"} or key == "double"
    if key == "double":
        assert trained == ("levels", "nested", "offset")
    for found, expected in zip((forward, backward), whole, strict=True):
        for field in w.fields:
            if field in trained:
                assert np.abs(expected[field]).max() > 0
                close(found[field], np.asarray(expected[field], np.float64), 2e-5)
            elif jnp.issubdtype(w.fields[field].dtype, jnp.floating):
                assert not np.asarray(found[field], np.float32).any()  # 8-bit floats are codes
            else:
                assert found[field].dtype == jax.dtypes.float0


@pytest.mark.parametrize("key", ("float zeros, rows in another order", "squares"))
def test_a_stack_of_layers(key):
    """Decoded together and by vmap; scan takes the layers one by one."""
    name, k, grain, zero, order = PRODUCTS[key]
    layers = [fields_of(name, k, WIDE, grain, zero=zero, order=order, seed=seed) for seed in (1, 2)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(weight(name, fields) for fields in layers))
    oracle = np.stack([decoded(name, fields) for fields in layers])
    assert stack.shape == (2, k, WIDE) and stack.ndim == 3
    np.testing.assert_array_equal(decode(stack), oracle)
    np.testing.assert_array_equal(jax.vmap(decode)(stack), oracle)
    x = jnp.ones((2, k))
    _, ys = jax.jit(lambda x, w: jax.lax.scan(lambda c, w: (c, x @ w), None, w))(x, stack)
    close(ys, np.ones((2, k)) @ oracle.astype(np.float64))


def test_a_stack_of_scales_that_are_codes():
    layers = [double_fields(128, 20, seed) for seed in (1, 2)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(weight("nf4", fields) for fields in layers))
    np.testing.assert_array_equal(decode(stack), np.stack([decoded("nf4", fields) for fields in layers]))


@pytest.mark.parametrize("rows", (1, 64))
@pytest.mark.parametrize("name", ("int4:g32", "int8:channel", "fp8_e4m3:128x128", "int3:g64:asym", "nf4"))
def test_the_whole_matrix_never_exists_in_float(name, rows):
    """Temporary memory of the default, against that of decoding everything; float8 codes are copied, as bytes."""
    k, n = 512, 8192
    storage = parse(name)
    w = QuantizedArray(
        storage.format.name, {f: jnp.zeros(s.shape, s.dtype) for f, s in storage.field_shapes(k, n).items()}
    )

    def temporaries(x, w, implementation):
        compiled = jax.jit(lambda x, w: linear(x, w, implementation=implementation)).lower(x, w).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    forward, back = (jnp.ones((rows, k)), w), (jnp.ones((rows, n)), w.T)
    copied = k * n if name.startswith("fp8") else 0
    for x, side in (forward, back):
        assert temporaries(x, side, None) <= copied + 4 * 4 * k * TILE + 3 * 4 * rows * n < 4 * k * n
        assert temporaries(x, side, "dequantize") >= 4 * k * n  # the measure can fail


def test_donated_fields_are_used_up():
    w = weight("int4", fields_of("int4", 64, 40, (2, 40)))
    doubled = jax.jit(
        lambda w: QuantizedArray(w.format, {**w.fields, "scale": w.fields["scale"] * 2}), donate_argnums=0
    )
    expected = 2 * np.asarray(w.dequantize())
    kept = doubled(w)
    assert all(field.is_deleted() for field in w.fields.values())
    np.testing.assert_array_equal(kept.dequantize(), expected)


def test_shards_along_either_axis(fresh_python):
    """Two devices; each field is cut along the axis that the matrix is, where it has that axis."""
    printed = fresh_python(
        """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from tests.quant.scaled import decoded, fields_of
        from trustcore.quant import QuantizedArray

        mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        cases = [("int4", (4, 96), "codes"), ("int8", (1, 1), ""), ("fp8_e4m3", (2, 1), ""), ("nf4", (4, 96), "")]
        for name, grain, zero in cases:
            fields = fields_of(name, 256, 96, grain, zero=zero)
            oracle = decoded(name, fields).astype(np.float64)
            x = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
            for axis in (0, 1):
                def place(value):
                    spec = [None, None]
                    if value.shape[axis] > 1:
                        spec[axis] = "d"
                    return jax.device_put(value, NamedSharding(mesh, P(*spec)))
                w = QuantizedArray(name, {f: place(v) for f, v in fields.items()})
                codes = w.fields["codes"]
                assert codes.addressable_shards[0].data.shape[axis] == codes.shape[axis] // 2
                y = np.asarray(jax.jit(lambda x, w: x @ w)(x, w))
                assert np.abs(y - x @ oracle).max() <= 1e-5 * np.abs(x @ oracle).max(), (name, axis)
                assert (np.asarray(jax.jit(lambda w: w.dequantize())(w)) == oracle.astype(np.float32)).all()
        print("done")
        """,
        devices=2,
    )
    assert printed.strip() == "done"


# ---- empty, described, refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_empty_matrices_decode(name):
    storage = parse(name)
    k = 2 * getattr(storage.format, "block", 128)
    for shape in ((0, 3), (k, 0)):
        fields = {f: jnp.zeros(s.shape, s.dtype) for f, s in storage.field_shapes(*shape).items()}
        w = QuantizedArray(storage.format.name, fields)
        assert w.shape == shape and w.dequantize().shape == shape and w.dequantize().dtype == jnp.float32
        stack = jax.tree.map(lambda field: field[None], w)
        assert stack.dequantize().shape == (1, *shape)
        assert w.size == 0 and isinstance(repr(w), str)
    y = jnp.ones((2, 0)) @ QuantizedArray(
        storage.format.name, {f: jnp.zeros(s.shape, s.dtype) for f, s in storage.field_shapes(0, 3).items()}
    )
    np.testing.assert_array_equal(y, np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("name", "grain", "zero", "described"),
    [
        ("int4", (3, 40), "", "int4:g64[192, 40]"),
        ("int4", (3, 40), "codes", "int4:g64:asym[192, 40]"),
        ("int8", (1, 40), "", "int8:channel[192, 40]"),
        ("int8", (1, 1), "", "int8:tensor[192, 40]"),
        ("fp8_e4m3", (2, 1), "", "fp8_e4m3:128x40[192, 40]"),
        ("mxfp8_e5m2", (6, 40), "", "mxfp8_e5m2[192, 40]"),
    ],
)
def test_what_a_weight_says_of_itself(name, grain, zero, described):
    w = weight(name, fields_of(name, 192, 40, grain, zero=zero))
    assert repr(w) == f"QuantizedArray({described}, {w.bits_per_weight:g} bits/weight)"


def test_what_is_described_can_be_asked_for():
    for name in ("int4:g64", "int8:tensor", "int2:g32:asym", "fp8_e4m3:128x128", "nf4:g64:double", "mxfp6_e2m3"):
        w = QuantizedArray.quantize(np.ones((256, 300), np.float32), name)
        assert w.description == name == parse(name).name
        assert {f: (v.shape, v.dtype) for f, v in w.fields.items()} == {
            f: (s.shape, s.dtype) for f, s in parse(name).field_shapes(256, 300).items()
        }


def test_fields_that_do_not_fit_are_named():
    fields = fields_of("int4", 192, 40, (3, 40))
    with pytest.raises(QuantizationError, match=r"int4: scale missing among the fields codes\. It needs codes, scale"):
        weight("int4", {"codes": fields["codes"]})
    with pytest.raises(QuantizationError, match=r"int4: levels unknown among .* it may have zero, order"):
        weight("int4", {**fields, "levels": fields["scale"]})
    with pytest.raises(QuantizationError, match=r"a scale \[5, 40\] does not fit the weights \[192, 40\]: rows of"):
        weight("int4", {**fields, "scale": np.ones((5, 40))}).dequantize()
    with pytest.raises(QuantizationError, match=r"its zero is \[1, 40\]; both must have one shape"):
        weight("int4", {**fields, "zero": np.ones((1, 40))}).dequantize()
    with pytest.raises(QuantizationError, match=r"mxfp8_e4m3.*it takes a scale for each 32 rows of each column"):
        weight("mxfp8_e4m3", fields_of("mxfp8_e4m3", 192, 40, (3, 40))).dequantize()
    nested = double_fields(256, 300)
    with pytest.raises(QuantizationError, match=r"nested scales \[1, 9\] do not fit scales \[4, 300\]; they must be"):
        weight("nf4", {**nested, "nested": np.ones((1, 9), np.float32)}).dequantize()
    with pytest.raises(QuantizationError, match="int4 has no form in blocks on disk"):
        weight("int4", fields).to_blocks()
    with pytest.raises(QuantizationError, match="int4 has no form in blocks on disk"):
        QuantizedArray.from_blocks("int4", np.zeros((2, 18), np.uint8))


def test_fields_come_in_one_order():
    """Whoever writes them down in another order gets the same pytree."""
    fields = fields_of("int4", 64, 40, (2, 40), zero="codes")
    mixed = {name: fields[name] for name in ("zero", "codes", "scale")}
    assert jax.tree.structure(weight("int4", fields)) == jax.tree.structure(weight("int4", mixed))


def test_the_table_names_each_format_once():
    assert set(SCALED_FORMATS) == set(NAMES) and not set(SCALED_FORMATS) & set(BLOCK_FORMATS)
    assert list(FORMATS) == [*BLOCK_FORMATS, *SCALED_FORMATS]
    assert {name: get_format(name).bits for name in NAMES if name.startswith("int")} == {
        f"int{bits}": bits for bits in range(1, 9)
    }


def test_a_scale_for_the_whole_nvfp4_matrix():
    raw, oracle = blocks_of("nvfp4", 128, 600)
    bare = QuantizedArray.from_blocks("nvfp4", raw)
    w = QuantizedArray("nvfp4", {**bare.fields, "tensor_scale": jnp.full((1, 1), 0.25)})
    np.testing.assert_array_equal(decode(w), oracle.T * np.float32(0.25))
    np.testing.assert_array_equal(look_up(w.T, jnp.asarray([5, 1])), oracle[[5, 1]] * np.float32(0.25))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 128)), jnp.float32)
    for implementation in ("stream", "tiles"):
        product = jax.jit(lambda x, w: linear(x, w, implementation=implementation))  # noqa: B023
        close(product(x, w), np.asarray(x, np.float64) @ oracle.T / 4)
    stack = jax.tree.map(lambda field: jnp.stack([field, field]), w)
    np.testing.assert_array_equal(decode(stack)[1], oracle.T * np.float32(0.25))
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(x @ w), allow_int=True))(w).fields["tensor_scale"]
    np.testing.assert_allclose(gradient, [[float(jnp.sum(x @ bare))]], rtol=1e-4)
    with pytest.raises(QuantizationError, match="nvfp4: tensor_scale has no place in the blocks"):
        w.to_blocks()
