"""Products with packed weights: one table of cases over all implementations, in both directions.

The default run crosses nearly everything for the formats of `THOROUGH`; the other formats, which share their code, take
each implementation once. `-m slow` runs the rest.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.quant.blocks import a_few_blocks, blocks_of
from trustcore.errors import ImplementationError
from trustcore.ops import cpu
from trustcore.ops.linear import linear, linear_many
from trustcore.quant import QuantizedArray, get_format
from trustcore.quant.formats import BLOCK_FORMATS
from trustcore.quant.matmul import TILE, choose

IMPLEMENTATIONS = ("native", "stream", "tiles", "dequantize")
NARROW, WIDE = SHAPES = ((96, 40), (64, 2 * TILE + 80))  # [K, N]: no whole vectors; several tiles and a rest
ROWS = (1, 3, 8, 17, 40)  # around the limits between the forms for few and for many rows
THOROUGH = ("f16", "bf16", "q4_0", "q4_1", "q8_0")  # one of each shape of product: plain, scale, scale and minimum
ONCE = {"native": (WIDE, 3), "stream": (NARROW, 3), "tiles": (WIDE, 17), "dequantize": (NARROW, 3)}
WITHOUT_FLOATS = ("iq1_m", "mxfp4", "nvfp4")  # their scales are codes as well

# Relative to the largest result: float32 sums of K terms in another order.
TOLERANCE = 4e-6


def usable(implementation, name="q4_1", columns=WIDE[1]):
    refusal = cpu.packed_refusal(name, columns)
    if implementation == "native" and refusal:
        pytest.skip(f"no native product: {refusal}")
    return implementation


def close(found, expected, tolerance=TOLERANCE):
    assert np.max(np.abs(np.asarray(found, np.float64) - expected)) <= tolerance * np.max(np.abs(expected))


def case(name, shape, rows):
    """K is rounded up to whole blocks."""
    k, n = a_few_blocks(name, shape[0]), shape[1]
    raw, oracle = blocks_of(name, k, n)
    x = np.random.default_rng(1).standard_normal((rows, k)).astype(np.float32)
    return QuantizedArray.from_blocks(name, raw), jnp.asarray(x), oracle.T.astype(np.float64)


def forward_cases():
    for name in BLOCK_FORMATS:
        for implementation in IMPLEMENTATIONS:
            if implementation == "native" and name not in cpu.FORMATS:
                continue
            for shape in SHAPES:
                for rows in ROWS:
                    thorough = name in THOROUGH and (implementation == "native" or rows in (1, 17))
                    quick = thorough or (shape, rows) == ONCE[implementation]
                    yield pytest.param(name, shape, rows, implementation, marks=() if quick else pytest.mark.slow)


def by_name(quick):
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in BLOCK_FORMATS]


@pytest.mark.parametrize(("name", "shape", "rows", "implementation"), list(forward_cases()))
def test_forward(name, shape, rows, implementation):
    usable(implementation, name, shape[1])
    w, x, oracle = case(name, shape, rows)
    product = jax.jit(lambda x, w: linear(x, w, implementation=implementation))
    close(product(x, w), np.asarray(x, np.float64) @ oracle)


@pytest.mark.parametrize("name", by_name((*THOROUGH, "q4_k", "iq2_s", "mxfp4")))
def test_the_default_is_right_under_jit_and_vmap(name):
    w, x, oracle = case(name, NARROW, 6)
    expected = np.asarray(x, np.float64) @ oracle
    close(jax.jit(lambda x, w: x @ w)(x, w), expected)
    close(jax.jit(jax.vmap(lambda row: linear(row, w)))(x.reshape(3, 2, -1)).reshape(6, -1), expected)
    stack = jax.tree.map(lambda a: jnp.stack([a, a, a]), w)
    close(jax.jit(jax.vmap(linear))(x.reshape(3, 2, -1), stack).reshape(6, -1), expected)


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, NARROW) for name in BLOCK_FORMATS]
    + [pytest.param(name, WIDE, marks=() if name in THOROUGH else pytest.mark.slow) for name in BLOCK_FORMATS],
)
def test_gradients(name, shape):
    """In x: the transposed product. In scales and minima: `decode`'s own derivative. Codes have none."""
    w, x, oracle = case(name, shape, 5)
    x = x / np.float32(np.abs(oracle).max())  # gradients of half-precision scales are to stay in their range
    y = np.asarray(x, np.float64) @ oracle

    @jax.jit
    def gradients(x, w):
        dx = jax.grad(lambda x: jnp.sum(linear(x, w) ** 2))(x)
        found = jax.grad(lambda w: jnp.mean(linear(x, w) ** 2), allow_int=True)(w)
        whole = jax.grad(lambda w: jnp.mean(jnp.matmul(x, w.dequantize(), precision="highest") ** 2), allow_int=True)(w)
        return dx, found.fields, whole.fields

    dx, found, expected = gradients(x, w)
    close(dx, 2 * y @ oracle.T)
    trained = [n for n, f in w.fields.items() if jnp.issubdtype(f.dtype, jnp.floating)]
    assert (not trained) == (name in WITHOUT_FLOATS)
    for field, gradient in found.items():
        if field not in trained:
            assert gradient.dtype == jax.dtypes.float0 and gradient.shape == w.fields[field].shape
            continue
        assert gradient.dtype == w.fields[field].dtype
        assert np.abs(np.asarray(expected[field], np.float64)).max() > 0
        close(gradient.astype(jnp.float32), np.asarray(expected[field], np.float64), 2e-3)


