"""Scaled dot-product attention: softmax(scale * Q K^T + mask) V, with grouped heads.

`attention` attends over keys and values as arrays of tokens; for a key-value cache see `kernels_pallas.decode`.
`attention_oracle` is the truth it is tested against. `explain` says which implementation a call takes.
"""

from kernels_pallas.attention.block_mask import BlockMask
from kernels_pallas.attention.front import ATTENTION, attention, explain
from kernels_pallas.attention.oracle import attention_oracle, dropout_weights

__all__ = [
    "ATTENTION",
    "BlockMask",
    "attention",
    "attention_oracle",
    "dropout_weights",
    "explain",
]
