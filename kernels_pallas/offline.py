"""Compiles programs for NVIDIA GPUs and TPUs that are not here; of GPUs it says what each kernel takes.

    Report of a kernel = registers a thread, bytes spilled to memory, shared memory and threads of a block

XLA's CUDA compiler needs no device, only a description of one (`CHIPS`). It comes with the wheels jax-cuda13-plugin,
jax-cuda13-pjrt, nvidia-cuda-nvcc and nvidia-nvvm, which may lie in a folder of their own on the path; `cuda_folder`
finds it. What registers a kernel takes is read from the same assembler, ptxas.

A compiler that fails hard ends its process: one process a program, started with `JAX_PLATFORMS=cpu` and, for kernels of
Mosaic-GPU, `MOSAIC_GPU_DUMP_PTXAS=1`. For TPUs libtpu compiles, in a process with `TPU_ENVIRONMENT`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from kernels_pallas import _compat


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the compiler must know of a GPU; memory in bytes, bandwidth in bytes a second.

    `shared` is what one block may take, `shared_core` what a multiprocessor has.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    shared: int
    shared_core: int
    threads_core: int
    fpus_core: int
    cache: int
    memory: int
    bandwidth: int
    clock_ghz: float

    @property
    def description(self) -> str:
        """XLA's GpuTargetConfig of the chip, as text."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {self.threads_core}
              shared_memory_per_block: 49152 shared_memory_per_block_optin: {self.shared}
              shared_memory_per_core: {self.shared_core} core_count: {self.cores} fpus_per_core: {self.fpus_core}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              memory_bandwidth: {self.bandwidth} l2_cache_size: {self.cache} device_memory_size: {self.memory}
              clock_rate_ghz: {self.clock_ghz} cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA" device_description_str: "{self.kind}"
            dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }}"""


# Limits by compute capability: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the rest
# from the vendor's data sheets.
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "A100": Chip(
            "NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912, 167936, 2048, 64, 40 << 20, 80 << 30, 2039 * 10**9, 1.41
        ),
        "A10": Chip("NVIDIA A10", (8, 6), 72, 101376, 102400, 1536, 128, 6 << 20, 24 << 30, 600 * 10**9, 1.695),
        "L4": Chip("NVIDIA L4", (8, 9), 58, 101376, 102400, 1536, 128, 48 << 20, 24 << 30, 300 * 10**9, 2.04),
        "H100": Chip(
            "NVIDIA H100 80GB HBM3", (9, 0), 132, 232448, 233472, 2048, 128, 50 << 20, 80 << 30, 3352 * 10**9, 1.98
        ),
        "B200": Chip("NVIDIA B200", (10, 0), 148, 232448, 233472, 2048, 128, 126 << 20, 180 << 30, 7700 * 10**9, 1.965),
    }
)


@dataclasses.dataclass(frozen=True)
class Report:
    """What one kernel takes. `spilled` counts the bytes of stores and loads that the assembler added for want of
    registers, `stack` the bytes of a thread's stack; `shared` and `threads` are of a block."""

    kernel: str
    target: str
    registers: int
    spilled: int
    stack: int
    shared: int
    threads: int


class OfflineError(RuntimeError):
    """The compiler for absent chips is not here, or its output cannot be read."""


def cuda_folder() -> Path:
    """Returns the folder of CUDA's tools (`bin/ptxas`, `nvvm/libdevice`) that came with the wheels.

    Raises:
        OfflineError: they are not installed.
    """
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        for folder in sorted(Path(place).glob("cu*")):
            if (folder / "bin" / "ptxas").is_file():
                return folder
    raise OfflineError(
        "compiling for an absent GPU needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, "
        "nvidia-cuda-nvcc and nvidia-nvvm on the path; write: make aot"
    )


