"""Multi-head attention that looks in both directions, or at another sequence: self- and cross-attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from trustcore.nn.linear import Linear, project
from trustcore.ops.masked_attention import masked_attention
from trustcore.ops.rope import RopeConfig, rotate

KeysValues = tuple[jax.Array, jax.Array]


class EncoderAttention(nnx.Module):
    """`out(attention(query(x), key(memory), value(memory)))`; Vaswani et al., arXiv 1706.03762, section 3.2.2.

    Args:
        features: D of x.
        heads: N.
        head_dim: H.
        memory_features: D of the memory; None: that of x.
        bias: whether queries, keys, values and the output have one.
        key_bias: whether keys have one; None: as `bias` says.
        out_bias: whether the output product has one; None: as `bias` says.
        scale: of the scores; None is `H ** -0.5`.
        rope: how positions turn queries and keys; None: they do not.
        dtype: of the parameters.
        rngs: None leaves them abstract.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        head_dim: int,
        *,
        memory_features: int | None = None,
        bias: bool = True,
        key_bias: bool | None = None,
        out_bias: bool | None = None,
        scale: float | None = None,
        rope: RopeConfig | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        made = {"dtype": dtype, "rngs": rngs}
        memory, inner = memory_features or features, heads * head_dim
        self.query = Linear(features, inner, bias=bias, **made)
        self.key = Linear(memory, inner, bias=bias if key_bias is None else key_bias, **made)
        self.value = Linear(memory, inner, bias=bias, **made)
        self.out = Linear(inner, features, bias=bias if out_bias is None else out_bias, **made)
        self.head_dim, self.scale, self.rope = head_dim, scale, rope

    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: Float[Array, "B S M"] | None = None,
        *,
        mask: Bool[Array, "_ _ _ _"] | None = None,
        bias: Float[Array, "_ _ _ _"] | None = None,
        turn: tuple[jax.Array, jax.Array] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the layer's output.

        Args:
            x: T tokens of B rows.
            memory: what they look at; None: themselves.
            mask, bias: of the scores, see `masked_attention`.
            turn: `trustcore.ops.rope.angles` of the positions, for a layer with rope, whose memory is x.
        """
        if memory is None:
            query, key, value = (self._heads(y) for y in project(x, self.query, self.key, self.value))
            if self.rope is not None and turn is not None:
                query, key = rotate(query, turn, self.rope), rotate(key, turn, self.rope)
        else:
            query, (key, value) = self.queries(x), self.keys_values(memory)
        return self.attend(query, (key, value), mask=mask, bias=bias)

    def queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        """Returns the queries of tokens."""
        return self._heads(self.query(x))

    def keys_values(self, memory: Float[Array, "B S M"]) -> KeysValues:
        """Returns keys and values `[B, S, N, H]`, which a decoder computes once for all its steps."""
        key, value = project(memory, self.key, self.value)
        return self._heads(key), self._heads(value)

    def attend(
        self,
        query: Float[Array, "B T N H"],
        memory: KeysValues,
        *,
        mask: Bool[Array, "_ _ _ _"] | None = None,
        bias: Float[Array, "_ _ _ _"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the layer's output for queries, keys and values that are there already."""
        y = masked_attention(query, *memory, mask=mask, bias=bias, scale=self.scale)
        return self.out(y.reshape(*y.shape[:2], -1))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], -1, self.head_dim)
