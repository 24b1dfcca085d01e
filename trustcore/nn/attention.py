"""Self-attention with grouped key-value heads, and what families add to it: norms of queries and keys, sinks, ALiBi."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from trustcore.errors import ModelError
from trustcore.nn.linear import Linear, project
from trustcore.nn.norm import LayerNorm, RMSNorm
from trustcore.nn.parameter import parameter
from trustcore.ops.attention import LayerCache, alibi_slopes, attention, cached_attention
from trustcore.ops.norm import rms_norm
from trustcore.ops.rope import RopeConfig, rotate

Turn = tuple[jax.Array, jax.Array]
QKNorm = Literal["head", "whole", "each", "turned"]


class Attention(nnx.Module):
    """Causal multi-head attention; N query heads share K key-value heads (Ainslie et al., arXiv 2305.13245).

    Args:
        features: D.
        heads: N.
        kv_heads: K, a divisor of N.
        head_dim: H.
        rope: how positions turn queries and keys; None: they do not.
        bias: whether queries, keys and values have one.
        out_bias: whether the output product has one.
        window: tokens a query sees, itself included; None: all.
        chunk: positions fall into chunks of so many, and a query sees those of its own one up to itself (Llama 4);
            None: all.
        scale: of the scores; None: `H ** -0.5`.
        soft_cap: of the scores, `soft_cap * tanh(score / soft_cap)` (Gemma 2, arXiv 2408.00118); None: none.
        qk_norm: how queries and keys are normalized before they turn (Henry et al., arXiv 2010.04245): "head": RMS of
            each head, with one gain for all; "whole": RMS over all heads at once; "each": layer norm of each head with
            a gain of its own; "turned": RMS of each head without a gain, after it has turned (Llama 4).
        norm_eps: of those norms.
        alibi: None, or what multiplies the slopes by which scores fall with the distance (Press et al., arXiv
            2108.12409).
        sinks: whether each head has a score that takes part in the softmax and has no value (Xiao et al., arXiv
            2309.17453).
        temperature: (F, a): queries at position p are multiplied by `1 + a * log(1 + floor((p + 1) / F))`, so that
            weights stay sharp in long texts (Nakanishi, arXiv 2501.19399; this form: Llama 4); None: they are not.
        dropout: share of the attention weights that a call with a `dropout_key` drops; a call without drops none.
        dtype: of the parameters.
        rngs: None leaves them abstract.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        rope: RopeConfig | None,
        bias: bool = False,
        out_bias: bool = False,
        window: int | None = None,
        chunk: int | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        qk_norm: QKNorm | None = None,
        norm_eps: float = 1e-6,
        alibi: float | None = None,
        sinks: bool = False,
        temperature: tuple[float, float] | None = None,
        dropout: float = 0.0,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.query = Linear(features, heads * head_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.key = Linear(features, kv_heads * head_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.value = Linear(features, kv_heads * head_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.out = Linear(heads * head_dim, features, bias=out_bias, dtype=dtype, rngs=rngs)
        made = {"eps": norm_eps, "dtype": dtype, "rngs": rngs}
        self.query_norm = _qk_norm(qk_norm, heads, head_dim, made)
        self.key_norm = _qk_norm(qk_norm, kv_heads, head_dim, made)
        self.sinks = parameter(jax.nn.initializers.zeros, (heads,), jnp.float32, rngs) if sinks else None
        self.heads = heads
        self.head_dim = head_dim
        self.rope = rope
        self.window = window
        self.chunk = chunk
        self.scale = scale
        self.soft_cap = soft_cap
        self.norm_all_heads = qk_norm == "whole"
        self.turned_eps = norm_eps if qk_norm == "turned" else None
        self.temperature = temperature
        self.alibi = alibi
        self.dropout = dropout

    def __call__(
        self,
        x: Float[Array, "B T D"],
        turn: Turn | None,
        positions: Int[Array, "B T"],
        cache: LayerCache | None = None,
        *,
        segments: Int[Array, "B T"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Returns the layer's output and, when a cache is given, the cache with these tokens in it.

        Args:
            x: T tokens of B rows.
            turn: `trustcore.ops.rope.angles(positions, rope)`, shared by all layers of that rope.
            positions: of the tokens; with a cache they follow each other from `positions[b, 0]` on.
            cache: of this layer.
            segments: of the tokens, for rows of several texts: tokens see those of their own segment alone. Positions
                may begin anew with each.
            dropout_key: of `jax.random`; None drops nothing.

        Raises:
            ModelError: a cache is given, which has no segments and no dropout.
        """
        if cache is not None and (segments is not None or dropout_key is not None):
            raise ModelError("attention: segments and dropout_key are of whole texts; a cache takes neither.")
        query, key, value = project(x, self.query, self.key, self.value)
        if self.norm_all_heads:
            query, key = self._normed(query, key)
        query, key, value = (y.reshape(*y.shape[:-1], -1, self.head_dim) for y in (query, key, value))
        if not self.norm_all_heads:
            query, key = self._normed(query, key)
        if self.rope is not None:
            assert turn is not None
            query, key = rotate(query, turn, self.rope), rotate(key, turn, self.rope)
        if self.turned_eps is not None:
            query, key = rms_norm(query, eps=self.turned_eps), rms_norm(key, eps=self.turned_eps)
        if self.temperature is not None:
            query = query * _sharpness(positions, *self.temperature).astype(query.dtype)[:, :, None, None]
        options: dict[str, Any] = {"window": self.window, "scale": self.scale, "soft_cap": self.soft_cap}
        options["slopes"] = None if self.alibi is None else jnp.asarray(alibi_slopes(self.heads) * self.alibi)
        options["sinks"] = None if self.sinks is None else self.sinks.get_value()
        if cache is None:
            if dropout_key is not None and self.dropout:
                options |= {"dropout": self.dropout, "dropout_key": dropout_key}
            if self.chunk is not None:
                segments = _chunks(positions, self.chunk, segments)
            if segments is not None:
                options |= {"query_segments": segments, "key_segments": segments}
            y = attention(query, key, value, query_positions=positions, key_positions=positions, **options)
        else:
            y, cache = cached_attention(query, key, value, cache, positions[:, 0], chunk=self.chunk, **options)
        return self.out(y.reshape(*y.shape[:2], -1)), cache

    def _normed(self, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.query_norm is None or self.key_norm is None:
            return query, key
        return self.query_norm(query), self.key_norm(key)


def _qk_norm(kind: QKNorm | None, heads: int, head_dim: int, made: dict[str, Any]) -> RMSNorm | LayerNorm | None:
    if kind is None or kind == "turned":
        return None
    if kind == "each":
        return LayerNorm(head_dim, groups=heads, bias=False, **made)
    return RMSNorm(heads * head_dim if kind == "whole" else head_dim, **made)


def _sharpness(positions: jax.Array, floor: float, share: float) -> jax.Array:
    """`1 + share * log(1 + floor((p + 1) / floor))`, float32."""
    return 1.0 + share * jnp.log1p(jnp.floor((positions.astype(jnp.float32) + 1.0) / floor))


def _chunks(positions: jax.Array, chunk: int, segments: jax.Array | None) -> jax.Array:
    """Segments `[B, T]` that keep chunks of positions apart, and the texts of a row where it has several."""
    chunks = positions // chunk
    if segments is None:
        return chunks
    begins = (chunks[:, 1:] != chunks[:, :-1]) | (segments[:, 1:] != segments[:, :-1])
    return jnp.cumsum(jnp.pad(begins, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
