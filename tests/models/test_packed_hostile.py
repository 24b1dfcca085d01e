"""Broken and hostile packed checkpoints: each gets one ModelError that names the tensor and what it should be."""

import contextlib
import json
import time
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tests.models.packed_cases import CASES, as_arrays, expected
from trustcore.errors import ModelError
from trustcore.models.schemes import SCHEMES, scheme_of
from trustcore.models.schemes.patterns import matches
from trustcore.weights import open_checkpoint

FUZZ = settings(
    max_examples=300, deadline=timedelta(seconds=5), database=None, suppress_health_check=[HealthCheck.too_slow]
)
QUANT_STATE = "m.weight.quant_state.bitsandbytes__nf4"
ONE_EACH = (
    *("gptq-4", "gptq-3-order", "awq-gemm", "awq-gemv", "bitsandbytes-nf4-nested", "bitsandbytes-int8"),
    *("compressed-tensors-pack-3-asym", "compressed-tensors-int-8-asym", "compressed-tensors-float-8-block"),
    *("compressed-tensors-nvfp4", "compressed-tensors-mxfp4", "compressed-tensors-mxfp6", "compressed-tensors-mxfp8"),
)
OPTIONAL = ("m.weight_format", "m.weight_shape", "m.g_idx")


def read(tmp_path, case, arrays, config=None):
    """Finds and reads the module "m" whose tensors are `arrays`."""
    path = tmp_path / "m.safetensors"
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    n, k = expected(case).shape[-2:]
    with open_checkpoint(path) as checkpoint:
        found = scheme_of({"quantization_config": config or CASES[case]}).find(checkpoint, "m", k, n)
        return None if found is None else dict(found.fields())


def parts(case):
    return [name for name in as_arrays(case) if name not in OPTIONAL]


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in ONE_EACH for name in parts(case)])
def test_a_missing_companion_is_named(tmp_path, case, name):
    arrays = as_arrays(case)
    del arrays[name]
    with pytest.raises(ModelError, match=r"m\.[\w.]+ (is missing; .* has it as|stands beside)") as caught:
        read(tmp_path, case, arrays)
    assert name in str(caught.value) or name == QUANT_STATE or name == "m.weight"


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in ONE_EACH for name in parts(case)])
def test_a_cut_tensor_is_named(tmp_path, case, name):
    arrays = as_arrays(case)
    if arrays[name].ndim == 0 or name == QUANT_STATE:
        return
    arrays[name] = arrays[name][:-1]
    with pytest.raises(ModelError, match=r"has it as|has \d+ bytes|nor|is no") as caught:
        read(tmp_path, case, arrays)
    assert name in str(caught.value)


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in ONE_EACH for name in parts(case)])
def test_another_dtype_is_named(tmp_path, case, name):
    """64-bit floats are nobody's; plain weights of them are not packed, and say so by being left alone."""
    arrays = as_arrays(case)
    arrays[name] = arrays[name].astype(np.float64)
    if name == "m.weight":
        try:
            assert read(tmp_path, case, arrays) is None
        except ModelError as error:
            assert "m.weight" in str(error)
        return
    with pytest.raises(ModelError, match=r"is f64\[") as caught:
        read(tmp_path, case, arrays)
    assert name in str(caught.value)


def state(**changes):
    arrays = as_arrays("bitsandbytes-nf4-nested")
    described = json.loads(arrays[QUANT_STATE].tobytes()) | changes
    return {QUANT_STATE: np.frombuffer(json.dumps(described).encode(), np.uint8)}


def with_value(case, name, index, value):
    array = as_arrays(case)[name]
    array[index] = value
    return {name: array}


