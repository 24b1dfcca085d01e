"""Hand-written CPU implementations, called from inside XLA programs through its foreign-function interface.

They exist where XLA's CPU code falls short (short products with packed weights, attention of one query against a long
cache, the searches of encoders), and are never needed for correctness: `why_not()` says why they are absent, and every
caller has a plain XLA form. The C++ sources stand beside this file; `build.py` compiles them once a machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.ops.cpu.build import load, why_not

__all__ = [
    "ANY_WIDTH",
    "ENCODED",
    "FORMATS",
    "cached_attention",
    "encode_blocks",
    "load",
    "nearest_entry",
    "packed_matmul",
    "packed_refusal",
    "statistics",
    "vector_lanes",
    "why_not",
]

# Formats of the packed product; their order is the numbering in formats.h. Fields in the order of its operands.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "q4_0": ("codes", "scale"),
    "q4_1": ("codes", "scale", "minimum"),
    "q8_0": ("codes", "scale"),
    "f16": ("values",),
    "bf16": ("values",),
    "q5_0": ("codes", "scale", "high"),
    "q5_1": ("codes", "scale", "minimum", "high"),
    "q2_k": ("codes", "scale", "minimum", "scales"),
    "q3_k": ("codes", "scale", "scales", "high"),
    "q4_k": ("codes", "scale", "minimum", "scales"),
    "q5_k": ("codes", "scale", "minimum", "scales", "high"),
    "q6_k": ("codes", "scale", "scales", "high"),
    "iq4_nl": ("codes", "scale"),
    "iq4_xs": ("codes", "scale", "scales", "high"),
    "tq1_0": ("codes", "scale", "high"),
    "tq2_0": ("codes", "scale"),
    "mxfp4": ("codes", "exponent"),
    "nvfp4": ("codes", "scales"),
    "q1_0": ("codes", "scale"),
    "iq3_xxs": ("codes", "scale", "signs"),
    "iq3_s": ("codes", "scale", "scales", "high", "signs"),
    "iq2_xxs": ("codes", "scale"),
    "iq2_xs": ("codes", "scale", "scales"),
    "iq2_s": ("codes", "scale", "scales", "high", "signs"),
    "iq1_s": ("codes", "scale", "high"),
    "iq1_m": ("codes", "scales", "high"),
}
FORMATS: tuple[str, ...] = tuple(_FIELDS)
ANY_WIDTH = ("q4_0", "q4_1", "q8_0", "f16", "bf16")  # the others need N to be a multiple of the vector length
# Formats of encode_blocks.cc, in the order of its numbering.
ENCODED = (
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q1_0",
    "tq1_0",
    "tq2_0",
    "mxfp4",
    "nvfp4",
    "f16",
    "bf16",
    "q2_k",
    "q3_k",
    "q4_k",
    "q5_k",
    "q6_k",
)


def packed_refusal(format: str, n: int) -> str:
    """Returns why `packed_matmul` cannot multiply by a weight of n columns in that format; "" when it can."""
    if format not in FORMATS:
        return f"it knows only {', '.join(FORMATS)}; use 'stream' or 'tiles'."
    if why_not():
        return why_not()
    if format not in ANY_WIDTH and n % vector_lanes():
        return f"{format} needs a multiple of {vector_lanes()} columns here, not {n}; use 'stream' or 'tiles'."
    return ""


def packed_matmul(
    x: jax.Array,
    weights: Sequence[tuple[str, Mapping[str, jax.Array]]],
    grids: Mapping[str, np.ndarray] | None = None,
) -> tuple[jax.Array, ...]:
    """Returns `x @ decode(w)` for each weight, float32 `[M, N_i]`.

    Args:
        x: float32 `[M, K]`.
        weights: format name and fields, as `trustcore.quant.QuantizedArray` holds them.
        grids: for formats whose codes name entries of a grid, the grid's entries.

    Under vmap over x alone the batch becomes rows; over weights it is a loop. Not differentiable by itself.
    """
    formats = tuple(FORMATS.index(name) for name, _ in weights)
    fields = tuple(tuple(fields[f] for f in _FIELDS[name]) for name, fields in weights)
    tables = [(jnp.asarray(grids[name].astype(np.int32)),) if grids and name in grids else () for name, _ in weights]

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array, fields: Any) -> tuple[jax.Array, ...]:
        load()
        flat = [part for parts, table in zip(fields, tables, strict=True) for part in (*parts, *table)]
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


def cached_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    start: jax.Array,
    cache: Sequence[jax.Array],
    *,
    scale: float,
    soft_cap: float,
    window: int,
    chunk: int,
) -> tuple[jax.Array, ...]:
    """Returns the attention output `[B, T, N, H]` and the extended cache; see attention.cc for the layout.

    Args:
        query: float32 `[B, T, N, H]`, H a multiple of the vector length.
        key: float32 `[B, T, K, H]`.
        value: float32 `[B, T, K, H]`.
        start: int32 `[B]`, the slot of each row's first token.
        cache: keys and values (float32, bfloat16, int8, float8_e4m3fn; uint8 holds pairs of 4 bits) and, for codes,
            their scales.
        scale: of the scores.
        soft_cap: 0 for none.
        window, chunk: 0 for none.

    Under vmap the batch is folded into B. Not differentiable by itself.
    """

    @jax.custom_batching.custom_vmap
    def call(query: Any, key: Any, value: Any, start: Any, cache: Any) -> tuple[jax.Array, ...]:
        load()
        shapes = [jax.ShapeDtypeStruct(query.shape, jnp.float32)]
        shapes += [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in cache]
        # Results lie over their operands: a donated cache is extended in place.
        aliases = {4 + i: 1 + i for i in range(len(cache))}
        target = jax.ffi.ffi_call("trustcore_cached_attention", shapes, input_output_aliases=aliases)
        attributes = {"scale": np.float32(scale), "soft_cap": np.float32(soft_cap)}
        attributes |= {"window": np.int64(window), "chunk": np.int64(chunk)}
        return tuple(target(query, key, value, start, *cache, **attributes))

    @call.def_vmap
    def batched(size: int, in_batched: Any, *args: Any) -> tuple[tuple[jax.Array, ...], Any]:
        def fold(arg: jax.Array, is_batched: bool) -> jax.Array:
            arg = arg if is_batched else jnp.broadcast_to(arg, (size, *arg.shape))
            return arg.reshape(-1, *arg.shape[2:])

        results = call(*jax.tree.map(fold, args, tuple(in_batched)))
        return tuple(r.reshape(size, -1, *r.shape[1:]) for r in results), (True,) * len(results)

    return call(query, key, value, start, tuple(cache))


def encode_blocks(
    format: str,
    weights: jax.Array,
    row_weight: jax.Array | None,
    candidates: Sequence[float],
    refits: int,
    fields: Mapping[str, jax.ShapeDtypeStruct],
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns the fields of weights packed as `format`, and the bits of the largest magnitude, uint32 `[1]`.

    Args:
        format: a name in `ENCODED`.
        weights: float32 `[K, N]`, K a multiple of the format's block, N at least `vector_lanes()`.
        row_weight: what an error in each row costs, float32 `[K]`; None: all the same.
        candidates: what the search tries, pairs one after the other; none where the format's own rule is enough.
        refits: rounds of re-fitting.
        fields: shapes of the results, in the format's order.
    """
    load("encoders")
    row_weight = jnp.zeros(0, jnp.float32) if row_weight is None else row_weight
    shapes = [*fields.values(), jax.ShapeDtypeStruct((1,), jnp.uint32)]
    target = jax.ffi.ffi_call("trustcore_encode_blocks", shapes, vmap_method="sequential")
    *found, largest = target(
        weights,
        row_weight,
        kind=np.int64(ENCODED.index(format)),
        candidates=np.asarray(candidates, np.float32),
        refits=np.int64(refits),
    )
    return dict(zip(fields, found, strict=True)), largest