def test_a_transposed_table_multiplies_from_both_sides():
    raw, oracle = blocks_of("q8_0", 64, 600)
    table = QuantizedArray.from_blocks("q8_0", raw, transposed=True)
    rng = np.random.default_rng(2)
    x, z = (jnp.asarray(rng.standard_normal((3, size)), jnp.float32) for size in (64, 600))
    close(x @ table.T, np.asarray(x, np.float64) @ oracle.T)
    close(z @ table, np.asarray(z, np.float64) @ oracle)


def test_weights_of_several_formats_share_one_call():
    parts = [case(name, (96, n), 4) for name, n in (("q4_1", 40), ("q8_0", 24), ("bf16", 70), ("q4_0", 16))]
    x = parts[0][1]
    dense = jnp.asarray(np.random.default_rng(3).standard_normal((96, 10)), jnp.float32)
    biases = [None, jnp.ones(24), None, None, None]
    ys = linear_many(x, [w for w, _, _ in parts] + [dense], biases)
    for y, (_, _, oracle), bias in zip(ys, parts, biases, strict=False):
        close(y, np.asarray(x, np.float64) @ oracle + (0 if bias is None else 1))
    close(ys[-1], np.asarray(x, np.float64) @ np.asarray(dense, np.float64))


@pytest.mark.parametrize("rows", (1, 64))
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(name, form, marks=() if name in ("q4_1", "q4_k", "iq2_s", "tq1_0") else pytest.mark.slow)
        for name, spec in BLOCK_FORMATS.items()
        if spec.block > 1  # not bf16: jax 0.10's CPU compiler widens the whole array ahead of the loop that slices it
        for form in ("native", "stream", "tiles")
        if form != "native" or name in cpu.FORMATS
    ],
)
def test_the_whole_matrix_never_exists_in_float(name, rows, implementation):
    """Temporary memory of the compiled program, against that of the oracle, which does decode everything."""
    usable(implementation)
    k, n = 512, 8192
    w = QuantizedArray(name, {f: jnp.zeros(s.shape, s.dtype) for f, s in get_format(name).field_shapes(k, n).items()})
    x = jnp.ones((rows, k))

    def temporaries(name):
        compiled = jax.jit(lambda x, w: linear(x, w, implementation=name)).lower(x, w).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    outputs = 4 * rows * n  # the sums that the loops carry
    tile, block = 4 * k * TILE, w.spec.block * n  # decoded to float32; unpacked to bytes
    bound = {"native": 4 * tile, "stream": 4 * block + 3 * outputs, "tiles": 3 * tile + outputs}[implementation]
    assert temporaries(implementation) <= bound + 4 * x.size < 4 * k * n
    assert temporaries("dequantize") >= 4 * k * n  # the measure can fail


def test_what_is_chosen_and_why_not():
    w, x, _ = case("q4_1", SHAPES[0], 1)
    expected = "stream" if cpu.why_not() else "native"
    assert choose(1, w) == expected
    assert choose(1, w.T) == "tiles"
    with pytest.raises(ImplementationError, match=r"'stream' cannot multiply.*use 'tiles'"):
        linear(jnp.ones((1, 40)), w.T, implementation="stream")
    with pytest.raises(ImplementationError, match="'fast' is not known for packed weights; choose from native, stream"):
        linear(x, w, implementation="fast")
    with pytest.raises(
        ImplementationError, match=r"float32\[1,7\]|\[1, 7\] does not fit QuantizedArray\(q4_1\[96, 40\]"
    ):
        linear(jnp.ones((1, 7)), w)
    with pytest.raises(ImplementationError, match="'native' was asked for, but the weight is a float32 array"):
        linear(x, jnp.ones((96, 4)), implementation="native")


def test_fields_of_another_dtype_are_computed_right():
    """Scales that were widened, for training say: the native kernel reads half precision and must not be chosen."""
    w, x, oracle = case("q4_1", SHAPES[0], 2)
    wide = QuantizedArray("q4_1", {**w.fields, "scale": w.fields["scale"].astype(jnp.float32)})
    close(linear(x, wide), np.asarray(x, np.float64) @ oracle)
    assert choose(2, wide) == "stream" and choose(64, wide) == "tiles"
    with pytest.raises(ImplementationError, match=r"its scale is float32, the format's float16|native"):
        linear(x, wide, implementation="native")


def test_without_a_compiler_everything_still_runs(monkeypatch):
    monkeypatch.setattr(cpu, "packed_refusal", lambda format, n: "no C++ compiler was found")
    w, x, oracle = case("q4_1", SHAPES[0], 2)
    assert choose(2, w) == "stream" and choose(64, w) == "tiles"
    close(linear(x, w), np.asarray(x, np.float64) @ oracle)
    with pytest.raises(ImplementationError, match="no C\\+\\+ compiler was found"):
        linear(x, w, implementation="native")
