"""What a decoder is made of, read from GGUF metadata or from Hugging Face's config.json.

The names of those files end here: `DecoderConfig` speaks the project's own words. A family is an entry of `FAMILIES`;
a checkpoint of another family is refused by name. Values come from files, so each is checked where it is read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from trustcore.errors import ModelError
from trustcore.models.values import LARGEST, Values
from trustcore.ops.rope import RopeConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """What tells one family of the decoder's shape from another.

    Attributes:
        name: GGUF's `general.architecture` and Hugging Face's `model_type`.
        qkv_bias: whether queries, keys and values always have a bias; None: the file says.
        gguf_interleaved: whether GGUF files hold query and key rows for interleaved rotary pairs.
        gguf: whether GGUF files use this name (Mistral's call themselves "llama").
    """

    name: str
    qkv_bias: bool | None = None
    gguf_interleaved: bool = False
    gguf: bool = True


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("llama", gguf_interleaved=True),
        Family("mistral", gguf=False),
        Family("qwen2", qkv_bias=True),
    )
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder of the Llama family.

    Attributes:
        vocab_size: V.
        features: D, width of the residual stream.
        layers: L.
        heads: N query heads.
        kv_heads: K key-value heads; divides N.
        head_dim: H.
        hidden: F, width of the feed-forward layer.
        context: tokens the model was made for.
        rope: rotary positions.
        norm_eps: epsilon of the norms.
        tied: whether the output layer is the embedding table.
        qkv_bias: whether queries, keys and values have a bias.
        out_bias: whether attention's output product has one.
        mlp_bias: whether the feed-forward products have one.
        window: tokens a query sees, itself included; None: all.
        family: the entry of `FAMILIES` it was read as.
    """

    vocab_size: int
    features: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    context: int
    rope: RopeConfig
    norm_eps: float = 1e-5
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    family: str = "llama"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "features", "layers", "heads", "kv_heads", "head_dim", "hidden", "context"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 < value < LARGEST:
                raise ModelError(f"config: {name} is {value!r}; it must be a positive integer.")
        if self.heads % self.kv_heads:
            raise ModelError(f"config: {self.kv_heads} key-value heads do not divide {self.heads} query heads.")
        if self.rope.size > self.head_dim:
            raise ModelError(f"config: rope turns {self.rope.size} channels of heads that have {self.head_dim}.")
        if self.window is not None and self.window <= 0:
            raise ModelError(f"config: the attention window is {self.window}; it must be positive, or None.")
        if not (math.isfinite(self.norm_eps) and self.norm_eps >= 0):
            raise ModelError(f"config: norm_eps is {self.norm_eps}; it must be a small number, not negative.")

    @staticmethod
    def from_gguf(
        metadata: Mapping[str, Any], *, vocab_size: int, tied: bool, rope_divisors: tuple[float, ...] = ()
    ) -> DecoderConfig:
        """Returns the configuration that GGUF metadata describe.

        Args:
            metadata: key-value pairs of the file.
            vocab_size: rows of the embedding table, which the metadata need not tell.
            tied: whether the file has no output table of its own.
            rope_divisors: contents of its `rope_freqs.weight`, if there.

        Raises:
            ModelError: the architecture is not supported, or a value is missing or out of range.
        """
        architecture = metadata.get("general.architecture")
        family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
        if family is None or not family.gguf:
            known = ", ".join(f.name for f in FAMILIES.values() if f.gguf)
            raise ModelError(f"general.architecture is {architecture!r}; supported GGUF architectures: {known}.")
        values = Values({k.removeprefix(f"{architecture}."): v for k, v in metadata.items()}, "metadata")
        heads = values.integer("attention.head_count")
        features = values.integer("embedding_length")
        head_dim = values.integer("attention.key_length", features // heads)
        if values.integer("attention.value_length", head_dim) != head_dim:
            raise ModelError("attention.value_length differs from attention.key_length; such heads are not supported.")
        context = values.integer("context_length")
        kind = values.text("rope.scaling.type", "none")
        if kind not in ("none", "linear", "yarn"):
            raise ModelError(f"rope.scaling.type is {kind!r}; supported: none, linear, yarn.")
        factor = values.number("rope.scaling.factor", values.number("rope.scale_linear", 1.0))
        if kind == "none" and factor != 1.0:
            kind = "linear"  # files from before rope.scaling.type gave the factor alone
        rope = RopeConfig(
            size=values.integer("rope.dimension_count", head_dim),
            theta=values.number("rope.freq_base", 10000.0),
            interleaved=family.gguf_interleaved,
            scaling=kind,  # type: ignore[arg-type]
            factor=factor if kind != "none" else 1.0,
            original_context=values.integer("rope.scaling.original_context_length", context),
            beta_fast=values.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=values.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=_yarn_magnitude(values, factor) if kind == "yarn" else None,
            divisors=rope_divisors,
        )
        window = values.integer("attention.sliding_window", 0, least=0)
        return DecoderConfig(
            vocab_size=vocab_size,
            features=features,
            layers=values.integer("block_count"),
            heads=heads,
            kv_heads=values.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            hidden=values.integer("feed_forward_length"),
            context=context,
            rope=rope,
            norm_eps=values.number("attention.layer_norm_rms_epsilon", 1e-5),
            tied=tied,
            qkv_bias=bool(family.qkv_bias),
            window=window or None,
            family=family.name,
        )

    @staticmethod
    def from_hugging_face(config: Mapping[str, Any]) -> DecoderConfig:
        """Returns the configuration that a parsed `config.json` describes.

        Raises:
            ModelError: the model type is not supported, or a value is missing or out of range.
        """
        model_type = config.get("model_type")
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None:
            raise ModelError(f"config.json: model_type is {model_type!r}; supported: {', '.join(FAMILIES)}.")
        values = Values(config, "config.json")
        activation = values.text("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ModelError(f"config.json: hidden_act is {activation!r}; this family has silu.")
        heads = values.integer("num_attention_heads")
        features = values.integer("hidden_size")
        head_dim = values.integer("head_dim", features // heads)
        context = values.integer("max_position_embeddings", 2048)
        windowed = config.get("use_sliding_window", family.name != "qwen2")
        bias = values.flag("attention_bias", False)
        return DecoderConfig(
            vocab_size=values.integer("vocab_size"),
            features=features,
            layers=values.integer("num_hidden_layers"),
            heads=heads,
            kv_heads=values.integer("num_key_value_heads", heads),
            head_dim=head_dim,
            hidden=values.integer("intermediate_size"),
            context=context,
            rope=_hugging_face_rope(values, head_dim, context),
            norm_eps=values.number("rms_norm_eps", 1e-6),
            tied=values.flag("tie_word_embeddings", False),
            qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
            out_bias=bias and family.qkv_bias is None,
            mlp_bias=values.flag("mlp_bias", False),
            window=(values.integer("sliding_window", 0, least=0) or None) if windowed else None,
            family=family.name,
        )


def _hugging_face_rope(values: Values, head_dim: int, context: int) -> RopeConfig:
    given = values.get("rope_parameters", values.get("rope_scaling")) or {}
    if not isinstance(given, Mapping):
        raise ModelError(f"config.json: rope_scaling is {given!r}; expected an object or null.")
    scaling = Values(given, "config.json: rope_scaling")
    kind = scaling.text("rope_type", scaling.text("type", "none"))
    kind = "none" if kind == "default" else kind
    if kind not in ("none", "linear", "dynamic", "yarn", "llama3"):
        raise ModelError(
            f"config.json: rope_scaling type is {kind!r}; supported: default, linear, dynamic, yarn, llama3."
        )
    factor = scaling.number("factor", 1.0)
    size = int(head_dim * values.number("partial_rotary_factor", 1.0))
    attention_factor = scaling.number("attention_factor", 0.0) or None
    if kind == "yarn" and attention_factor is None and scaling.get("mscale_all_dim"):
        share = _magnitude(factor, scaling.number("mscale", 1.0))
        attention_factor = share / _magnitude(factor, scaling.number("mscale_all_dim", 1.0))
    return RopeConfig(
        size=size,
        theta=scaling.number("rope_theta", values.number("rope_theta", 10000.0)),
        scaling=kind,  # type: ignore[arg-type]
        factor=factor if kind != "none" else 1.0,
        original_context=scaling.integer("original_max_position_embeddings", context),
        low_frequency=scaling.number("low_freq_factor", 1.0),
        high_frequency=scaling.number("high_freq_factor", 4.0),
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        attention_factor=attention_factor,
    )


def _yarn_magnitude(values: Values, factor: float) -> float:
    """GGUF's `attn_factor` multiplies YaRN's own magnitude."""
    return values.number("rope.scaling.attn_factor", 1.0) * _magnitude(factor, 1.0)


def _magnitude(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
