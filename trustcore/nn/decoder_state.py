"""What the decoder of an encoder-decoder has seen: its own keys and values, and those of the encoder's states.

Slot s holds the token at position s; all rows have the same length. The encoder's keys and values are computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from trustcore.nn.encoder_attention import EncoderAttention, KeysValues
from trustcore.nn.stack import run_blocks


class DecoderState(NamedTuple):
    """A pytree.

    Attributes:
        layers: keys and values `[B, slots, N, H]` of each layer's own tokens; of a `Stack`, those of a group in one.
        memory: keys and values `[B, S, N, H]` of each layer's view of the encoder's states; alike.
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
        return self.layers[0][0].shape[-3]

    @classmethod
    def of_blocks(cls, blocks: Any, empty: KeysValues, memory: jax.Array, mask: jax.Array | None) -> DecoderState:
        """Returns the state of a decoder of these blocks that has written nothing yet.

        Args:
            blocks: a list or a `Stack`; each has its cross-attention as `cross`.
            empty: keys and values of one layer, see `empty_layer`.
            memory: states of the encoder, `[B, S, D]`.
            mask: see above.
        """
        _, states = run_blocks(blocks, lambda block, x, _: (x, (empty, block.cross.keys_values(x))), memory)
        layers, views = (tuple(state[i] for state in states) for i in range(2))
        return cls(layers, views, mask, jnp.zeros((), jnp.int32))

    def through(self, blocks: Any, step: Callable[..., Any], x: jax.Array) -> tuple[jax.Array, tuple[KeysValues, ...]]:
        """Returns x behind all blocks, and their own keys and values after it; `step(block, x, layer, memory)`."""

        def call(block: Any, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
            x, layer = step(block, x, *state)
            return x, (layer, state[1])

        x, after = run_blocks(blocks, call, x, tuple(zip(self.layers, self.memory, strict=True)))
        return x, tuple(layer for layer, _ in after)


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
