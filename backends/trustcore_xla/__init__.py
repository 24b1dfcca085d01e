"""The XLA backend: everything that JAX reaches through PJRT (CPU, CUDA, ROCm, TPU, Metal and any other plugin).

`backend` is what the entry-point group `trustcore.backends` names. Importing this package starts no device and does
not import jax; `backend.probe()` looks from other processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from trustcore.backend import PlatformReport

__all__ = ["XlaBackend", "backend"]


@dataclass(frozen=True)
class XlaBackend:
    """XLA through JAX.

    Attributes:
        name: "xla".
        timeout: seconds that one platform may take to answer before it counts as hanging.
    """

    name: str = "xla"
    timeout: float = 120.0

    def probe(self) -> list[PlatformReport]:
        """Returns a report for each platform that JAX knows, installed or not."""
        from trustcore_xla.discovery import probe

        return probe(timeout=self.timeout)


backend = XlaBackend()
