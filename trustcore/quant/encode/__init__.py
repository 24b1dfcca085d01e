"""Encoders: from float weights to the fields of a format, the counterpart of `formats`.

`search` finds scales; `plain` and `k_quants` each hold one kind of format; `tiles` walks over large matrices.
"""

from trustcore.quant.encode.tiles import ENCODERS, encode

__all__ = ["ENCODERS", "encode"]
