"""Hand-written CPU implementations, called from inside XLA programs through its foreign-function interface.

They exist where XLA's CPU code falls short (short products with packed weights, attention of one query against a long
cache), and are never needed for correctness: `why_not()` says why they are absent, and every caller has a plain XLA
form. The C++ sources stand beside this file; `build.py` compiles them once a machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.ops.cpu.build import load, why_not

__all__ = ["FORMATS", "load", "packed_matmul", "why_not"]

# Formats of packed_matmul.cc; their order is the numbering there.
FORMATS: tuple[str, ...] = ("q4_0", "q4_1", "q8_0", "f16", "bf16")
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "q4_0": ("codes", "scale"),
    "q4_1": ("codes", "scale", "minimum"),
    "q8_0": ("codes", "scale"),
    "f16": ("values",),
    "bf16": ("values",),
}


def packed_matmul(x: jax.Array, weights: Sequence[tuple[str, Mapping[str, jax.Array]]]) -> tuple[jax.Array, ...]:
    """Returns `x @ decode(w)` for each weight, float32 `[M, N_i]`.

    Args:
        x: float32 `[M, K]`.
        weights: format name and fields, as `trustcore.quant.QuantizedArray` holds them.

    Under vmap over x alone the batch becomes rows; over weights it is a loop. Not differentiable by itself.
    """
    formats = tuple(FORMATS.index(name) for name, _ in weights)
    fields = tuple(tuple(fields[f] for f in _FIELDS[name]) for name, fields in weights)

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array, fields: Any) -> tuple[jax.Array, ...]:
        load()
        flat = [part for parts in fields for part in parts]
        shapes = [jax.ShapeDtypeStruct((x.shape[0], parts[0].shape[-1]), jnp.float32) for parts in fields]
        target = jax.ffi.ffi_call("trustcore_packed_matmul", shapes)
        return tuple(target(x, *flat, formats=np.array(formats, np.int64)))

    @call.def_vmap
    def batched(size: int, in_batched: Any, x: jax.Array, fields: Any) -> tuple[tuple[jax.Array, ...], Any]:
        x_batched, fields_batched = in_batched
        if not any(jax.tree.leaves(fields_batched)):
            ys = call(x.reshape(-1, x.shape[-1]), fields)
            ys = tuple(y.reshape(size, -1, y.shape[-1]) for y in ys)
        else:
            axes = jax.tree.map(lambda b: 0 if b else None, (x_batched, fields_batched))
            ys = _loop(call, size, axes, x, fields)
        return ys, tuple(True for _ in fields)

    return call(x, fields)


def _loop(call: Any, size: int, axes: Any, *args: Any) -> Any:
    def one(i: jax.Array) -> Any:
        leaves, tree = jax.tree.flatten(args)
        ins = jax.tree.leaves(axes, is_leaf=lambda a: a is None)
        return call(*tree.unflatten([leaf if a is None else leaf[i] for leaf, a in zip(leaves, ins, strict=True)]))

    return jax.lax.map(one, jnp.arange(size))
