"""The plain grouped product: the truth that `grouped_matmul` is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def grouped_matmul_oracle(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Returns `y[r] = x[r] @ w[e]` where row r is of group e; zeros for rows of no group. O(R * E * K * N) time.

    Args:
        x: `[R, K]`, the first `sizes[0]` rows of group 0, the next of group 1, and so on.
        w: `[E, K, N]`.
        sizes: integers `[E]`; their sum is at most R.

    Sums are float32 at highest precision (float64 for float64); the result has the dtype of x.
    """
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0], dtype=ends.dtype)[:, None]
    own = (row < ends[None]) & (row >= (ends - sizes)[None])  # [R, E]
    every = jnp.einsum("rk,ekn->ren", x.astype(wide), w.astype(wide), precision="highest")
    return jnp.sum(jnp.where(own[..., None], every, 0), axis=1).astype(x.dtype)
