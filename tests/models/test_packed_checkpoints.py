"""Folders that other packages packed load packed, and answer as the float model of their decoded weights does."""

import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest

import trustcore
from tests.models import packers
from tests.models.packed_folder import write_packed, write_tokenizer
from tests.models.small import some_tokens
from trustcore.errors import ModelError
from trustcore.models import decoder_from_checkpoint
from trustcore.quant import QuantizedArray
from trustcore.weights import open_checkpoint


def load(path, **options):
    with open_checkpoint(path) as checkpoint:
        return decoder_from_checkpoint(checkpoint, **options)


def gptq_config(bits=4, size=32, **others):
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": False, **others}


def groups(format, **weights):
    entry = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"g": entry},
        "ignore": ["lm_head"],
    }


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}

draw = functools.partial(np.random.default_rng, 7)
# name: (packer, quantization_config, format, description of a kernel)
CASES = {
    "gptq": (packers.gptq, gptq_config(), "int4:g32:asym"),
    "gptq-v2": (functools.partial(packers.gptq, version=2), gptq_config(checkpoint_format="gptq_v2"), "int4:g32:asym"),
    "gptq-sym": (functools.partial(packers.gptq, sym=True), gptq_config(sym=True), "int4:g32"),
    "gptq-order": (lambda weight: packers.gptq(weight, order=draw()), gptq_config(desc_act=True), "int4:g32:asym"),
    "gptq-no-index": (functools.partial(packers.gptq, index=False), gptq_config(), "int4:g32:asym"),
    "gptq-2": (functools.partial(packers.gptq, bits=2), gptq_config(2), "int2:g32:asym"),
    "gptq-3": (functools.partial(packers.gptq, bits=3), gptq_config(3), "int3:g32:asym"),
    "gptq-8": (functools.partial(packers.gptq, bits=8, size=128), gptq_config(8, -1), "int8:channel:asym"),
    "gptq-rules": (packers.gptq, gptq_config(8, 64, dynamic={"+:.*": {"bits": 4, "group_size": 32}}), "int4:g32:asym"),
    "awq": (packers.awq, AWQ_CONFIG, "int4:g32:asym"),
    "nf4": (packers.bitsandbytes, BNB, "nf4:g64"),
    "nf4-nested": (functools.partial(packers.bitsandbytes, nested=True), BNB, "nf4:g64:double"),
    "llm-int8": (packers.llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8:channel"),
    "pack": (packers.pack_quantized, groups("pack-quantized", **INTS), "int4:g32"),
    "pack-3-asym": (
        functools.partial(packers.pack_quantized, bits=3, sym=False),
        groups("pack-quantized", **(INTS | {"num_bits": 3, "symmetric": False})),
        "int3:g32:asym",
    ),
    "int": (
        packers.int_quantized,
        groups("int-quantized", num_bits=8, type="int", symmetric=True, strategy="channel"),
        "int8:channel",
    ),
    "float": (
        functools.partial(packers.float8, rows=1, columns=0),
        groups("float-quantized", num_bits=8, type="float", strategy="channel"),
        "fp8_e4m3:channel",
    ),
    "nvfp4": (
        packers.nvfp4,
        groups("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        "nvfp4",
    ),
    "fp8-block": (
        functools.partial(packers.float8, rows=128, columns=128, suffix="weight_scale_inv"),
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "fp8_e4m3:tensor",
    ),
    "fp8-tensor": (functools.partial(packers.float8, rows=0, columns=0), {"quant_method": "fp8"}, "fp8_e4m3:tensor"),
    "mxfp4": (packers.mxfp4, {"quant_method": "mxfp4"}, "mxfp4"),
}


# A compiled model each: the others run with the slow tests.
QUICK = ("gptq-order", "awq", "nf4-nested", "fp8-tensor")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_packed_folder_answers_as_its_float_model(tmp_path, case):
    packer, quantization, description = CASES[case]
    write_packed(tmp_path / "m", packer, quantization)
    packed, plain = load(tmp_path / "m"), load(tmp_path / "m" / "float")
    kernel = packed.blocks[1].mlp.down.kernel.get_value()
    assert isinstance(kernel, QuantizedArray) and kernel.shape == (128, 64)
    assert kernel.description == description
    np.testing.assert_allclose(kernel.dequantize(), plain.blocks[1].mlp.down.kernel.get_value(), rtol=2e-7, atol=1e-9)
    tokens = some_tokens()
    np.testing.assert_allclose(packed(tokens), plain(tokens), atol=3e-5)


def test_a_dtype_decodes_packed_matrices(tmp_path):
    write_packed(tmp_path / "m", packers.gptq, gptq_config())
    dense, plain = load(tmp_path / "m", dtype=jnp.float32), load(tmp_path / "m" / "float")
    np.testing.assert_array_equal(dense.blocks[0].mlp.up.kernel.get_value(), plain.blocks[0].mlp.up.kernel.get_value())


def test_load_and_generate(tmp_path):
    write_packed(tmp_path / "m", packers.gptq, gptq_config())
    for folder in (tmp_path / "m", tmp_path / "m" / "float"):
        write_tokenizer(folder)
    answers = [
        trustcore.generate(trustcore.load(folder), "w5 w17 w3", max_tokens=8)
        for folder in (tmp_path / "m", tmp_path / "m" / "float")
    ]
    assert answers[0] == answers[1] != ""


def test_only_some_matrices_are_packed(tmp_path):
    """Tensors tell, not lists: the file keeps what it left alone as `weight`."""
    write_packed(tmp_path / "m", packers.awq, AWQ_CONFIG, where=re.compile(r"mlp.*_proj\.weight$"))
    model = load(tmp_path / "m")
    assert isinstance(model.blocks[0].mlp.gate.kernel.get_value(), QuantizedArray)
    assert not isinstance(model.blocks[0].attention.query.kernel.get_value(), QuantizedArray)
    np.testing.assert_allclose(model(some_tokens()), load(tmp_path / "m" / "float")(some_tokens()), atol=3e-5)


def test_groups_of_modules_with_formats_of_their_own(tmp_path):
    def packer(weight):
        wide = weight.shape[1] == 128  # down_proj
        return packers.pack_quantized(weight, bits=8 if wide else 4, size=64 if wide else 32)

    config = groups("pack-quantized", **INTS)
    down = {"targets": ["re:.*down_proj$"], "weights": INTS | {"num_bits": 8, "group_size": 64}}
    others = {"targets": ["re:.*(q|k|v|o|gate|up)_proj$", "lm_head"], "weights": INTS}
    config["config_groups"] = {"a": down, "b": others}
    write_packed(tmp_path / "m", packer, config)
    model = load(tmp_path / "m")
    assert model.blocks[0].mlp.down.kernel.get_value().description == "int8:g64"
    assert model.blocks[0].mlp.up.kernel.get_value().description == "int4:g32"
    np.testing.assert_allclose(model(some_tokens()), load(tmp_path / "m" / "float")(some_tokens()), atol=3e-5)


def test_input_scales_are_kept_and_not_used(tmp_path):
    packer = functools.partial(packers.float8, rows=0, columns=0)

    def with_input(weight):
        tensors, held = packer(weight)
        return {**tensors, "input_scale": np.float32([0.25])}, held

    write_packed(
        tmp_path / "m", with_input, {"quant_method": "fp8", "activation_scheme": "static"},
        model__layers__0__self_attn__k_scale=np.float32([1.5]),
    )  # fmt: skip
    model = load(tmp_path / "m")
    assert dict(model.input_scales)["blocks.0.mlp.down.kernel"] == 0.25
    assert len(model.input_scales) == 15


def test_zero_biases_that_the_model_has_not_are_left_out(tmp_path):
    name = "model__layers__0__mlp__up_proj__bias"
    write_packed(tmp_path / "m", packers.gptq, gptq_config(), **{name: np.zeros(128, np.float16)})
    load(tmp_path / "m")
    write_packed(tmp_path / "m", packers.gptq, gptq_config(), **{name: np.ones(128, np.float16)})
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj\.bias is unexpected"):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "aqlm"},
            r"quant_method is 'aqlm'; supported: gptq, awq, bitsandbytes, compressed-tensors, fp8",
        ),
        ({"quant_method": ["gptq"]}, "supported: gptq"),
        ("gptq", "expected an object"),
        (gptq_config(5), r"\(gptq\).*bits is '5'; supported: 2, 3, 4, 8"),
        (gptq_config(checkpoint_format="marlin"), "checkpoint_format is 'marlin'; supported: gptq, gptq_v2"),
        (gptq_config(is_marlin_format=True), "supported: gptq, gptq_v2"),
        (gptq_config(size=2), "group_size is 2; expected an integer of at least 8"),
        (gptq_config(desc_act="yes"), "desc_act is 'yes'; expected true or false"),
        (AWQ_CONFIG | {"version": "gemv_fast"}, "version is 'gemv_fast'; supported: gemm, gemv"),
        (AWQ_CONFIG | {"bits": 8}, "bits is '8'; supported: 4"),
        (AWQ_CONFIG | {"zero_point": False}, "zero_point is 'False'; supported: True"),
        ({"quant_method": "bitsandbytes"}, "one of load_in_4bit and load_in_8bit"),
        (groups("marlin-24", **INTS), "format is 'marlin-24'; supported: pack-quantized"),
        (groups("pack-quantized", **(INTS | {"type": "complex"})), "type is 'complex'; supported: int, float"),
        (groups("pack-quantized", **(INTS | {"group_size": 1})), "group_size is 1; expected an integer of at least 8"),
        (groups("pack-quantized", **INTS) | {"transform_config": {"a": 1}}, "transforms of activations"),
        (groups("pack-quantized", **INTS) | {"config_groups": {"W4A16": ["Linear"]}}, "names of presets are not read"),
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            r"weight_block_size is \[128\]; expected \[rows, columns\]",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, config, message):
    write_packed(tmp_path / "m", packers.gptq, config)
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "m")


def test_a_folder_without_its_configuration_says_so(tmp_path):
    write_packed(tmp_path / "m", packers.gptq, None)
    with pytest.raises(
        ModelError, match=r"packed as another package does, but config\.json has no quantization_config"
    ):
        load(tmp_path / "m")


def test_all_faults_come_at_once(tmp_path):
    write_packed(
        tmp_path / "m", packers.gptq, gptq_config(),
        model__layers__0__mlp__up_proj__scales=None,
        model__layers__1__mlp__up_proj__qzeros=np.zeros((2, 8), np.int32),
        model__norm__weight=None,
        stray=np.zeros(3, np.float32),
    )  # fmt: skip
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "m")
    for part in (
        "model.layers.0.mlp.up_proj.scales is missing; GPTQ has it as f16 or bf16 or f32[2, 128] (2 groups of inputs)",
        "model.layers.1.mlp.up_proj.qzeros is i32[2, 8]; GPTQ has it as i32[2, 16]",
        "model.norm.weight is missing",
        "stray is unexpected",
    ):
        assert part in str(caught.value)
    assert "qweight is unexpected" not in str(caught.value)
