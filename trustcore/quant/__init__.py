"""Weights that stay packed: formats, `QuantizedArray`, products with it, and what packs a model, and how well.

`quantize` rounds to nearest, `gptq` corrects rounding errors on data; `calibration` gathers what both may use;
`sensitivity` and `allocate` choose formats under a budget; `report` and `compare_formats` say what it has cost.
"""

from trustcore.quant.allocate import Allocation, Option, allocate, frontier
from trustcore.quant.array import QuantizedArray
from trustcore.quant.formats import FORMATS, Format, get_format
from trustcore.quant.gptq import gptq
from trustcore.quant.quantize import quantize
from trustcore.quant.report import LeafReport, Recommendation, Report, compare_formats, report
from trustcore.quant.sensitivity import Divergence, Reference, sensitivity

__all__ = [
    "FORMATS",
    "Allocation",
    "Divergence",
    "Format",
    "LeafReport",
    "Option",
    "QuantizedArray",
    "Recommendation",
    "Reference",
    "Report",
    "allocate",
    "compare_formats",
    "frontier",
    "get_format",
    "gptq",
    "quantize",
    "report",
    "sensitivity",
]
