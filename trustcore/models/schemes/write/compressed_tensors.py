"""Writes matrices as compressed-tensors has them; the layouts are in `trustcore.models.schemes.compressed_tensors`.

Each kind of weight is a group of its own, so that formats may differ from matrix to matrix.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from trustcore.errors import ModelError
from trustcore.models.schemes.float4 import mxfp4_blocks, nvfp4_packed
from trustcore.models.schemes.write.integers import Integers, integers
from trustcore.quant import QuantizedArray
from trustcore.quant.formats.scaled import BLOCK, ScaledFormat
from trustcore.weights.bit_words import pack_bytes, pack_words, word_count
from trustcore.weights.safetensors_writer import Planned

_U8, _I32, _I64, _F32 = np.dtype(np.uint8), np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float32)
_MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}

Plan = tuple[str, dict[str, Any], dict[str, Planned]]  # the package's format, its weights' arguments, tensors by suffix


class CompressedTensorsWriter:
    """Plans a model's tensors in compressed-tensors' layouts."""

    name = "compressed-tensors"
    holds = (
        "int2 to int8 (ternary, q4_0, q5_0, q8_0) without an order of rows, fp8_e4m3, nvfp4, mxfp4, mxfp6_e2m3 and "
        "mxfp8_e4m3"
    )

    def __init__(self) -> None:
        self.groups: dict[str, tuple[str, dict[str, Any], dict[str, None]]] = {}

    def tensors(self, module: str, weight: QuantizedArray) -> dict[str, Planned]:
        """Returns the tensors of a matrix.

        Raises:
            ModelError: no layout holds it.
        """
        format, arguments, parts = _plan(weight)
        key = json.dumps([format, arguments], sort_keys=True)
        self.groups.setdefault(key, (format, arguments, {}))[2][module] = None
        return {f"{module}.{suffix}": planned for suffix, planned in parts.items()}

    def config(self, packed: Sequence[str], plain: Sequence[str]) -> dict[str, Any]:
        """Returns the `quantization_config`; `plain` are the matrices that are not packed."""
        alone = len(self.groups) == 1
        groups, formats = {}, []
        for index, (format, arguments, modules) in enumerate(self.groups.values()):
            formats.append(format)
            groups[f"group_{index}"] = {
                "targets": ["Linear"] if alone else list(modules),
                "weights": arguments,
                "input_activations": None,
                "output_activations": None,
                "format": format,
            }
        return {
            "quant_method": "compressed-tensors",
            "format": formats[0] if len(set(formats)) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(plain),
            "kv_cache_scheme": None,
        }


def _plan(weight: QuantizedArray) -> Plan:
    if weight.transposed or weight.ndim != 2:
        raise ModelError(f"is {weight!r}")
    matrix = integers(weight)
    if matrix is not None:
        return _integers(matrix)
    if "order" in weight.fields:
        raise ModelError("has rows in an order of their own")
    make = {
        "fp8_e4m3": _float8,
        "nvfp4": _nvfp4,
        "mxfp4": _mxfp4,
        "mxfp6_e2m3": _mxfp6,
        "mxfp8_e4m3": _mxfp8,
    }.get(weight.format)
    if make is None:
        raise ModelError(f"is {weight!r}")
    return make(weight)


def _integers(matrix: Integers) -> Plan:
    if matrix.order is not None:
        raise ModelError("has rows in an order of their own")
    bits, k, n = matrix.bits, matrix.k, matrix.n
    symmetric = matrix.zero is None
    grain = {"strategy": "channel"} if matrix.run == k else {"strategy": "group", "group_size": matrix.run}
    parts = {
        "weight_packed": Planned((n, word_count(k, bits)), _I32, lambda: pack_words(matrix.codes().T, bits, axis=1)),
        "weight_scale": Planned((n, matrix.groups), matrix.scale.dtype, lambda: matrix.scale.T),
        "weight_shape": Planned.of(np.array([n, k], _I64)),
    }
    if not symmetric:
        parts["weight_zero_point"] = Planned(
            (word_count(n, bits), matrix.groups), _I32, lambda: pack_words(matrix.zeros().T, bits, axis=0)
        )
    return "pack-quantized", _arguments(bits, "int", symmetric=symmetric, **grain), parts


def _float8(weight: QuantizedArray) -> Plan:
    assert isinstance(weight.spec, ScaledFormat)
    k, n = weight.stored_shape
    run, span = weight.spec.granularity(weight.fields)
    scale = np.asarray(weight.fields["scale"]).T  # [C, G]
    if (span == BLOCK and run in (BLOCK, k)) or (span == 0 and n <= BLOCK and run == BLOCK):
        grain: dict[str, Any] = {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
    elif span == BLOCK or k % run:
        raise ModelError(
            f"is {weight!r}, whose scales are neither of the tensor, nor outputs, groups, or 128x128 blocks"
        )
    elif run == k:
        grain = {"strategy": "tensor"} if span == 0 else {"strategy": "channel"}
        scale = scale.reshape(-1) if span == 0 else scale
    else:
        grain = {"strategy": "group", "group_size": run}
        scale = np.repeat(scale, n, axis=0) if span == 0 else scale
    parts = {"weight": _turned(weight), "weight_scale": Planned.of(scale)}
    return "float-quantized", _arguments(8, "float", **grain), parts


def _nvfp4(weight: QuantizedArray) -> Plan:
    k, n = weight.stored_shape
    tensor_scale = weight.fields.get("tensor_scale")
    whole = np.float32(1) if tensor_scale is None else np.asarray(tensor_scale, _F32).reshape(())
    if not (np.isfinite(whole) and whole > 0):
        raise ModelError(f"has the tensor's scale {whole}, whose inverse the layout stores")
    import ml_dtypes

    float8 = np.dtype(ml_dtypes.float8_e4m3fn)
    parts = {
        "weight_packed": Planned((n, k // 2), _U8, lambda: nvfp4_packed(_numpy(weight))[0]),
        "weight_scale": Planned(
            (n, k // 16), float8, lambda: _contiguous(nvfp4_packed(_numpy(weight))[1]).view(float8)
        ),
        "weight_global_scale": Planned.of(np.array([np.float32(1) / whole], _F32)),
    }
    grain = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
    return "nvfp4-pack-quantized", _arguments(4, "float", zp_dtype="torch.float8_e4m3fn", **grain), parts


def _mxfp4(weight: QuantizedArray) -> Plan:
    k, n = weight.stored_shape
    parts = {
        "weight_packed": Planned((n, k // 2), _U8, lambda: mxfp4_blocks(_numpy(weight))[0].reshape(n, k // 2)),
        "weight_scale": Planned((n, k // 32), _U8, lambda: mxfp4_blocks(_numpy(weight))[1]),
    }
    return "mxfp4-pack-quantized", _arguments(4, "float", **_MX), parts


def _mxfp6(weight: QuantizedArray) -> Plan:
    spec = weight.spec
    assert isinstance(spec, ScaledFormat)
    k, n = weight.stored_shape

    def packed() -> np.ndarray:
        return pack_bytes(_contiguous(np.asarray(jax.jit(spec.codes)(weight.fields)).T), 6)

    scale = weight.fields["scale"]
    parts = {
        "weight_packed": Planned((n, k * 6 // 8), _U8, packed),
        "weight_scale": Planned((n, k // 32), _U8, lambda: np.asarray(scale).T),
    }
    return "mxfp6-pack-quantized", _arguments(6, "float", **_MX), parts


def _mxfp8(weight: QuantizedArray) -> Plan:
    k, n = weight.stored_shape
    scale = weight.fields["scale"]
    parts = {"weight": _turned(weight), "weight_scale": Planned((n, k // 32), _U8, lambda: np.asarray(scale).T)}
    return "mxfp8-quantized", _arguments(8, "float", **_MX), parts


def _arguments(bits: int, kind: str, *, symmetric: bool = True, **grain: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": symmetric, "dynamic": False, **grain}


def _turned(weight: QuantizedArray) -> Planned:
    """The codes `[K, N]` of whole bytes as `[N, K]`."""
    codes = weight.fields["codes"]
    return Planned((codes.shape[1], codes.shape[0]), np.dtype(codes.dtype), lambda: np.asarray(codes).T)


def _numpy(weight: QuantizedArray) -> dict[str, np.ndarray]:
    return {name: np.asarray(field) for name, field in weight.fields.items()}


def _contiguous(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array)
