"""The table of storage formats. A format is one entry: its fields, and `decode` as a pure function.

`layout` says what a format is; the other files each hold one kind. Adding a format is adding an entry to its file's
tuple.
"""

from __future__ import annotations

from collections.abc import Mapping

from trustcore.errors import QuantizationError
from trustcore.quant.formats.block_floats import BLOCK_FLOATS
from trustcore.quant.formats.iq import IQ
from trustcore.quant.formats.k_quants import K_QUANTS
from trustcore.quant.formats.layout import Affine, Field, Fields, Format, decode_matrix
from trustcore.quant.formats.plain import PLAIN
from trustcore.quant.formats.ternary import TERNARY

__all__ = ["FORMATS", "Affine", "Field", "Fields", "Format", "decode_matrix", "get_format"]

FORMATS: Mapping[str, Format] = {f.name: f for f in (*PLAIN, *K_QUANTS, *IQ, *TERNARY, *BLOCK_FLOATS)}


def get_format(name: str) -> Format:
    """Returns the entry of the table called `name`.

    Raises:
        QuantizationError: there is none; the message lists those that are.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise QuantizationError(f"Format {name!r} is not known. Known formats: {', '.join(sorted(FORMATS))}.") from None
