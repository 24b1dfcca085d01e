"""The plain recurrence, token by token: the truth that `selective_scan` is tested against."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def selective_scan_oracle(
    x: jax.Array, dt: jax.Array, decay: jax.Array, b: jax.Array, c: jax.Array, state: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns y in the dtype of x, and the state after the last token, float32 (float64 where x is).

        h[t] = exp(dt[t] A) h[t - 1] + dt[t] x[t] b[t];   y[t] = c[t] . h[t]

    Gu and Dao, arXiv 2312.00752, eq. 2 and section 3.3.2.

    Args:
        x, dt: `[B, T, I]`.
        decay: A, `[I, S]`.
        b, c: `[B, T, S]`.
        state: before the first token, `[B, I, S]`; None: zeros.
    """
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    a = decay.astype(wide)[None]
    h = jnp.zeros((x.shape[0], *decay.shape), wide) if state is None else state.astype(wide)

    def step(h: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
        x, dt, b, c = token
        h = jnp.exp(dt[..., None] * a) * h + (dt * x)[..., None] * b[:, None]
        return h, jnp.einsum("bis,bs->bi", h, c, precision="highest")

    h, y = jax.lax.scan(step, h, [jnp.swapaxes(z.astype(wide), 0, 1) for z in (x, dt, b, c)])
    return jnp.swapaxes(y, 0, 1).astype(x.dtype), h
