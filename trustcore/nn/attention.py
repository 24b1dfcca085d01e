"""Self-attention with grouped key-value heads and rotary positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from trustcore.nn.linear import Linear, project
from trustcore.ops.attention import LayerCache, attention, cached_attention
from trustcore.ops.rope import RopeConfig, rotate

Turn = tuple[jax.Array, jax.Array]


class Attention(nnx.Module):
    """Causal multi-head attention; N query heads share K key-value heads (Ainslie et al., arXiv 2305.13245).

    Args:
        features: D.
        heads: N.
        kv_heads: K, a divisor of N.
        head_dim: H.
        rope: how positions turn queries and keys.
        bias: whether queries, keys and values have one.
        out_bias: whether the output product has one.
        window: tokens a query sees, itself included; None: all.
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
        rope: RopeConfig,
        bias: bool = False,
        out_bias: bool = False,
        window: int | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.query = Linear(features, heads * head_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.key = Linear(features, kv_heads * head_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.value = Linear(features, kv_heads * head_dim, bias=bias, dtype=dtype, rngs=rngs)
        self.out = Linear(heads * head_dim, features, bias=out_bias, dtype=dtype, rngs=rngs)
        self.head_dim = head_dim
        self.rope = rope
        self.window = window

    def __call__(
        self,
        x: Float[Array, "B T D"],
        turn: Turn,
        positions: Int[Array, "B T"],
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Returns the layer's output and, when a cache is given, the cache with these tokens in it.

        Args:
            x: T tokens of B rows.
            turn: `trustcore.ops.rope.angles(positions, rope)`, shared by all layers.
            positions: of the tokens; with a cache they follow each other from `positions[b, 0]` on.
            cache: of this layer.
        """
        query, key, value = (
            y.reshape(*y.shape[:-1], -1, self.head_dim) for y in project(x, self.query, self.key, self.value)
        )
        query, key = rotate(query, turn, self.rope), rotate(key, turn, self.rope)
        if cache is None:
            y = attention(query, key, value, query_positions=positions, key_positions=positions, window=self.window)
        else:
            y, cache = cached_attention(query, key, value, cache, positions[:, 0], window=self.window)
        return self.out(y.reshape(*y.shape[:2], -1)), cache
