"""Weights that stay packed: formats, `QuantizedArray`, products with it, and `quantize`, which packs a model."""

from trustcore.quant.array import QuantizedArray
from trustcore.quant.formats import FORMATS, Format, get_format
from trustcore.quant.quantize import quantize
from trustcore.quant.report import LeafReport, Report, report

__all__ = ["FORMATS", "Format", "LeafReport", "QuantizedArray", "Report", "get_format", "quantize", "report"]
