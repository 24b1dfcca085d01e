"""Accelerator kernels for transformer layers, and their plain XLA forms. Depends on jax alone.

One folder an op family. Each holds the oracle, the implementations, and one public function that chooses among them.
"""

from kernels_pallas._compat import abstract_device
from kernels_pallas.dispatch import Explanation, ImplementationError, Target, Verdict

__all__ = ["Explanation", "ImplementationError", "Target", "Verdict", "abstract_device"]
