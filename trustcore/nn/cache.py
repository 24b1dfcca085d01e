"""The key-value cache: what a decoder has seen, one `LayerCache` a layer.

Slot s of a row holds the token at position s, so a row's length is all the state there is. Rows grow on their own:
prompts of different lengths share a batch, padded on the right; what padding leaves behind a row's length is not
visible, and is overwritten by the tokens that follow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trustcore.ops.attention import LayerCache


class KVCache(NamedTuple):
    """A pytree: pass it donated (`jax.jit(..., donate_argnames="cache")`) and it is extended in place.

    Attributes:
        layers: of the model, first to last; of a scanned model as `trustcore.nn.stack` says, stacked by kind of layer.
        length: int32 `[B]`, tokens each row holds.
    """

    layers: tuple[LayerCache, ...]
    length: jax.Array

    @staticmethod
    def zeros(
        batch: int,
        slots: int,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
    ) -> KVCache:
        """Returns an empty cache for `batch` rows of up to `slots` tokens; `dtype` as in `LayerCache`.

        `value_dim` is the head size of values, None: `head_dim`.
        """
        made = tuple(
            LayerCache.zeros(batch, kv_heads, slots, head_dim, dtype, value_size=value_dim) for _ in range(layers)
        )
        return KVCache(made, jnp.zeros((batch,), jnp.int32))

    @property
    def slots(self) -> int:
        """S, tokens a row can hold."""
        return self.layers[0].keys.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))
