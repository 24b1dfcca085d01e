"""The table of decoder families: for each a way to read its configuration, and the names of its weights.

One file for families that share names; `FAMILIES` has them by Hugging Face's `model_type`. Adding a brand of a shape
that exists is an entry of one of these files; `docs/models.md` is made from the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from trustcore.errors import ModelError
from trustcore.models.config import DecoderConfig
from trustcore.models.families import deepseek, experts, gemma, gpt, llama, llama4
from trustcore.models.families.family import Family, Gguf
from trustcore.models.families.fields import magnitude
from trustcore.models.values import Values
from trustcore.ops.rope import RopeConfig

__all__ = ["FAMILIES", "Family", "Gguf", "gguf_of", "read_gguf", "read_hugging_face"]

FAMILIES: Mapping[str, Family] = {
    family.name: family for file in (llama, gemma, experts, llama4, deepseek, gpt) for family in file.FAMILIES
}


def read_hugging_face(config: Mapping[str, Any]) -> DecoderConfig:
    """See `DecoderConfig.from_hugging_face`."""
    model_type = config.get("model_type")
    inner = config.get("text_config")
    if isinstance(inner, Mapping) and inner.get("model_type") in FAMILIES:  # the text model of one that sees, too
        config = {"tie_word_embeddings": config.get("tie_word_embeddings"), **inner}
        model_type = config["model_type"]
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(f"config.json: model_type is {model_type!r}; supported: {', '.join(FAMILIES)}.")
    return DecoderConfig(**family.read(Values(config, "config.json")), family=family.name)


def read_gguf(
    metadata: Mapping[str, Any],
    *,
    vocab_size: int,
    tied: bool,
    divisors: tuple[tuple[float, ...], tuple[float, ...]] = ((), ()),
    tensors: Collection[str] = (),
) -> DecoderConfig:
    """See `DecoderConfig.from_gguf`; `divisors` of rotary frequencies: all, or of short and of long contexts."""
    architecture = metadata.get("general.architecture")
    known = {(f.gguf.name, f.gguf.experts): f for f in FAMILIES.values() if f.gguf is not None and f.gguf.own}
    names = dict.fromkeys(name for name, _ in known)
    if not isinstance(architecture, str) or architecture not in names:
        raise ModelError(f"general.architecture is {architecture!r}; supported GGUF architectures: {', '.join(names)}.")
    values = Values({k.removeprefix(f"{architecture}."): v for k, v in metadata.items()}, "metadata")
    with_experts = values.integer("expert_count", 0, least=0) > 0
    family = known.get((architecture, with_experts))
    if family is None or family.gguf is None:
        is_, are = ("has", "none") if with_experts else ("has no", "some")
        raise ModelError(f"the file of architecture {architecture!r} {is_} experts (expert_count); others have {are}.")
    heads = values.integer("attention.head_count")
    features = values.integer("embedding_length")
    head_dim = values.integer("attention.key_length", features // heads)
    if values.integer("attention.value_length", head_dim) != head_dim and "attention.kv_lora_rank" not in values:
        raise ModelError("attention.value_length differs from attention.key_length; such heads are not supported.")
    context = values.integer("context_length")
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "features": features,
        "layers": values.integer("block_count"),
        "heads": heads,
        "kv_heads": values.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden": values.integer("feed_forward_length"),
        "context": context,
        "rope": _gguf_rope(values, head_dim, context, family.gguf, divisors),
        "norm_eps": values.number(
            "attention.layer_norm_rms_epsilon", values.number("attention.layer_norm_epsilon", 1e-5)
        ),
        "tied": tied,
        "window": values.integer("attention.sliding_window", 0, least=0) or None,
        "family": family.name,
    }
    return DecoderConfig(**{**fields, **family.gguf.read(values, fields), **family.gguf.seen(tensors)})


def _gguf_rope(
    values: Values,
    head_dim: int,
    context: int,
    file: Gguf,
    divisors: tuple[tuple[float, ...], tuple[float, ...]],
) -> RopeConfig:
    kind = values.text("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(f"rope.scaling.type is {kind!r}; supported: none, linear, yarn.")
    factor = values.number("rope.scaling.factor", values.number("rope.scale_linear", 1.0))
    if kind == "none" and factor != 1.0:
        kind = "linear"  # files from before rope.scaling.type gave the factor alone
    attention_factor = None
    if kind == "yarn":  # attn_factor multiplies YaRN's own magnitude
        attention_factor = values.number("rope.scaling.attn_factor", 1.0) * magnitude(factor, 1.0)
    plain, long = divisors
    if long:
        kind, attention_factor = "longrope", values.number("rope.scaling.attn_factor", 1.0)
    return RopeConfig(
        size=values.integer("rope.dimension_count", head_dim),
        theta=values.number("rope.freq_base", 10000.0),
        interleaved=file.interleaved,
        scaling=kind,  # type: ignore[arg-type]
        factor=factor if kind in ("linear", "yarn") else 1.0,
        original_context=values.integer("rope.scaling.original_context_length", context),
        beta_fast=values.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=values.number("rope.scaling.yarn_beta_slow", 1.0),
        truncate=kind != "yarn" or file.whole_pairs,
        attention_factor=attention_factor,
        divisors=plain,
        long_divisors=long,
    )


def gguf_of(config: DecoderConfig) -> Gguf:
    """Returns how GGUF files hold a decoder.

    Raises:
        ModelError: they hold its family in no way that is supported.
    """
    found = FAMILIES[config.family].gguf
    if found is None:
        known = ", ".join(f.name for f in FAMILIES.values() if f.gguf is not None)
        raise ModelError(f"{config.family} has no place in GGUF files here; families that have one: {known}.")
    return found if found.variant is None else dataclasses.replace(found, names=found.variant(config))
