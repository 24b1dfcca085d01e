"""The encoder-decoder of BART's shape: positions that are added, layer norms, attention over the encoder's states.

BART    norms after each sum, and behind the embeddings          Lewis et al., arXiv 1910.13461
mBART   norms before each sum, behind the embeddings, at the end Liu et al., arXiv 2001.08210
Marian  norms after each sum, sinusoids                          Junczys-Dowmunt et al., arXiv 1804.00344
Pegasus norms before each sum and at the end, sinusoids          Zhang et al., arXiv 1912.08777
Whisper as Pegasus; reads log-mel frames through two convolutions, of which the second halves their number; its
        decoder's positions are a table                          Radford et al., arXiv 2212.04356
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from trustcore.errors import ModelError
from trustcore.models.model import Model, key_mask, run, sample_images, sample_tokens
from trustcore.models.name_map import Rule, conv, linear, norm, numbered, plain
from trustcore.models.names import Names, under
from trustcore.models.registry import Family
from trustcore.models.values import Values
from trustcore.models.writing import Reads, Writing, behind_last, rows_of
from trustcore.nn.conv import Conv
from trustcore.nn.decoder_state import DecoderState, attend_extended, empty_layer
from trustcore.nn.embedding import Embedding
from trustcore.nn.encoder_attention import EncoderAttention, KeysValues
from trustcore.nn.mlp import MLP
from trustcore.nn.module import made_module
from trustcore.nn.norm import LayerNorm
from trustcore.nn.parameter import parameter
from trustcore.nn.positions import sinusoids
from trustcore.nn.stack import Stack, run_blocks
from trustcore.ops.activate import activation
from trustcore.ops.log_mel import HOP, log_mel

_SINUSOIDS = ("marian", "pegasus")
_NORM_FIRST = ("mbart", "pegasus", "whisper")
_NORM_BEHIND_EMBEDDING = ("bart", "mbart")
_FRAMES = 2  # that one position of Whisper's encoder is made of


@dataclasses.dataclass(frozen=True)
class BartConfig:
    """Shape of an encoder-decoder of BART's kind.

    Attributes:
        vocab_size: V.
        features: D.
        layers, heads, hidden: L, N and F of the encoder.
        decoder_layers, decoder_heads, decoder_hidden: of the decoder.
        positions: tokens or frames that the encoder reads.
        decoder_positions: tokens that the decoder writes.
        mel_bins: channels of an encoder that reads sound; 0: it reads tokens.
        scaled: whether embeddings are multiplied by `sqrt(D)`.
        activation: of the feed-forward layers.
        start_token: with which the decoder begins.
        logits_bias: whether one is added to the logits.
        sinusoidal: whether positions are computed, and not read from tables.
        family: config.json's `model_type`, which says where norms stand; see the header of this file.
    """

    vocab_size: int
    features: int
    layers: int
    heads: int
    hidden: int
    decoder_layers: int
    decoder_heads: int
    decoder_hidden: int
    positions: int
    decoder_positions: int
    mel_bins: int = 0
    scaled: bool = False
    activation: str = "gelu"
    start_token: int = 2
    logits_bias: bool = False
    sinusoidal: bool = False
    family: str = "bart"

    def __post_init__(self) -> None:
        for heads in (self.heads, self.decoder_heads):
            if self.features % heads:
                raise ModelError(f"config: {heads} heads do not divide a width of {self.features}.")
        activation(self.activation)

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> BartConfig:
        """Returns the configuration that a config.json describes; `names` of tensors tell what is there.

        Raises:
            ModelError: a value is missing, impossible, or asks for what is not supported.
        """
        values = Values(config, "config.json")
        family = values.text("model_type", "bart")
        whisper = family == "whisper"
        positions = ("max_source_positions", "max_target_positions") if whisper else ("max_position_embeddings",) * 2
        if not values.flag("share_encoder_decoder_embeddings", True):
            raise ModelError("config.json: share_encoder_decoder_embeddings is false; only one table is supported.")
        size = (384, 4, 6, 1536) if whisper else (1024, 12, 16, 4096)
        return cls(
            vocab_size=values.integer("vocab_size", 51865 if whisper else 50265),
            features=values.integer("d_model", size[0]),
            layers=values.integer("encoder_layers", size[1]),
            heads=values.integer("encoder_attention_heads", size[2]),
            hidden=values.integer("encoder_ffn_dim", size[3]),
            decoder_layers=values.integer("decoder_layers", size[1]),
            decoder_heads=values.integer("decoder_attention_heads", size[2]),
            decoder_hidden=values.integer("decoder_ffn_dim", size[3]),
            positions=values.integer(positions[0], 1500 if whisper else 1024),
            decoder_positions=values.integer(positions[1], 448 if whisper else 1024),
            mel_bins=values.integer("num_mel_bins", 80) if whisper else 0,
            scaled=values.flag("scale_embedding", False),
            activation=values.text("activation_function", "gelu"),
            start_token=values.integer("decoder_start_token_id", 2, least=0),
            logits_bias=any(name.endswith("final_logits_bias") for name in names),
            # Files of some versions hold the sinusoids as tables.
            sinusoidal=family in _SINUSOIDS and not any(name.endswith("embed_positions.weight") for name in names),
            family=family,
        )

    @property
    def offset(self) -> int:
        """Rows of the tables of positions that no token uses."""
        return 2 if self.family in ("bart", "mbart") else 0


class Block(nnx.Module):
    """One layer of the encoder, or, with attention over a memory, of the decoder."""

    def __init__(
        self,
        config: BartConfig,
        *,
        cross: bool,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        made = {"dtype": dtype, "rngs": rngs}
        heads = config.decoder_heads if cross else config.heads
        hidden = config.decoder_hidden if cross else config.hidden
        shape = (config.features, heads, config.features // heads)
        options = {"key_bias": config.family != "whisper", **made}
        self.attention = EncoderAttention(*shape, **options)
        self.attention_norm = LayerNorm(config.features, **made)
        self.cross = EncoderAttention(*shape, **options) if cross else None
        self.cross_norm = LayerNorm(config.features, **made) if cross else None
        self.mlp = MLP(config.features, hidden, activation=config.activation, **made)
        self.mlp_norm = LayerNorm(config.features, **made)
        self.norm_first = config.family in _NORM_FIRST

    def __call__(self, x: Float[Array, "B T D"], mask: jax.Array | None) -> Float[Array, "B T D"]:
        """Returns the encoder's stream after this layer."""
        if self.norm_first:
            x = x + self.attention(self.attention_norm(x), mask=mask)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x, mask=mask))
        return self.mlp_norm(x + self.mlp(x))

    def step(
        self,
        x: Float[Array, "B T D"],
        layer: KeysValues,
        memory: KeysValues,
        mask: jax.Array | None,
        length: jax.Array,
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """Returns the decoder's stream after this layer, and the layer's keys and values with these tokens."""
        assert self.cross is not None and self.cross_norm is not None
        if self.norm_first:
            y, layer = attend_extended(self.attention, self.attention_norm(x), layer, length)
            x = x + y
            x = x + self.cross.attend(self.cross.queries(self.cross_norm(x)), memory, mask=mask)
            return x + self.mlp(self.mlp_norm(x)), layer
        y, layer = attend_extended(self.attention, x, layer, length)
        x = self.attention_norm(x + y)
        x = self.cross_norm(x + self.cross.attend(self.cross.queries(x), memory, mask=mask))
        return self.mlp_norm(x + self.mlp(x)), layer


class Bart(Model):
    """An encoder-decoder of BART's kind.

    Args:
        config: its shape.
        dtype: of activations, and of the parameters that `rngs` draws.
        rngs: None leaves the parameters abstract, for a loader to fill.
    """

    chooses_cache = False
    stacks = ("blocks", "decoder")

    def __init__(self, config: BartConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        super().__init__(config, dtype)
        self.writing = Writing(first=(config.start_token,))
        made = {"dtype": dtype, "rngs": rngs}
        features, family = config.features, config.family
        self.words = Embedding(config.vocab_size, features, **made)
        self.conv1 = self.conv2 = None
        if config.mel_bins:
            window = {"kernel_size": (3,), "padding": 1, "dtype": dtype, "param_dtype": dtype}
            first = made_module(lambda r: Conv(config.mel_bins, features, rngs=r, **window), rngs)
            second = made_module(lambda r: Conv(features, features, strides=2, rngs=r, **window), rngs)
            self.conv1, self.conv2 = nnx.data(first), nnx.data(second)
        offset, learned = config.offset, not config.sinusoidal
        self.positions = Embedding(config.positions + offset, features, **made) if learned else None
        self.decoder_positions = Embedding(config.decoder_positions + offset, features, **made) if learned else None
        after, last = family in _NORM_BEHIND_EMBEDDING, family in _NORM_FIRST
        self.embedding_norm = LayerNorm(features, **made) if after else None
        self.decoder_embedding_norm = LayerNorm(features, **made) if after else None
        self.blocks: nnx.List[Any] | Stack = nnx.List(
            [Block(config, cross=False, **made) for _ in range(config.layers)]
        )
        self.decoder: nnx.List[Any] | Stack = nnx.List(
            [Block(config, cross=True, **made) for _ in range(config.decoder_layers)]
        )
        self.norm = LayerNorm(features, **made) if last else None
        self.decoder_norm = LayerNorm(features, **made) if last else None
        row = (1, config.vocab_size)
        self.logits_bias = parameter(jax.nn.initializers.zeros, row, dtype, rngs) if config.logits_bias else None

    def __call__(
        self, inputs: Int[Array, "B S"] | Float[Array, "B S M"], decoder_tokens: Int[Array, "B T"], mask: Any = None
    ) -> Float[Array, "B T V"]:
        """Returns float32 logits behind each of the decoder's tokens.

        Args:
            inputs: what the encoder reads; see `encode`.
            decoder_tokens: that the decoder has written so far, `config.start_token` first.
            mask: `[B, S]`, zero or False where a token is padding (on either side); None: all count.

        Differentiable in the float weights.
        """
        memory = self.encode(inputs, mask)
        return self.decode(decoder_tokens, self.start(memory, mask, slots=decoder_tokens.shape[1]))[0]

    def example(self) -> tuple[Any, ...]:
        """See `Model.example`."""
        config = self.config
        tokens = sample_tokens(config.vocab_size, min(config.positions, config.decoder_positions))
        if not config.mel_bins:
            return tokens, tokens[:, :8]
        return sample_images((2 * min(config.positions, 16), config.mel_bins), 1)[..., 0], tokens[:, :8]

    def encode(self, inputs: Int[Array, "B S"] | Float[Array, "B S M"], mask: Any = None) -> Float[Array, "B _ D"]:
        """Returns the encoder's states; what stands in the rows of padding means nothing.

        Args:
            inputs: tokens; for Whisper, log-mel frames (`trustcore.ops.log_mel`), of which two make one state.
            mask: of tokens. Whisper has none: silence is a sound.

        Raises:
            ModelError: there are more of them than the model reads.
        """
        x = self._embedded(inputs)
        length = x.shape[1]
        if length > self.config.positions:
            raise ModelError(f"{length} positions are more than the {self.config.positions} this encoder reads.")
        x = x + self._places(self.positions, jnp.zeros((), jnp.int32), length)
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        visible = key_mask(mask)
        x, _ = run_blocks(self.blocks, lambda block, x, _: (run(block, x, visible), None), x)
        return x if self.norm is None else self.norm(x)

    @property
    def reads(self) -> Reads:
        """See `Writer`."""
        return "sound" if self.config.mel_bins else "text"

    @property
    def limits(self) -> tuple[int, int]:
        """See `Writer`; of sound, in samples."""
        sound = self.config.positions * _FRAMES * HOP
        return sound if self.config.mel_bins else self.config.positions, self.config.decoder_positions

    def encoder_input(self, prompts: Sequence[Any]) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Writer`.

        Raises:
            ModelError: a sound is no row of samples, or no log-mel frames of this model.
        """
        if not self.config.mel_bins:
            return rows_of(prompts, self.config.positions)
        return np.concatenate([self._frames(np.asarray(sound, np.float32)) for sound in prompts]), None

    def _frames(self, sound: np.ndarray) -> np.ndarray:
        """Returns log-mel frames, `[1, F, M]`: the sound is padded with silence to the length that the model reads."""
        frames, bins = self.config.positions * _FRAMES, self.config.mel_bins
        if sound.shape == (frames, bins):
            return sound[None]
        if sound.ndim != 1 or not 0 < sound.size <= frames * HOP:
            raise ModelError(
                f"the sound is an array {list(sound.shape)}; expected up to {frames * HOP} samples, or log-mel frames "
                f"[{frames}, {bins}]."
            )
        return np.asarray(log_mel(jnp.asarray(np.pad(sound, (0, frames * HOP - sound.size)))[None], bins))

    def begin(self, source: Any, mask: Any, *, batch: int, slots: int, dtype: Any) -> DecoderState:
        """See `Writer`; there may be more slots than the decoder has positions."""
        return self._start(self.encode(source, mask), mask, slots)

    def step(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], kept: DecoderState
    ) -> tuple[Float[Array, "B V"], DecoderState]:
        """See `Writer`; rows grow together, so all of `lengths` that are not 0 are the same."""
        logits, after = self.decode(tokens, kept)
        return behind_last(logits, lengths)[:, 0], after._replace(length=kept.length + jnp.max(lengths))

    def start(self, memory: Float[Array, "B S D"], mask: Any = None, *, slots: int) -> DecoderState:
        """Returns the state of a decoder that has written nothing yet.

        Args:
            memory: what `encode` returned.
            mask: as there.
            slots: tokens there is to be room for.

        Raises:
            ModelError: the model does not write so many.
        """
        config = self.config
        if slots > config.decoder_positions:
            raise ModelError(f"{slots} tokens are more than the {config.decoder_positions} this decoder writes.")
        return self._start(memory, mask, slots)

    def _start(self, memory: jax.Array, mask: Any, slots: int) -> DecoderState:
        config = self.config
        size = config.features // config.decoder_heads
        empty = empty_layer(memory.shape[0], slots, config.decoder_heads, size, self.dtype)
        return DecoderState.of_blocks(self.decoder, empty, memory, key_mask(mask))

    def decode(self, tokens: Int[Array, "B T"], state: DecoderState) -> tuple[Float[Array, "B T V"], DecoderState]:
        """Returns float32 logits behind each token, and the state; tokens follow those that the state has seen."""
        x = self._words(tokens) + self._places(self.decoder_positions, state.length, tokens.shape[1])
        x = x if self.decoder_embedding_norm is None else self.decoder_embedding_norm(x)
        x, layers = state.through(self.decoder, lambda block, *given: _step(block, *given, state.mask, state.length), x)
        x = x if self.decoder_norm is None else self.decoder_norm(x)
        logits = self.words.unembed(x).astype(jnp.float32)
        if self.logits_bias is not None:
            logits = logits + self.logits_bias.get_value().astype(jnp.float32)[None]
        return logits, state._replace(layers=layers, length=state.length + tokens.shape[1])

    def _embedded(self, inputs: jax.Array) -> jax.Array:
        if self.conv1 is None or self.conv2 is None:
            return self._words(inputs)
        act = activation("gelu")
        return act(self.conv2(act(self.conv1(inputs.astype(self.dtype)))))

    def _words(self, tokens: jax.Array) -> jax.Array:
        x = self.words(tokens).astype(self.dtype)
        return x * jnp.asarray(math.sqrt(self.config.features), x.dtype) if self.config.scaled else x

    def _places(self, table: Embedding | None, start: jax.Array, length: int) -> jax.Array:
        places = start + jnp.arange(length, dtype=jnp.int32)
        if table is None:
            return sinusoids(places, self.config.features).astype(self.dtype)[None]
        return table(places + self.config.offset).astype(self.dtype)[None]


@jax.jit
def _step(block: Block, *args: Any) -> Any:
    return block.step(*args)


def _attention(path: str, stored: str) -> tuple[Rule, ...]:
    parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    return tuple(r for ours, theirs in parts.items() for r in linear(f"{path}.{ours}", f"{stored}.{theirs}"))


_BLOCK = (
    *_attention("attention", "self_attn"),
    *norm("attention_norm", "self_attn_layer_norm"),
    *linear("mlp.up", "fc1"),
    *linear("mlp.down", "fc2"),
    *norm("mlp_norm", "final_layer_norm"),
)
_DECODER_BLOCK = (*_BLOCK, *_attention("cross", "encoder_attn"), *norm("cross_norm", "encoder_attn_layer_norm"))


def names(config: BartConfig) -> Names:
    """Returns the names of the weights in checkpoints."""
    copies = ("shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight")
    first = copies[1] if config.family == "whisper" else copies[0]
    return Names(
        (
            plain("words.table", first, others=(*(name for name in copies if name != first), "proj_out.weight")),
            *conv("conv1", "encoder.conv1"),
            *conv("conv2", "encoder.conv2"),
            plain("positions.table", "encoder.embed_positions.weight"),
            plain("decoder_positions.table", "decoder.embed_positions.weight"),
            *norm("embedding_norm", "encoder.layernorm_embedding"),
            *norm("decoder_embedding_norm", "decoder.layernorm_embedding"),
            *norm("norm", "encoder.layer_norm"),
            *norm("decoder_norm", "decoder.layer_norm"),
            *numbered(config.decoder_layers, under("decoder.{}.", "decoder.layers.{}.", _DECODER_BLOCK)),
        ),
        under("blocks.{}.", "encoder.layers.{}.", _BLOCK),
        (plain("logits_bias", "final_logits_bias"),),
        prefix="model.",
        prefixes=("",),
        ignored=("*.version", "classification_head.*"),
    )


FAMILY = Family(BartConfig.from_hugging_face, Bart, names)
