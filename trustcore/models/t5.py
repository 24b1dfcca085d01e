"""T5: an encoder and a decoder with relative positions, norms before each sum, and no biases in products.

    h = words[tokens];  h += attention(norm(h), bias), h += mlp(norm(h))  per block;  memory = norm(h)
    the decoder does the same, causally, with attention over the memory between the two

T5 and its versions 1.1 (gated feed-forward, an output layer of its own), FLAN-T5, mT5, and UMT5 (each layer has a
table of relative positions); with an encoder alone, a text encoder. Raffel et al., arXiv 1910.10683; Shazeer, arXiv
2002.05202; Chung et al., arXiv 2304.09151 (UMT5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from trustcore.errors import ModelError
from trustcore.models.model import TextEncoder, key_mask, run, sample_tokens
from trustcore.models.name_map import Rule, kernel, numbered, plain
from trustcore.models.names import Names, under
from trustcore.models.registry import Family
from trustcore.models.values import Values
from trustcore.models.writing import Reads, Writing, behind_last, rows_of
from trustcore.nn.decoder_state import DecoderState, attend_extended, empty_layer
from trustcore.nn.embedding import Embedding
from trustcore.nn.encoder_attention import EncoderAttention, KeysValues
from trustcore.nn.linear import Linear
from trustcore.nn.mlp import MLP
from trustcore.nn.norm import RMSNorm
from trustcore.nn.positions import RelativeBias
from trustcore.nn.stack import Stack, run_blocks
from trustcore.ops.activate import activation

MOST = 1 << 20  # tokens of a row: what no memory holds


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape of a T5.

    Attributes:
        vocab_size: V.
        features: D.
        layers: of the encoder.
        decoder_layers: 0: there is no decoder.
        heads: N.
        head_dim: H.
        hidden: F.
        buckets, distance: of the relative positions, see `RelativeBias`.
        each_layer: whether every layer has relative positions of its own.
        activation: of the feed-forward layer.
        gated: whether that has a gate.
        own_output: whether the output layer is not the embedding table.
        scaled_output: whether the states are divided by `sqrt(D)` before it.
        norm_eps: epsilon of the norms.
        start_token: with which the decoder begins.
        family: config.json's `model_type`.
    """

    vocab_size: int
    features: int
    layers: int
    decoder_layers: int
    heads: int
    head_dim: int
    hidden: int
    buckets: int = 32
    distance: int = 128
    each_layer: bool = False
    activation: str = "relu"
    gated: bool = False
    own_output: bool = False
    scaled_output: bool = True
    norm_eps: float = 1e-6
    start_token: int = 0
    family: str = "t5"

    def __post_init__(self) -> None:
        if self.buckets < 4 or self.buckets % 4 or self.distance <= self.buckets // 2:
            raise ModelError(
                f"config: {self.buckets} relative_attention_num_buckets up to a distance of {self.distance}; expected "
                "a multiple of 4, and a distance of more than half of it."
            )
        activation(self.activation)

    @property
    def context(self) -> int:
        """Tokens that the models were trained with; relative positions know no end."""
        return 512

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> T5Config:
        """Returns the configuration that a config.json describes; `names` of tensors tell what is there.

        Raises:
            ModelError: a value is missing, impossible, or asks for what is not supported.
        """
        values = Values(config, "config.json")
        family = values.text("model_type", "t5")
        features, layers = values.integer("d_model", 512), values.integer("num_layers", 6)
        kind = values.text("feed_forward_proj", "gated-gelu" if family in ("mt5", "umt5") else "relu").split("-")
        gated = len(kind) == 2 and kind[0] == "gated"
        if len(kind) > 2 or (len(kind) == 2 and not gated):
            raise ModelError(
                f"config.json: feed_forward_proj is {config['feed_forward_proj']!r}; expected an activation, or "
                "'gated-' and one."
            )
        # The gate of "gated-gelu" is the tanh form; so are both when only the activation of dense layers is named.
        act = "gelu_new" if gated and kind[-1] == "gelu" else kind[-1]
        encoder_only = bool(names) and not any("decoder." in name for name in names)
        tied = values.flag("tie_word_embeddings", family == "t5")
        scaled = family != "mt5" and values.flag("scale_decoder_outputs", tied)
        decoder = values.get("num_decoder_layers")
        return cls(
            vocab_size=values.integer("vocab_size", 32128),
            features=features,
            layers=layers,
            decoder_layers=0 if encoder_only else layers if decoder is None else values.integer("num_decoder_layers"),
            heads=values.integer("num_heads", 8),
            head_dim=values.integer("d_kv", 64),
            hidden=values.integer("d_ff", 2048),
            buckets=values.integer("relative_attention_num_buckets", 32),
            distance=values.integer("relative_attention_max_distance", 128),
            each_layer=family == "umt5",
            activation=act,
            gated=gated,
            own_output="lm_head.weight" in names and not scaled,
            scaled_output=scaled,
            norm_eps=values.number("layer_norm_epsilon", 1e-6),
            start_token=values.integer("decoder_start_token_id", 0, least=0),
            family=family,
        )


