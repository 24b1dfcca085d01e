"""Products of floats with a packed matrix: codes are unpacked inside the kernel, for few rows and for many.

`packed_matmul` takes the arrays and a `Layout` that says how they are packed. `packed_oracle` is the truth it is tested
against. `explain` says which implementation a call takes.
"""

from kernels_pallas.packed.front import PACKED, explain, packed_matmul, packed_oracle
from kernels_pallas.packed.layout import Layout, Plane

__all__ = ["PACKED", "Layout", "Plane", "explain", "packed_matmul", "packed_oracle"]
