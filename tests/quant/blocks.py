"""Random packed weights of every format, and what the oracle decodes them to.

The oracle is the `gguf` package. It cannot decode q8_k and q1_0: those two have a definition of one line here, and
`tests/data/ggml_blocks.json` holds what llama.cpp's own functions make of them.
"""

from __future__ import annotations

import gguf
import numpy as np

from trustcore.quant import get_format


def blocks_of(name: str, k: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns bytes `[n, bytes]` of random weights, and the oracle's float32 `[n, k]`.

    Codes are random bytes, so every bit pattern occurs; half-precision numbers are finite, of both signs and of the
    size that a weight matrix has.
    """
    spec = get_format(name)
    rng = np.random.default_rng(seed)
    if spec.block == 1:
        kind = getattr(gguf.GGMLQuantizationType, name.upper())
        values = rng.standard_normal((n, k)).astype(np.float32)
        raw = gguf.quants.quantize(values, kind).view(np.uint8).reshape(n, -1)
        return raw, decoded(name, raw)
    blocks = rng.integers(0, 256, (n, k // spec.block, spec.bytes_per_block), dtype=np.uint8)
    for field in spec.fields:
        if field.dtype.kind == "f":
            sizes = rng.standard_normal((n, k // spec.block, field.rows or 1)) * 0.1
            blocks[..., field.offset : field.offset + field.nbytes] = sizes.astype(field.dtype).view(np.uint8)
    if name == "iq1_m":  # its half-precision number is four bits of each word; the last has the exponent's upper bits
        blocks[..., -1] = (blocks[..., -1] & 0x8F) | 0x20
    if name == "mxfp4":  # powers of two from 2**-20 to 2**20
        blocks[..., 0] = rng.integers(107, 148, blocks.shape[:-1])
    raw = blocks.reshape(n, -1)
    return raw, decoded(name, raw)


def decoded(name: str, raw: np.ndarray) -> np.ndarray:
    """Returns the oracle's float32 `[n, k]` of the bytes `[n, bytes]`."""
    if name == "q8_k":
        blocks = raw.reshape(len(raw), -1, 292)
        scale, codes = blocks[..., :4].copy().view(np.float32), blocks[..., 4:260].view(np.int8)
        return (scale * codes.astype(np.float32)).reshape(len(raw), -1)
    if name == "q1_0":
        blocks = raw.reshape(len(raw), -1, 18)
        scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
        bits = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little")
        return np.where(bits == 1, scale, -scale).reshape(len(raw), -1)
    return gguf.quants.dequantize(raw, getattr(gguf.GGMLQuantizationType, name.upper())).reshape(len(raw), -1)


def a_few_blocks(name: str, least: int = 1) -> int:
    """Returns the smallest K of at least `least` weights that is a multiple of the format's block."""
    block = get_format(name).block
    return -(-least // block) * block
