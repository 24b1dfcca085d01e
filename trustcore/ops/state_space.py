"""Selective state spaces: a state that decays and takes in, at rates that each token chooses.

    h[t] = exp(dt[t] A) h[t - 1] + dt[t] x[t] b[t];   y[t] = c[t] . h[t]

`selective_scan` has a decay for each channel and number of the state (Mamba), `ssd` one for each head (Mamba-2), which
lets matrix products do the work. Memory does not grow with the square of the length; decays are at most one (A < 0 <
dt), and only ever multiplied or, as logarithms, added: nothing can overflow, however long the row. States and sums are
float32, float64 for float64.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import kernels_pallas.selective_scan as kernels
from trustcore.dtypes import accumulation_dtype


def selective_scan(
    x: Float[Array, "B T I"],
    dt: Float[Array, "B T I"],
    decay: Float[Array, "I S"],
    b: Float[Array, "B T S"],
    c: Float[Array, "B T S"],
    state: Float[Array, "B I S"] | None = None,
    *,
    chunk: int = 32,
) -> tuple[Float[Array, "B T I"], Float[Array, "B I S"]]:
    """Returns y and the state after the last token.

    Args:
        x: what each of I channels takes in.
        dt: positive step sizes.
        decay: A, negative.
        b, c: how the S numbers of a channel's state take in and give out.
        state: before the first token; None: zeros.
        chunk: tokens between the states that the backward pass keeps.

    O(T * I * S) time; `kernels_pallas.selective_scan` computes it, and within a chunk of the backward pass the states
    again. Differentiable in all arrays, in reverse and once. Gu and Dao, arXiv 2312.00752, eq. 2 and section 3.3.2.
    """
    return kernels.selective_scan(x, dt, decay, b, c, state, chunk=chunk)


def ssd(
    x: Float[Array, "B T N H"],
    dt: Float[Array, "B T N"],
    decay: Float[Array, " N"],
    b: Float[Array, "B T G S"],
    c: Float[Array, "B T G S"],
    state: Float[Array, "B N H S"] | None = None,
    *,
    chunk: int = 64,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N H S"]]:
    """Returns y and the state after the last token.

    Args:
        x: what the H channels of N heads take in.
        dt: positive step sizes.
        decay: A, negative.
        b, c: how states take in and give out, shared by the heads of a group; G divides N.
        state: before the first token; None: zeros.
        chunk: tokens that one product takes.

    O(T * (chunk + S) * N * H) time. Differentiable in all arrays. Dao and Gu, arXiv 2405.21060, section 6.
    """
    wide = accumulation_dtype(x.dtype)
    heads, groups = x.shape[2], b.shape[2]
    operands = [part.astype(wide) for part in (x, dt, b, c)]
    decay = decay.astype(wide)
    if state is None:
        state = jnp.zeros((x.shape[0], heads, x.shape[3], b.shape[3]), wide)

    def one(h: jax.Array, part: Any) -> tuple[jax.Array, jax.Array]:
        x, dt, b, c = part
        b, c = (jnp.repeat(side, heads // groups, axis=2) for side in (b, c))  # [B, t, N, S]
        rate = dt * decay[None, None]  # [B, t, N], negative
        fade = jnp.cumsum(rate, axis=1)  # log of what is left of the start
        place = jnp.arange(rate.shape[1])
        later = place[:, None] - place[None]
        behind, past = ((later >= least)[None, ..., None] for least in (1, 0))
        # What is left of s at t: summed from s on. The difference of two sums from the start would lose their digits.
        apart = jnp.cumsum(jnp.where(behind, rate[:, :, None], 0.0), axis=1)  # [B, t, s, N]
        share = jnp.where(past, jnp.exp(apart), 0.0)
        share = share * jnp.einsum("btns,brns->btrn", c, b)
        taken = x * dt[..., None]
        y = jnp.einsum("btrn,brnh->btnh", share, taken)
        y = y + jnp.einsum("btns,bnhs->btnh", c * jnp.exp(fade)[..., None], h)
        rest = jnp.exp(apart[:, -1])[..., None]
        h = h * jnp.exp(fade[:, -1])[..., None, None] + jnp.einsum("btns,btnh->bnhs", b * rest, taken)
        return h, y

    state, y = _by_chunks(one, state.astype(wide), operands, chunk)
    return y.astype(x.dtype), state


def causal_conv(
    x: Float[Array, "B T I"],
    kernel: Float[Array, "W 1 I"],
    bias: Float[Array, " I"] | None,
    past: Float[Array, "B P I"] | None = None,
) -> tuple[Float[Array, "B T I"], Float[Array, "B P I"]]:
    """Returns a convolution of each channel with itself up to now, and the P = W - 1 last inputs.

    Args:
        x: T tokens.
        kernel: W taps, the last for the token itself.
        bias: added.
        past: what came before; None: zeros.

    Differentiable in all arrays.
    """
    taps, length = kernel.shape[0], x.shape[1]
    if past is None:
        past = jnp.zeros((x.shape[0], taps - 1, x.shape[2]), x.dtype)
    whole = jnp.concatenate([past.astype(x.dtype), x], axis=1)
    y = sum(whole[:, i : i + length] * kernel[i][None].astype(x.dtype) for i in range(taps))
    assert isinstance(y, jax.Array)
    y = y if bias is None else y + jnp.broadcast_to(bias.astype(x.dtype), y.shape)
    return y, whole[:, length:]


def _by_chunks(one: Any, state: jax.Array, operands: list[jax.Array], chunk: int) -> tuple[jax.Array, jax.Array]:
    """Runs `one` over chunks of the tokens. What is added at the end has dt = 0: it changes no state."""
    batch, length = operands[0].shape[:2]
    chunk = min(chunk, length)
    if chunk == length:
        return one(state, operands)
    count = -(-length // chunk)

    def split(part: jax.Array) -> jax.Array:
        pad = [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (part.ndim - 2)
        return jnp.pad(part, pad).reshape(batch, count, chunk, *part.shape[2:]).swapaxes(0, 1)

    state, y = jax.lax.scan(jax.checkpoint(one), state, [split(part) for part in operands])
    y = y.swapaxes(0, 1)
    return state, y.reshape(batch, count * chunk, *y.shape[3:])[:, :length]
