"""Fake quantization: a number goes through its code and back, and gradients go through as if it had not.

    v = (x - offset) / scale        q = nearest code to v        y = scale * (q - zero), zero = -offset / scale

Rounding has no gradient, so it is given that of the identity: the straight-through estimator (Bengio et al.,
arXiv 1308.3432). With `inside` = low <= v <= high, and the learned step sizes of LSQ (Esser et al., arXiv 1902.08153,
eq. 3 and 5) and offsets of LSQ+ (Bhalgat et al., arXiv 2004.09576, eq. 5 and 6):

    dy/dx      = inside                         (clipped; else 1)
    dy/dscale  = q - v where inside, else q     (PACT: 0 where inside; binary codes: q, which does not depend on it)
    dy/doffset = 0 where inside, else 1

`y` is computed as packed weights are decoded, bit for bit: `codes_of` gives the q that it stands on.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from trustcore import _jax
from trustcore.errors import QuantizationError
from trustcore.quant.training.scheme import Grid, Scheme, expand, shared

SMALLEST = 2.0**-40  # of a scale: what trains below it is kept positive, and can come back


def fake_quantize(
    x: Float[Array, "*lead K N"],
    scale: Float[Array, "*lead G C"],
    offset: Float[Array, "*lead G C"] | None = None,
    *,
    format: str | Scheme,
    clipped: bool = True,
) -> Float[Array, "*lead K N"]:
    """Returns x as its codes stand for it, in the dtype of x.

    Args:
        x: weights or activations.
        scale: of the codes, positive; its shape is what `Scheme.scale_shape` gives.
        offset: what code 0 stands for; None: zero.
        format: such as "int4:g64", "fp8_e4m3:tensor"; see `Scheme.parse`.
        clipped: whether numbers beyond the codes get no gradient (they cannot lower the loss by themselves), or the
            full one.

    Raises:
        QuantizationError: the format is not known, or the scales do not have its shape.

    Differentiable in x, scale and offset, straight through the rounding.
    """
    scheme = Scheme.parse(format) if isinstance(format, str) else format
    expected = scheme.scale_shape(x.shape)
    for name, given in (("scale", scale), ("offset", offset)):
        if given is not None and given.shape != expected:
            raise QuantizationError(
                f"fake_quantize: {name} {list(given.shape)} does not fit x {list(x.shape)} in {scheme.storage.name}; "
                f"it must be {list(expected)}."
            )
    parts = [None if p is None else expand(p.astype(jnp.float32), x.shape, scheme) for p in (scale, offset)]
    y: jax.Array = elementwise(scheme.grid, "lsq", clipped, x.astype(jnp.float32), *parts)
    return y.astype(x.dtype)


def codes_of(x: jax.Array, scale: jax.Array, offset: jax.Array | None, scheme: Scheme) -> jax.Array:
    """Returns the codes, float32 `[..., K, N]`, on which `fake_quantize` of the same arguments stands."""
    scale = expand(scale.astype(jnp.float32), x.shape, scheme)
    offset = None if offset is None else expand(offset.astype(jnp.float32), x.shape, scheme)
    return scheme.grid.nearest(_position(x.astype(jnp.float32), scale, offset))


class Start(NamedTuple):
    """Where training begins: `[..., G, C]`, float32."""

    scale: jax.Array
    offset: jax.Array | None


def start_of(x: jax.Array, scheme: Scheme, method: str) -> Start:
    """Returns the first scales for x `[..., K, N]`.

    Args:
        x: what is to be quantized.
        scheme: the format and its granularity.
        method: "lsq": 2 mean|x| / sqrt(Q_P) (arXiv 1902.08153, section 2.1), which suits few bits; else from the range
            of x, so that nothing is clipped. Binary codes stand for the mean magnitude either way, ternary ones for it
            where the range is asked for (Ma et al., arXiv 2402.17764); a zero point always comes from the range.
    """
    # Reciprocals, which compilers make of such divisions, and no product of two constants: scales are the same in and
    # out of jit.
    x, grid = x.astype(jnp.float32), scheme.grid
    offset = None
    if scheme.asymmetric:
        low = jnp.minimum(shared(x, scheme, "min"), 0.0)
        scale = (jnp.maximum(shared(x, scheme, "max"), 0.0) - low) * (1.0 / (grid.high - grid.low))
        scale = _jax.computed_once(scale)
        offset = low - scale * grid.low
    elif grid.binary or (scheme.format == "ternary" and method != "lsq"):
        scale = shared(jnp.abs(x), scheme, "mean")
    elif method == "lsq":
        scale = 2.0 * shared(jnp.abs(x), scheme, "mean") / grid.high**0.5
    else:
        scale = shared(jnp.abs(x), scheme, "max") * (1.0 / grid.high)
    return Start(jnp.where(scale > 0, jnp.maximum(scale, SMALLEST), 1.0), offset)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def scaled_gradient(x: jax.Array, factor: float) -> jax.Array:
    """Returns `max(x, SMALLEST)`; the gradient of x is multiplied by `factor` on its way back."""
    return jnp.maximum(x, SMALLEST)


scaled_gradient.defvjp(
    lambda x, factor: (scaled_gradient(x, factor), None), lambda factor, _, g: (g * jnp.asarray(factor, g.dtype),)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def elementwise(
    grid: Grid, rule: str, clipped: bool, x: jax.Array, scale: jax.Array, offset: jax.Array | None
) -> jax.Array:
    """Returns y, for arguments of one shape; `rule` "lsq" or "pact" decides the gradient of the scale."""
    q = grid.nearest(_position(x, scale, offset))
    return scale * (q if offset is None else q + offset / scale)


def _position(x: jax.Array, scale: jax.Array, offset: jax.Array | None) -> jax.Array:
    return x / scale if offset is None else (x - offset) / scale


def _forward(grid: Grid, rule: str, clipped: bool, *args: Any) -> Any:
    return elementwise(grid, rule, clipped, *args), args


def _backward(grid: Grid, rule: str, clipped: bool, args: Any, g: jax.Array) -> Any:
    x, scale, offset = args
    v = _position(x, scale, offset)
    q = grid.nearest(v)
    inside = (v >= grid.low) & (v <= grid.high)
    step = q if grid.binary else jnp.where(inside, q - v if rule == "lsq" else 0.0, q)
    dx = jnp.where(inside, g, 0.0) if clipped else g
    return dx, g * step, None if offset is None else jnp.where(inside, 0.0, g)


elementwise.defvjp(_forward, _backward)