class Block(nnx.Module):
    """One layer of the encoder, or, with attention over a memory, of the decoder."""

    def __init__(
        self,
        config: T5Config,
        *,
        biased: bool,
        cross: bool,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        made = {"dtype": dtype, "rngs": rngs}
        shape = (config.features, config.heads, config.head_dim)
        options = {"bias": False, "scale": 1.0, **made}
        table = {"buckets": config.buckets, "distance": config.distance, "two_sided": not cross, **made}
        self.attention_norm = RMSNorm(config.features, eps=config.norm_eps, **made)
        self.attention = EncoderAttention(*shape, **options)
        self.relative_bias = RelativeBias(config.heads, **table) if biased else None
        self.cross_norm = RMSNorm(config.features, eps=config.norm_eps, **made) if cross else None
        self.cross = EncoderAttention(*shape, **options) if cross else None
        self.mlp_norm = RMSNorm(config.features, eps=config.norm_eps, **made)
        mlp = {"activation": config.activation, "gated": config.gated, "bias": False, **made}
        self.mlp = MLP(config.features, config.hidden, **mlp)

    def __call__(self, x: Float[Array, "B T D"], mask: jax.Array | None, bias: jax.Array) -> Float[Array, "B T D"]:
        """Returns the encoder's stream after this layer."""
        x = x + self.attention(self.attention_norm(x), mask=mask, bias=bias)
        return x + self.mlp(self.mlp_norm(x))

    def step(
        self,
        x: Float[Array, "B T D"],
        layer: KeysValues,
        memory: KeysValues,
        mask: jax.Array | None,
        length: jax.Array,
        bias: jax.Array,
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """Returns the decoder's stream after this layer, and the layer's keys and values with these tokens."""
        assert self.cross is not None and self.cross_norm is not None
        y, layer = attend_extended(self.attention, self.attention_norm(x), layer, length, bias=bias)
        x = x + y
        x = x + self.cross.attend(self.cross.queries(self.cross_norm(x)), memory, mask=mask)
        return x + self.mlp(self.mlp_norm(x)), layer


class T5(TextEncoder):
    """A T5.

    Args:
        config: its shape.
        dtype: of activations, and of the parameters that `rngs` draws.
        rngs: None leaves the parameters abstract, for a loader to fill.
    """

    reads: Reads = "text"
    chooses_cache = False
    stacks = ("blocks", "decoder")

    def __init__(self, config: T5Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        super().__init__(config, dtype)
        self.writing = Writing(first=(config.start_token,))
        made = {"dtype": dtype, "rngs": rngs}
        self.words = Embedding(config.vocab_size, config.features, **made)

        def stack(count: int, cross: bool) -> nnx.List[Block]:
            biased = (i == 0 or config.each_layer for i in range(count))
            return nnx.List([Block(config, biased=own, cross=cross, **made) for own in biased])

        self.blocks: nnx.List[Any] | Stack = stack(config.layers, False)
        self.norm = RMSNorm(config.features, eps=config.norm_eps, **made)
        self.decoder: nnx.List[Any] | Stack = stack(config.decoder_layers, True)
        whole = config.decoder_layers > 0
        self.decoder_norm = RMSNorm(config.features, eps=config.norm_eps, **made) if whole else None
        own = whole and config.own_output
        self.output = Linear(config.features, config.vocab_size, **made) if own else None

    def __call__(
        self, tokens: Int[Array, "B S"], mask: Any = None, decoder_tokens: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B _ _"]:
        """Returns the encoder's states `[B, S, D]`; with `decoder_tokens`, the decoder's logits `[B, T, V]`, float32.

        Args:
            tokens: that the encoder reads.
            mask: `[B, S]`, zero or False where a token is padding (on either side); None: all count.
            decoder_tokens: that the decoder has written so far, `config.start_token` first.

        Differentiable in the float weights.
        """
        memory = self.encode(tokens, mask)
        if decoder_tokens is None:
            return memory
        return self.decode(decoder_tokens, self.start(memory, mask, slots=decoder_tokens.shape[1]))[0]

    def example(self) -> tuple[Any, ...]:
        """See `Model.example`."""
        tokens = sample_tokens(self.config.vocab_size)
        return tokens, None, tokens[:, :8] if self.config.decoder_layers else None

    def encode(self, tokens: Int[Array, "B S"], mask: Any = None) -> Float[Array, "B S D"]:
        """Returns the encoder's states; what stands in the rows of padding means nothing."""
        x = self.words(tokens).astype(self.dtype)
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        visible = key_mask(mask)
        bias = self._bias(self.blocks, places, places)
        x, _ = run_blocks(self.blocks, lambda block, x, _: (run(block, x, visible, bias(block)), None), x)
        return self.norm(x)

    def _bias(self, blocks: Any, queries: jax.Array, keys: jax.Array) -> Callable[[Any], jax.Array]:
        """What gives the bias of a block's scores: that of the first block, or of each its own."""
        if self.config.each_layer:
            return lambda block: block.relative_bias(queries, keys)
        shared = next(iter(blocks)).relative_bias(queries, keys)
        return lambda block: shared

    def start(self, memory: Float[Array, "B S D"], mask: Any = None, *, slots: int) -> DecoderState:
        """Returns the state of a decoder that has written nothing yet.

        Args:
            memory: what `encode` returned.
            mask: as there.
            slots: tokens there is to be room for.

        Raises:
            ModelError: the checkpoint has an encoder alone.
        """
        config = self.config
        if not config.decoder_layers:
            raise ModelError("this checkpoint has an encoder alone; it writes nothing.")
        empty = empty_layer(memory.shape[0], slots, config.heads, config.head_dim, self.dtype)
        return DecoderState.of_blocks(self.decoder, empty, memory, key_mask(mask))

    @property
    def limits(self) -> tuple[int, int]:
        """See `Writer`; relative positions know no end."""
        return MOST, MOST

    def encoder_input(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """See `Writer`."""
        return rows_of(prompts, MOST)

    def begin(self, source: Any, mask: Any, *, batch: int, slots: int, dtype: Any) -> DecoderState:
        """See `Writer`."""
        return self.start(self.encode(source, mask), mask, slots=slots)

    def step(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], kept: DecoderState
    ) -> tuple[Float[Array, "B V"], DecoderState]:
        """See `Writer`; rows grow together, so all of `lengths` that are not 0 are the same."""
        logits, after = self.decode(tokens, kept)
        return behind_last(logits, lengths)[:, 0], after._replace(length=kept.length + jnp.max(lengths))

    def decode(self, tokens: Int[Array, "B T"], state: DecoderState) -> tuple[Float[Array, "B T V"], DecoderState]:
        """Returns float32 logits behind each token, and the state; tokens follow those that the state has seen."""
        assert self.decoder_norm is not None
        x = self.words(tokens).astype(self.dtype)
        places = state.length + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        slots = jnp.arange(state.slots, dtype=jnp.int32)
        bias = self._bias(self.decoder, places, slots)

        def step(block: Any, *given: Any) -> tuple[jax.Array, Any]:
            return _step(block, *given, state.mask, state.length, bias(block))

        x, layers = state.through(self.decoder, step, x)
        x = self.decoder_norm(x)
        if self.config.scaled_output:
            x = x * jnp.asarray(self.config.features**-0.5, x.dtype)
        logits = self.words.unembed(x) if self.output is None else self.output(x)
        after = state._replace(layers=layers, length=state.length + tokens.shape[1])
        return logits.astype(jnp.float32), after


@jax.jit
def _step(block: Block, *args: Any) -> Any:
    return block.step(*args)


def _attention(path: str, stored: str) -> tuple[Rule, ...]:
    parts = {"query": "q", "key": "k", "value": "v", "out": "o"}
    return tuple(kernel(f"{path}.{ours}.kernel", f"{stored}.{theirs}.weight") for ours, theirs in parts.items())


def _block(last: int, gated: bool) -> tuple[Rule, ...]:
    """Rules of a block whose feed-forward layer is the sublayer of that number."""
    dense = f"layer.{last}.DenseReluDense"
    up = {"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}
    return (
        *_attention("attention", "layer.0.SelfAttention"),
        plain("relative_bias.table", "layer.0.SelfAttention.relative_attention_bias.weight"),
        plain("attention_norm.weight", "layer.0.layer_norm.weight"),
        *(kernel(f"mlp.{ours}.kernel", f"{dense}.{theirs}.weight") for ours, theirs in up.items()),
        kernel("mlp.down.kernel", f"{dense}.wo.weight"),
        plain("mlp_norm.weight", f"layer.{last}.layer_norm.weight"),
    )


_PARTS = ("encoder", "decoder")


def names(config: T5Config) -> Names:
    """Returns the names of the weights in checkpoints."""
    decoder = (
        *_block(2, config.gated),
        *_attention("cross", "layer.1.EncDecAttention"),
        plain("cross_norm.weight", "layer.1.layer_norm.weight"),
    )
    return Names(
        (
            plain("words.table", "shared.weight", others=[f"{part}.embed_tokens.weight" for part in _PARTS]),
            plain("norm.weight", "encoder.final_layer_norm.weight"),
            plain("decoder_norm.weight", "decoder.final_layer_norm.weight"),
            *numbered(config.decoder_layers, under("decoder.{}.", "decoder.block.{}.", decoder)),
        ),
        under("blocks.{}.", "encoder.block.{}.", _block(1, config.gated)),
        (kernel("output.kernel", "lm_head.weight"),),
        prefixes=("transformer.",),
        # A table that old files hold and no layer reads.
        ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    )


FAMILY = Family(T5Config.from_hugging_face, T5, names)
