"""Which entry of a grid costs least, for every group of four or eight weights.

    cost of entry e = sum over i of costs[level i of e][i]

Entries share halves: the sums of each combination of levels in the first and in the second half of an entry are made
once (grids have up to 2048 entries of at most 81 first and 64 second halves). The lowest seven bits of a second half's
sum give way to its number, so that one minimum of integers finds the best among the entries with the same first half.
Of second halves whose sums agree to a part in 65536 the first is taken.

Two implementations, with the same bits: XLA, and on the CPU `trustcore/ops/cpu/nearest_entry.cc`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.ops import cpu

_AT_ONCE = 16  # entries in one step of the loop
_NUMBER = np.int32(127)  # the lowest bits of a sum, where the number of its half stands


def nearest_entry(
    costs: jax.Array, grid: np.ndarray, bits: int, *, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the index int32 `[G]` and the cost float32 `[G]` of the cheapest entry for each group.

    Args:
        costs: float32 `[levels, d, G]`, finite and not negative: what each level costs in each place.
        grid: uint16 `[entries]`, level i of an entry in `bits` bits from `i * bits` on.
        bits: of a level.
        implementation: "native" or "xla"; None takes native on a CPU that has it.
    """
    if implementation is None:
        implementation = "native" if jax.default_backend() == "cpu" and not cpu.why_not("encoders") else "xla"
    if implementation == "native":
        return cpu.nearest_entry(costs, jnp.asarray(grid), bits)
    return _on_xla(costs, grid, bits)


def _on_xla(costs: jax.Array, grid: np.ndarray, bits: int) -> tuple[jax.Array, jax.Array]:
    d, groups = costs.shape[1:]
    tables, numbers = [], []
    for side in range(2):
        half_bits = bits * d // 2
        halves = grid >> (side * half_bits) & ((1 << half_bits) - 1)
        used, number = np.unique(halves, return_inverse=True)
        level = [used >> (bits * i) & ((1 << bits) - 1) for i in range(d // 2)]
        parts = [costs[level[i], side * d // 2 + i] for i in range(d // 2)]  # [halves, G]
        tables.append(parts[0] + parts[1] if d == 4 else (parts[0] + parts[1]) + (parts[2] + parts[3]))
        numbers.append(number)
    first = tables[0]
    mark = jnp.arange(len(tables[1]), dtype=jnp.int32)[:, None]
    second = (jax.lax.bitcast_convert_type(tables[1], jnp.int32) & ~_NUMBER) | mark
    # Entries by first half, then by second: `last` ends the entries of a first half.
    order = np.lexsort((numbers[1], numbers[0])).astype(np.int32)
    last = np.diff(numbers[0][order], append=-1) != 0
    at = [jnp.asarray(column) for column in (numbers[0][order].astype(np.int32), numbers[1][order].astype(np.int32))]
    last, worst = jnp.asarray(last), jnp.int32(np.iinfo(np.int32).max)

    def step(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        run, kept, cost = best
        for j in range(_AT_ONCE):
            entry = i * _AT_ONCE + j
            run = jnp.minimum(run, jax.lax.dynamic_index_in_dim(second, at[1][entry], keepdims=False))
            total = jax.lax.dynamic_index_in_dim(first, at[0][entry], keepdims=False)
            total = total + jax.lax.bitcast_convert_type(run & ~_NUMBER, jnp.float32)
            better = last[entry] & (total < cost)
            cost = jnp.where(better, total, cost)
            kept = jnp.where(better, at[0][entry] * (_NUMBER + 1) + (run & _NUMBER), kept)
            run = jnp.where(last[entry], worst, run)
        return run, kept, cost

    start = (jnp.full(groups, worst), jnp.zeros(groups, jnp.int32), jnp.full(groups, jnp.inf, jnp.float32))
    _, kept, cost = jax.lax.fori_loop(0, len(grid) // _AT_ONCE, step, start)
    index = np.zeros((len(first), int(_NUMBER) + 1), np.int32)
    index[numbers[0], numbers[1]] = np.arange(len(grid))
    return jnp.asarray(index.reshape(-1))[kept], cost
