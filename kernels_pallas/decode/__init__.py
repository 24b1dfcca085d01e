"""Attention of one or a few query tokens over a long key-value cache: float or packed, in one piece or in pages.

`decode_attention` reads a cache that holds the tokens already; `extend_cache` writes tokens into one.
`decode_oracle` is the truth it is tested against. `explain` says which implementation a call takes.
"""

from kernels_pallas.decode.cache import extend_cache
from kernels_pallas.decode.front import DECODE, decode_attention, explain
from kernels_pallas.decode.oracle import decode_oracle

__all__ = ["DECODE", "decode_attention", "decode_oracle", "explain", "extend_cache"]
