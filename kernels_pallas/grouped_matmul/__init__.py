"""Products of rows that lie sorted by group, each group with a matrix of its own: what layers of experts need.

`grouped_matmul` chooses among implementations; `grouped_matmul_oracle` is the truth it is tested against; `explain`
says which implementation a call takes.
"""

from kernels_pallas.grouped_matmul.front import GROUPED_MATMUL, explain, grouped_matmul
from kernels_pallas.grouped_matmul.oracle import grouped_matmul_oracle

__all__ = ["GROUPED_MATMUL", "explain", "grouped_matmul", "grouped_matmul_oracle"]
