"""What the speed of a call depends on, and the values that were found for it: see `../tuning.py`."""

from __future__ import annotations

from typing import Any

from kernels_pallas import tuning
from kernels_pallas.dispatch import no_sizes


def direction_of(call: Any) -> str:
    """Returns "forward" or "backward"."""
    return "backward" if "of_y" in call.arrays else "forward"


def facts(call: Any) -> tuning.Facts | None:
    """Returns the facts of a call; None where a size is symbolic or an axis is empty.

    `keep`: a forward pass whose backward pass will follow, which stores the state before each chunk.
    """
    (batch, length, inner), size = call.arrays["x"].shape, call.arrays["decay"].shape[1]
    sizes = {"B": batch, "T": length, "I": inner, "S": size}
    if no_sizes(tuple(sizes.values())):
        return None
    made = {**sizes, "chunk": call.chunk, "dtype": call.arrays["x"].dtype.name}
    return made if direction_of(call) == "backward" else {**made, "keep": call.keep}


def tuned(target: Any, call: Any, implementation: str) -> tuning.Values:
    """Returns the values that were found for an implementation of a call; {} for its defaults."""
    return tuning.values(f"selective_scan_{direction_of(call)}", target, lambda: facts(call), implementation)


def refusal_of_shapes(call: Any, dtypes: tuple[str, ...], largest: int) -> str:
    """Returns why a kernel cannot compute a call whatever the chip; "" where it can. `largest`: of a state, S."""
    arrays = call.arrays
    if reason := no_sizes((*arrays["x"].shape, *arrays["decay"].shape)):
        return reason
    for name in ("x", "dt", "b", "c"):
        if name in arrays and arrays[name].dtype.name not in dtypes:
            return f"it takes {', '.join(dtypes[:-1])} and {dtypes[-1]}, and {name} is {arrays[name].dtype}."
    if arrays["decay"].shape[1] > largest:
        return f"states of {arrays['decay'].shape[1]} numbers are larger than {largest}."
    return ""