VALUES = {
    "group below": ("gptq-4-order", lambda: with_value("gptq-4-order", "m.g_idx", 3, -1), r"g_idx has groups -1 to 3"),
    "group above": (
        "gptq-4-order",
        lambda: with_value("gptq-4-order", "m.g_idx", 3, 4),
        "g_idx has groups 0 to 4; there",
    ),
    "groups uneven": (
        "gptq-4",
        lambda: with_value("gptq-4", "m.g_idx", 3, 2),
        r"g_idx groups of 31, 32, 33 rows share no size of at",
    ),
    "scale nan": (
        "gptq-4",
        lambda: with_value("gptq-4", "m.scales", (0, 0), np.nan),
        "scales holds a scale that is inf",
    ),
    "scale inf": (
        "awq-gemm",
        lambda: with_value("awq-gemm", "m.scales", (0, 0), np.inf),
        "scales holds a scale that is",
    ),
    "state is no json": (
        "bitsandbytes-nf4-nested",
        lambda: {QUANT_STATE: np.full(9, 255, np.uint8)},
        "the text is not UTF-8",
    ),
    "state is long": (
        "bitsandbytes-nf4-nested",
        lambda: {QUANT_STATE: np.zeros(5000, np.uint8)},
        "5000 bytes; expected at most 4096",
    ),
    "state of another shape": (
        "bitsandbytes-nf4-nested",
        lambda: state(shape=[128, 40]),
        r"shape \[128, 40\]; expected",
    ),
    "state of another type": ("bitsandbytes-nf4-nested", lambda: state(quant_type="fp4"), "quant_type 'fp4'"),
    "absurd block": (
        "bitsandbytes-nf4-nested",
        lambda: state(blocksize=2**30),
        "blocksize 1073741824; expected one of",
    ),
    "block of nothing": ("bitsandbytes-nf4-nested", lambda: state(blocksize=0), "blocksize is 0; expected an integer"),
    "block of one": (
        "bitsandbytes-nf4-nested",
        lambda: state(blocksize="64"),
        "blocksize is '64'; expected an integer",
    ),
    "absurd nest": (
        "bitsandbytes-nf4-nested",
        lambda: state(nested_blocksize=2**30),
        None,  # one scale for all of them, which is what the file has
    ),
    "offset nan": ("bitsandbytes-nf4-nested", lambda: state(nested_offset=float("nan")), "nested_offset is nan"),
    "another table": (
        "bitsandbytes-nf4-nested",
        lambda: with_value("bitsandbytes-nf4-nested", "m.weight.quant_map", 3, 9.0),
        "quant_map is not the table of nf4",
    ),
    "another order of rows": (
        "bitsandbytes-int8",
        lambda: {"m.weight_format": np.array(1, np.uint8)},
        "weight_format is 1; only 0",
    ),
    "another shape": (
        "compressed-tensors-pack-4",
        lambda: {"m.weight_shape": np.array([96, 40])},
        r"weight_shape says \[96, 40\]",
    ),
    "global scale of zero": (
        "compressed-tensors-nvfp4",
        lambda: {"m.weight_global_scale": np.float32([0])},
        "is 0.0; expected a positive",
    ),
    "negative scales": (
        "compressed-tensors-nvfp4",
        lambda: {"m.weight_scale": -as_arrays("compressed-tensors-nvfp4")["m.weight_scale"]},
        "holds a negative scale",
    ),
    "group above, old files": (
        "compressed-tensors-pack-4",
        lambda: {"m.weight_g_idx": np.full(96, 3, np.int32)},
        "has groups 3 to 3; there are 3",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_cannot_be_are_named(tmp_path, name):
    case, change, message = VALUES[name]
    arrays = as_arrays(case) | change()
    if message is None:
        assert read(tmp_path, case, arrays) is not None
        return
    with pytest.raises(ModelError, match=message):
        read(tmp_path, case, arrays)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("gptq-4", {"group_size": 2**31 - 1}),
        ("gptq-4", {"group_size": 64}),
        ("gptq-4", {"bits": 8}),
        ("gptq-4", {"desc_act": True, "group_size": 9}),
        ("awq-gemm", {"group_size": 48}),
        ("awq-gemm", {"version": "gemv"}),
    ],
)
def test_configurations_that_do_not_fit_the_tensors_are_told(tmp_path, case, changes):
    with pytest.raises(ModelError, match=r"m\.\w+ (is|cannot be)"):
        read(tmp_path, case, as_arrays(case), CASES[case] | changes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        "bits",
        "group_size",
        "desc_act",
        "sym",
        "checkpoint_format",
        "dynamic",
        "pack_dtype",
        "version",
        "zero_point",
        "load_in_4bit",
        "load_in_8bit",
        "config_groups",
        "format",
        "weight_block_size",
        "sparsity_config",
        "transform_config",
        "quantization_status",
        "ignore",
    ]
)


@FUZZ
@given(st.sampled_from(sorted(SCHEMES)), st.dictionaries(KEYS, JSON, max_size=5))
def test_any_configuration_is_read_or_refused(method, config):
    try:
        scheme_of({"quantization_config": {"quant_method": method, **config}})
    except ModelError as error:
        assert len(str(error)) < 2000


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(("num_bits", "type", "strategy", "group_size", "symmetric", "block_structure")), JSON
    )
)
def test_any_group_is_read_or_refused(weights):
    groups = {"g": {"targets": ["Linear"], "weights": weights}}
    try:
        scheme_of({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}})
    except ModelError as error:
        assert len(str(error)) < 2000


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*)*x", ".*.*.*.*.*x", "(?=x)", r"(a)\1", "x" * 300, "(", "(a|aa){9}b", "a{1,9}{1,9}"]
)
def test_intricate_patterns_are_not_run(pattern):
    with pytest.raises(ModelError, match=r"too intricate|no regular expression"):
        matches("model.layers.0.self_attn.q_proj", "Linear", [f"re:{pattern}"])


@FUZZ
@given(st.text(alphabet=r"ab.*+?{}()[]|\^$1,:=!<", max_size=24))
def test_no_pattern_takes_long(pattern):
    start = time.perf_counter()
    with contextlib.suppress(ModelError):
        matches("a" * 60, "Linear", [f"re:{pattern}"])
    assert time.perf_counter() - start < 2
