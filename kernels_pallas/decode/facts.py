"""What the speed of a call depends on, and the values that were found for it: see `../tuning.py`."""

from __future__ import annotations

from typing import Any

from kernels_pallas import tuning
from kernels_pallas.decode.spec import Call

# Operands and options beyond the cache and its scales, whose presence alone counts.
MORE = ("soft_cap", "slopes", "sinks")


def facts(call: Call) -> tuning.Facts | None:
    """Returns the facts of a call; None where a size is symbolic or an axis is empty.

    S counts the slots that a row can have. `page` is the size of a page, 0: none; `window` and `chunk` as the call
    has them, 0: all; `cache` the dtype of the cache, whose codes of 4 bits are uint8.
    """
    ops, spec = call.ops, call.spec
    sizes = {
        "B": call.batch,
        "T": call.length,
        "S": call.slots,
        "N": ops.query.shape[2],
        "K": call.kv_heads,
        "H": call.sizes[0] * spec.parts,
        "Hv": call.sizes[1] * spec.parts,
    }
    if not all(isinstance(n, int) and n > 0 for n in sizes.values()):
        return None
    there = {"soft_cap": spec.soft_cap, "slopes": ops.slopes, "sinks": ops.sinks}
    return {
        **sizes,
        "dtype": ops.query.dtype.name,
        "cache": {"float8": "float8_e4m3fn", "int4": "uint8"}.get(spec.kind, ops.keys.dtype.name),
        "page": 0 if ops.pages is None else call.page,
        "window": spec.window or 0,
        "chunk": spec.chunk or 0,
        "more": " ".join(n for n in MORE if there[n] is not None),
    }


def tuned(target: Any, call: Call, implementation: str) -> tuning.Values:
    """Returns the values that were found for an implementation of a call; {} for its defaults."""
    return tuning.values("decode_attention_forward", target, lambda: facts(call), implementation)
