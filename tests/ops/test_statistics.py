"""Statistics of arrays against NumPy in float64, both implementations, every class of numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustcore.debug.statistics import Statistics
from trustcore.errors import ImplementationError
from trustcore.ops.cpu import why_not
from trustcore.ops.statistics import statistics, worst_bits

IMPLEMENTATIONS = ("xla", "native")
SHAPES = ((), (1,), (7,), (3, 5), (40, 33), (2, 3, 16), (1030, 70), (700, 700), (0, 3), (2, 0))


def oracle(x):
    """x as the device stored it, NumPy."""
    wide = np.asarray(x, np.float64)
    finite = wide[np.isfinite(wide)]
    a = np.abs(wide)
    tiny = float(jnp.finfo(x.dtype).tiny)
    rows = wide.reshape(-1, wide.shape[-1]) if wide.ndim > 1 and wide.shape[-1] else None
    grouped = rows is not None and len(rows) > 1
    return {
        "min": finite.min() if finite.size else None,
        "max": finite.max() if finite.size else None,
        "mean": finite.mean() if finite.size else None,
        "std": finite.std() if finite.size else None,
        "rms": np.sqrt((finite**2).mean()) if finite.size else None,
        "norm": np.sqrt((finite**2).sum()) if finite.size else None,
        "zeros": (wide == 0).sum(),
        "nan": np.isnan(wide).sum(),
        "inf": (wide == np.inf).sum(),
        "negative_inf": (wide == -np.inf).sum(),
        "subnormal": ((a > 0) & (a < tiny)).sum(),
        "tiny": ((a > 0) & (a < np.float32(1e-7))).sum(),
        "huge": ((a > 1e6) & np.isfinite(wide)).sum(),
        "dead_units": (rows == 0).all(0).sum() if grouped else None,
        "zero_rows": (rows == 0).all(1).sum() if grouped else None,
    }


def sample(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3, shape)
    x = np.where(rng.random(shape) < 0.1, 0, x)
    x = np.where(rng.random(shape) < 0.02, 3e-8, x)
    x = np.where(rng.random(shape) < 0.02, 1e-40, x)
    x = np.where(rng.random(shape) < 0.02, np.nan, x)
    x = np.where(rng.random(shape) < 0.02, np.inf, x)
    x = np.where(rng.random(shape) < 0.02, -np.inf, x)
    if np.ndim(x) > 1 and x.size:
        x[..., 0], x[1:2] = 0, 0
    with np.errstate(over="ignore"):
        return jnp.asarray(np.asarray(x).astype(dtype))


def found(x, implementation):
    if implementation == "native" and why_not("statistics"):
        pytest.skip(why_not("statistics"))
    words = jax.jit(lambda x: statistics(x, implementation=implementation))(x)
    return Statistics.from_words(np.asarray(words), x.shape, x.dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_are_those_of_numpy(shape, dtype, implementation):
    x = sample(shape, jnp.dtype(dtype))
    got, expected = found(x, implementation), oracle(x)
    for name, value in expected.items():
        mine = getattr(got, name)
        if value is None or mine is None:
            assert mine == value, name
        else:
            np.testing.assert_allclose(mine, value, rtol=1e-4, atol=1e-6 * abs(expected["rms"] or 0), err_msg=name)
    assert sum(got.histogram) == x.size


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bins_hold_their_orders(implementation):
    x = jnp.asarray([0.0, 1.0, 1.9, -2.0, 15.0, 1e-45, 3e38, np.inf, np.nan] * 5, jnp.float32)
    expected = np.zeros(64, int)
    for value in np.asarray(x):
        magnitude = abs(float(value))
        if not np.isfinite(magnitude):
            expected[63] += 1
        else:
            expected[0 if magnitude == 0 else max(int(np.floor(np.log2(magnitude))) + 127, 0) // 4] += 1
    assert list(found(x, implementation).histogram) == expected.tolist()


def test_other_dtypes_count_too():
    x = jnp.asarray([1 + 2j, complex("nan"), 0j], jnp.complex64)
    got = found(x, "xla")
    assert (got.size, got.nan, got.zeros, got.max) == (6, 1, 3, 2.0)
    assert found(jnp.asarray([0.5, -448.0], jnp.float8_e4m3fn), "native").min == -448.0
    with pytest.raises(ImplementationError, match="int32"):
        statistics(jnp.arange(3))
    with pytest.raises(ImplementationError, match="'native' and 'xla'"):
        statistics(jnp.ones(3), implementation="fast")


def test_worst_bits_order_numbers_infinity_and_nan():
    values = [[0.0, -2.0], [1e30, 3.0], [-np.inf, 1.0], [np.nan, np.inf]]
    bits = [int(worst_bits(jnp.asarray(v, jnp.float32))) for v in values]
    assert bits == sorted(bits) and bits[2] == 0x7F800000 < bits[3]
    assert np.uint32(bits[0]).view(np.float32) == 2.0
