"""Attention with any mask and any additive bias: encoders, cross-attention, relative positions.

    scores[b, n, t, s] = scale * query[b, t, n] . key[b, s, n] + bias[b, n, t, s]
    out[b, t, n] = sum_s softmax(scores where mask)[b, n, t, s] * value[b, s, n]

A query that sees no key gives zeros. Long sequences are taken `QUERY_BLOCK` queries at a time, forward and backward, so
that the scores held at once are O(QUERY_BLOCK * S).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from trustcore.dtypes import accumulation_dtype

QUERY_BLOCK = 1024
_MASKED = -1e30  # far below any score, and finite: a row that sees nothing gives no NaN


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
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    length = query.shape[1]
    if length <= QUERY_BLOCK:
        return _attend(query, key, value, mask, bias, factor)
    blocks = -(-length // QUERY_BLOCK)

    padded = _padded(query, 1, blocks * QUERY_BLOCK)
    wide = [None if part is None else _padded(part, 2, blocks * QUERY_BLOCK) for part in (mask, bias)]

    def block_of(x: jax.Array, axis: int, i: jax.Array) -> jax.Array:
        return x if x.shape[axis] == 1 else jax.lax.dynamic_slice_in_dim(x, i * QUERY_BLOCK, QUERY_BLOCK, axis)

    @jax.checkpoint
    def one(i: jax.Array) -> jax.Array:
        q = block_of(padded, 1, i)
        m, b = (None if part is None else block_of(part, 2, i) for part in wide)
        return _attend(q, key, value, m, b, factor)

    out = jax.lax.map(one, jnp.arange(blocks))  # [blocks, B, block, N, H]
    out = jnp.moveaxis(out, 0, 1).reshape(query.shape[0], blocks * QUERY_BLOCK, *query.shape[2:])
    return out[:, :length]


def _padded(x: jax.Array, axis: int, length: int) -> jax.Array:
    """x with its queries filled up to `length`; as it is where it does not depend on the query."""
    if x.shape[axis] == 1:
        return x
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, pad)


def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, bias: jax.Array | None, scale: float
) -> jax.Array:
    wide = accumulation_dtype(query.dtype)
    scores = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=wide) * jnp.asarray(scale, wide)
    if bias is not None:
        scores = scores + bias.astype(wide)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.asarray(_MASKED, wide))
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    if mask is not None:
        weights = jnp.where(mask, weights, jnp.zeros((), wide))
    total = jnp.sum(weights, axis=-1)  # [B, N, T]
    out = jnp.einsum("bnts,bsnh->btnh", weights.astype(value.dtype), value, preferred_element_type=wide)
    out = out / jnp.maximum(total, jnp.asarray(1e-30, wide)).transpose(0, 2, 1)[..., None]
    return out.astype(query.dtype)
