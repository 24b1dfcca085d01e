"""What the decoder of an encoder-decoder has seen: its own keys and values, and those of the encoder's states.

Slot s holds the token at position s; all rows have the same length. The encoder's keys and values are computed once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from trustcore.nn.encoder_attention import EncoderAttention, KeysValues


class DecoderState(NamedTuple):
    """A pytree.

    Attributes:
        layers: keys and values `[B, slots, N, H]` of each layer's own tokens.
        memory: keys and values `[B, S, N, H]` of each layer's view of the encoder's states.
        mask: bool `[B, 1, 1, S]`, which of the encoder's states count; None: all.
        length: int32, tokens the decoder has seen.
    """

    layers: tuple[KeysValues, ...]
    memory: tuple[KeysValues, ...]
    mask: jax.Array | None
    length: jax.Array

    @property
    def slots(self) -> int:
        """Tokens there is room for."""
        return self.layers[0][0].shape[1]


def empty_layer(batch: int, slots: int, heads: int, head_dim: int, dtype: jax.typing.DTypeLike) -> KeysValues:
    """Returns keys and values of no token yet."""
    return jnp.zeros((batch, slots, heads, head_dim), dtype), jnp.zeros((batch, slots, heads, head_dim), dtype)


def causal_mask(length: Int[Array, ""], tokens: int, slots: int) -> Bool[Array, "1 1 T S"]:
    """Returns which slots `tokens` queries see that stand behind `length` others."""
    place = length + jnp.arange(tokens, dtype=jnp.int32)
    return (jnp.arange(slots, dtype=jnp.int32)[None, :] <= place[:, None])[None, None]


def attend_extended(
    attention: EncoderAttention,
    x: Float[Array, "B T D"],
    layer: KeysValues,
    length: Int[Array, ""],
    *,
    bias: Float[Array, "_ _ _ _"] | None = None,
) -> tuple[Float[Array, "B T D"], KeysValues]:
    """Returns causal self-attention of T tokens that follow `length` others, and the layer with them in it."""
    key, value = attention.keys_values(x)
    at = (0, length, 0, 0)
    at = tuple(jnp.asarray(i, jnp.int32) for i in at)
    keys = jax.lax.dynamic_update_slice(layer[0], key.astype(layer[0].dtype), at)
    values = jax.lax.dynamic_update_slice(layer[1], value.astype(layer[1].dtype), at)
    mask = causal_mask(length, x.shape[1], keys.shape[1])
    y = attention.attend(attention.queries(x), (keys, values), mask=mask, bias=bias)
    return y, (keys, values)
