"""Records what other packages decode their own packed matrices to, as `tests/data/packed_checkpoints.safetensors`.

The oracles are no test dependencies. In a virtual environment of its own (CPU, Python 3.11):

    pip install torch transformers compressed-tensors==0.20.0 bitsandbytes==0.50.2
    pip download --no-deps auto-gptq==0.7.1 autoawq==0.2.9     (unpacked into a folder, given as --unpacked)
    python tests/oracles/record_packed_checkpoints.py --out tests/data --unpacked FOLDER

Each case holds the tensors of a module called "m", as the package wrote them, and `expected`, the matrix [N, K] that
the package decodes them to, in the dtype in which it does. `__metadata__["cases"]` has each case's quantization_config
and the packages' versions. Matrices are normal random numbers; N and K are no multiples of what would hide a swap.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import compressed_tensors
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as portable_4bit
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file
from torch import nn

Case = tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the file")
    parser.add_argument("--unpacked", type=Path, required=True, help="folder with auto_gptq and autoawq-0.2.9")
    args = parser.parse_args()
    torch.manual_seed(0)
    cases: dict[str, Case] = {}
    gptq_module = load(args.unpacked / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py", "qlinear_cuda")
    for bits in (2, 3, 4, 8):
        for order in (False, True):
            cases[f"gptq-{bits}{'-order' if order else ''}"] = gptq(gptq_module, bits, order)
    cases["gptq-4-ragged"] = gptq(gptq_module, 4, False, k=160, size=64)
    awq_packing, awq_gemm, awq_gemv = load_awq(args.unpacked / "autoawq-0.2.9")
    cases["awq-gemm"] = awq(awq_packing, awq_gemm, "gemm")
    cases["awq-gemv"] = awq(awq_packing, awq_gemv, "gemv")
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            cases[f"bitsandbytes-{kind}{'-nested' if nested else ''}"] = bitsandbytes_4bit(kind, nested, 128, 64)
    cases["bitsandbytes-nf4-across"] = bitsandbytes_4bit("nf4", False, 96, 64)
    cases["bitsandbytes-nf4-nested-long"] = bitsandbytes_4bit("nf4", True, 16384, 64, n=3)
    cases["bitsandbytes-int8"] = bitsandbytes_8bit()
    for name, (format, weights, k) in COMPRESSED.items():
        cases[f"compressed-tensors-{name}"] = compressed(format, weights, k)
    cases["gpt-oss"] = gpt_oss()

    tensors, about = {}, {}
    for name, (config, parts, expected) in cases.items():
        about[name] = config
        for part, tensor in parts.items():
            tensors[f"{name}/m{'' if part.startswith('_') else '.'}{part}"] = tensor.contiguous()
        tensors[f"{name}/expected"] = expected.contiguous()
    versions = {
        "auto-gptq": "0.7.1",
        "autoawq": "0.2.9",
        "bitsandbytes": bnb.__version__,
        "compressed-tensors": compressed_tensors.__version__,
        "torch": torch.__version__,
    }
    metadata = {"cases": json.dumps(about), "versions": json.dumps(versions)}
    save_file(tensors, args.out / "packed_checkpoints.safetensors", metadata)


def load(path: Path, name: str) -> Any:
    """Imports one file of a package without the package, whose other files want other versions."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_awq(folder: Path) -> tuple[Any, Any, Any]:
    """Imports AutoAWQ's packing and its two layers."""
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        sys.modules[name] = types.ModuleType(name)
    module = types.ModuleType("awq.utils.module")
    module.try_import = lambda name: (None, "not installed")  # type: ignore[attr-defined]
    sys.modules["awq.utils.module"] = module
    load(folder / "awq/utils/utils.py", "awq.utils.utils")
    packing = load(folder / "awq/utils/packing_utils.py", "awq.utils.packing_utils")
    gemm = load(folder / "awq/modules/linear/gemm.py", "awq.modules.linear.gemm")
    gemv = load(folder / "awq/modules/linear/gemv.py", "awq.modules.linear.gemv")
    return packing, gemm, gemv


