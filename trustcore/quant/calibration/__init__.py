"""Calibration: what goes into each product of a model, collected in one pass over data, and what is made of it."""

from trustcore.quant.calibration.capture import Capture, capture
from trustcore.quant.calibration.cross_validate import RULES, Trial, Validation, cross_validate
from trustcore.quant.calibration.observers import Hessian, HessianSum, MeanSquare, MinMax, Observer, Range
from trustcore.quant.calibration.ranges import Entropy, Histogram, LeastSquares, Percentile, Rule
from trustcore.quant.calibration.sample import Sample
from trustcore.quant.calibration.stages import Matrix, Stage, stages

__all__ = [
    "RULES",
    "Capture",
    "Entropy",
    "Hessian",
    "HessianSum",
    "Histogram",
    "LeastSquares",
    "Matrix",
    "MeanSquare",
    "MinMax",
    "Observer",
    "Percentile",
    "Range",
    "Rule",
    "Sample",
    "Stage",
    "Trial",
    "Validation",
    "capture",
    "cross_validate",
    "stages",
]
