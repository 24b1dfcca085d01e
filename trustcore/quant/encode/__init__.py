"""Encoders: from float weights to the fields of a format, the counterpart of `formats`.

`search` finds scales and `nearest_entry` entries of grids; `plain`, `k_quants`, `iq4`, `iq`, `ternary`, `block_floats`,
`integers` and `floats` each hold one kind of format; `tiles` walks over large matrices. The simple formats and the
K-quants have twins in C++ for the CPU (`trustcore/ops/cpu/encode_blocks.cc`), which `tiles` prefers.
"""

from trustcore.quant.encode.tiles import ENCODERS, encode, no_encoder

__all__ = ["ENCODERS", "encode", "no_encoder"]
