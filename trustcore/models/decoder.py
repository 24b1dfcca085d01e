"""One decoder for all families: a stack of blocks whose parts a configuration chooses.

    h = embed(tokens);  h += attention(norm(h)), h += mlp(norm(h))  for each block;  logits = output(norm(h))

Norms stand before the products, behind them or both; attention and feed-forward follow each other or read the same
stream; positions turn queries and keys, are added, or lower scores; the feed-forward is plain, gated, or experts. The
module is a pytree of its weights, so `model(tokens)` is a pure function of (weights, tokens, cache): jit, grad and vmap
take it from the outside. The blocks are a list and not one stacked scan: packed weights are then read where they lie,
and the trace of blocks of one kind is shared through one inner jit. `trustcore.models.scan_layers` stacks them, for
programs that are long to compile.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from trustcore.errors import ModelError
from trustcore.models.config import DecoderConfig
from trustcore.models.model import Model
from trustcore.models.writing import Reads, behind_last
from trustcore.nn.attention import Attention
from trustcore.nn.cache import KVCache
from trustcore.nn.embedding import Embedding
from trustcore.nn.experts import Experts
from trustcore.nn.latent import LatentAttention
from trustcore.nn.linear import Linear
from trustcore.nn.mlp import MLP
from trustcore.nn.norm import LayerNorm, RMSNorm
from trustcore.nn.stack import Stack, run_blocks
from trustcore.ops.attention import LayerCache
from trustcore.ops.rope import angles


class Block(nnx.Module):
    """One layer: attention and feed-forward, each between norms and added to the stream."""

    def __init__(self, config: DecoderConfig, index: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        made = {"dtype": dtype, "rngs": rngs}
        before, after = config.norm_place in ("before", "both"), config.norm_place in ("after", "both")
        self.attention_norm = _norm(config, made) if before else None
        self.attention = _attention(config, index, made)
        self.attention_post_norm = _norm(config, made) if after else None
        self.mlp_norm = _norm(config, made) if before and not config.shared_norm else None
        self.mlp = _mlp(config, index, made)
        self.mlp_post_norm = _norm(config, made) if after else None
        self.parallel = config.parallel
        self.residual_scale = config.residual_scale

    def __call__(
        self,
        x: Float[Array, "B T D"],
        turn: Any,
        positions: Int[Array, "B T"],
        cache: LayerCache | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Returns the stream after this layer and, when a cache is given, the extended cache."""
        normed = _through(self.attention_norm, x)
        more = {} if segments is None else {"segments": segments}
        y, cache = self.attention(normed, turn, positions, cache, **more)
        y = self._scaled(_through(self.attention_post_norm, y))
        if self.parallel:
            z = self.mlp(normed if self.mlp_norm is None else self.mlp_norm(x))
            return x + y + self._scaled(_through(self.mlp_post_norm, z)), cache
        x = x + y
        z = self.mlp(_through(self.mlp_norm, x))
        return x + self._scaled(_through(self.mlp_post_norm, z)), cache

    def _scaled(self, y: jax.Array) -> jax.Array:
        return y if self.residual_scale == 1 else y * self.residual_scale


