"""Matrices that other packages packed decode to what those packages decode them to, and stay packed until then."""

import jax
import numpy as np
import pytest

from tests.models.packed_cases import CASES, expected, tensors
from trustcore.models.schemes import scheme_of
from trustcore.models.schemes.float4 import GptOss
from trustcore.models.schemes.write import WRITERS


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


WRITERS_OF = {"gptq": "gptq", "awq": "awq", "compressed-tensors": "compressed-tensors"}
# Read, and not written: AWQ's other order, plain and static integers, blocks of a ragged size.
NOT_WRITTEN = ("awq-gemv", "compressed-tensors-int-8", "compressed-tensors-int-8-asym", "gptq-4-ragged")


@pytest.mark.parametrize(
    "case", [case for case in CASES if CASES[case]["quant_method"] in WRITERS_OF and case not in NOT_WRITTEN]
)
def test_writers_write_what_the_packages_wrote(case):
    """Tensor for tensor and byte for byte."""
    writer = WRITERS[WRITERS_OF[CASES[case]["quant_method"]]]()
    planned = writer.tensors("m", packed(case).read())
    theirs = {name: np.asarray(tensor.numpy()) for name, tensor in tensors(case).items()}
    config = writer.config(["m"], [])
    if case.startswith("gptq"):
        assert {key: config[key] for key in ("bits", "group_size", "desc_act", "sym")} == {
            key: CASES[case][key] for key in ("bits", "group_size", "desc_act", "sym")
        }
    assert planned.keys() == theirs.keys()
    for name, plan in planned.items():
        ours = np.ascontiguousarray(plan.make())
        assert (ours.shape, ours.dtype) == (plan.shape, plan.dtype)
        if name == "m.weight_global_scale":  # one over one over it
            np.testing.assert_allclose(ours, theirs[name], rtol=2**-23)
            continue
        assert (ours.shape, ours.dtype) == (theirs[name].shape, theirs[name].dtype), name
        np.testing.assert_array_equal(ours.view(np.uint8), theirs[name].view(np.uint8), name)
