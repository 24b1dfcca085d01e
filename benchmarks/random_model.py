"""A random Llama model as a GGUF file whose matrices are stored in one format, for measuring speed alone.

Every size is a multiple of 256, so that each format of GGUF can hold every matrix. Codes are random bytes and scales
small random numbers: time does not depend on them. The file has no vocabulary; it takes and gives token ids.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trustcore.quant import get_format
from trustcore.weights.gguf_writer import Tensor, write_gguf

FEATURES, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCABULARY, CONTEXT = 768, 2048, 12, 12, 4, 41216, 2048


def write_random_model(path: Path, format: str) -> int:
    """Writes the model to `path`; returns the number of its weights."""
    rng = np.random.default_rng(0)
    tensors: dict[str, Tensor] = {"token_embd.weight": _matrix(rng, format, VOCABULARY, FEATURES)}
    for i in range(LAYERS):
        shapes = {
            "attn_q": (FEATURES, FEATURES),
            "attn_k": (FEATURES // HEADS * KV_HEADS, FEATURES),
            "attn_v": (FEATURES // HEADS * KV_HEADS, FEATURES),
            "attn_output": (FEATURES, FEATURES),
            "ffn_gate": (HIDDEN, FEATURES),
            "ffn_up": (HIDDEN, FEATURES),
            "ffn_down": (FEATURES, HIDDEN),
        }
        for name, (n, k) in shapes.items():
            tensors[f"blk.{i}.{name}.weight"] = _matrix(rng, format, n, k)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{i}.{name}.weight"] = np.ones(FEATURES, np.float32)
    tensors["output_norm.weight"] = np.ones(FEATURES, np.float32)
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.embedding_length": FEATURES,
        "llama.feed_forward_length": HIDDEN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e4,
        "llama.context_length": CONTEXT,
        "llama.vocab_size": VOCABULARY,
        "tokenizer.ggml.model": "none",
    }
    write_gguf(path, metadata, tensors)
    kv = FEATURES // HEADS * KV_HEADS
    return VOCABULARY * FEATURES + LAYERS * FEATURES * (2 * FEATURES + 2 * kv + 3 * HIDDEN)


def _matrix(rng: np.random.Generator, format: str, n: int, k: int) -> Tensor:
    if format == "f32":
        return rng.standard_normal((n, k), np.float32) * np.float32(0.02)
    spec = get_format(format)
    blocks = rng.integers(0, 256, (n, k // spec.block, spec.bytes_per_block), dtype=np.uint8)
    for field in spec.fields:
        if field.dtype.kind == "f" or field.dtype.name == "bfloat16":
            sizes = rng.standard_normal((n, k // spec.block, field.rows or 1), np.float32) * np.float32(1e-3)
            blocks[..., field.offset : field.offset + field.nbytes] = sizes.astype(field.dtype).view(np.uint8)
    if format == "iq1_m":  # its scale is the upper four bits of four words, the exponent in the last
        blocks[..., -1] = (blocks[..., -1] & 0x8F) | 0x10
    if format == "mxfp4":
        blocks[..., 0] = rng.integers(110, 118, blocks.shape[:-1])
    if format == "nvfp4":
        blocks[..., :4] = rng.integers(1, 24, (*blocks.shape[:-1], 4))
    raw = blocks.reshape(n, -1)
    if spec.block == 1:
        return raw.view(spec.fields[0].dtype)
    return raw, format
