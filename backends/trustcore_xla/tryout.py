"""Tries one platform in this process and prints what it found: `python -m trustcore_xla.tryout cpu`.

Run by `discovery`, never imported by a program: it starts a device and changes jax's configuration. Prints one line:

    {"devices": [{"id", "kind", "memory_bytes"}], "dtypes": [...]}      or      {"error": "..."}
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# Tried in this order; a release of jax that lacks one leaves it out.
DTYPES: tuple[str, ...] = (
    "float32",
    "bfloat16",
    "float16",
    "float64",
    "int8",
    "int4",
    "float8_e4m3fn",
    "float8_e5m2",
)
NARROW: frozenset[str] = frozenset({"int4", "float8_e4m3fn", "float8_e5m2"})


def main(platform: str) -> dict[str, Any]:
    """Returns what `platform` can do, or the error that it gives."""
    try:
        import jax

        jax.config.update("jax_enable_x64", True)  # or float64 would quietly be float32
        devices = jax.local_devices(backend=platform)
    except Exception as error:  # a driver may raise anything
        return {"error": f"{type(error).__name__}: {error}"}
    if not devices:
        return {"error": "no device was found"}
    described = [{"id": d.id, "kind": d.device_kind, "memory_bytes": _memory(platform, d)} for d in devices]
    return {"devices": described, "dtypes": [name for name in DTYPES if works(name, devices[0])]}


def works(dtype: str, device: Any) -> bool:
    """Whether a jitted program on `device` that computes with small whole numbers in `dtype` gives the exact answer.

    Dtypes of 16 bits and more, and int8, take a matrix product; the narrower ones, in which weights are stored and
    which few devices multiply, take an addition and a conversion.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    kind = getattr(jnp, dtype, None)
    if kind is None:
        return False
    wide = jnp.int32 if "int" in dtype else jnp.float64 if dtype == "float64" else jnp.float32
    left = np.arange(16 * 16).reshape(16, 16) % 3 - 1
    right = np.arange(16 * 16).reshape(16, 16) % 4 - 2

    def program(x: jax.Array, y: jax.Array) -> jax.Array:
        if dtype in NARROW:
            return (x + y).astype(wide)
        return jax.lax.dot(x, y, preferred_element_type=wide)

    try:
        with jax.default_device(device):
            x, y = jnp.asarray(left, kind), jnp.asarray(right, kind)
            found = np.asarray(jax.jit(program)(x, y))
    except Exception:  # refused by the compiler or the device, each in its own way
        return False
    return bool(np.array_equal(found, left + right if dtype in NARROW else left @ right))


def _memory(platform: str, device: Any) -> int | None:
    if platform == "cpu":
        return host_memory()
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def host_memory() -> int | None:
    """Returns the bytes of main memory that this process may use: the machine's, or its control group's limit."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                total = min(total, int(file.read()))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return total


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])), flush=True)
