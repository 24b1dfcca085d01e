"""Weights that stay packed: formats, `QuantizedArray`, products with it, `quantize`, which packs a model, and methods.

A method that chooses scales or codes with more than the weights at hand, or without rounding to nearest, is a function
from tree to tree: `awq`, `smoothquant`, `rotate` fold into neighbours (`trustcore.quant.folding`), `hqq` needs no data.
"""

from trustcore.quant.array import QuantizedArray
from trustcore.quant.folding import Link, Sample, Stream, awq, migration, rotate, smoothquant
from trustcore.quant.formats import FORMATS, Format, get_format
from trustcore.quant.hqq import hqq
from trustcore.quant.quantize import quantize
from trustcore.quant.report import LeafReport, Report, report

__all__ = [
    "FORMATS", "Format", "LeafReport", "Link", "QuantizedArray", "Report", "Sample", "Stream", "awq", "get_format",
    "hqq", "migration", "quantize", "report", "rotate", "smoothquant",
]  # fmt: skip
