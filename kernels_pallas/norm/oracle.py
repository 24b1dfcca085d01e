"""The plain norms: the truth that `rms_norm` and `layer_norm` are tested against."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def rms_norm_oracle(
    x: jax.Array,
    weight: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    shift: float = 0.0,
) -> Any:
    """Returns `(shift + weight) * s / sqrt(mean(s ** 2) + eps)`, and s where a residual is given: `s = x + residual`.

    Zhang and Sennrich, arXiv 1910.07467, eq. 4. Sums are float32 (float64 for float64); both results have the dtype of
    x, and s is rounded to it before it is normalized.

    Args:
        x: `[..., D]`.
        weight: `[D]` of any float dtype; None: one.
        residual: as x, or None.
        eps: keeps a row of zeros finite.
        shift: 1 for families that store the gain's distance from one (Gemma).
    """
    return _norm(x, weight, None, residual, eps, shift, centre=False)


def layer_norm_oracle(
    x: jax.Array,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    eps: float = 1e-5,
) -> Any:
    """Returns `weight * (s - mean(s)) / sqrt(var(s) + eps) + bias`, and s with a residual: `s = x + residual`.

    Ba et al., arXiv 1607.06450, eq. 4. Otherwise as `rms_norm_oracle`.
    """
    return _norm(x, weight, bias, residual, eps, 0.0, centre=True)


def _norm(x: Any, weight: Any, bias: Any, residual: Any, eps: float, shift: float, *, centre: bool) -> Any:
    total = x if residual is None else x + residual
    wide = total.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    if centre:
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    y = wide / jnp.sqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * jnp.broadcast_to(weight.astype(wide.dtype) + shift, y.shape)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(wide.dtype), y.shape)
    y = y.astype(x.dtype)
    return y if residual is None else (y, total)
