"""Norms and activations as they are written by hand, as the fused functions of `kernels_pallas`.

Those read each row once, forward and backward, and keep fewer arrays for the backward pass than autodiff of the plain
form does. Patterns cover: the gain before or after the conversion back to a narrow dtype, `x / sqrt(v)` and
`x * rsqrt(v)`, gains stored as their distance from one, variances by `jnp.var`, as a mean of squares of differences,
and as a difference of means (Flax).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.glu import bias_activation, glu
from kernels_pallas.norm import layer_norm, rms_norm
from trustcore.graph.rewriting.rule import Finding, Rule, Static

_ROWS = jax.ShapeDtypeStruct((2, 3, 8), "float32")
_GAIN = jax.ShapeDtypeStruct((8,), "float32")
_NARROW = jax.ShapeDtypeStruct((2, 3, 8), "bfloat16")
_NARROW_GAIN = jax.ShapeDtypeStruct((8,), "bfloat16")


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32 if x.dtype.itemsize < 4 else x.dtype)


def _mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=-1, keepdims=True)


def _like(gain: jax.Array, x: jax.Array) -> jax.Array:
    """A gain `[D]` with an axis for each of x, as JAX broadcasts it."""
    return gain.reshape((1,) * (x.ndim - 1) + gain.shape)


def _spread(gain: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(gain, x.shape)


# ---- RMSNorm ---------------------------------------------------------------------------------------------------------


def _rms_patterns(shift: float) -> list[Callable[..., Any]]:
    def gained(weight: jax.Array) -> jax.Array:
        return weight + shift if shift else weight

    made: list[Callable[..., Any]] = []
    for axes in (_like, _spread):
        for root in (True, False):

            def normal(x: jax.Array, eps: Any, root: bool = root) -> jax.Array:
                total = _mean(jnp.square(x)) + eps
                return x * jax.lax.rsqrt(total) if root else x / jnp.sqrt(total)

            def after(x: Any, w: Any, eps: Any, normal: Any = normal, axes: Any = axes) -> jax.Array:
                y = normal(_wide(x), eps).astype(x.dtype)
                return y * axes(gained(w), y)

            def before(x: Any, w: Any, eps: Any, normal: Any = normal, axes: Any = axes) -> jax.Array:
                y = normal(_wide(x), eps)
                return (y * axes(gained(w.astype(y.dtype)), y)).astype(x.dtype)

            made += [after, before]

        def factor(x: Any, w: Any, eps: Any, axes: Any = axes) -> jax.Array:
            y = _wide(x)
            return (y * (jax.lax.rsqrt(_mean(jnp.square(y)) + eps) * axes(gained(w.astype(y.dtype)), y))).astype(
                x.dtype
            )

        made += [factor] if axes is _like else []
    return [*made, _flax_rms] if not shift else made


def _flax_rms(x: Any, w: Any, eps: Any) -> jax.Array:
    """As `flax.nnx.RMSNorm` writes it, but for the mean of zero that it subtracts."""
    y = _wide(x)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1)[..., None] + eps) * _like(w, y)
    return (y * scale).astype(x.dtype)


def _rms_plain(x: jax.Array, eps: Any) -> jax.Array:
    y = _wide(x)
    return (y * jax.lax.rsqrt(_mean(jnp.square(y)) + eps)).astype(x.dtype)


def _fits(x: Any, *others: Any) -> bool | str:
    gains = [each for each in others if hasattr(each, "shape")]
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        return f"rows of {x.dtype}"
    return all(tuple(gain.shape) == tuple(x.shape[-1:]) for gain in gains) or "the gain is not one number a channel"


# ---- LayerNorm -------------------------------------------------------------------------------------------------------


def _centred(kind: str, root: bool) -> Callable[[jax.Array, Any], jax.Array]:
    def normal(x: jax.Array, eps: Any) -> jax.Array:
        mean = _mean(x)
        if kind == "var":
            variance = jnp.var(x, axis=-1, keepdims=True)
        elif kind == "squares":
            variance = _mean(jnp.square(x - mean))
        else:
            variance = _mean(jnp.square(x)) - jnp.square(mean)
            variance = jnp.maximum(variance, 0.0) if kind == "clipped" else variance
        return (x - mean) * jax.lax.rsqrt(variance + eps) if root else (x - mean) / jnp.sqrt(variance + eps)

    return normal


def _layer_patterns(bias: bool) -> list[Callable[..., Any]]:
    made: list[Callable[..., Any]] = []
    for axes in (_like, _spread):
        for kind in ("var", "squares", "difference", "clipped"):
            for root in (True, False):
                normal = _centred(kind, root)

                def pattern(
                    x: Any, w: Any, *rest: Any, normal: Any = normal, axes: Any = axes, bias: bool = bias
                ) -> jax.Array:
                    y = normal(_wide(x), rest[-1])
                    y = y * axes(w.astype(y.dtype), y)
                    return (y + axes(rest[0].astype(y.dtype), y) if bias else y).astype(x.dtype)

                made.append(pattern)
    return made


def _flax_layer(x: Any, w: Any, b: Any, eps: Any) -> jax.Array:
    """As `flax.nnx.LayerNorm` writes it: one factor of root and gain, means without their axis."""
    y = _wide(x)
    mean = jnp.mean(y, axis=-1)
    variance = jnp.maximum(0.0, jnp.mean(jnp.square(y), axis=-1) - jnp.square(mean))
    scale = jax.lax.rsqrt(variance[..., None] + eps) * _like(w, y)
    return ((y - mean[..., None]) * scale + _like(b, y)).astype(x.dtype)


# ---- activations -----------------------------------------------------------------------------------------------------

_ACTIVATIONS: dict[str, tuple[Callable[[jax.Array], jax.Array], ...]] = {
    "silu": (jax.nn.silu, lambda x: x / (1 + jnp.exp(-x))),
    "gelu": (lambda x: jax.nn.gelu(x, approximate=False),),
    "gelu_tanh": (
        lambda x: jax.nn.gelu(x, approximate=True),
        lambda x: 0.5 * x * (1 + jnp.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))),
        lambda x: 0.5 * x * (1 + jnp.tanh(0.7978845608028654 * (x + 0.044715 * x**3))),
    ),
    "relu": (jax.nn.relu, lambda x: jnp.maximum(x, 0)),
}


def _alike(x: Any, y: Any) -> bool | str:
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64) or x.dtype != y.dtype:
        return f"dtypes {x.dtype} and {y.dtype}"
    return tuple(x.shape) == tuple(y.shape) or "its halves are of different shapes"


def _glu_rule(name: str) -> Rule:
    forms = [lambda x, y, f=f: f(x) * y for f in _ACTIVATIONS[name]]
    return Rule(
        f"glu-{name}", forms, lambda x, y: glu(x, y, activation=name), (_ROWS, _ROWS), condition=_alike, priority=60
    )


def _bias_rule(name: str) -> Rule:
    forms = [lambda x, b, f=f, a=a: f(x + a(b, x)) for f in _ACTIVATIONS[name] for a in (_like, _spread)]
    made = lambda x, b: bias_activation(x, b, activation=name)  # noqa: E731
    return Rule(f"bias-{name}", forms, made, (_ROWS, _GAIN), condition=_fits, priority=50)


NORMS: tuple[Finding, ...] = (
    Rule(
        "layer-norm",
        [*_layer_patterns(bias=True), _flax_layer],
        lambda x, w, b, eps: layer_norm(x, w, b, eps=eps),
        (_ROWS, _GAIN, _GAIN, Static(1e-5)),
        condition=_fits,
        priority=80,
    ),
    Rule(
        "layer-norm-without-bias",
        _layer_patterns(bias=False),
        lambda x, w, eps: layer_norm(x, w, eps=eps),
        (_ROWS, _GAIN, Static(1e-5)),
        condition=_fits,
        priority=75,
    ),
    Rule(
        "rms-norm-from-one",
        _rms_patterns(1.0),
        lambda x, w, eps: rms_norm(x, w, eps=eps, shift=1.0),
        (_ROWS, _GAIN, Static(1e-6)),
        condition=_fits,
        priority=72,
    ),
    Rule(
        "rms-norm",
        _rms_patterns(0.0),
        lambda x, w, eps: rms_norm(x, w, eps=eps),
        (_ROWS, _GAIN, Static(1e-6)),
        condition=_fits,
        priority=70,
    ),
)
ACTIVATIONS: tuple[Finding, ...] = (*(_glu_rule(name) for name in _ACTIVATIONS), *map(_bias_rule, _ACTIVATIONS))
