"""Llama 4, the text model: chunks and rotary positions in most layers, in the others neither, and experts.

Layers with positions see the chunk of the query's position alone and normalize heads after they have turned; those
without see everything, their queries growing slowly with the position. A sigmoid of the router scales what an expert
reads; one more expert reads every token. Meta AI, Llama 4 model card, 2025; the scale of queries: arXiv 2501.19399.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trustcore.errors import ModelError
from trustcore.models.config import DecoderConfig
from trustcore.models.families import gguf_experts
from trustcore.models.families.described import described
from trustcore.models.families.experts import shared_expert
from trustcore.models.families.family import Family
from trustcore.models.families.fields import common, over_layers, positioned_of
from trustcore.models.families.llama import NORMS, OUT, QKV, llama_names
from trustcore.models.name_map import fused, kernel, plain
from trustcore.models.values import Values
from trustcore.nn.experts import ExpertsConfig

_DENSE = tuple(kernel(f"mlp.{part}.kernel", f"feed_forward.{part}_proj.weight") for part in ("gate", "up", "down"))
_EXPERTS = (
    kernel("mlp.router.kernel", "feed_forward.router.weight"),
    fused(["mlp.experts.gate.kernel", "mlp.experts.up.kernel"], "feed_forward.experts.gate_up_proj", rows_first=False),
    plain("mlp.experts.down.kernel", "feed_forward.experts.down_proj"),
    *shared_expert("feed_forward.shared_expert"),
)
_DEFAULTS = {"head_dim": 128, "max_position_embeddings": 131072, "attention_chunk_size": 8192}
_TYPES = ("full_attention", "chunked_attention")


def _read(values: Values) -> Mapping[str, Any]:
    values = values.with_defaults(**_DEFAULTS)
    fields = common(values, default_eps=1e-5, rope={"theta": 500000.0, "interleaved": True})
    layers, hidden = fields["layers"], fields["hidden"]
    positioned = positioned_of(values, layers)
    types = values.sequence("layer_types", str, layers)
    strange = sorted(set(types or ()) - set(_TYPES))
    if strange:
        raise ModelError(f"config.json: layer_types has {strange[0]!r}; known: {', '.join(_TYPES)}.")
    chunked = positioned if types is None else over_layers(layers, lambda i: types[i] == "chunked_attention")
    step = values.integer("interleave_moe_layer_step", 1)
    given = values.get("moe_layers")
    among = {i for i in given if isinstance(i, int)} if isinstance(given, list) else None
    return {
        **fields,
        "hidden": values.integer("intermediate_size_mlp", 16384),
        "positioned": positioned,
        "chunk": values.integer("attention_chunk_size") if values.get("attention_chunk_size") else None,
        "chunked": chunked,
        "qk_norm": "turned" if values.flag("use_qk_norm", True) else None,
        "temperature": _temperature(values),
        "experts": ExpertsConfig(
            values.integer("num_local_experts", 16),
            values.integer("num_experts_per_tok", 1),
            hidden,
            scoring="sigmoid",
            scale_inputs=True,
            shared=hidden,
        ),
        "expert_layers": over_layers(layers, lambda i: (i + 1) % step == 0 if among is None else i in among),
    }


def _temperature(values: Values) -> tuple[float, float] | None:
    tuned = values.get("attn_temperature_tuning")
    if tuned is not None and not isinstance(tuned, int):  # the first files have a 4 that means true
        raise ModelError(f"config.json: attn_temperature_tuning is {tuned!r}; expected true or false.")
    if tuned is not None and not tuned:
        return None
    return values.number("floor_scale", 8192.0), values.number("attn_scale", 0.1)


def _describe(config: DecoderConfig) -> dict[str, Any]:
    experts = config.experts
    assert experts is not None
    every = (True,) * config.layers
    floor, share = config.temperature or (8192.0, 0.1)
    chunked = config.chunked or every
    return {
        **described(config),
        "intermediate_size": experts.hidden,
        "intermediate_size_mlp": config.hidden,
        "no_rope_layers": [int(holds) for holds in config.positioned or every],
        "attention_chunk_size": config.chunk,
        "layer_types": [_TYPES[holds] for holds in chunked],
        "use_qk_norm": config.qk_norm is not None,
        "attn_temperature_tuning": config.temperature is not None,
        "floor_scale": int(floor) if floor == int(floor) else floor,
        "attn_scale": share,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.active,
        "moe_layers": [i for i, holds in enumerate(config.expert_layers or every) if holds],
    }


FAMILIES = (
    Family(
        "llama4_text",
        "Llama 4 (text)",
        "Llama4ForCausalLM",
        _read,
        _describe,
        llama_names((*NORMS, *QKV, *OUT, *_DENSE, *_EXPERTS)),
        interleaved=True,
        gguf=gguf_experts.LLAMA4,
    ),
)
