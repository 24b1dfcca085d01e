"""Scaled dot-product attention: softmax(scale * Q K^T + mask) V, with grouped heads.

`attention` attends over keys and values as arrays of tokens; `cached_attention` over a key-value cache that it first
extends. `attention_oracle` is the truth both are tested against. `explain` says which implementation a call takes.
"""

from kernels_pallas.attention.cached import cached_attention, extend_cache, size_scale
from kernels_pallas.attention.front import ATTENTION, attention, explain
from kernels_pallas.attention.oracle import attention_oracle, dropout_weights

__all__ = [
    "ATTENTION",
    "attention",
    "attention_oracle",
    "cached_attention",
    "dropout_weights",
    "explain",
    "extend_cache",
    "size_scale",
]
