"""Models written anew, tensor by tensor from a checkpoint on disk: packed as a recipe says, or in another format."""

from trustcore.convert.calibrated import METHODS, Prepared, prepare
from trustcore.convert.convert import ConvertReport, convert_checkpoint
from trustcore.convert.folder import quantize_to_folder
from trustcore.convert.mixes import RECIPES
from trustcore.convert.quantize import ConversionReport, TensorReport, quantize_checkpoint
from trustcore.convert.verify import Verification, verify_conversion

__all__ = [
    "METHODS",
    "RECIPES",
    "ConversionReport",
    "ConvertReport",
    "Prepared",
    "TensorReport",
    "Verification",
    "convert_checkpoint",
    "prepare",
    "quantize_checkpoint",
    "quantize_to_folder",
    "verify_conversion",
]
