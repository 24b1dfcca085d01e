"""Packed weights in families whose files fuse or stack matrices: they stay packed, and the model stays the same."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.models import gguf_models
from tests.models.random_weights import random_weight
from tests.models.test_families import load, logits, recorded, write
from trustcore.models.schemes.float4 import mxfp4_blocks
from trustcore.quant import QuantizedArray, quantize
from trustcore.saving import save
from trustcore.weights.gguf_writer import write_gguf


def close(one, other, tokens, atol=2e-5):
    np.testing.assert_allclose(logits(one, tokens), logits(other, tokens), atol=atol)


def test_fused_blocks_of_a_gguf_file_are_split_as_they_are(tmp_path):
    """Phi-3's queries, keys and values are one matrix of blocks, its gate and up another."""
    model = gguf_models.random_model("phi3")
    tensors = {}
    for name, array in gguf_models.gguf_tensors_of(model).items():
        packed = array.ndim == 2
        tensors[name] = (QuantizedArray.quantize(array.T, "q8_0").to_blocks(), "q8_0") if packed else array
    metadata = {**gguf_models.gguf_metadata(model.config), "tokenizer.ggml.model": "none"}
    write_gguf(tmp_path / "m.gguf", metadata, tensors)
    packed, floats = load(tmp_path / "m.gguf"), load(tmp_path / "m.gguf", dtype="float32")
    for part in (packed.blocks[0].attention.key, packed.blocks[1].mlp.up):
        assert part.kernel.get_value().format == "q8_0"
    tokens = jnp.asarray(gguf_models.TOKENS[None], jnp.int32)
    close(packed, floats, tokens)
    close(packed, model, tokens, atol=0.2)


@pytest.mark.parametrize("name", ("phi3", "gpt_oss", "deepseek_v3"))
def test_16_bit_files_stay_as_they_are(tmp_path, name):
    """The recorded weights are numbers of 16 bits, so that nothing is lost."""
    case = recorded(name)
    floats = load(write(tmp_path, case))
    folder = tmp_path / "narrow"
    folder.mkdir()
    narrow = {
        key: value.astype(ml_dtypes.bfloat16) if key.startswith("weights/") else value for key, value in case.items()
    }
    held = load(write(folder, narrow))
    kernels = {"deepseek_v3": "mlp.experts.down", "gpt_oss": "mlp.experts.gate"}.get(name, "attention.out").split(".")
    layer = held.blocks[1]
    for part in kernels:
        layer = getattr(layer, part)
    assert layer.kernel.get_value().format == "bf16"
    close(held, floats, jnp.asarray(case["tokens"], jnp.int32))
    save(held, tmp_path / "again")
    close(load(tmp_path / "again" / "model.safetensors"), floats, jnp.asarray(case["tokens"], jnp.int32))


def test_gpt_oss_as_its_files_are_packed(tmp_path):
    """Experts in MXFP4, gate and up in turns; everything else in floats."""
    case = recorded("gpt_oss")
    experts, hidden, width = 4, 64, 32
    config = str(case["config"]).replace('"intermediate_size": 40', '"intermediate_size": 64')
    case["config"] = config[:-1] + ', "quantization_config": {"quant_method": "mxfp4"}}'
    plain = dict(case)
    for layer in range(2):
        module = f"weights/model.layers.{layer}.mlp.experts."
        for name, (k, n) in {"gate_up_proj": (width, 2 * hidden), "down_proj": (hidden, width)}.items():
            matrices = [random_weight("mxfp4", k, n, seed=10 * layer + e) for e in range(experts)]
            # Small enough for the scores of the next layer to differ.
            fields = {f: np.stack([np.asarray(m.fields[f]) for m in matrices]) for f in ("exponent", "codes")}
            fields["exponent"] = np.clip(fields["exponent"], 120, 124)
            blocks, scales = mxfp4_blocks(fields)
            del case[f"{module}{name}"]
            case |= {f"{module}{name}_blocks": np.ascontiguousarray(blocks)}
            case |= {f"{module}{name}_scales": np.ascontiguousarray(scales)}
            packed = QuantizedArray("mxfp4", {f: jnp.asarray(v) for f, v in fields.items()})
            plain[f"{module}{name}"] = np.asarray(packed.dequantize())
        bias = np.random.default_rng(layer).standard_normal((experts, 2 * hidden)).astype(np.float32)
        case[f"{module}gate_up_proj_bias"] = plain[f"{module}gate_up_proj_bias"] = bias
    plain["config"] = config
    for folder, arrays in (("packed", case), ("plain", plain)):
        (tmp_path / folder).mkdir()
        save_file(
            {k.removeprefix("weights/"): v for k, v in arrays.items() if k.startswith("weights/")},
            tmp_path / folder / "model.safetensors",
        )
        (tmp_path / folder / "config.json").write_text(str(arrays["config"]))
    held, floats = (load(tmp_path / folder / "model.safetensors") for folder in ("packed", "plain"))
    for kernel in (held.blocks[0].mlp.experts.up.kernel, held.blocks[1].mlp.experts.down.kernel):
        assert kernel.get_value().format == "mxfp4" and kernel.get_value().ndim == 3
    close(held, floats, jnp.asarray(case["tokens"], jnp.int32))


@pytest.mark.parametrize("name", ("phi3", "qwen2_moe"))
def test_a_quantized_model_is_saved_and_read_back(tmp_path, name):
    """Fused tensors of matrices that were packed one by one; stacks of experts stay floats."""
    case = recorded(name)
    packed = quantize(load(write(tmp_path, case)), "int8")
    assert packed.blocks[0].attention.query.kernel.get_value().format == "int8"
    save(packed, tmp_path / "packed")
    close(load(tmp_path / "packed" / "model.safetensors"), packed, jnp.asarray(case["tokens"], jnp.int32))
