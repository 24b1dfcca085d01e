"""Products in 8-bit floats for training: the scales, as Transformer Engine defines them, and the state they need.

A float8 has few exponents (E4M3 up to 448, E5M2 up to 57344), so a tensor is multiplied by a scale first:

    codes = float8(clip(x * scale))        x ~ codes / scale        scale = largest / amax / 2**margin

*Current* scaling takes amax, the largest magnitude, from x itself: one more pass over x before it can be stored.
*Delayed* scaling takes it from the steps before. Each tensor has a history of H amaxes; slot 0 takes this step's, and
after a step, as in Transformer Engine's `DelayedScaling`:

    amax    = max(history), NaN left out, or history[0]
    scale   = largest / amax / 2**margin           kept where amax is 0 or not finite, at most float32's largest
    history = roll(history, -1); history[0] = 0

With an update interval of n the scale changes every n-th step; the history always moves. Inputs and weights are E4M3,
gradients E5M2 (the HYBRID recipe). What a step measured comes back as the gradient of `Fp8State.measured`, since a
backward pass has no other way out; `updated` is then a pure function of state and measurement.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import QuantizationError

E4M3, E5M2 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2)
TENSORS = ("input", "weight", "gradient")  # the rows of a state


@dataclasses.dataclass(frozen=True)
class DelayedScaling:
    """Scales from the amaxes of the steps before.

    Args:
        margin: powers of two of head room.
        interval: steps between changes of the scale.
        history: H, steps looked back at.
        algorithm: "max" of the history, or "most_recent".
        hybrid: whether gradients are E5M2; else E4M3 like the rest.
    """

    margin: int = 0
    interval: int = 1
    history: int = 1024
    algorithm: str = "max"
    hybrid: bool = True

    def __post_init__(self) -> None:
        if self.algorithm not in ("max", "most_recent"):
            raise QuantizationError(f"algorithm is {self.algorithm!r}; choose from max, most_recent.")
        if self.history < 1 or self.interval < 1:
            raise QuantizationError(f"history is {self.history} and interval {self.interval}; both must be at least 1.")

    @property
    def dtypes(self) -> tuple[np.dtype, np.dtype, np.dtype]:
        """Of inputs, weights and gradients."""
        return E4M3, E4M3, E5M2 if self.hybrid else E4M3


@dataclasses.dataclass(frozen=True)
class CurrentScaling:
    """Scales from the tensors themselves, one each. No state."""

    margin: int = 0
    hybrid: bool = True
    dtypes = DelayedScaling.dtypes


@dataclasses.dataclass(frozen=True)
class BlockScaling:
    """Scales for 1 x 128 runs of inputs and gradients and 128 x 128 blocks of weights, all E4M3 (DeepSeek-V3,
    arXiv 2412.19437, section 3.3.2). No state.

    Args:
        powers: whether scales are rounded down to powers of two, which makes scaling exact.
        block: the length of runs and blocks.
    """

    powers: bool = True
    block: int = 128


Recipe = DelayedScaling | CurrentScaling | BlockScaling


class Fp8State(NamedTuple):
    """What delayed scaling remembers about one product; rows are `TENSORS`.

    Attributes:
        history: float32 `[3, H]`, amaxes; slot 0 is the current step's.
        scale: float32 `[3]`.
        step: int32 `[]`, updates so far.
        overflow: int32 `[3]`, numbers that were clipped at the largest code, in all steps; stays at int32's largest.
        underflow: int32 `[3]`, numbers other than zero whose code was zero.
        measured: float32 `[3, 3]`, zeros: its gradient holds amax, overflow and underflow of a step, in its columns.
            Uses within one step add up: counts as they should, amaxes to an upper bound.
    """

    history: jax.Array
    scale: jax.Array
    step: jax.Array
    overflow: jax.Array
    underflow: jax.Array
    measured: jax.Array


def started(weight: jax.Array, recipe: DelayedScaling) -> Fp8State:
    """Returns the state before the first step: no history, the weight's scale from `weight`, the others 1."""
    counts = jnp.zeros((3,), jnp.int32)
    scale = amax_scale(jnp.max(jnp.abs(weight.astype(jnp.float32))), E4M3, recipe.margin)
    scales = jnp.ones((3,)).at[1].set(scale)
    return Fp8State(jnp.zeros((3, recipe.history)), scales, jnp.zeros((), jnp.int32), counts, counts, jnp.zeros((3, 3)))


def updated(state: Fp8State, measured: jax.Array, recipe: DelayedScaling) -> Fp8State:
    """Returns the state for the next step.

    Args:
        state: this step's.
        measured: `[3, 3]`, the gradient of `state.measured`.
        recipe: of the product.
    """
    history = state.history.at[:, 0].set(measured[:, 0])
    amax = jnp.max(jnp.where(jnp.isnan(history), 0.0, history), axis=1) if recipe.algorithm == "max" else history[:, 0]
    largest = jnp.asarray([float(jnp.finfo(dtype).max) for dtype in recipe.dtypes], jnp.float32)
    usable = (amax > 0) & jnp.isfinite(amax)
    scale = largest / jnp.where(usable, amax, 1.0) / 2.0**recipe.margin
    scale = jnp.minimum(jnp.where(usable, scale, state.scale), float(np.finfo(np.float32).max))
    step = state.step + 1
    return Fp8State(
        history=jnp.roll(history, -1, axis=1).at[:, 0].set(0.0),
        scale=jnp.where(step % recipe.interval == 0, scale, state.scale),
        step=step,
        overflow=_added(state.overflow, measured[:, 1]),
        underflow=_added(state.underflow, measured[:, 2]),
        measured=jnp.zeros_like(state.measured),
    )


def _added(count: jax.Array, more: jax.Array) -> jax.Array:
    most = np.iinfo(np.int32).max
    more = jnp.minimum(more, 2.0**30).astype(jnp.int32)
    return jnp.where(count > most - more, most, count + more)


def amax_scale(amax: jax.Array, dtype: np.dtype, margin: int = 0, *, powers: bool = False) -> jax.Array:
    """Returns `largest / amax / 2**margin`, 1 where amax is zero or not finite; a power of two if `powers`."""
    usable = (amax > 0) & jnp.isfinite(amax)
    scale = float(jnp.finfo(dtype).max) / jnp.where(usable, amax, 1.0) / 2.0**margin
    scale = jnp.where(usable, jnp.minimum(scale, float(np.finfo(np.float32).max)), 1.0)
    if not powers:
        return scale
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32) & jnp.int32(0x7F800000)  # the exponent alone
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def to_float8(x: jax.Array, scale: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns `x * scale` as float8, clipped to its largest number, rounded to nearest with ties to even.

    Args:
        x: float, any shape.
        scale: of a shape that broadcasts to that of x.
        dtype: of the codes.
    """
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x.astype(jnp.float32) * scale, -largest, largest).astype(dtype)


def measure(x: jax.Array, scale: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns float32 `[3]`: amax of x, how many numbers `to_float8` clips, how many it takes to zero."""
    magnitude = jnp.abs(x.astype(jnp.float32))
    scaled = magnitude * scale
    lost = (scaled.astype(dtype).astype(jnp.float32) == 0) & (magnitude > 0)
    over = scaled > float(jnp.finfo(dtype).max)
    counts = [jnp.sum(flags, dtype=jnp.int32).astype(jnp.float32) for flags in (over, lost)]
    return jnp.stack([jnp.max(magnitude), *counts])
