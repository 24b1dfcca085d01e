"""What a decoder is made of, in the project's own words.

`DecoderConfig` is read from GGUF metadata or Hugging Face's config.json by the entries of `trustcore.models.families`,
where the names of those files end. Most families set a few of its switches; the others stand at what Llama has.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

from trustcore.errors import ModelError
from trustcore.models.values import LARGEST
from trustcore.nn.attention import QKNorm
from trustcore.nn.experts import ExpertsConfig
from trustcore.nn.latent import LatentConfig
from trustcore.ops.activate import ACTIVATIONS
from trustcore.ops.rope import RopeConfig


class LayerConfig(NamedTuple):
    """What may differ from layer to layer: window or chunk, rotary positions (None: none), whether it has experts."""

    window: int | None
    rope: RopeConfig | None
    experts: bool
    chunk: int | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder.

    Attributes:
        vocab_size: V.
        features: D, width of the residual stream.
        layers: L.
        heads: N query heads.
        kv_heads: K key-value heads; divides N.
        head_dim: H.
        hidden: F, width of the feed-forward layer.
        context: tokens the model was made for.
        rope: rotary positions; None: there are none.
        norm_eps: epsilon of the norms.
        tied: whether the output layer is the embedding table.
        qkv_bias: whether queries, keys and values have a bias.
        out_bias: whether attention's output product has one.
        mlp_bias: whether the feed-forward products have one.
        window: tokens a query sees, itself included; None: all.
        family: the entry of `trustcore.models.families.FAMILIES` it was read as.
        norm: "rms" or "layer", of the stream.
        norm_bias: whether layer norms have a bias.
        norm_place: of a layer's norms: "before" its products, "after" them, or "both".
        last_norm: whether there is a norm before the output layer.
        embedding_norm: whether there is one behind the embedding.
        parallel: whether attention and feed-forward read the same stream and are added together.
        shared_norm: with `parallel`, whether one norm serves both.
        qk_norm: of queries and keys; see `trustcore.nn.Attention`. "turned" is of the layers that have positions.
        activation: of the feed-forward layer, a name in `trustcore.ops.activate.ACTIVATIONS`.
        gated: whether the feed-forward layer has a gate.
        learned_positions: rows of a table that is added to the embedding; 0: there is none.
        position_offset: row of that table for position 0.
        alibi: what multiplies the slopes of ALiBi; None: there are none.
        windowed: which layers have the window; None: all of them.
        chunk: positions of a chunk, of which a query sees its own one alone; None: there are none.
        chunked: which layers have chunks; None: all of them.
        temperature: of the queries in layers without positions; see `trustcore.nn.Attention`.
        positioned: which layers have positions; None: all of them.
        window_rope: rotary positions of the layers with a window; None: those of the others.
        score_cap, logit_cap: soft caps of scores and logits; None: none.
        embedding_scale, residual_scale, logit_scale: factors of embeddings, of what a layer adds to the stream, of
            logits.
        attention_scale: of the scores; None: `H ** -0.5`.
        sinks: whether heads have an attention sink.
        experts: of the layers that have them; None: no layer has.
        expert_layers: which layers have experts; None: all of them.
        latent: sizes of latent attention; None: keys and values are made directly. `head_dim` is then that of the keys.
        latent_norm_eps: epsilon of the norms of latents.
    """

    vocab_size: int
    features: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    context: int
    rope: RopeConfig | None
    norm_eps: float = 1e-5
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    family: str = "llama"
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_place: Literal["before", "after", "both"] = "before"
    last_norm: bool = True
    embedding_norm: bool = False
    parallel: bool = False
    shared_norm: bool = False
    qk_norm: QKNorm | None = None
    activation: str = "silu"
    gated: bool = True
    learned_positions: int = 0
    position_offset: int = 0
    alibi: float | None = None
    windowed: tuple[bool, ...] | None = None
    chunk: int | None = None
    chunked: tuple[bool, ...] | None = None
    temperature: tuple[float, float] | None = None
    positioned: tuple[bool, ...] | None = None
    window_rope: RopeConfig | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_scale: float | None = None
    sinks: bool = False
    experts: ExpertsConfig | None = None
    expert_layers: tuple[bool, ...] | None = None
    latent: LatentConfig | None = None
    latent_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("vocab_size", "features", "layers", "heads", "kv_heads", "head_dim", "hidden", "context"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 < value < LARGEST:
                raise ModelError(f"config: {name} is {value!r}; it must be a positive integer.")
        if self.heads % self.kv_heads:
            raise ModelError(f"config: {self.kv_heads} key-value heads do not divide {self.heads} query heads.")
        for rope in self.ropes:
            if rope.size > self.head_dim:
                raise ModelError(f"config: rope turns {rope.size} channels of heads that have {self.head_dim}.")
        if self.window is not None and self.window <= 0:
            raise ModelError(f"config: the attention window is {self.window}; it must be positive, or None.")
        if self.chunk is not None and self.chunk <= 0:
            raise ModelError(f"config: attention chunks have {self.chunk} positions; at least one, or None.")
        if self.temperature is not None and not self.temperature[0] > 0:
            raise ModelError(
                f"config: the temperature of queries steps every {self.temperature[0]} positions; above 0."
            )
        if not (math.isfinite(self.norm_eps) and self.norm_eps >= 0):
            raise ModelError(f"config: norm_eps is {self.norm_eps}; it must be a small number, not negative.")
        if self.activation not in ACTIVATIONS:
            raise ModelError(f"config: activation is {self.activation!r}; choose from {', '.join(ACTIVATIONS)}.")
        if self.shared_norm and not self.parallel:
            raise ModelError("config: one norm for attention and feed-forward needs them to be parallel.")
        for name in ("score_cap", "logit_cap", "attention_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ModelError(f"config: {name} is {value}; it must be positive, or None.")
        for name in ("windowed", "chunked", "positioned", "expert_layers"):
            value = getattr(self, name)
            if value is not None and len(value) != self.layers:
                raise ModelError(f"config: {name} speaks of {len(value)} layers; the model has {self.layers}.")
        if self.learned_positions and self.learned_positions - self.position_offset < self.context:
            raise ModelError(
                f"config: a table of {self.learned_positions} positions, the first {self.position_offset} unused, does "
                f"not reach a context of {self.context}."
            )

    def layer(self, index: int) -> LayerConfig:
        """Returns what layer `index` has of what differs between layers."""
        windowed = self.window is not None and (self.windowed is None or self.windowed[index])
        rope = self.window_rope if windowed and self.window_rope is not None else self.rope
        positioned = self.positioned is None or self.positioned[index]
        experts = self.experts is not None and (self.expert_layers is None or self.expert_layers[index])
        chunked = self.chunked is None or self.chunked[index]
        return LayerConfig(
            window=self.window if windowed else None,
            rope=rope if positioned else None,
            experts=experts,
            chunk=self.chunk if chunked else None,
        )

    @property
    def expert_count(self) -> int:
        """E, 0 where there are no experts."""
        return 0 if self.experts is None else self.experts.count

    @property
    def expert_hidden(self) -> int:
        """F of an expert, 0 where there are none."""
        return 0 if self.experts is None else self.experts.hidden

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotary positions that layers use, each once."""
        found = (self.rope, self.window_rope if self.window is not None else None)
        return tuple(dict.fromkeys(rope for rope in found if rope is not None))

    @staticmethod
    def from_gguf(
        metadata: Mapping[str, Any],
        *,
        vocab_size: int,
        tied: bool,
        rope_divisors: tuple[float, ...] = (),
        long_divisors: tuple[float, ...] = (),
        tensors: Collection[str] = (),
    ) -> DecoderConfig:
        """Returns the configuration that GGUF metadata describe.

        Args:
            metadata: key-value pairs of the file.
            vocab_size: rows of the embedding table, which the metadata need not tell.
            tied: whether the file has no output table of its own.
            rope_divisors: contents of its `rope_freqs.weight` or `rope_factors_short.weight`, if there.
            long_divisors: contents of its `rope_factors_long.weight`, if there.
            tensors: names of its tensors, which tell what the metadata of some architectures do not.

        Raises:
            ModelError: the architecture is not supported, or a value is missing or out of range.
        """
        from trustcore.models.families import read_gguf  # families make configurations: they are above this file

        divisors = (rope_divisors, long_divisors)
        return read_gguf(metadata, vocab_size=vocab_size, tied=tied, divisors=divisors, tensors=tensors)

    @staticmethod
    def from_hugging_face(config: Mapping[str, Any]) -> DecoderConfig:
        """Returns the configuration that a parsed `config.json` describes.

        Raises:
            ModelError: the model type is not supported, or a value is missing or out of range.
        """
        from trustcore.models.families import read_hugging_face

        return read_hugging_face(config)
