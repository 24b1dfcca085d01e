"""Files of 4-bit floats (E2M1): gpt-oss' MXFP4, and the packed tensors of MXFP4 and NVFP4 in general.

    gpt-oss   NAME_blocks u8 [..., N, K / 32, 16], NAME_scales u8 [..., N, K / 32]
    packed    u8 [..., N, K / 2], the same bytes without the axis of blocks

Two consecutive codes a byte, the low nibble first. GGUF's blocks, which is what the fields of `mxfp4` and `nvfp4` are,
hold the first half of a block (of 32 weights, or 16) in low nibbles and the second in high ones: bytes are regrouped,
codes stay. Scales are E8M0 (2**(byte - 127)), of NVFP4 E4M3 under a scale of the whole tensor.
"""

from __future__ import annotations

import numpy as np

from trustcore.errors import ModelError
from trustcore.models.schemes.scheme import Fields, Packed, Tensors
from trustcore.models.values import Values

_MX, _NV = 32, 16  # weights under one scale
_NV_BLOCK = 64  # weights in a block of GGUF's nvfp4


class GptOss:
    """Reads matrices as gpt-oss' files have them."""

    name = "gpt-oss MXFP4"

    def __init__(self, config: Values):
        """Takes the `quantization_config`, which says nothing about the layout."""

    def find(self, tensors: Tensors, module: str, k: int, n: int) -> Packed | None:
        """See `Scheme.find`; a matrix without leading axes."""
        return self.find_stack(tensors, module, (), k, n)

    def find_stack(self, tensors: Tensors, module: str, lead: tuple[int, ...], k: int, n: int) -> Packed | None:
        """Returns what a stack `[*lead, K, N]` of matrices is made of, such as one for each expert; None: plain."""
        blocks, scales = tensors.get(f"{module}_blocks"), tensors.get(f"{module}_scales")
        if blocks is None and (f"{module}.weight" in tensors or module in tensors):
            return None
        shape = (*lead, n, k // _MX)
        for name, tensor, expected in ((f"{module}_blocks", blocks, (*shape, 16)), (f"{module}_scales", scales, shape)):
            if tensor is None:
                raise ModelError(f"{name} is missing; {self.name} has it as u8{list(expected)}")
            if tensor.encoding != "u8" or tensor.shape != expected or k % _MX:
                raise ModelError(
                    f"{name} is {tensor.encoding}{list(tensor.shape)}; {self.name} has it as u8{list(expected)} "
                    f"({k} inputs in blocks of {_MX}, {n} outputs)"
                )
        assert blocks is not None and scales is not None
        return Packed("mxfp4", (blocks, scales), lambda: mxfp4_fields(blocks.numpy(), scales.numpy()))


def mxfp4_fields(blocks: np.ndarray, scales: np.ndarray) -> Fields:
    """Returns the fields of `mxfp4`.

    Args:
        blocks: uint8 `[..., N, K / 32, 16]`.
        scales: uint8 `[..., N, K / 32]`.
    """
    exponent = np.swapaxes(scales, -1, -2)  # [..., blocks, N]
    return {"exponent": exponent, "codes": np.moveaxis(_halves(blocks), -3, -1)}  # [..., blocks, 16, N]


def mxfp4_blocks(fields: Fields) -> tuple[np.ndarray, np.ndarray]:
    """Returns (blocks, scales): the inverse of `mxfp4_fields`."""
    return _pairs(np.moveaxis(fields["codes"], -1, -3)), np.swapaxes(fields["exponent"], -1, -2)


def nvfp4_fields(packed: np.ndarray, scales: np.ndarray, tensor_scale: np.float32) -> Fields:
    """Returns the fields of `nvfp4`.

    Args:
        packed: uint8 `[N, K / 2]`; K is a multiple of 64.
        scales: uint8 `[N, K / 16]`, the bytes of E4M3 numbers, none negative.
        tensor_scale: what every weight is multiplied with besides.
    """
    n = packed.shape[0]
    sub_blocks = _halves(packed.reshape(n, -1, _NV // 2))  # [N, K / 16, 8]
    codes = sub_blocks.reshape(n, -1, _NV_BLOCK // 2)
    return {
        "scales": scales.reshape(n, -1, _NV_BLOCK // _NV).transpose(1, 2, 0),
        "codes": codes.transpose(1, 2, 0),
        "tensor_scale": np.full((1, 1), tensor_scale, np.float32),
    }


def nvfp4_packed(fields: Fields) -> tuple[np.ndarray, np.ndarray]:
    """Returns (packed, scales): the inverse of `nvfp4_fields`, but for the tensor's scale."""
    codes = fields["codes"].transpose(2, 0, 1)  # [N, blocks, 32]
    n = codes.shape[0]
    packed = _pairs(codes.reshape(n, -1, _NV // 2)).reshape(n, -1)
    return packed, fields["scales"].transpose(2, 0, 1).reshape(n, -1)


def _halves(pairs: np.ndarray) -> np.ndarray:
    """Blocks of bytes of consecutive codes, as bytes of a code of the first half and one of the second."""
    low, high = pairs & np.uint8(15), pairs >> np.uint8(4)
    codes = np.stack((low, high), axis=-1).reshape(*pairs.shape[:-1], 2 * pairs.shape[-1])
    half = pairs.shape[-1]
    return codes[..., :half] | codes[..., half:] << np.uint8(4)


def _pairs(halves: np.ndarray) -> np.ndarray:
    """The inverse of `_halves`."""
    codes = np.concatenate((halves & np.uint8(15), halves >> np.uint8(4)), axis=-1)
    return codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)
