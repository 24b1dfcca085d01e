"""Weights that stay packed: formats, `QuantizedArray`, products with it, and what packs a model, and how well.

`quantize` rounds to nearest. A method that chooses scales or codes with more than the weights at hand, or otherwise
than to nearest, is a function from tree to tree as well: `gptq` corrects rounding errors on data, `awq`, `smoothquant`
and `rotate` fold into neighbours, `hqq` needs no data. `calibration` gathers what they use; `sensitivity` and
`allocate` choose formats under a budget; `report` and `compare_formats` say what it has cost.
"""

from trustcore.quant.activations import ActivationQuantized, quantize_activations
from trustcore.quant.allocate import Allocation, Option, allocate, frontier
from trustcore.quant.array import QuantizedArray
from trustcore.quant.calibration import Sample
from trustcore.quant.folding import Link, Stream, awq, migration, rotate, smoothquant
from trustcore.quant.formats import FORMATS, Format, get_format
from trustcore.quant.gptq import gptq
from trustcore.quant.hqq import hqq
from trustcore.quant.quantize import quantize
from trustcore.quant.report import LeafReport, Recommendation, Report, compare_formats, report
from trustcore.quant.sensitivity import Divergence, Reference, sensitivity

__all__ = [
    "FORMATS",
    "ActivationQuantized",
    "Allocation",
    "Divergence",
    "Format",
    "LeafReport",
    "Link",
    "Option",
    "QuantizedArray",
    "Recommendation",
    "Reference",
    "Report",
    "Sample",
    "Stream",
    "allocate",
    "awq",
    "compare_formats",
    "frontier",
    "get_format",
    "gptq",
    "hqq",
    "migration",
    "quantize",
    "quantize_activations",
    "report",
    "rotate",
    "sensitivity",
    "smoothquant",
]
