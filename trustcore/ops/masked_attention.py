"""Attention with any mask and any additive bias: encoders, cross-attention, relative positions.

    scores[b, n, t, s] = scale * query[b, t, n] . key[b, s, n] + bias[b, n, t, s]
    out[b, t, n] = sum_s softmax(scores where mask)[b, n, t, s] * value[b, s, n]

A query that sees no key gives zeros. It is computed as `trustcore.ops.attention` is, block by block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

import kernels_pallas.attention as kernels


def masked_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    *,
    mask: Bool[Array, "_ _ _ _"] | None = None,
    bias: Float[Array, "_ _ _ _"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T N H"]:
    """Returns the attention outputs, in the dtype of query; scores and sums are float32, float64 for float64.

    Args:
        query, key, value: of every head.
        mask: `[B or 1, N or 1, T or 1, S]`, True where the query sees the key; None: everywhere.
        bias: of the scores, after scaling, of a shape like the mask's.
        scale: None is `H ** -0.5`.

    Differentiable in query, key, value and bias. Vaswani et al., arXiv 1706.03762, eq. 1.
    """
    positions = None
    if mask is not None and mask.shape[1] == mask.shape[2] == 1:  # keys that nobody sees: whole blocks may be skipped
        places = jax.lax.broadcasted_iota(jnp.int32, (1, mask.shape[3]), 1)
        positions = jnp.where(mask[:, 0, 0], places, -1)
        positions, mask = jnp.broadcast_to(positions, (query.shape[0], mask.shape[3])), None
    return kernels.attention(
        query, key, value, key_positions=positions, mask=mask, bias=bias, causal=False, scale=scale
    )
