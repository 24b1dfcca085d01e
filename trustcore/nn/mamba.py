"""Mamba and Mamba-2 as layers: products around a short convolution and a selective state space.

Mamba    x, gate = in(u);         x = act(conv(x));  dt, b, c = f(x);   out(scan(x) * silu(gate))
Mamba-2  gate, x, b, c, dt = in(u);  x, b, c = act(conv(x, b, c));      out(norm(ssd(x) * silu(gate)))
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from trustcore.nn.linear import Linear
from trustcore.nn.parameter import parameter
from trustcore.ops.activate import activation
from trustcore.ops.norm import rms_norm
from trustcore.ops.state_space import causal_conv, selective_scan, ssd


class MambaState(NamedTuple):
    """What a layer has seen.

    Attributes:
        past: `[B, W - 1, channels]`, the convolution's last inputs.
        hidden: `[B, I, S]` (Mamba) or `[B, N, H, S]` (Mamba-2), float32.
    """

    past: jax.Array
    hidden: jax.Array


class Mamba(nnx.Module):
    """Gu and Dao, arXiv 2312.00752, section 3.4.

    Args:
        features: D.
        inner: I, channels inside.
        state_size: S, numbers of a channel's state.
        rank: of the step sizes' product.
        window: W, taps of the convolution.
        bias: whether the outer products have one.
        conv_bias: whether the convolution has one.
        activation: behind the convolution.
        chunk: tokens between the states that the backward pass keeps.
        dtype: of the parameters.
        rngs: None leaves them abstract.
    """

    def __init__(
        self,
        features: int,
        inner: int,
        *,
        state_size: int = 16,
        rank: int = 1,
        window: int = 4,
        bias: bool = False,
        conv_bias: bool = True,
        activation: str = "silu",
        chunk: int = 32,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        made = {"dtype": dtype, "rngs": rngs}
        self.input = Linear(features, 2 * inner, bias=bias, **made)
        self.conv = parameter(jax.nn.initializers.lecun_normal(), (window, 1, inner), dtype, rngs)
        self.conv_bias = parameter(jax.nn.initializers.zeros, (inner,), dtype, rngs) if conv_bias else None
        self.select = Linear(inner, rank + 2 * state_size, **made)
        self.steps = Linear(rank, inner, bias=True, **made)
        self.decay = parameter(_log_of_counts, (inner, state_size), dtype, rngs)
        self.skip = parameter(jax.nn.initializers.ones, (inner,), dtype, rngs)
        self.out = Linear(inner, features, bias=bias, **made)
        self.rank, self.state_size, self.activation, self.chunk = rank, state_size, activation, chunk

    def __call__(
        self,
        u: Float[Array, "B T D"],
        state: MambaState | None = None,
        mask: Float[Array, "B T 1"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], MambaState]:
        """Returns the layer's output and the state after it.

        Args:
            u: T tokens; one of them for a step.
            state: before them; None: nothing was seen.
            mask: zero where a token is padding, which must stand on the left, or behind all that counts.
            lengths: in place of `mask`, tokens of each row that count, the rest being padding on the right: the state
                is that after the last of them.
        """
        u = u if mask is None else u * mask
        x, gate = jnp.split(self.input(u), 2, axis=-1)
        before = None if state is None else state.past
        y, past = causal_conv(x, self.conv.get_value(), _value(self.conv_bias), before)
        past = past if lengths is None else _last_inputs(x, before, past, lengths)
        x = y
        x = activation(self.activation)(x)
        x = x if mask is None else x * mask
        low, b, c = jnp.split(self.select(x), [self.rank, self.rank + self.state_size], axis=-1)
        dt = _steps_of(jax.nn.softplus(self.steps(low)), lengths)
        before = None if state is None else state.hidden
        decay = -jnp.exp(_wide(self.decay.get_value()))
        y, hidden = selective_scan(x, dt, decay, b, c, before, chunk=self.chunk)
        y = y + x * jnp.broadcast_to(self.skip.get_value().astype(x.dtype), x.shape)
        return self.out(y * jax.nn.silu(gate)), MambaState(past, hidden)


class Mamba2(nnx.Module):
    """Dao and Gu, arXiv 2405.21060, section 7.

    Args:
        features: D.
        heads: N.
        head_dim: H.
        state_size: S.
        groups: G, of heads that share b and c.
        window: W, taps of the convolution.
        bias: whether the outer products have one.
        conv_bias: whether the convolution has one.
        limits: least and largest step size.
        activation: behind the convolution.
        norm_eps: epsilon of the norm, which is one of each group's channels.
        chunk: tokens that one product takes.
        dtype: of the parameters.
        rngs: None leaves them abstract.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        head_dim: int,
        *,
        state_size: int = 128,
        groups: int = 1,
        window: int = 4,
        bias: bool = False,
        conv_bias: bool = True,
        limits: tuple[float, float] = (0.0, float("inf")),
        activation: str = "silu",
        norm_eps: float = 1e-5,
        chunk: int = 64,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        made = {"dtype": dtype, "rngs": rngs}
        inner, side = heads * head_dim, groups * state_size
        self.input = Linear(features, 2 * inner + 2 * side + heads, bias=bias, **made)
        mixed = inner + 2 * side
        self.conv = parameter(jax.nn.initializers.lecun_normal(), (window, 1, mixed), dtype, rngs)
        self.conv_bias = parameter(jax.nn.initializers.zeros, (mixed,), dtype, rngs) if conv_bias else None
        self.steps = parameter(jax.nn.initializers.zeros, (heads,), dtype, rngs)
        self.decay = parameter(_log_of_counts, (heads,), dtype, rngs)
        self.skip = parameter(jax.nn.initializers.ones, (heads,), dtype, rngs)
        self.norm = parameter(jax.nn.initializers.ones, (inner,), dtype, rngs)
        self.out = Linear(inner, features, bias=bias, **made)
        self.sizes = (inner, side, heads, head_dim, state_size, groups)
        self.limits, self.activation, self.norm_eps, self.chunk = limits, activation, norm_eps, chunk

    def __call__(
        self,
        u: Float[Array, "B T D"],
        state: MambaState | None = None,
        mask: Float[Array, "B T 1"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], MambaState]:
        """Returns the layer's output and the state after it; arguments as in `Mamba`."""
        inner, side, heads, head_dim, state_size, groups = self.sizes
        u = u if mask is None else u * mask
        gate, mixed, dt = jnp.split(self.input(u), [inner, 2 * (inner + side)], axis=-1)
        before = None if state is None else state.past
        y, past = causal_conv(mixed, self.conv.get_value(), _value(self.conv_bias), before)
        past = past if lengths is None else _last_inputs(mixed, before, past, lengths)
        mixed = activation(self.activation)(y)
        mixed = mixed if mask is None else mixed * mask
        x, b, c = jnp.split(mixed, [inner, inner + side], axis=-1)
        rows = x.shape[:2]
        x = x.reshape(*rows, heads, head_dim)
        b, c = (part.reshape(*rows, groups, state_size) for part in (b, c))
        dt = jax.nn.softplus(_wide(dt) + jnp.broadcast_to(_wide(self.steps.get_value()), dt.shape))
        dt = _steps_of(jnp.clip(dt, *self.limits), lengths)
        before = None if state is None else state.hidden
        y, hidden = ssd(x, dt, -jnp.exp(_wide(self.decay.get_value())), b, c, before, chunk=self.chunk)
        skip = self.skip.get_value().astype(x.dtype)[None, None, :, None]
        y = (y + x * skip).reshape(*rows, inner) * jax.nn.silu(gate)
        weight = self.norm.get_value().reshape(groups, -1)
        parts = jnp.split(y, groups, axis=-1)
        y = jnp.concatenate([rms_norm(p, weight[i], eps=self.norm_eps) for i, p in enumerate(parts)], axis=-1)
        return self.out(y), MambaState(past, hidden)


def _steps_of(dt: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Step sizes `[B, T, _]`, zero for padding on the right: what is zero changes no state."""
    if lengths is None:
        return dt
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, dt.shape, 1) < lengths[:, None, None], dt, 0)


def _last_inputs(x: jax.Array, before: jax.Array | None, past: jax.Array, lengths: jax.Array) -> jax.Array:
    """The last inputs `[B, P, I]` of the convolution up to each row's last token that counts."""
    before = jnp.zeros_like(past) if before is None else before.astype(x.dtype)
    whole = jnp.concatenate([before, x], axis=1)
    places = lengths[:, None] + jax.lax.broadcasted_iota(jnp.int32, (1, past.shape[1]), 1)
    return jnp.take_along_axis(whole, jnp.broadcast_to(places[..., None], past.shape), axis=1)


def _log_of_counts(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """log(1), log(2), ... along the last axis: S4D's real initialization (arXiv 2206.11893)."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=jnp.float32)), shape).astype(dtype)


def _value(bias: nnx.Param[Any] | None) -> jax.Array | None:
    return None if bias is None else bias.get_value()


def _wide(x: jax.Array) -> jax.Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)
