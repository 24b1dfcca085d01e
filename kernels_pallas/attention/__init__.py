"""Scaled dot-product attention: softmax(scale * Q K^T + mask) V, with grouped heads.

`attention` attends over keys and values as arrays of tokens; `cached_attention` over a key-value cache that it first
extends. `oracle` is the truth both are tested against, `xla` the implementation that runs on every platform.
"""

from kernels_pallas.attention.oracle import attention_oracle
from kernels_pallas.attention.xla import attention, cached_attention, extend_cache, size_scale

__all__ = ["attention", "attention_oracle", "cached_attention", "extend_cache", "size_scale"]
