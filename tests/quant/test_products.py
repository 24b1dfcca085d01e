"""Products with packed weights: one table of cases over all implementations, in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.quant.blocks import blocks_of
from trustcore.errors import ImplementationError
from trustcore.ops import cpu
from trustcore.ops.linear import linear, linear_many
from trustcore.quant import FORMATS, QuantizedArray
from trustcore.quant.matmul import TILE, choose

IMPLEMENTATIONS = ("native", "stream", "tiles", "dequantize")
SHAPES = ((96, 40), (64, 2 * TILE + 76))  # [K, N]: narrower than a vector; several tiles and a rest
ROWS = (1, 3, 8, 17, 40)  # around the limits between the forms for few and for many rows

# Relative to the largest result: float32 sums of K terms in another order.
TOLERANCE = 4e-6


def usable(implementation):
    if implementation == "native" and cpu.why_not():
        pytest.skip(f"no native kernels: {cpu.why_not()}")
    return implementation


def close(found, expected, tolerance=TOLERANCE):
    assert np.max(np.abs(np.asarray(found, np.float64) - expected)) <= tolerance * np.max(np.abs(expected))


def case(name, shape, rows):
    k, n = shape
    raw, oracle = blocks_of(name, k, n)
    x = np.random.default_rng(1).standard_normal((rows, k)).astype(np.float32)
    return QuantizedArray.from_blocks(name, raw), jnp.asarray(x), oracle.T.astype(np.float64)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_forward(name, shape, implementation):
    usable(implementation)
    for rows in ROWS:
        w, x, oracle = case(name, shape, rows)
        close(linear(x, w, implementation=implementation), np.asarray(x, np.float64) @ oracle)


@pytest.mark.parametrize("name", FORMATS)
def test_the_default_is_right_under_jit_and_vmap(name):
    w, x, oracle = case(name, SHAPES[0], 6)
    expected = np.asarray(x, np.float64) @ oracle
    close(jax.jit(lambda x, w: x @ w)(x, w), expected)
    close(jax.vmap(lambda row: linear(row, w))(x.reshape(3, 2, -1)).reshape(6, -1), expected)
    stack = jax.tree.map(lambda a: jnp.stack([a, a, a]), w)
    close(jax.vmap(linear)(x.reshape(3, 2, -1), stack).reshape(6, -1), expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(name, shape):
    """In x: the transposed product. In scales and minima: `decode`'s own derivative. Codes have none."""
    w, x, oracle = case(name, shape, 5)
    y = np.asarray(x, np.float64) @ oracle
    close(jax.grad(lambda x: jnp.sum(linear(x, w) ** 2))(x), 2 * y @ oracle.T)

    found = jax.grad(lambda w: jnp.mean(linear(x, w) ** 2), allow_int=True)(w)
    expected = jax.grad(lambda w: jnp.mean(jnp.matmul(x, w.dequantize(), precision="highest") ** 2), allow_int=True)(w)
    trained = [n for n, f in w.fields.items() if jnp.issubdtype(f.dtype, jnp.floating)]
    assert trained
    for field in trained:
        assert found.fields[field].dtype == w.fields[field].dtype
        close(found.fields[field].astype(jnp.float32), np.asarray(expected.fields[field], np.float64), 2e-3)


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


@pytest.mark.parametrize("implementation", ("native", "stream", "tiles"))
@pytest.mark.parametrize("rows", (1, 64))
def test_the_whole_matrix_never_exists_in_float(implementation, rows):
    """Temporary memory of the compiled program, against that of the oracle, which does decode everything."""
    usable(implementation)
    k, n = 512, 8192
    raw, _ = blocks_of("q4_1", k, n)
    w = QuantizedArray.from_blocks("q4_1", raw)
    x = jnp.ones((rows, k))

    def temporaries(name):
        compiled = jax.jit(lambda x, w: linear(x, w, implementation=name)).lower(x, w).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(implementation) < k * n * 4 / 2
    assert temporaries("dequantize") >= k * n * 4  # the measure can fail


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