def nearest_entry(costs: jax.Array, grid: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Returns for each group the entry of the grid with the least sum of costs, int32 `[G]`, and that sum.

    Args:
        costs: float32 `[levels, d, G]`, not negative, d 4 or 8.
        grid: uint16, level i of an entry in `bits` bits from i * bits on; at most 128 different halves of entries.
        bits: of a level.
    """
    load("encoders")
    groups = costs.shape[2:]
    shapes = [jax.ShapeDtypeStruct(groups, jnp.int32), jax.ShapeDtypeStruct(groups, jnp.float32)]
    target = jax.ffi.ffi_call("trustcore_nearest_entry", shapes, vmap_method="sequential")
    index, cost = target(costs, grid, bits=np.int64(bits))
    return index, cost


def statistics(x: jax.Array) -> jax.Array:
    """Returns the words of `trustcore.ops.statistics` for x `[R, C]`, float32, bfloat16 or float16."""
    load("statistics")
    return jax.ffi.ffi_call("trustcore_statistics", jax.ShapeDtypeStruct((80,), jnp.uint32))(x)


def vector_lanes(library: str = "products") -> int:
    """Returns the float32 lanes of the vectors that the handlers were built for: 16 with AVX-512, else 8."""
    return int(load(library).trustcore_vector_lanes())


def _loop(call: Any, size: int, axes: Any, *args: Any) -> Any:
    def one(i: jax.Array) -> Any:
        leaves, tree = jax.tree.flatten(args)
        ins = jax.tree.leaves(axes, is_leaf=lambda a: a is None)
        return call(*tree.unflatten([leaf if a is None else leaf[i] for leaf, a in zip(leaves, ins, strict=True)]))

    return jax.lax.map(one, jnp.arange(size))
