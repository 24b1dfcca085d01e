"""What the speed of a call depends on, and the values that were found for it: see `../tuning.py`."""

from __future__ import annotations

from typing import Any

from kernels_pallas import tuning


def facts(call: Any) -> tuning.Facts | None:
    """Returns the facts of a call; None where a size is symbolic or an axis empty, and where `vmap` made segments more.

    R rows of K numbers, E groups, N columns, as the direction has them; `transposed`: of the matrices.
    """
    sizes = {"R": call.x.shape[0], "E": call.sizes.shape[0], "K": call.x.shape[1], "N": call.width}
    if call.parts != 1 or not all(isinstance(n, int) and n > 0 for n in sizes.values()):
        return None
    made = {**sizes, "dtype": call.x.dtype.name}
    return made if call.direction == "sums" else {**made, "transposed": call.transposed}


def tuned(target: Any, call: Any, implementation: str) -> tuning.Values:
    """Returns the values that were found for an implementation of a call; {} for its defaults."""
    return tuning.values(f"grouped_matmul_{call.direction}", target, lambda: facts(call), implementation)
