"""Rotary positions, turned in place of a copy: `rope`, with kernels that write over their operand.

`rope_oracle` is the truth it is tested against; `explain` says which implementation a call takes.
"""

from kernels_pallas.rope.front import ROPE, explain, rope
from kernels_pallas.rope.oracle import rope_oracle
from kernels_pallas.rope.xla import turned

__all__ = ["ROPE", "explain", "rope", "rope_oracle", "turned"]
