"""Models written anew, tensor by tensor from a checkpoint on disk: as GGUF files, packed as a recipe says."""

from trustcore.convert.mixes import RECIPES
from trustcore.convert.quantize import ConversionReport, TensorReport, quantize_checkpoint

__all__ = ["RECIPES", "ConversionReport", "TensorReport", "quantize_checkpoint"]
