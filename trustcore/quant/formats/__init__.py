"""The table of storage formats. A format is one entry: its fields, and their decoding as a pure function.

`format` says what a format answers; `layout` what one of blocks is, `scaled` what one with free granularity is; the
other files each hold one kind. Adding a format is adding an entry to its file's tuple.
"""

from __future__ import annotations

from collections.abc import Mapping

from trustcore.errors import QuantizationError
from trustcore.quant.formats.block_floats import BLOCK_FLOATS
from trustcore.quant.formats.format import Fields, Format, decode_matrix
from trustcore.quant.formats.iq import IQ
from trustcore.quant.formats.k_quants import K_QUANTS
from trustcore.quant.formats.layout import Affine, BlockFormat, Field
from trustcore.quant.formats.plain import PLAIN
from trustcore.quant.formats.scaled import SCALED, ScaledFormat
from trustcore.quant.formats.ternary import TERNARY

__all__ = [
    "BLOCK_FORMATS", "FORMATS", "SCALED_FORMATS", "Affine", "BlockFormat", "Field", "Fields", "Format", "ScaledFormat",
    "decode_matrix", "get_format",
]  # fmt: skip

BLOCK_FORMATS: Mapping[str, BlockFormat] = {f.name: f for f in (*PLAIN, *K_QUANTS, *IQ, *TERNARY, *BLOCK_FLOATS)}
SCALED_FORMATS: Mapping[str, ScaledFormat] = {f.name: f for f in SCALED}
FORMATS: Mapping[str, Format] = {**BLOCK_FORMATS, **SCALED_FORMATS}


def get_format(name: str) -> Format:
    """Returns the entry of the table called `name`.

    Raises:
        QuantizationError: there is none; the message lists those that are.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise QuantizationError(f"Format {name!r} is not known. Known formats: {', '.join(sorted(FORMATS))}.") from None
