"""What the speed of a call depends on, and the values that were found for it: see `../tuning.py`."""

from __future__ import annotations

from typing import Any

from kernels_pallas import tuning
from kernels_pallas.attention.spec import Operands, Spec

# Operands beyond query, key and value, whose presence alone counts.
MORE = ("query_positions", "key_positions", "query_segments", "mask", "bias", "slopes", "relative", "sinks")


def facts(spec: Spec, ops: Operands) -> tuning.Facts | None:
    """Returns the facts of a call; None where a size is symbolic, an axis is empty, or blocks are listed.

    `window` is how many keys a query sees on its left, itself included; 0: all. `more` names what else there is.
    """
    batch, length, heads, size = ops.query.shape
    span, kv_heads = ops.key.shape[1:3]
    sizes = {"B": batch, "T": length, "S": span, "N": heads, "K": kv_heads, "H": size, "Hv": ops.value.shape[3]}
    if not all(isinstance(n, int) and n > 0 for n in sizes.values()) or spec.blocks is not None:
        return None
    more = [n for n in MORE if getattr(ops, n) is not None]
    more += ["soft_cap"] if spec.soft_cap is not None else []
    more += ["dropout"] if spec.dropout else []
    return {
        **sizes,
        "dtype": ops.query.dtype.name,
        "causal": spec.right == 0,
        "window": 0 if spec.left is None else spec.left + 1,
        "more": " ".join(more),
    }


def tuned(target: Any, call: Any, direction: str, implementation: str) -> tuning.Values:
    """Returns the values that were found for an implementation of a call; {} for its defaults."""
    return tuning.values(f"attention_{direction}", target, lambda: facts(call.spec, call.ops), implementation)
