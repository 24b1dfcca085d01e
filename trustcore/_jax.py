"""Every difference between the jax releases that trustcore supports (0.10.2 to the newest), in one place."""

from __future__ import annotations

from typing import Any

import jax

JAX_VERSION: tuple[int, ...] = tuple(int(part) for part in jax.__version__.split(".")[:3] if part.isdigit())

# Rows of codes that one step of the streaming product takes on the CPU. XLA's CPU compiler changed between these
# releases: on 0.12, four rows a step run at 13.9 G weights/s and one at 6 to 9; on 0.10.2, four run at 1.2 and one at 7
# (K=2048, N=8192, two cores of an AVX2 machine, 2026-11).
STREAM_UNROLL: int = 4 if JAX_VERSION >= (0, 12) else 1


def program_count(jitted: Any) -> int:
    """Returns how many programs a jitted function holds. JAX gives the number to nobody but its own tests."""
    return jitted._cache_size()
