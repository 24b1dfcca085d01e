"""Models written anew, tensor by tensor from a checkpoint on disk: as GGUF files, packed as a recipe says."""

from trustcore.convert.calibrated import METHODS, Prepared, prepare
from trustcore.convert.mixes import RECIPES
from trustcore.convert.quantize import ConversionReport, TensorReport, quantize_checkpoint

__all__ = ["METHODS", "RECIPES", "ConversionReport", "Prepared", "TensorReport", "prepare", "quantize_checkpoint"]
