"""Calibration: what goes into each product of a model, collected in one pass over data, and what is made of it."""

from trustcore.quant.calibration.capture import Capture, capture
from trustcore.quant.calibration.observers import Hessian, HessianSum, MeanSquare, MinMax, Observer, Range
from trustcore.quant.calibration.ranges import Entropy, Histogram, LeastSquares, Percentile, Rule

__all__ = [
    "Capture",
    "Entropy",
    "Hessian",
    "HessianSum",
    "Histogram",
    "LeastSquares",
    "MeanSquare",
    "MinMax",
    "Observer",
    "Percentile",
    "Range",
    "Rule",
    "capture",
]
