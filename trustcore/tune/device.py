"""Which device results belong to, and what it offers: the limits that cut candidates before anything runs.

A result holds for a platform, an architecture and a number of cores (multiprocessors of a GPU, cores that this process
may use on a CPU). Of the rates below only the order of candidates depends, never what wins: that is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform as system
from pathlib import Path

import jax

from kernels_pallas import Target
from kernels_pallas._compat import default_platform, device_kind

KB = 1024


@dataclasses.dataclass(frozen=True)
class Device:
    """What results are kept for.

    Attributes:
        platform: "cpu", "cuda", "rocm", "tpu" or another.
        architecture: a compute capability, "gfx942", a TPU's kind; of a CPU its name, family and vector instructions.
        cores: 0 where it is not known.
    """

    platform: str
    architecture: str
    cores: int

    @property
    def target(self) -> Target:
        """What ops are asked with. A CPU's architecture is nothing that an op knows."""
        return Target(self.platform, None if self.platform == "cpu" else self.architecture)

    def serves(self, target: Target) -> bool:
        """Returns whether results of this device are for programs that are lowered for the target."""
        return self.platform == target.platform and target.architecture in (None, self.architecture)

    def __str__(self) -> str:
        return f"{self.platform} {self.architecture}, {self.cores} cores"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a chip offers.

    Attributes:
        onchip: bytes of shared memory that one program may hold, or of VMEM; None: nothing is cut.
        cache: bytes of the nearest cache that is large, of one core.
        flops, bandwidth: of the whole chip, a second, roughly.
        step: seconds that a step of a loop or grid costs by itself, roughly.
        slots: programs that run side by side.
    """

    onchip: int | None
    cache: int
    flops: float
    bandwidth: float
    step: float
    slots: int


# Shared memory of a block: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Rates: data
# sheets, dense bfloat16. LDS: CDNA 3 instruction set manual. VMEM: what Mosaic lets one program have by default.
_CUDA = {
    "8.0": Limits(163 * KB, 40 << 20, 3e14, 1.5e12, 1e-6, 108),
    "8.6": Limits(99 * KB, 6 << 20, 1.2e14, 6e11, 1e-6, 72),
    "8.9": Limits(99 * KB, 48 << 20, 1.2e14, 3e11, 1e-6, 58),
    "9.0": Limits(227 * KB, 50 << 20, 9e14, 3.3e12, 1e-6, 132),
    "10.0": Limits(227 * KB, 126 << 20, 2.2e15, 8e12, 1e-6, 148),
    "12.0": Limits(99 * KB, 128 << 20, 4e14, 1.8e12, 1e-6, 188),
}
_OLDEST_CUDA = Limits(48 * KB, 4 << 20, 6e13, 3e11, 1e-6, 40)  # what every NVIDIA GPU of this century lets a block have
_ROCM = Limits(64 * KB, 4 << 20, 1e15, 5e12, 1e-6, 304)
_TPU = Limits(16 << 20, 16 << 20, 2e14, 8e11, 4e-7, 1)


def limits(device: Device) -> Limits:
    """Returns what a device offers; for one that is not known, the least of its kind."""
    if device.platform == "cuda":
        return _CUDA.get(device.architecture, _OLDEST_CUDA)
    if device.platform == "rocm":
        return _ROCM
    if device.platform == "tpu":
        return _TPU
    cores = max(device.cores, 1)
    return Limits(None, 1 << 20, 1e11 * cores, 2e10, 2e-6, cores)


@functools.cache
def this_device() -> Device:
    """Returns the device where arrays are computed by default; starts it if need be."""
    name = default_platform()
    if name == "cpu":
        return Device(name, _processor(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0)
    device = jax.devices()[0]
    cores = getattr(device, "core_count", None) or getattr(device, "num_cores", None) or 0
    return Device(name, device_kind(name) or str(device.device_kind), int(cores))


def _processor() -> str:
    """Name, family and model, and the widest vectors: what decides which loops are fast."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return system.processor() or system.machine()
    facts: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip().lower(), value.strip())
    flags = (facts.get("flags") or facts.get("features") or "").split()
    vectors = next((f for f in ("avx512_bf16", "avx512f", "avx2", "sve2", "sve", "asimd") if f in flags), "")
    family = "/".join(facts[n] for n in ("cpu family", "model") if n in facts)
    return " ".join(part for part in (facts.get("model name", system.machine()), family, vectors) if part)
