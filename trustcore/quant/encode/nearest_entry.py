"""Which entry of a grid costs least, for every group of four or eight weights.

    cost of entry e = sum over i of costs[level i of e][i]

Entries share halves: the sums of each combination of levels in the first and in the second half of an entry are made
once, which leaves one addition for an entry (grids have up to 2048). The sum's lowest bits give way to the entry's
index, so that one minimum of integers finds both; of entries whose costs agree to a part in 4096 (for 2048 entries) the
first is taken.

Two implementations, with the same bits: XLA, and on the CPU `trustcore/ops/cpu/nearest_entry.cc`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.ops import cpu

_AT_ONCE = 16  # entries in one step of the loop


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
        marked = cpu.nearest_entry(costs, jnp.asarray(grid), bits)
    else:
        marked = _on_xla(costs, grid, bits)
    low = np.int32(len(grid) - 1)
    return marked & low, jax.lax.bitcast_convert_type(marked & ~low, jnp.float32)


def _on_xla(costs: jax.Array, grid: np.ndarray, bits: int) -> jax.Array:
    d, groups = costs.shape[1:]
    tables, slots = [], []
    for side in range(2):
        half_bits = bits * d // 2
        halves = grid >> (side * half_bits) & ((1 << half_bits) - 1)
        used, slot = np.unique(halves, return_inverse=True)
        level = [used >> (bits * i) & ((1 << bits) - 1) for i in range(d // 2)]
        parts = [costs[level[i], side * d // 2 + i] for i in range(d // 2)]  # [halves, G]
        tables.append(parts[0] + parts[1] if d == 4 else (parts[0] + parts[1]) + (parts[2] + parts[3]))
        slots.append(jnp.asarray(slot.astype(np.int32)))
    low = jnp.int32(len(grid) - 1)

    def step(i: jax.Array, best: jax.Array) -> jax.Array:
        for j in range(_AT_ONCE):
            entry = i * _AT_ONCE + j
            first, second = (
                jax.lax.dynamic_index_in_dim(table, slot[entry], keepdims=False)
                for table, slot in zip(tables, slots, strict=True)
            )
            cost = jax.lax.bitcast_convert_type(first + second, jnp.int32)
            best = jnp.minimum(best, (cost & ~low) | entry)
        return best

    start = jnp.full(groups, np.iinfo(np.int32).max, jnp.int32)
    return jax.lax.fori_loop(0, len(grid) // _AT_ONCE, step, start)
