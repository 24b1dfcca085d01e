"""FP8 files: 8-bit floats with a scale for the tensor, for each output, or for blocks.

    weight              f8_e4m3 (or f8_e5m2) [N, K]
    weight_scale_inv    [ceil(N / rows), ceil(K / columns)] for blocks of `weight_block_size` = [rows, columns], or one
                        number
    weight_scale        one number, or [N] or [N, 1]
    input_scale         one number for the inputs of a layer that was calibrated; kept beside the weight

    w = weight * scale      (`_inv` notwithstanding: DeepSeek-V3, arXiv 2412.19437, names it after how it was made)

Read for quant_method "fp8" (DeepSeek, Qwen, vLLM) and "fbgemm_fp8" (Meta's Llama files). Scales are f32, f16, bf16 or
powers of two (f8_e8m0).
"""

from __future__ import annotations

import numpy as np

from trustcore.errors import ModelError
from trustcore.models.schemes.fields import block_scale
from trustcore.models.schemes.gptq import finite_scale
from trustcore.models.schemes.scheme import FLOATS, Fields, Module, Packed, Tensors
from trustcore.models.values import Values
from trustcore.weights import LazyArray

FORMATS = {"f8_e4m3": "fp8_e4m3", "f8_e5m2": "fp8_e5m2"}
SCALES = (*FLOATS, "f8_e8m0")
EXTRAS = ("input_scale", "activation_scale", "input_scale_ub")


class Float8:
    """Reads matrices of 8-bit floats."""

    name = "FP8"

    def __init__(self, config: Values):
        """Takes the `quantization_config`.

        Raises:
            ModelError: its block size is no pair of positive integers.
        """
        self.block = block_size(config.get("weight_block_size"), "quantization_config: weight_block_size")

    def find(self, tensors: Tensors, module: str, k: int, n: int) -> Packed | None:
        """See `Scheme.find`."""
        parts = Module(tensors, module, self.name)
        weight = parts.get("weight")
        if weight is None or weight.encoding not in FORMATS:
            return None
        suffix = "weight_scale" if "weight_scale" in parts else "weight_scale_inv"
        return float8(parts, suffix, k, n, self.block)


def float8(parts: Module, suffix: str, k: int, n: int, block: tuple[int, int] | None) -> Packed:
    """Returns the matrix of 8-bit floats whose scales, in any of the shapes of the header, are `suffix`.

    Raises:
        ModelError: the weight or the scale is missing or of another shape.
    """
    weight = parts.need("weight", tuple(FORMATS), (n, k))
    shapes: list[tuple[int, ...]] = [(), (1,), (n,), (n, 1), (1, 1)]
    blocks = None if block is None else (-(-n // block[0]), -(-k // block[1]))
    if blocks is not None and suffix == "weight_scale_inv":
        shapes = [blocks, (), (1,)]
    elif blocks is not None:
        shapes.append(blocks)
    scale = parts.need(suffix, SCALES, *dict.fromkeys(shapes), why=f"{n} outputs, {k} inputs")
    in_blocks = block is not None and scale.shape == blocks

    def fields() -> Fields:
        values = finite_scale(parts, suffix, scale)
        if scale.encoding == "f8_e8m0":
            values = values.astype(np.float32)
        try:
            field = block_scale(values, k, n, *block, integer=False) if in_blocks and block else values.reshape(1, -1)
        except ModelError as error:
            raise parts.error(suffix, str(error)) from None
        return {"codes": weight.numpy().T, "scale": field}

    return Packed(FORMATS[weight.encoding], tuple(parts.used), fields, parts.extras(*EXTRAS))


def block_size(value: object, where: str) -> tuple[int, int] | None:
    """Returns (rows, columns) of a block; None where there are none."""
    if value is None:
        return None
    if (
        not isinstance(value, list | tuple)
        or len(value) != 2
        or not all(type(size) is int and size > 0 for size in value)
    ):
        raise ModelError(f"{where} is {str(value)[:64]}; expected [rows, columns], two positive integers")
    return value[0], value[1]


def input_scale(packed: Packed) -> float | None:
    """Returns the scale of the module's inputs where the file has one number for it.

    Raises:
        ModelError: it is no single number.
    """
    for tensor in packed.extras:
        if tensor.name.endswith("_ub"):
            continue
        value = np.asarray(_numbers(tensor), np.float32).reshape(-1)
        if value.size != 1 or not np.isfinite(value[0]):
            raise ModelError(f"{tensor.name} is {tensor.encoding}{list(tensor.shape)}; expected one finite number")
        return float(value[0])
    return None


def _numbers(tensor: LazyArray) -> np.ndarray:
    if tensor.dtype is None or tensor.nbytes > 64:
        raise ModelError(f"{tensor.name} is {tensor.encoding}{list(tensor.shape)}; expected one finite number")
    return tensor.numpy()
