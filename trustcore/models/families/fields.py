"""Reading config.json: what most families call the same, their rotary positions, and patterns over layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from trustcore.errors import ModelError
from trustcore.models.values import Values
from trustcore.ops.rope import RopeConfig

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "relu_squared": "relu2",
}
SCALINGS = ("none", "linear", "dynamic", "yarn", "llama3")
_MOST_LAYERS = 1 << 16  # bounds what a pattern over layers takes


def common(
    values: Values,
    *,
    tied: bool = False,
    activation: str = "hidden_act",
    eps: str = "rms_norm_eps",
    default_eps: float = 1e-6,
    rope: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the fields that Llama's config.json has, and those that are named after it.

    Args:
        values: of the file.
        tied: what holds where the file does not say whether the output layer is the embedding.
        activation: the key of the activation.
        eps: the key of the norms' epsilon.
        default_eps: where that is not there.
        rope: options of `rope_of`.
    """
    heads, features = values.integer("num_attention_heads"), values.integer("hidden_size")
    head_dim = values.integer("head_dim", features // heads)
    context = values.integer("max_position_embeddings", 2048)
    bias = values.flag("attention_bias", False)
    return {
        "vocab_size": values.integer("vocab_size"),
        "features": features,
        "layers": values.integer("num_hidden_layers"),
        "heads": heads,
        "kv_heads": values.integer("num_key_value_heads", heads),
        "head_dim": head_dim,
        "hidden": values.integer("intermediate_size"),
        "context": context,
        "rope": rope_of(values, head_dim, context, **(rope or {})),
        "norm_eps": values.number(eps, default_eps),
        "tied": values.flag("tie_word_embeddings", tied),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": values.flag("mlp_bias", False),
        "activation": values.choice(activation, "silu", ACTIVATIONS),
    }


def rope_of(
    values: Values,
    head_dim: int,
    context: int,
    *,
    given: Any = None,
    theta: float = 10000.0,
    partial: float = 1.0,
    kinds: tuple[str, ...] = SCALINGS,
    interleaved: bool = False,
) -> RopeConfig:
    """Returns the rotary positions that config.json describes, in either of its spellings.

    Args:
        values: of the file.
        head_dim: H.
        context: tokens the model was made for.
        given: the object with the scaling; None: `rope_parameters` or `rope_scaling`.
        theta: base where the file names none.
        partial: share of the channels that turn, where the file names none.
        kinds: of scaling that the family has.
        interleaved: which pairing.
    """
    if given is None:
        given = values.get("rope_parameters", values.get("rope_scaling")) or {}
    if not isinstance(given, Mapping):
        raise ModelError(f"config.json: rope_scaling is {given!r}; expected an object or null.")
    scaling = Values(given, "config.json: rope_scaling")
    kind = scaling.text("rope_type", scaling.text("type", "none"))
    kind = "none" if kind == "default" else kind
    if kind not in kinds:
        known = ", ".join(("default", *kinds[1:]))
        raise ModelError(f"config.json: rope_scaling type is {kind!r}; supported: {known}.")
    original = scaling.integer(
        "original_max_position_embeddings", values.integer("original_max_position_embeddings", context)
    )
    factor = scaling.number("factor", context / original if kind in ("yarn", "longrope") else 1.0)
    attention_factor = scaling.number("attention_factor", 0.0) or None
    if kind == "yarn" and attention_factor is None and scaling.get("mscale_all_dim") and scaling.get("mscale"):
        share = magnitude(factor, scaling.number("mscale"))
        attention_factor = share / magnitude(factor, scaling.number("mscale_all_dim"))
    size = int(head_dim * scaling.number("partial_rotary_factor", values.number("partial_rotary_factor", partial)))
    short = long = ()
    if kind == "longrope":
        if attention_factor is None and factor > 1 and original > 1:
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
        short, long = (_divisors(scaling, key, size) for key in ("short_factor", "long_factor"))
    return RopeConfig(
        size=size,
        theta=scaling.number("rope_theta", values.number("rope_theta", theta)),
        interleaved=interleaved,
        scaling=kind,  # type: ignore[arg-type]
        factor=factor if kind not in ("none", "longrope") else 1.0,
        original_context=original,
        low_frequency=scaling.number("low_freq_factor", 1.0),
        high_frequency=scaling.number("high_freq_factor", 4.0),
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
        attention_factor=attention_factor,
        divisors=short,
        long_divisors=long,
    )


def magnitude(factor: float, weight: float) -> float:
    """Returns YaRN's factor of cosine and sine for an extension by `factor`; arXiv 2309.00071, eq. 22."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def over_layers(layers: int, holds: Callable[[int], bool]) -> tuple[bool, ...] | None:
    """Returns for which layers something holds; None: for all of them.

    Raises:
        ModelError: there are more layers than any model has.
    """
    if layers > _MOST_LAYERS:
        raise ModelError(f"config.json: num_hidden_layers is {layers}; more than {_MOST_LAYERS} are not believed.")
    found = tuple(bool(holds(i)) for i in range(layers))
    return None if all(found) else found


def positioned_of(values: Values, layers: int) -> tuple[bool, ...] | None:
    """Returns which layers have positions; None: all of them. `no_rope_layers` has a 1 where there are some."""
    every = values.integer("no_rope_layer_interval", 4)
    over_layers(layers, lambda i: True)
    given = values.sequence("no_rope_layers", int, layers) if values.get("no_rope_layers") else None
    return over_layers(layers, lambda i: bool(given[i]) if given else (i + 1) % every != 0)


def window_of(values: Values, layers: int, holds: Callable[[int], bool] = lambda i: True) -> dict[str, Any]:
    """Returns `window` and `windowed`: by `layer_types`, or where the file has none by `holds(layer)`."""
    window = values.integer("sliding_window", 0, least=0) or None
    if window is None:
        return {"window": None}
    over_layers(layers, lambda i: True)
    types = values.sequence("layer_types", str, layers)
    if types is not None:
        strange = sorted(set(types) - {"sliding_attention", "full_attention"})
        if strange:
            raise ModelError(f"config.json: layer_types has {strange[0]!r}; known: sliding_attention, full_attention.")
        windowed = over_layers(layers, lambda i: types[i] == "sliding_attention")
    else:
        windowed = over_layers(layers, holds)
    if windowed is not None and not any(windowed):
        return {"window": None}
    return {"window": window, "windowed": windowed}


def _divisors(scaling: Values, key: str, size: int) -> tuple[float, ...]:
    found = scaling.sequence(key, (int, float), size // 2)
    if found is None or not all(math.isfinite(x) and x > 0 for x in found):
        raise ModelError(f"config.json: rope_scaling has no {key} of positive numbers, which longrope needs.")
    return tuple(float(x) for x in found)
