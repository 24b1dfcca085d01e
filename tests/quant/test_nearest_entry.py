"""The cheapest entry of a grid: against a search in float64, and both implementations bit for bit."""

import jax.numpy as jnp
import numpy as np
import pytest

from trustcore.ops import cpu
from trustcore.quant.encode.nearest_entry import nearest_entry
from trustcore.quant.formats.iq_grids import GRIDS

IMPLEMENTATIONS = (
    "xla",
    pytest.param("native", marks=pytest.mark.skipif(bool(cpu.why_not("encoders")), reason=cpu.why_not("encoders"))),
)


def shape_of(name):
    """Levels, weights in a group, bits."""
    return (8, 4, 3) if name.startswith("iq3") else (3, 8, 2)


def costs_of(name, groups, seed=0):
    levels, d, _ = shape_of(name)
    return (np.random.default_rng(seed).standard_normal((levels, d, groups)) ** 2).astype(np.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", GRIDS)
def test_no_entry_is_cheaper(name, implementation):
    _, d, bits = shape_of(name)
    costs = costs_of(name, 300)
    index, cost = nearest_entry(jnp.asarray(costs), GRIDS[name], bits, implementation=implementation)
    levels = GRIDS[name][:, None] >> (bits * np.arange(d)) & ((1 << bits) - 1)
    sums = np.sum([costs[levels[:, i], i] for i in range(d)], axis=0, dtype=np.float64)  # [entries, G]
    found = np.take_along_axis(sums, np.asarray(index)[None], 0)[0]
    rounding = 2.0**-16  # seven bits of half a sum hold its number
    assert np.all(found <= sums.min(axis=0) * (1 + rounding))
    np.testing.assert_allclose(cost, found, rtol=rounding)


@pytest.mark.skipif(bool(cpu.why_not("encoders")), reason=cpu.why_not("encoders"))
@pytest.mark.parametrize("groups", (1, 33, 300))
@pytest.mark.parametrize("name", GRIDS)
def test_both_implementations_give_the_same_bits(name, groups):
    costs = jnp.asarray(costs_of(name, groups, seed=1))
    native, xla = (nearest_entry(costs, GRIDS[name], shape_of(name)[2], implementation=i) for i in ("native", "xla"))
    for a, b in zip(native, xla, strict=True):
        np.testing.assert_array_equal(a, b)


def test_of_equal_costs_the_first_entry_is_taken():
    for name in ("iq3_s", "iq1"):
        levels, d, bits = shape_of(name)
        index, cost = nearest_entry(jnp.zeros((levels, d, 300)), GRIDS[name], bits)
        assert not np.any(index) and not np.any(cost)
