"""The plain cross-entropy, logits in memory: the truth that `cross_entropy` is tested against."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def cross_entropy_oracle(
    hidden: jax.Array,
    table: jax.Array,
    labels: jax.Array,
    *,
    bias: jax.Array | None = None,
    transposed: bool = False,
    scale: float = 1.0,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    return_lse: bool = False,
) -> Any:
    """Returns the losses `[*rows]` in float32 (float64 for float64).

        z = scale * (hidden @ table + bias)      z <- soft_cap * tanh(z / soft_cap)
        loss = lse - (1 - s) z[label] - s mean(z) + z_loss * lse ** 2,     lse = log(sum(exp(z))), s = label_smoothing

    Szegedy et al., arXiv 1512.00567, section 7 (smoothing); de Brebisson and Vincent, arXiv 1604.08859 (the square of
    lse). O(R * V) memory.

    Args:
        hidden: `[*rows, D]`.
        table: `[D, V]`, or `[V, D]` where `transposed`.
        labels: integers `[*rows]`. A row whose label is `ignore_index` has loss 0 and no gradient; one whose label lies
            outside of 0 .. V - 1 has the loss NaN.
        bias: `[V]` or None.
        transposed: whether the table is an embedding's.
        scale: of the logits.
        soft_cap: bound of the logits; None: none.
        label_smoothing: share of the target that is spread over all of V.
        z_loss: weight of `lse ** 2`.
        ignore_index: which label means that a row does not count.
        return_lse: the pair of losses and log-sum-exp.
    """
    wide = jnp.float64 if hidden.dtype == jnp.float64 else jnp.float32
    table = table.T if transposed else table
    logits = jnp.matmul(hidden.astype(wide), table.astype(wide), precision="highest")
    if bias is not None:
        logits = logits + jnp.broadcast_to(bias.astype(wide), logits.shape)
    logits = logits * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, jnp.clip(labels, 0, table.shape[1] - 1)[..., None], axis=-1)[..., 0]
    losses = lse - (1 - label_smoothing) * picked - label_smoothing * jnp.mean(logits, axis=-1) + z_loss * lse**2
    losses = jnp.where((labels >= 0) & (labels < table.shape[1]), losses, jnp.nan)
    losses = jnp.where(labels == ignore_index, jnp.zeros((), wide), losses)
    return (losses, lse) if return_lse else losses
