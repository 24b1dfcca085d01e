"""The selective scan in plain XLA, forward and backward. Oracle: `oracle.py`.

Two forms of one recurrence, `h[t] = keep[t] h[t - 1] + take[t]`:

    cpu, others        token by token: what a token needs is computed on the spot, the state `[B, S, I]` stays in the
                       cache and no array of all tokens and states is made
    cuda, rocm, tpu    an associative scan within a chunk, for a loop over tokens would launch one kernel for each;
                       taken where neither kernel (`triton.py`, `tpu.py`) can

The backward pass goes from chunk to chunk, last first: the states of a chunk are computed again from the one before
it, then g[t] = c[t] dy[t] + keep[t + 1] g[t + 1], the gradient of h[t], runs backward through it. With p = keep[t]
h[t - 1]:

    d(dt) = sum_s g (A p + x b)     dA = sum_t g p dt     dx = sum_s g b dt     db = sum_i g dt x     dc = sum_i h dy

A state is laid out `[S, I]`, channels innermost: sums over S are then sums of vectors, not within one.

B=8, T=128, I=768, S=16, float32, 2 cores of an AMD EPYC (Zen 5), jax 0.10.2, a machine that was not quiet (lowest of
five calls taken in turn; temporaries of the compiled program, among them the operands laid out by tokens):

                                          forward            with all gradients
    associative scan, chunks of 64        244 ms, 118 MB     1268 ms, 427 MB (autodiff, chunks recomputed)
    associative scan, chunks of 16        152 ms,  32 MB
    token by token, state [I, S]           18 ms, 6.4 MB      328 ms, 24 MB (chunks of 16)
    token by token, state [S, I]            9 ms, 6.8 MB       82 ms, 24 MB (chunks of 16), 109 ms, 46 MB (of 64)

In chunks of 32, the default, 31 MB. B=1, T=32768, I=1536: 0.4 GB forward, 0.9 GB with gradients, of which x, dt, y and
their gradients by tokens are 0.2 GB each; all states would be 3.2 GB.

Unrolling the loop by 2 or 4 did not help there; `tunable.py` tries it elsewhere.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.selective_scan.facts import tuned

_PARALLEL = ("cuda", "rocm", "tpu")


def forward(target: Any, call: Any, interpret: bool) -> list[jax.Array]:
    """Returns y, the last state and, where they are to be kept, the states before each chunk `[B, chunks, S, I]`."""
    wide = call.wide
    x, dt, a, b, c, h = (call.arrays[n] for n in ("x", "dt", "decay", "b", "c", "state"))
    a, h = a.astype(wide).T, h.astype(wide).swapaxes(1, 2)  # [S, I], [B, S, I]
    unroll = tuned(target, call, "xla").get("unroll", 1)
    by_token = functools.partial(_by_token, unroll=unroll)
    one = _associative if target.platform in _PARALLEL else by_token
    tokens = x, dt, b, c
    if one is by_token and not call.keep:
        h, y = one(h, a, tuple(z.swapaxes(0, 1) for z in tokens), wide)
        y, states = y.swapaxes(0, 1), None
    else:

        def chunk(h: jax.Array, part: Any) -> Any:
            after, y = one(h, a, part, wide)
            return after, (y, h)

        h, (y, states) = jax.lax.scan(chunk, h, tuple(_split(z, call.chunk) for z in tokens))
        y = _joined(y, x.shape[1])
    found = [y.astype(x.dtype), h.swapaxes(1, 2)]
    return [*found, states.swapaxes(0, 1)] if call.keep and states is not None else found


def backward(target: Any, call: Any, interpret: bool) -> list[jax.Array]:
    """Returns the gradients of x, dt, decay (of each row of the batch), b, c and the first state."""
    wide = call.wide
    arrays = call.arrays
    a = arrays["decay"].astype(wide).T
    length = arrays["x"].shape[1]
    by_token = functools.partial(_gradients_by_token, unroll=tuned(target, call, "xla").get("unroll", 1))
    one = _associative_gradients if target.platform in _PARALLEL else by_token

    def chunk(carry: Any, part: Any) -> Any:
        return one(carry, a, part[0], part[1:], wide)

    parts = [_split(arrays[n], call.chunk) for n in ("x", "dt", "b", "c", "of_y")]
    g = arrays["of_last"].astype(wide).swapaxes(1, 2)
    (g, da), found = jax.lax.scan(
        chunk, (g, jnp.zeros_like(g)), (arrays["states"].swapaxes(0, 1), *parts), reverse=True
    )
    dx, ddt, db, dc = (_joined(z, length) for z in found)
    return [dx, ddt, da.swapaxes(1, 2), db, dc, g.swapaxes(1, 2)]


def _by_token(h: jax.Array, a: jax.Array, tokens: Any, wide: Any, *, unroll: int) -> tuple[jax.Array, jax.Array]:
    """The state after tokens `[t, B, ...]`, and their y."""

    def step(h: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
        *given, c = token
        keep, take = _rates(a, given, wide)
        h = keep * h + take
        return h, jnp.sum(h * c.astype(wide)[:, :, None], axis=1)

    return jax.lax.scan(step, h, tokens, unroll=unroll)


def _gradients_by_token(carry: Any, a: jax.Array, before: jax.Array, tokens: Any, wide: Any, *, unroll: int) -> Any:
    def again(h: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
        keep, take = _rates(a, token, wide)
        return keep * h + take, h

    _, states = jax.lax.scan(again, before, tokens[:3], unroll=unroll)

    def step(carry: Any, token: Any) -> Any:
        g, da = carry
        h, *given, c, dy = token
        keep, take = _rates(a, given, wide)
        x, dt, b, c, dy = (z.astype(wide) for z in (*given, c, dy))
        decayed = keep * h
        g = g + dy[:, None] * c[:, :, None]
        of_rate = g * decayed
        of_take = jnp.sum(g * b[:, :, None], axis=1)
        found = (
            of_take * dt,
            jnp.sum(of_rate * a[None], axis=1) + of_take * x,
            jnp.sum(g * (dt * x)[:, None], axis=2),
            jnp.sum((decayed + take) * dy[:, None], axis=2),
        )
        return (g * keep, da + of_rate * dt[:, None]), found

    return jax.lax.scan(step, carry, (states, *tokens), reverse=True, unroll=unroll)


def _associative(h: jax.Array, a: jax.Array, tokens: Any, wide: Any) -> tuple[jax.Array, jax.Array]:
    *given, c = tokens
    keep, take = _rates(a, given, wide)
    states = _all_states(h, keep, take)
    return states[-1], jnp.einsum("tbsi,tbs->tbi", states, c.astype(wide), preferred_element_type=wide)


def _associative_gradients(carry: Any, a: jax.Array, before: jax.Array, tokens: Any, wide: Any) -> Any:
    g, da = carry
    *given, c, dy = tokens
    keep, take = _rates(a, given, wide)
    x, dt, b, c, dy = (z.astype(wide) for z in (*given, c, dy))
    states = _all_states(before, keep, take)
    decayed = keep * jnp.concatenate([before[None], states[:-1]])
    of_y = dy[:, :, None] * c[..., None]
    # g[t] = of_y[t] + keep[t + 1] g[t + 1], from the end; beyond the chunk comes the gradient that has decayed already.
    later = jnp.concatenate([keep[1:], jnp.ones_like(keep[:1])])
    g = jnp.flip(_all_states(g, jnp.flip(later, 0), jnp.flip(of_y, 0)), 0)
    of_take = jnp.einsum("tbsi,tbs->tbi", g, b)
    of_rate = g * decayed
    found = (
        of_take * dt,
        jnp.sum(of_rate * a[None, None], axis=2) + of_take * x,
        jnp.einsum("tbsi,tbi->tbs", g, dt * x),
        jnp.einsum("tbsi,tbi->tbs", states, dy),
    )
    return (g[0] * keep[0], da + jnp.einsum("tbsi,tbi->bsi", of_rate, dt)), found


def _rates(a: jax.Array, tokens: Any, wide: Any) -> tuple[jax.Array, jax.Array]:
    """What is kept of the state and what it takes in, `[..., S, I]`."""
    x, dt, b = (z.astype(wide) for z in tokens)
    keep = jnp.exp(dt[..., None, :] * jnp.expand_dims(a, tuple(range(dt.ndim - 1))))
    return keep, (dt * x)[..., None, :] * b[..., None]


def _all_states(h: jax.Array, keep: jax.Array, take: jax.Array) -> jax.Array:
    """h of every token of `[t, ...]`."""

    def join(left: Any, right: Any) -> Any:
        return left[0] * right[0], left[1] * right[0] + right[1]

    kept, taken = jax.lax.associative_scan(join, (keep, take), axis=0)
    return kept * h[None] + taken


def _split(z: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [chunks, chunk, B, ...]; what is added at the end has dt = 0 and changes no state."""
    batch, length = z.shape[:2]
    count = -(-length // chunk)
    z = jnp.pad(z, [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (z.ndim - 2))
    return jnp.moveaxis(z.reshape(batch, count, chunk, *z.shape[2:]), 0, 2)


def _joined(z: jax.Array, length: Any) -> jax.Array:
    """[chunks, chunk, B, ...] -> [B, T, ...]."""
    z = jnp.moveaxis(z, 2, 0)
    return z.reshape(z.shape[0], -1, *z.shape[3:])[:, :length]
