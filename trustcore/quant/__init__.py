"""Weights that stay packed: formats, `QuantizedArray` and products with it."""

from trustcore.quant.array import QuantizedArray
from trustcore.quant.formats import FORMATS, Format, get_format

__all__ = ["FORMATS", "Format", "QuantizedArray", "get_format"]
