"""RMSNorm and LayerNorm over the last axis, with an addition of a residual before it if wanted.

`norm_quantized` writes codes of 8 bits in place of floats.

`rms_norm` and `layer_norm` choose among implementations; `rms_norm_oracle` and `layer_norm_oracle` are the truth they
are tested against; `explain` says which implementation a call takes.
"""

from kernels_pallas.norm.front import NORM, explain, layer_norm, rms_norm
from kernels_pallas.norm.oracle import layer_norm_oracle, rms_norm_oracle
from kernels_pallas.norm.quantized import NORM_QUANTIZED, norm_quantized, norm_quantized_oracle

__all__ = [
    "NORM",
    "NORM_QUANTIZED",
    "explain",
    "layer_norm",
    "layer_norm_oracle",
    "norm_quantized",
    "norm_quantized_oracle",
    "rms_norm",
    "rms_norm_oracle",
]
