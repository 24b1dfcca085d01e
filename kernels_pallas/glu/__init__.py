"""Activations of feed-forward layers: of a gate times the other half (GLU), or of x with a bias.

`glu` and `bias_activation` choose among implementations; `glu_oracle` and `bias_activation_oracle` are the truth they
are tested against; `explain` says which implementation a call takes.
"""

from kernels_pallas.glu.front import BIAS_ACTIVATION, GLU, bias_activation, explain, glu
from kernels_pallas.glu.oracle import ACTIVATIONS, bias_activation_oracle, glu_oracle

__all__ = [
    "ACTIVATIONS",
    "BIAS_ACTIVATION",
    "GLU",
    "bias_activation",
    "bias_activation_oracle",
    "explain",
    "glu",
    "glu_oracle",
]