def compile_for(chip: Chip, function: Callable[..., Any], *arrays: Any) -> tuple[Any, list[Report]]:
    """Compiles `function` of arrays (trees of `jax.ShapeDtypeStruct`) for a chip.

    Returns the compiled program and a report of each hand-written kernel and each fusion in it.

    Raises:
        OfflineError: the compiler is not here, or this process has a GPU's backend of its own.
        Exception: what the compiler raises, e.g. for a kernel that takes more shared memory than a block has.
    """
    folder = cuda_folder()
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(platform="cuda", target_config=chip.description, topology="1x1x1").devices
    mesh = Mesh(devices[:1], ("d",))
    where = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arrays)
    with tempfile.TemporaryDirectory() as dump:
        options: dict[str, str | bool] = {"xla_gpu_cuda_data_dir": str(folder), "xla_dump_to": dump}
        mosaic = _compat.mosaic_gpu_for(chip.capability, chip.shared)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), mosaic as taken, _captured() as said:
            lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",))
            compiled = lowered.compile(compiler_options=options)
        return compiled, [*_assembled(Path(dump), folder), *_said_of_mosaic("".join(said), taken)]


# Kinds of TPUs as JAX names them, and a slice of each that libtpu describes.
TPUS: Mapping[str, str] = MappingProxyType(
    {
        "TPU v4": "v4:2x2x1",
        "TPU v5 lite": "v5e:2x2",
        "TPU v5e": "v5e:2x2",
        "TPU v5": "v5p:4x4x4",
        "TPU v5p": "v5p:4x4x4",
        "TPU v6 lite": "v6e:4x4",
        "TPU v6e": "v6e:4x4",
    }
)
# What libtpu wants to know of a host that has no TPU.
TPU_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes compile at a time
    }
)


def compile_for_tpu(kind: str, function: Callable[..., Any], *arrays: Any) -> Any:
    """Compiles `function` of arrays (trees of `jax.ShapeDtypeStruct`) for a TPU of a kind of `TPUS`.

    Raises:
        OfflineError: libtpu is not installed.
        Exception: what the compiler raises, e.g. for a kernel that takes more VMEM than there is.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise OfflineError("compiling for an absent TPU needs the wheel libtpu on the path; write: make aot")
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[kind]).devices
    mesh = Mesh(devices[:1], ("d",))
    where = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arrays)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).trace(*placed).lower(lowering_platforms=("tpu",)).compile()


MOSAIC = "_mosaic_gpu_kernel"  # how names of its kernels end
_LAUNCH = re.compile(r"(\S+) grid: \[[\d, ]+\] threads: \[([\d, ]+)\]\s+shared_memory: (\d+) bytes")
_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def parsed(said: str) -> Iterator[tuple[str, str, int, int, int]]:
    """Yields kernel, target, registers, spilled and stack bytes of each kernel of which ptxas speaks."""
    for part in re.split(r"(?=[^\n]*Compiling entry function)", said):
        entry, stack, registers = _ENTRY.search(part), _STACK.search(part), _REGISTERS.search(part)
        if entry and stack and registers:
            frame, stores, loads = map(int, stack.groups())
            yield entry[1], entry[2], int(registers[1]), stores + loads, frame


def _assembled(dump: Path, folder: Path) -> Iterator[Report]:
    """Assembles XLA's PTX again, to hear what it takes: XLA itself tells of failures alone."""
    launches = {}
    for text in dump.glob("*.thunk_sequence.txt"):
        for name, threads, shared in _LAUNCH.findall(text.read_text()):
            x, y, z = map(int, threads.split(","))
            launches[name] = int(shared), x * y * z
    for ptx in sorted(dump.glob("*.ptx")):
        target = re.search(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)
        if target is None or ".entry" not in ptx.read_text():
            continue
        command = [str(folder / "bin" / "ptxas"), "-v", f"-arch={target[1]}", str(ptx), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        for name, of, registers, spilled, stack in parsed(said.stderr + said.stdout):
            yield Report(name, of, registers, spilled, stack, *launches.get(name, (0, 0)))


def _said_of_mosaic(said: str, taken: Mapping[str, int]) -> Iterator[Report]:
    """Mosaic-GPU assembles its kernels itself and prints what ptxas says; `taken` is their shared memory."""
    for name, target, registers, spilled, stack in parsed(said):
        yield Report(name, target, registers, spilled, stack, taken.get(name.removesuffix(MOSAIC), 0), 0)


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
    """Inside, what the process writes to its output and error files goes into the list at the end."""
    said: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield said
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            said.append(file.read())
