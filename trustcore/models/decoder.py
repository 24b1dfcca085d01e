"""The decoder of the Llama family: RMSNorm, rotary grouped-query attention, SwiGLU, optionally tied embeddings.

    h = embed(tokens);  h += attention(norm(h)), h += mlp(norm(h))  for each block;  logits = output(norm(h))

The module is a pytree of its weights, so `model(tokens)` is a pure function of (weights, tokens, cache): jit, grad and
vmap take it from the outside. The blocks are a list and not one stacked scan: packed weights are then read where they
lie, and each block's trace is shared through one inner jit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from trustcore.models.config import DecoderConfig
from trustcore.nn.attention import Attention
from trustcore.nn.cache import KVCache
from trustcore.nn.embedding import Embedding
from trustcore.nn.linear import Linear
from trustcore.nn.mlp import GatedMLP
from trustcore.nn.norm import RMSNorm
from trustcore.ops.attention import LayerCache
from trustcore.ops.rope import angles


class Block(nnx.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, config: DecoderConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        made = {"dtype": dtype, "rngs": rngs}
        self.attention_norm = RMSNorm(config.features, eps=config.norm_eps, **made)
        self.attention = Attention(
            config.features,
            config.heads,
            config.kv_heads,
            config.head_dim,
            rope=config.rope,
            bias=config.qkv_bias,
            out_bias=config.out_bias,
            window=config.window,
            **made,
        )
        self.mlp_norm = RMSNorm(config.features, eps=config.norm_eps, **made)
        self.mlp = GatedMLP(config.features, config.hidden, bias=config.mlp_bias, **made)

    def __call__(
        self, x: Float[Array, "B T D"], turn: Any, positions: Int[Array, "B T"], cache: LayerCache | None = None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Returns the stream after this layer and, when a cache is given, the extended cache."""
        y, cache = self.attention(self.attention_norm(x), turn, positions, cache)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """A decoder-only language model.

    Args:
        config: its shape.
        dtype: of activations, and of the parameters that `rngs` draws.
        rngs: None leaves the parameters abstract, for a loader to fill.

    Attributes:
        tokenizer: set by `trustcore.load`; None in a model that was made by hand.
        source: where the weights came from, for people.
        origin: the file they came from, or "": `trustcore.save` takes the tokenizer's files from beside it.
        input_scales: (path, scale) of matrices whose checkpoint has a static scale for quantized inputs. Products do
            not use them; they are kept for whoever does.
    """

    def __init__(self, config: DecoderConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        made = {"dtype": dtype, "rngs": rngs}
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.tokenizer: Any = None
        self.source = ""
        self.origin = ""
        self.input_scales: tuple[tuple[str, float], ...] = ()
        self.embedding = Embedding(config.vocab_size, config.features, **made)
        self.blocks = nnx.List([Block(config, **made) for _ in range(config.layers)])
        self.norm = RMSNorm(config.features, eps=config.norm_eps, **made)
        self.output = None if config.tied else Linear(config.features, config.vocab_size, **made)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        cache: KVCache | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> Any:
        """Returns logits `[B, T, V]`, float32; with a cache, `(logits, extended cache)`.

        Args:
            tokens: T tokens of B rows; with a cache they follow what the rows hold.
            cache: see `new_cache`; None: the tokens stand at positions 0 to T - 1 and nothing is kept.
            lengths: tokens of each row that count, the rest being padding on the right; None: all T.

        Differentiable in the float weights. Accumulates in float32.
        """
        hidden, extended = self.hidden_states(tokens, cache=cache, lengths=lengths)
        logits = self.logits(hidden)
        return logits if cache is None else (logits, extended)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        *,
        cache: KVCache | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Returns the stream after the last norm, and the extended cache; arguments as in a call."""
        batch, length = tokens.shape
        start = jnp.zeros((batch,), jnp.int32) if cache is None else cache.length
        positions = start[:, None] + jax.lax.broadcasted_iota(jnp.int32, (1, length), 1)
        context = length if cache is None else cache.slots
        turn = angles(positions, self.config.rope, context=context)
        x = self.embedding(tokens).astype(self.dtype)
        layers = []
        for i, block in enumerate(self.blocks):
            x, layer = _run_block(block, x, turn, positions, None if cache is None else cache.layers[i])
            layers.append(layer)
        x = self.norm(x)
        if cache is None:
            return x, None
        return x, KVCache(tuple(layers), start + (length if lengths is None else lengths))

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Returns float32 logits of normalized hidden states."""
        y = self.embedding.unembed(hidden) if self.output is None else self.output(hidden)
        return y.astype(jnp.float32)

    def new_cache(self, batch: int, slots: int, *, dtype: Any = jnp.float32) -> KVCache:
        """Returns an empty cache for `batch` rows of up to `slots` tokens; `dtype` as in `LayerCache`."""
        return empty_cache(self.config, batch, slots, dtype=dtype)

    @property
    def parameters(self) -> int:
        """Number of weights; a tied table counts once."""
        leaves = jax.tree.leaves(nnx.state(self, nnx.Param), is_leaf=lambda x: hasattr(x, "dequantize"))
        return sum(leaf.size for leaf in leaves)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are held."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def __repr__(self) -> str:
        c = self.config
        source = f"{self.source}: " if self.source else ""
        return (
            f"Decoder({source}{c.family}, {_count(self.parameters)} parameters in {_bytes(self.nbytes)}, "
            f"{c.layers} layers, D {c.features}, heads {c.heads}/{c.kv_heads}, vocabulary {c.vocab_size}, "
            f"context {c.context})"
        )

    __str__ = __repr__  # nnx would print every layer


def empty_cache(config: DecoderConfig, batch: int, slots: int, *, dtype: Any = jnp.float32) -> KVCache:
    """Returns an empty cache for a decoder of that configuration; see `Decoder.new_cache`."""
    return KVCache.zeros(
        batch, slots, layers=config.layers, kv_heads=config.kv_heads, head_dim=config.head_dim, dtype=dtype
    )


@jax.jit
def _run_block(block: Block, x: jax.Array, turn: Any, positions: jax.Array, cache: LayerCache | None) -> Any:
    return block(x, turn, positions, cache)


def _count(n: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)


def _bytes(n: int) -> str:
    for size, unit in ((10**9, "GB"), (10**6, "MB")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} bytes"
