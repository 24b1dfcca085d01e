"""Grouped products in plain XLA: pieces of rows of one group, each a dot with its group's matrix. Oracle: `oracle.py`.

A group of n rows has ceil(n / P) pieces of P rows; a loop runs over as many pieces as there are, so groups without rows
cost nothing. What a piece has beyond the end of its group is multiplied and dropped: P is a power of two, at most
the mean number of rows a group, so that this is less than half of the work.

On 2 cores of an AMD EPYC (Zen 5, AVX-512), jax 0.10.2, medians of nine calls taken in turn, ms (`jax.lax.ragged_dot` on
the CPU multiplies every row by every matrix):

    rows, groups, K, N                 ragged_dot    here    its gradients    here
    2048, 4, 576, 768                         43      13         46, 58       13, 16
    2048, 64, 256, 512                       324      11        419, 606      12, 28
    512, 8, 1024, 1024                        90      14         96, 97       19, 37
    2, 8, 576, 1536 (one token)              3.8     0.7         14, 1.1     0.8, 2.9
    1024, 4, 576, 768, bfloat16               26       7         30, 20        7, 7

On GPUs and TPUs XLA has ragged products of its own, which are taken there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul.facts import tuned

NATIVE = ("cuda", "rocm", "tpu")
_ROWS, _SUMS = 128, 256  # most rows of a piece


def rows(target: Any, call: Any, interpret: bool) -> list[jax.Array]:
    """Returns `x[r] @ w[e]`, `[R, N]`."""
    x, w, starts, sizes = call.x, call.second, call.starts, call.sizes
    wide = _wide(x.dtype)
    length, width = x.shape[0], call.width
    if isinstance(length, int) and length == 0:
        return [jnp.zeros((0, width), x.dtype)]
    if target.platform in NATIVE and call.parts == 1:
        matrices = jnp.swapaxes(w, 1, 2) if call.transposed else w
        y = jax.lax.ragged_dot(x, matrices, sizes, preferred_element_type=wide).astype(x.dtype)
        return [jnp.where(_covered(length, sizes)[:, None], y, jnp.zeros((), y.dtype))]
    piece = piece_of(call, tuned(target, call, "xla"))
    pieces = -(-sizes // piece)  # of each segment
    last = jnp.cumsum(pieces)
    given = jnp.pad(x, ((0, piece - 1), (0, 0)))
    over = (((1,), (1 if call.transposed else 0,)), ((), ()))

    def step(i: Any, y: jax.Array) -> jax.Array:
        s = jnp.sum(last <= i, dtype=jnp.int32)
        start, end = starts[s] + (i - last[s] + pieces[s]) * piece, starts[s] + sizes[s]
        matrix = jax.lax.dynamic_index_in_dim(w, jax.lax.rem(s, jnp.int32(w.shape[0])), 0, keepdims=False)
        part = jax.lax.dot_general(_cut(given, start, piece), matrix, over, preferred_element_type=wide)
        own = start + jax.lax.broadcasted_iota(jnp.int32, (piece, 1), 0) < end
        part = jnp.where(own, part.astype(y.dtype), _cut(y, start, piece))
        return jax.lax.dynamic_update_slice_in_dim(y, part, start, 0)

    y = jnp.zeros((length + piece - 1, width), x.dtype)
    return [jax.lax.fori_loop(0, last[-1], step, y)[:length]]


def sums(target: Any, call: Any, interpret: bool) -> list[jax.Array]:
    """Returns the sum over the rows of each segment of `x[r] y[r]^T`, `[S, K, N]`."""
    x, y, starts, sizes = call.x, call.second, call.starts, call.sizes
    wide = _wide(x.dtype)
    count, length = sizes.shape[0], x.shape[0]
    over = (((0,), (0,)), ((), ()))
    if isinstance(length, int) and length == 0:
        return [jnp.zeros((count, x.shape[1], y.shape[1]), x.dtype)]
    if target.platform in NATIVE and call.parts == 1:
        inside = _covered(length, sizes)[:, None]
        x, y = (jnp.where(inside, z, jnp.zeros((), z.dtype)) for z in (x, y))
        dims = jax.lax.RaggedDotDimensionNumbers(over, [0], [])
        return [jax.lax.ragged_dot_general(x, y, sizes, dims, preferred_element_type=wide).astype(x.dtype)]
    piece = piece_of(call, tuned(target, call, "xla"))
    x, y = (jnp.pad(z, ((0, piece - 1), (0, 0))) for z in (x, y))
    shape = x.shape[1], y.shape[1]

    def segment(found: jax.Array, s: jax.Array) -> tuple[jax.Array, None]:
        end = starts[s] + sizes[s]

        def step(i: Any, total: jax.Array) -> jax.Array:
            start = starts[s] + i * piece
            own = start + jax.lax.broadcasted_iota(jnp.int32, (piece, 1), 0) < end
            left, right = (jnp.where(own, _cut(z, start, piece), jnp.zeros((), z.dtype)) for z in (x, y))
            return total + jax.lax.dot_general(left, right, over, preferred_element_type=wide)

        total = jax.lax.fori_loop(0, -(-sizes[s] // piece), step, jnp.zeros(shape, wide))
        return jax.lax.dynamic_update_index_in_dim(found, total.astype(x.dtype), s, 0), None

    found = jnp.zeros((count, *shape), x.dtype)
    return [jax.lax.scan(segment, found, jnp.arange(count, dtype=jnp.int32))[0]]


def _wide(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def piece_of(call: Any, given: Mapping[str, Any]) -> int:
    """Returns the rows of a piece: those given, or a power of two, at most the mean number of rows a segment."""
    rows, count = call.x.shape[0], call.sizes.shape[0]
    if not (isinstance(rows, int) and isinstance(count, int)):
        return 32
    if "piece" in given:
        return min(given["piece"], rows)
    most = _SUMS if call.direction == "sums" else _ROWS
    return min(most, 1 << (max(1, rows // max(1, count)).bit_length() - 1))


def _cut(x: jax.Array, start: Any, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, 0)


def _covered(rows: Any, sizes: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (rows,), 0) < jnp.sum(sizes)
