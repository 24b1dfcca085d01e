"""The encoders in C++ against those on XLA: one table of cases for both.

Their steps are the same, but XLA joins products and sums into one rounding where it likes. The last bit of a sum may
therefore differ, and with it, now and then, the rounding of a scale or the choice between two candidates as good.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.quant.samples import DISTRIBUTIONS, importance_of, mean_error, weights_of
from trustcore.errors import QuantizationError
from trustcore.ops import cpu
from trustcore.quant import get_format
from trustcore.quant.encode import encode, tiles
from trustcore.quant.formats import decode_matrix
from trustcore.quant.formats.names import parse

pytestmark = pytest.mark.skipif(bool(cpu.why_not("encoders")), reason=cpu.why_not("encoders"))

# Part of the elements of a field that may differ: searched, and not.
DIFFERENT = {True: 0.02, False: 0.005}
# With an importance eight bits leave many candidates within a thousandth of each other.
MANY_EQUALS = {("q8_0", True): 0.08, ("q5_1", True): 0.04, ("q5_k", True): 0.08}
# A block has one scale and one minimum for all its sub-blocks: what differs in one goes over to the others.
MINIMA = ("q2_k", "q4_k", "q5_k")


def on_xla(monkeypatch, *args, **options):
    with monkeypatch.context() as patched:
        patched.setattr(cpu, "ENCODED", ())
        return encode(*args, **options)


@functools.cache
def decoder(name):
    return jax.jit(lambda fields: decode_matrix(get_format(name), fields))


def decoded(name, fields):
    return np.asarray(decoder(name)(fields))


@pytest.mark.parametrize("search", (True, False))
@pytest.mark.parametrize("weighted", (True, False))
@pytest.mark.parametrize("name", cpu.ENCODED)
def test_the_fields_are_those_of_xla(name, weighted, search, monkeypatch):
    importance = importance_of() if weighted else None
    for distribution in DISTRIBUTIONS:
        weights = weights_of(distribution).T
        options = {"importance": importance, "search": search}
        native, xla = encode(name, jnp.asarray(weights), **options), on_xla(monkeypatch, name, weights, **options)
        assert list(native) == list(xla)
        for field, found in native.items():
            expected = np.asarray(xla[field])
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            different = np.mean(np.asarray(found) != expected)
            assert different <= MANY_EQUALS.get((name, weighted), (1 + 2 * (name in MINIMA)) * DIFFERENT[search])
            # The scale of a K-quant depends on what sub-blocks make of theirs.
            if not search and not name.endswith("_k") and field in ("scale", "minimum"):
                steps = np.asarray(found).view(np.int16).astype(int) - expected.view(np.int16)
                assert np.abs(steps).max() <= 1
        errors = [mean_error(weights.T, decoded(name, f).T, importance) for f in (native, xla)]
        assert abs(errors[0] / errors[1] - 1) <= (1 + (name in MINIMA)) * (1e-3 if search else 1e-4)


@pytest.mark.parametrize("name", cpu.ENCODED)
def test_widths_and_stacks(name):
    """Columns that fill no whole vector, more than one run of columns, matrices in a stack with their importance."""
    k = 2 * get_format(name).block
    weights = weights_of("heavy", k, 2100).T
    whole = encode(name, jnp.asarray(weights))
    for n in (cpu.vector_lanes("encoders"), 45):
        for field, value in encode(name, jnp.asarray(weights[:, -n:])).items():
            np.testing.assert_array_equal(value, whole[field][..., -n:])
    stack = np.stack([weights[:, :40], weights[:, 40:80]])
    importance = np.stack([importance_of(k, seed) for seed in (0, 1)])
    both = encode(name, jnp.asarray(stack), importance=importance)
    for i in range(2):
        one = encode(name, jnp.asarray(stack[i]), importance=importance[i])
        for field, value in both.items():
            np.testing.assert_array_equal(value[i], one[field])


def test_few_columns_and_traces_go_to_xla():
    weights = jnp.asarray(weights_of("gaussian", 64, 64).T)
    q4_0 = parse("q4_0")
    assert tiles._natively(q4_0, weights)
    assert not tiles._natively(q4_0, weights[:, : cpu.vector_lanes("encoders") - 1])
    assert not tiles._natively(parse("iq4_nl"), weights)
    jax.jit(lambda w: [pytest.fail("native under a trace") if tiles._natively(q4_0, w) else w])(weights)


@pytest.mark.parametrize("value", (np.nan, -np.nan, np.inf, -np.inf, 1e30))
def test_what_cannot_be_packed_is_refused(value):
    weights = np.zeros((256, 64), np.float32)
    weights[100, 50] = value
    for name in cpu.ENCODED:
        if name in ("mxfp4", "bf16") and value == 1e30:
            continue  # they reach that far
        with pytest.raises(QuantizationError, match=f"{name}: (1 of the weights|the largest weight is)"):
            encode(name, jnp.asarray(weights))
