"""Compiles the C++ handlers once a machine, loads them, and registers them with XLA.

The library goes to the cache folder under a name that hashes the sources, the compiler's version, this processor's
features and the release of jaxlib whose headers it was built with, so a change of any builds a new one and machines
that share a home folder do not load each other's. Two processes that build at once each write their own file and move
it into place. `TRUSTCORE_CPU_KERNELS=off` keeps everything on plain XLA.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import jax

from trustcore.cache import cache_folder
from trustcore.errors import ImplementationError

# Libraries, each built when something of it is asked for first: sources, and what they register.
LIBRARIES = {
    "products": (
        ("packed_matmul.cc", "packed_codes.cc", "attention.cc"),
        ("trustcore_packed_matmul", "trustcore_cached_attention"),
    ),
    "encoders": (("encode_blocks.cc", "nearest_entry.cc"), ("trustcore_encode_blocks", "trustcore_nearest_entry")),
    "statistics": (("statistics.cc",), ("trustcore_statistics",)),
}
HEADERS = tuple(sorted(path.name for path in Path(__file__).parent.glob("*.h")))

# No -ffast-math: linked into a shared library it would flush subnormals in the whole process.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-w")
TIMEOUT = 300  # seconds; a build takes about ten


def why_not(library: str = "products") -> str:
    """Returns "" when the handlers are loaded and registered, else the reason why not. Builds them on first use."""
    return _load(library)[1]


def load(library: str = "products") -> ctypes.CDLL:
    """Returns the loaded library, one of `LIBRARIES`.

    Raises:
        ImplementationError: it cannot be built or loaded here; says why.
    """
    loaded, reason = _load(library)
    if loaded is None:
        raise ImplementationError(f"native CPU kernels: {reason}")
    return loaded


def compiler() -> str | None:
    """Returns the C++ compiler that would be used: `$CXX`, else g++, c++ or clang++ on the path."""
    named = os.environ.get("CXX")
    for name in (named,) if named else ("g++", "c++", "clang++"):
        found = shutil.which(name)
        if found:
            return found
    return None


@functools.cache
def _load(library: str) -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("TRUSTCORE_CPU_KERNELS", "").lower() in ("off", "0", "no", "false"):
        return None, "TRUSTCORE_CPU_KERNELS=off."
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64", "aarch64", "arm64"):
        return None, f"they are written for x86-64 and 64-bit Arm, not {machine}."
    cxx = compiler()
    if cxx is None:
        return None, "no C++ compiler was found ($CXX, g++, c++, clang++); plain XLA is used instead."
    native = _native_flags(machine)
    if native is None:
        return None, "this processor has no AVX2, FMA and F16C; plain XLA is used instead."
    sources, targets = LIBRARIES[library]
    path = cache_folder("native") / f"trustcore-{library}-{_key(cxx, native, sources)}.so"
    try:
        if not path.exists():
            _compile(cxx, native, sources, path)
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"building or loading {path} failed: {_one_line(error)}"
    for target in targets:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(loaded, target)), platform="cpu")
    return loaded, ""


def _native_flags(machine: str) -> tuple[str, ...] | None:
    if machine in ("aarch64", "arm64"):
        return ("-mcpu=native",)
    features = _cpu_features()
    if features and not {"avx2", "fma", "f16c"} <= set(features.split()):
        return None
    return ("-march=native",)


def _cpu_features() -> str:
    """The processor's feature flags where the system tells them, else ""."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    for line in text.splitlines():
        if line.lower().startswith(("flags", "features")):
            return line.partition(":")[2]
    return ""


def _key(cxx: str, native: tuple[str, ...], sources: tuple[str, ...]) -> str:
    folder = Path(__file__).parent
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    parts = [version, metadata.version("jaxlib"), _cpu_features(), *FLAGS, *native]
    parts += [(folder / name).read_text() for name in (*sources, *HEADERS)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(cxx: str, native: tuple[str, ...], sources: tuple[str, ...], path: Path) -> None:
    folder = Path(__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch) / path.name
        objects = [Path(scratch) / f"{name}.o" for name in sources]
        include = (f"-I{jax.ffi.include_dir()}", f"-I{folder}")

        def run(*arguments: str) -> None:
            command = [cxx, *FLAGS, *native, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
            if done.returncode:
                raise subprocess.SubprocessError(done.stderr.strip() or f"{cxx} exited with {done.returncode}")

        def compile_one(name: str, target: Path) -> None:
            run(*include, "-c", str(folder / name), "-o", str(target))

        with ThreadPoolExecutor() as pool:  # the compiler is another process: sources side by side
            list(pool.map(compile_one, sources, objects))
        run("-shared", *map(str, objects), "-o", str(built), "-lpthread")
        os.replace(built, path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