def affine(weight: torch.Tensor, bits: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points [N, G] that reach from the smallest to the largest weight of each group; zeros from 1."""
    n, k = weight.shape
    padded = nn.functional.pad(weight, (0, -k % size), value=0.0).reshape(n, -1, size)
    low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half().float()
    return scale, torch.round(-low / scale).clamp(1, 2**bits - 1)


def gptq(module: Any, bits: int, order: bool, k: int = 128, n: int = 64, size: int = 32) -> Case:
    """A layer of AutoGPTQ; with `order` its inputs belong to groups in a random order."""
    linear = nn.Linear(k, n, bias=False)
    group = torch.arange(k) // size
    if order:
        group = group[torch.randperm(k)]
    by_group = torch.argsort(group, stable=True)
    scale, zero = affine(linear.weight.data[:, by_group], bits, size)
    layer = module.QuantLinear(bits, size, k, n, False)
    layer.g_idx = group.to(torch.int32)
    linear.weight.data = linear.weight.data.half()
    layer.pack(linear.float(), scale, zero, layer.g_idx)
    layer.scales = layer.scales.half()
    decoded = layer.half()(torch.eye(k, dtype=torch.float16))  # [K, N], float16 products
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": order, "sym": False}
    parts = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    return config, parts, decoded.T


def awq(packing: Any, module: Any, version: str, k: int = 256, n: int = 96, size: int = 64) -> Case:
    """A layer of AutoAWQ, in the order of one of its kernels."""
    linear = nn.Linear(k, n, bias=False)
    scale, zero = affine(linear.weight.data, 4, size)
    make = module.WQLinear_GEMM if version == "gemm" else module.WQLinear_GEMV
    turned = (scale.T.contiguous(), zero.T.contiguous()) if version == "gemm" else (scale, zero)
    layer = make.from_linear(linear, 4, size, scales=turned[0], zeros=turned[1])
    if version == "gemm":
        decoded = packing.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, size).T
    else:  # the package decodes this order on a GPU alone: by its definition, from what was packed
        scale = layer.scales[:, : k // size].repeat_interleave(size, 1)
        codes = torch.round((linear.weight.data + (scale_zeros(scale, zero, size))) / scale.float())
        decoded = ((codes - zero.repeat_interleave(size, 1)) * scale.float()).half()
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": version}
    return config, {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}, decoded


def scale_zeros(scale: torch.Tensor, zero: torch.Tensor, size: int) -> torch.Tensor:
    """The products of scales and zero points, for each weight."""
    return scale.float() * zero.repeat_interleave(size, 1)


def bitsandbytes_4bit(kind: str, nested: bool, k: int, block: int, n: int = 40) -> Case:
    """A matrix of the 4-bit types, as a layer's state has it."""
    weight = torch.randn(n, k)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=nested)
    if k % block:  # the CPU kernel decodes blocks that lie across rows to something else; the portable code does not
        flat, shape = packed.reshape(-1), (n, k)
        decoded = portable_4bit(flat, state.absmax, state.code, block, shape, torch.float32)
    else:
        decoded = bnb.functional.dequantize_4bit(packed, state)
    parts = {"weight": packed, **{f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}}
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}, parts, decoded


def bitsandbytes_8bit(k: int = 96, n: int = 40) -> Case:
    """Rows of 8-bit integers."""
    codes, scale, _ = bnb.functional.int8_vectorwise_quant(torch.randn(n, k).half())
    decoded = bnb.functional.int8_vectorwise_dequant(codes, scale)
    parts = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {"quant_method": "bitsandbytes", "load_in_8bit": True}, parts, decoded


def _ints(bits: int, **others: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **others}


def _floats(bits: int, **others: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "symmetric": True, **others}


_MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
COMPRESSED: dict[str, tuple[str, dict[str, Any], int]] = {
    **{f"pack-{bits}": ("pack-quantized", _ints(bits), 96) for bits in range(2, 9)},
    **{f"pack-{bits}-asym": ("pack-quantized", _ints(bits, symmetric=False), 96) for bits in (3, 4, 8)},
    "pack-4-channel": ("pack-quantized", _ints(4, strategy="channel", group_size=None), 96),
    "int-8": ("int-quantized", _ints(8, strategy="channel", group_size=None), 96),
    "int-8-asym": ("int-quantized", _ints(8, symmetric=False), 96),
    "float-8-tensor": ("float-quantized", _floats(8, strategy="tensor"), 96),
    "float-8-channel": ("float-quantized", _floats(8, strategy="channel"), 96),
    "float-8-block": ("float-quantized", _floats(8, strategy="block", block_structure=[128, 128]), 320),
    "nvfp4": (
        "nvfp4-pack-quantized",
        _floats(4, strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"),
        128,
    ),
    "mxfp4": ("mxfp4-pack-quantized", _floats(4, **_MX), 96),
    "mxfp6": ("mxfp6-pack-quantized", _floats(6, **_MX), 96),
    "mxfp8": ("mxfp8-quantized", _floats(8, **_MX), 96),
}


def compressed(format: str, weights: dict[str, Any], k: int, n: int = 40) -> Case:
    """A module that compressed-tensors packs and unpacks."""
    n = 200 if weights["strategy"] == "block" else n
    config = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, format=format, ignore=["lm_head"]
    )
    scheme = config.config_groups["group_0"]
    weight = torch.randn(n, k)
    state: dict[str, torch.Tensor] = {"weight": weight, **_scales(weight, weights)}
    compressor = BaseCompressor.get_value_from_registry(format)
    parts = compressor.compress(dict(state), scheme)
    decoded = compressor.decompress(dict(parts), scheme)["weight"]
    described = json.loads(config.model_dump_json())
    kept = {name: part.data for name, part in parts.items() if part is not None}
    return {**described, "quant_method": "compressed-tensors"}, kept, decoded.data


def _scales(weight: torch.Tensor, weights: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Scales (and zero points) by the largest magnitude of what shares one."""
    n, k = weight.shape
    size = weights.get("group_size") or k
    largest = weight.reshape(n, -1, size).abs().amax(-1)  # [N, G]
    top = {4: 6.0, 6: 7.5, 8: 448.0}[weights["num_bits"]] if weights["type"] == "float" else 0.0
    if weights["strategy"] == "tensor":
        return {"weight_scale": (weight.abs().max() / top).reshape(1)}
    if weights["strategy"] == "block":
        padded = nn.functional.pad(weight, (0, -k % 128, 0, -n % 128)).abs()
        return {"weight_scale": padded.reshape(-(-n // 128), 128, -(-k // 128), 128).amax((1, 3)) / top}
    if weights["strategy"] == "tensor_group":
        whole = torch.tensor([448.0 * 6.0]) / weight.abs().max()
        scale = (largest / top * whole).to(torch.float8_e4m3fn).float()
        return {"weight_scale": scale, "weight_global_scale": whole}
    if "scale_dtype" in weights:
        return {"weight_scale": torch.exp2(torch.ceil(torch.log2(largest / top)))}
    if weights["type"] == "float":
        return {"weight_scale": largest / top}
    half = 2 ** (weights["num_bits"] - 1)
    if weights["symmetric"]:
        return {"weight_scale": (largest / (half - 0.5)).to(torch.bfloat16)}
    scale, zero = affine(weight, weights["num_bits"], size)
    return {"weight_scale": scale.to(torch.bfloat16), "weight_zero_point": (zero - half).to(torch.int8)}


def gpt_oss(e: int = 2, n: int = 6, k: int = 96) -> Case:
    """A stack of matrices in the blocks of gpt-oss, decoded by transformers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (e, n, k // 32, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (e, n, k // 32), dtype=torch.uint8)
    decoded = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # [E, K, N]
    return {"quant_method": "mxfp4"}, {"_blocks": blocks, "_scales": scales}, decoded.transpose(1, 2)


if __name__ == "__main__":
    main()