def _through(norm: Any, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


def _norm(config: DecoderConfig, made: Any) -> RMSNorm | LayerNorm:
    if config.norm == "layer":
        return LayerNorm(config.features, bias=config.norm_bias, eps=config.norm_eps, **made)
    return RMSNorm(config.features, eps=config.norm_eps, **made)


def _attention(config: DecoderConfig, index: int, made: Any) -> Attention | LatentAttention:
    c, layer = config, config.layer(index)
    if c.latent is not None:
        assert layer.rope is not None
        return LatentAttention(
            c.features,
            c.heads,
            c.latent,
            rope=layer.rope,
            bias=c.qkv_bias,
            scale=c.attention_scale,
            norm_eps=c.latent_norm_eps,
            **made,
        )
    without_turn = layer.rope is None
    return Attention(
        c.features,
        c.heads,
        c.kv_heads,
        c.head_dim,
        rope=layer.rope,
        bias=c.qkv_bias,
        out_bias=c.out_bias,
        window=layer.window,
        chunk=layer.chunk,
        scale=c.attention_scale,
        soft_cap=c.score_cap,
        qk_norm=None if c.qk_norm == "turned" and without_turn else c.qk_norm,
        norm_eps=c.norm_eps,
        alibi=c.alibi,
        sinks=c.sinks,
        temperature=c.temperature if without_turn else None,
        **made,
    )


def _mlp(config: DecoderConfig, index: int, made: Any) -> MLP | Experts:
    c = config
    if c.experts is not None and c.layer(index).experts:
        return Experts(c.features, c.experts, activation=c.activation, **made)
    return MLP(c.features, c.hidden, activation=c.activation, gated=c.gated, bias=c.mlp_bias, **made)


class Decoder(Model):
    """A decoder-only language model.

    Args:
        config: its shape.
        dtype: of activations, and of the parameters that `rngs` draws.
        rngs: None leaves the parameters abstract, for a loader to fill.
    """

    stacks = ("blocks",)

    def __init__(self, config: DecoderConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        super().__init__(config, dtype)
        made = {"dtype": dtype, "rngs": rngs}
        self.reads: Reads = "prompt"
        self.chooses_cache = True
        self.embedding = Embedding(config.vocab_size, config.features, **made)
        positions = config.learned_positions
        self.positions = Embedding(positions, config.features, **made) if positions else None
        self.embedding_norm = _norm(config, made) if config.embedding_norm else None
        self.blocks: nnx.List[Any] | Stack = nnx.List([Block(config, i, **made) for i in range(config.layers)])
        self.norm = _norm(config, made) if config.last_norm else None
        self.output = None if config.tied else Linear(config.features, config.vocab_size, **made)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        cache: KVCache | None = None,
        lengths: Int[Array, " B"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> Any:
        """Returns logits `[B, T, V]`, float32; with a cache, `(logits, extended cache)`.

        Args:
            tokens: T tokens of B rows; with a cache they follow what the rows hold.
            cache: see `new_cache`; None: nothing is kept.
            lengths: tokens of each row that count, the rest being padding on the right; None: all T.
            mask: in place of `lengths`, which tokens count, wherever the padding lies: on the left, say. Those that do
                follow each other at positions 0, 1, ... (or behind what the cache holds) and see one another alone;
                logits of the others mean nothing.
            segments: which text each token is of, where a row holds several behind each other (packed sequences):
                tokens see those of their own text alone, at positions that begin anew with each.

        Raises:
            ModelError: more than one of `lengths`, `mask` and `segments` is given, or segments with a cache or latent
                attention.

        Differentiable in the float weights. Accumulates in float32.
        """
        hidden, extended = self.hidden_states(tokens, cache=cache, lengths=lengths, mask=mask, segments=segments)
        logits = self.logits(hidden)
        return logits if cache is None else (logits, extended)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        *,
        cache: KVCache | None = None,
        lengths: Int[Array, " B"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Returns the stream after the last norm, and the extended cache; arguments as in a call."""
        if segments is not None and (cache is not None or lengths is not None or mask is not None):
            raise ModelError("decoder: segments are of whole rows; they come without a cache, lengths and mask.")
        if segments is not None and self.config.latent is not None:
            raise ModelError("decoder: latent attention takes no segments; pass one text a row.")
        if mask is not None:
            if lengths is not None:
                raise ModelError("decoder: lengths and mask both say which tokens count; pass one of them.")
            # Tokens that count move to the front, where the others are padding on the right that nobody sees.
            front = jnp.argsort(~mask, axis=1, stable=True)
            packed = jnp.take_along_axis(tokens, front, axis=1)
            hidden, extended = self.hidden_states(packed, cache=cache, lengths=jnp.sum(mask, axis=1, dtype=jnp.int32))
            back = jnp.argsort(front, axis=1)[..., None]
            return jnp.take_along_axis(hidden, back, axis=1), extended
        batch, length = tokens.shape
        start = jnp.zeros((batch,), jnp.int32) if cache is None else cache.length
        positions = start[:, None] + jax.lax.broadcasted_iota(jnp.int32, (1, length), 1)
        if segments is not None:
            begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
            positions = positions - jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)
        context = length if cache is None else cache.slots
        turns = {rope: angles(positions, rope, context=context) for rope in self.config.ropes}

        def call(block: Any, x: jax.Array, layer: LayerCache | None) -> Any:
            turn = None if block.attention.rope is None else turns[block.attention.rope]
            return _run_block(block, x, turn, positions, layer, segments)

        x = self._embed(tokens, positions)
        x, layers = run_blocks(self.blocks, call, x, None if cache is None else cache.layers)
        x = _through(self.norm, x)
        if cache is None:
            return x, None
        return x, KVCache(layers, start + (length if lengths is None else lengths))

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.embedding(tokens).astype(self.dtype)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if self.positions is not None:
            x = x + self.positions(positions + self.config.position_offset).astype(self.dtype)
        return _through(self.embedding_norm, x)

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Returns float32 logits of normalized hidden states."""
        y = self.embedding.unembed(hidden) if self.output is None else self.output(hidden)
        y = y.astype(jnp.float32)
        if self.config.logit_scale != 1:
            y = y * self.config.logit_scale
        cap = self.config.logit_cap
        return y if cap is None else cap * jnp.tanh(y / cap)

    @property
    def limits(self) -> tuple[int, int]:
        """See `Writer`."""
        return self.config.context, self.config.context

    def encoder_input(self, prompts: Any) -> None:
        """There is no encoder."""

    def begin(self, source: Any, mask: Any, *, batch: int, slots: int, dtype: Any) -> KVCache:
        """See `Writer`; what is kept is a cache of keys and values."""
        return self.new_cache(batch, slots, dtype=dtype)

    def step(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], kept: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """See `Writer`."""
        hidden, cache = self.hidden_states(tokens, cache=kept, lengths=lengths)
        assert cache is not None
        return self.logits(behind_last(hidden, lengths))[:, 0], cache

    def new_cache(self, batch: int, slots: int, *, dtype: Any = jnp.float32) -> KVCache:
        """Returns an empty cache for `batch` rows of up to `slots` tokens; `dtype` as in `LayerCache`."""
        cache = empty_cache(self.config, batch, slots, dtype=dtype)
        return cache._replace(layers=self.blocks.states(cache.layers)) if isinstance(self.blocks, Stack) else cache

    def __repr__(self) -> str:
        c = self.config
        source = f"{self.source}: " if self.source else ""
        return (
            f"Decoder({source}{c.family}, {_count(self.parameters)} parameters in {_bytes(self.nbytes)}, "
            f"{c.layers} layers, D {c.features}, heads {c.heads}/{c.kv_heads}, vocabulary {c.vocab_size}, "
            f"context {c.context})"
        )

    __str__ = __repr__


def empty_cache(config: DecoderConfig, batch: int, slots: int, *, dtype: Any = jnp.float32) -> KVCache:
    """Returns an empty cache for a decoder of that configuration; see `Decoder.new_cache`."""
    c = config
    if c.latent is not None:
        assert c.rope is not None
        sizes = {"kv_heads": 1, "head_dim": c.latent.rank + c.rope.size, "value_dim": c.latent.rank}
    else:
        sizes = {"kv_heads": c.kv_heads, "head_dim": c.head_dim}
    return KVCache.zeros(batch, slots, layers=c.layers, dtype=dtype, **sizes)


@jax.jit
def _run_block(
    block: Block, x: jax.Array, turn: Any, positions: jax.Array, cache: LayerCache | None, segments: jax.Array | None
) -> Any:
    return block(x, turn, positions, cache, segments)


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
