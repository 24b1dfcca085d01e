"""Random packed weights and what the `gguf` package decodes them to."""

import gguf
import numpy as np


def blocks_of(name: str, k: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns bytes `[n, bytes]` of random weights, and the oracle's float32 `[n, k]`."""
    kind = getattr(gguf.GGMLQuantizationType, name.upper())
    weights = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    raw = gguf.quants.quantize(weights, kind).view(np.uint8).reshape(n, -1)
    return raw, gguf.quants.dequantize(raw, kind).reshape(n, k)
