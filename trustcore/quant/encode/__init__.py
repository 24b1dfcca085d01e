"""Encoders: from float weights to the fields of a format, the counterpart of `formats`.

`search` finds scales; `plain`, `k_quants`, `integers` and `floats` each hold one kind of format; `tiles` walks over
large matrices.
"""

from trustcore.quant.encode.tiles import ENCODERS, encode, no_encoder

__all__ = ["ENCODERS", "encode", "no_encoder"]
