"""Training for and in few bits: quantization-aware training (STE, LSQ, PACT), and products in 8-bit floats."""

from trustcore.quant.training.fake import fake_quantize
from trustcore.quant.training.fp8 import BlockScaling, CurrentScaling, DelayedScaling, Fp8State
from trustcore.quant.training.fp8_dot import fp8_dot
from trustcore.quant.training.fp8_weight import Fp8Weight, fp8_join, fp8_prepare, fp8_value_and_grad
from trustcore.quant.training.inputs import pact
from trustcore.quant.training.prepare import calibrate, convert, kinds, prepare
from trustcore.quant.training.scheme import Scheme
from trustcore.quant.training.weight import FakeQuantized, QuantizedInputs

__all__ = [
    "BlockScaling", "CurrentScaling", "DelayedScaling", "FakeQuantized", "Fp8State", "Fp8Weight", "QuantizedInputs",
    "Scheme", "calibrate", "convert", "fake_quantize", "fp8_dot", "fp8_join", "fp8_prepare", "fp8_value_and_grad",
    "kinds", "pact", "prepare",
]  # fmt: skip
