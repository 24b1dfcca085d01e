"""Matrices that other packages packed decode to what those packages decode them to, and stay packed until then."""

import jax
import numpy as np
import pytest

from tests.models.packed_cases import CASES, expected, tensors
from trustcore.models.schemes import scheme_of
from trustcore.models.schemes.float4 import GptOss


def packed(case):
    scheme = scheme_of({"quantization_config": CASES[case]})
    n, k = expected(case).shape[-2:]
    if isinstance(scheme, GptOss):
        return scheme.find_stack(tensors(case), "m", expected(case).shape[:-2], k, n)
    return scheme.find(tensors(case), "m", k, n)


# Their scale is the product or quotient of two numbers, which the packages round elsewhere: one step of the dtype in
# which they decode, float32 and bfloat16.
ROUNDED = {"bitsandbytes-int8": 2.0**-22, "compressed-tensors-nvfp4": 2.0**-7}


@jax.jit
def _dequantized(weight):
    return weight.dequantize()


def decoded(found):
    return np.swapaxes(np.asarray(_dequantized(found.read())), -1, -2)


@pytest.mark.parametrize("case", CASES)
def test_decodes_as_the_original_package(case):
    """Bit for bit, once rounded to the dtype in which the package computes."""
    theirs = expected(case)
    ours = decoded(packed(case)).astype(theirs.dtype)
    if case in ROUNDED:
        np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), rtol=ROUNDED[case])
    else:
        np.testing.assert_array_equal(ours, theirs)
