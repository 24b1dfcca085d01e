"""Softmax over the last axis, of what a mask leaves.

`softmax` chooses among implementations; `softmax_oracle` is the truth it is tested against; `explain` says which
implementation a call takes.
"""

from kernels_pallas.softmax.front import SOFTMAX, explain, softmax
from kernels_pallas.softmax.oracle import softmax_oracle

__all__ = ["SOFTMAX", "explain", "softmax", "softmax_oracle"]
