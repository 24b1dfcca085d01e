"""Losses that keep a mixture of experts in balance, and a way to have their gradients where no loss is returned.

    balance = E * sum over e of  (share of the rows that go to e) * (mean score of e)
    z = mean over rows of logsumexp(logits)^2

A perfectly even router has a balance of k, the experts that a row goes to. Fedus et al. (Switch), arXiv 2101.03961,
eq. 4 to 6, for k = 1; Mixtral's code for more. The z-loss: Zoph et al. (ST-MoE), arXiv 2202.08906, eq. 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from trustcore.dtypes import accumulation_dtype
from trustcore.ops.experts import by_expert


def load_balancing_loss(
    logits: Float[Array, "R E"] | Sequence[Float[Array, "R E"]],
    *,
    active: int,
    mask: Bool[Array, " R"] | None = None,
) -> Float[Array, ""]:
    """Returns the balance of routers that take the softmax and its k best.

    Args:
        logits: of a layer's router; or of several layers, which count together, as transformers counts them.
        active: k.
        mask: rows that count; None: all.

    Differentiable in the logits, through the scores alone.
    """
    layers = [logits] if isinstance(logits, jax.Array) else list(logits)
    wide = [layer.astype(accumulation_dtype(layer.dtype)) for layer in layers]
    scores = jnp.concatenate([jax.nn.softmax(layer, axis=-1) for layer in wide])
    chosen = jax.lax.top_k(scores, active)[1]
    return balance(scores, chosen, mask=None if mask is None else jnp.tile(mask, len(layers)))


def balance(
    scores: Float[Array, "R E"], chosen: Int[Array, "R k"], *, mask: Bool[Array, " R"] | None = None
) -> Float[Array, ""]:
    """Returns `E * sum_e (rows that go to e / R) * mean(scores[:, e])`, whatever the router is.

    Args:
        scores: of each row, adding up to one.
        chosen: the experts of each row.
        mask: rows that count; None: all.
    """
    count = scores.shape[1]
    if mask is None:
        rows = jnp.asarray(scores.shape[0], scores.dtype)
        going = by_expert(chosen, count)[1].astype(scores.dtype)
        total = jnp.sum(scores, axis=0)
    else:
        weight = mask.astype(scores.dtype)
        rows = jnp.sum(weight)
        going = jnp.zeros((count,), scores.dtype).at[chosen.reshape(-1)].add(jnp.repeat(weight, chosen.shape[1]))
        total = weight @ scores
    return count * jnp.sum(jax.lax.stop_gradient(going) * total) / rows**2


def router_z_loss(logits: Float[Array, "*rows E"], *, mask: Bool[Array, "*rows"] | None = None) -> Float[Array, ""]:
    """Returns the mean of `logsumexp(logits)^2` over the rows that count (None: all): it keeps logits small."""
    squares = jax.scipy.special.logsumexp(logits.astype(accumulation_dtype(logits.dtype)), axis=-1) ** 2
    if mask is None:
        return jnp.mean(squares)
    weight = mask.astype(squares.dtype)
    return jnp.sum(squares * weight) / jnp.sum(weight)


@jax.custom_vjp
def attach_loss(x: Any, loss: Float[Array, ""]) -> Any:
    """Returns x; whatever is differentiated through it has the gradient of `loss` added, once.

    So a layer deep in a model adds a loss of its own to the one that is differentiated, through jit, scan and remat,
    though nothing returns it. If that one is scaled (against underflow, say), scale `loss` likewise.
    """
    return x


attach_loss.defvjp(lambda x, loss: (x, loss), lambda loss, dx: (dx, jnp.ones_like(loss)))
