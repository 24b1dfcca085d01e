"""Which tensor of a model is packed in which format: llama.cpp's file types, told as data and one function.

A *recipe* is a name that people know from file names. It has a base format, which most matrices take, and rules that
give some of them more bits (`q4_k_m`) or fewer. Every packed recipe has one rule in common: the output layer, or the
table of tokens that serves as one, is q6_k. Source: llama.cpp's `llama-quant.cpp`, whose files these recipes reproduce
tensor by tensor for dense models; of models with experts it does the same for the rules about eight of them.

The recipes `q3_k`, `q4_k`, `q5_k` are no file types there: the base format everywhere, but for the output layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trustcore.errors import QuantizationError
from trustcore.quant.formats import BLOCK_FORMATS

PLAIN = ("f32", "f16", "bf16")  # formats without blocks


class Recipe(NamedTuple):
    """Base format, and llama.cpp's number for such files (`general.file_type`)."""

    base: str
    file_type: int


RECIPES: Mapping[str, Recipe] = {
    "f32": Recipe("f32", 0), "f16": Recipe("f16", 1), "bf16": Recipe("bf16", 32),
    "q4_0": Recipe("q4_0", 2), "q4_1": Recipe("q4_1", 3), "q5_0": Recipe("q5_0", 8), "q5_1": Recipe("q5_1", 9),
    "q8_0": Recipe("q8_0", 7), "q1_0": Recipe("q1_0", 40),
    "q2_k": Recipe("q2_k", 10), "q2_k_s": Recipe("q2_k", 21),
    "q3_k": Recipe("q3_k", 11), "q3_k_s": Recipe("q3_k", 11), "q3_k_m": Recipe("q3_k", 12),
    "q3_k_l": Recipe("q3_k", 13),
    "q4_k": Recipe("q4_k", 14), "q4_k_s": Recipe("q4_k", 14), "q4_k_m": Recipe("q4_k", 15),
    "q5_k": Recipe("q5_k", 16), "q5_k_s": Recipe("q5_k", 16), "q5_k_m": Recipe("q5_k", 17),
    "q6_k": Recipe("q6_k", 18),
    "iq1_s": Recipe("iq1_s", 24), "iq1_m": Recipe("iq1_m", 31),
    "iq2_xxs": Recipe("iq2_xxs", 19), "iq2_xs": Recipe("iq2_xs", 20), "iq2_s": Recipe("iq2_xs", 28),
    "iq2_m": Recipe("iq2_s", 29),
    "iq3_xxs": Recipe("iq3_xxs", 23), "iq3_xs": Recipe("iq3_s", 22), "iq3_s": Recipe("iq3_s", 26),
    "iq3_m": Recipe("iq3_s", 27),
    "iq4_nl": Recipe("iq4_nl", 25), "iq4_xs": Recipe("iq4_xs", 30),
    "tq1_0": Recipe("tq1_0", 36), "tq2_0": Recipe("tq2_0", 37),
    "mxfp4": Recipe("mxfp4", 38), "nvfp4": Recipe("nvfp4", 39),
}  # fmt: skip
UNNAMED_FILE_TYPE = 1024  # llama.cpp's "guessed": formats that were chosen tensor by tensor

# What a matrix takes instead whose rows the blocks do not divide.
FALLBACKS: Mapping[str, str] = {
    **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
    **dict.fromkeys(("q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}

# Small matrices, or no matrices at all, which every packer of the field leaves as they are.
_LEFT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid|altup|laurel|per_layer_model_proj|^position_embd\.weight"
    r"|^token_types\.weight|ssm_conv1d|shortconv\.conv|indexer\.[kq]_proj|time_mix_(?:first|[wvag][012]|decay_w[12])"
    r"\.weight|time_mix_lerp_fused|attn_rel_b\.weight|\.position_embd|sam\.(?:pos_embd|neck\.|net_)|\.rel_pos"
    r"|\.patch_(?:embd|merger)|a\.rvq\.codebook|mm\.a\.code_embd"
)
_PARTS = (
    ("output", re.compile(r"^output\.weight$")),
    ("table", re.compile(r"^(?:per_layer_)?token_embd\.weight$")),
    ("value", re.compile(r"attn_(?:qkv|kv_b|v)\.weight")),
    ("key", re.compile(r"attn_k\.weight")),
    ("query", re.compile(r"attn_q\.weight")),
    ("out", re.compile(r"attn_output\.weight")),
    ("up", re.compile(r"ffn_up")),
    ("gate", re.compile(r"ffn_gate")),
    ("down", re.compile(r"ffn_down")),
)
_LOW = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m")


@dataclass(frozen=True)
class Facts:
    """What the rules ask of a model.

    Attributes:
        layers: L.
        queries_per_key: N / K, query heads that share a key head.
        experts: of a layer; 0 in a dense model.
        tied: whether the table of tokens serves as the output layer.
        with_importance: whether inputs are weighed.
    """

    layers: int
    queries_per_key: int = 1
    experts: int = 0
    tied: bool = False
    with_importance: bool = False

    @staticmethod
    def of(metadata: Mapping[str, Any], names: Sequence[str], *, with_importance: bool = False) -> Facts:
        """Returns the facts that a GGUF file's metadata and tensor names tell."""

        def value(key: str, default: int) -> int:
            found = metadata.get(f"{metadata.get('general.architecture')}.{key}", default)
            found = found[0] if isinstance(found, list) and found else found
            return found if isinstance(found, int) and found > 0 else default

        heads = value("attention.head_count", 1)
        return Facts(
            layers=value("block_count", 1),
            queries_per_key=heads // value("attention.head_count_kv", heads),
            experts=value("expert_count", 0),
            tied="output.weight" not in names,
            with_importance=with_importance,
        )


def is_packable(name: str, shape: Sequence[int]) -> bool:
    """Returns whether a tensor is one that packers pack: a matrix, or a stack of them, that is not left by its name."""
    return sum(size > 1 for size in shape) >= 2 and name.endswith("weight") and _LEFT.search(name) is None


def formats_of(recipe: str, shapes: Mapping[str, Sequence[int]], facts: Facts, *, pure: bool = False) -> dict[str, str]:
    """Returns the format that a recipe gives each packable tensor; rows that the blocks do not divide count later.

    Args:
        recipe: a name in `RECIPES`, or of a format.
        shapes: of all tensors, by GGUF name.
        facts: about the model.
        pure: every tensor in the recipe's base format.

    Raises:
        QuantizationError: there is no such recipe.
    """
    if recipe not in RECIPES and recipe not in BLOCK_FORMATS:
        names = ", ".join(dict.fromkeys((*RECIPES, *BLOCK_FORMATS)))
        raise QuantizationError(f"format {recipe!r} is not known; choose one of {names}.")
    base = recipe if pure and recipe in BLOCK_FORMATS else RECIPES[recipe].base if recipe in RECIPES else recipe
    packable = [name for name, shape in shapes.items() if is_packable(name, shape)]
    if pure or base in PLAIN:
        return dict.fromkeys(packable, base)
    ranks: dict[str, int] = {}
    for part in ("value", "down", "gate", "up"):
        ranked = sorted((name for name in packable if _part(name) == part), key=_layer)
        ranks.update({name: rank for rank, name in enumerate(ranked)})
    values = sum(_part(name) == "value" for name in packable)
    chosen = {}
    for name in packable:
        part = _part(name)
        if part == "output" or (part == "table" and facts.tied):
            chosen[name] = _output_format(recipe, base, shapes[name][-1])
        else:
            count = values if part == "value" else facts.layers
            rank = ranks.get(name, 0) if facts.experts <= 1 or part == "value" else _layer(name)
            chosen[name] = _format(recipe, base, part, rank, count, facts)
    return chosen


def fallback(format: str, row: int) -> str:
    """Returns the format for rows of that many weights: `format`, or what llama.cpp takes where blocks do not fit."""
    if format == "f32" or row % BLOCK_FORMATS[format].block == 0:
        return format
    other = FALLBACKS.get(format, "f16")
    return other if row % BLOCK_FORMATS[other].block == 0 else "f16"


def _part(name: str) -> str:
    return next((part for part, pattern in _PARTS if pattern.search(name)), "other")


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _output_format(recipe: str, base: str, row: int) -> str:
    if recipe == "mxfp4" or row % BLOCK_FORMATS[base].block:
        return "q8_0"
    if recipe in ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs"):
        return "q5_k"
    return base if base == "q8_0" else "q6_k"


def _format(recipe: str, base: str, part: str, i: int, count: int, facts: Facts) -> str:
    """The rule for tensor `i` of `count` of its part, in the order of the layers."""
    first = i < count // 8
    more = first or i >= 7 * count // 8 or (i - count // 8) % 3 == 2
    shared = facts.queries_per_key >= 4
    eight = facts.experts == 8
    chosen: str | None = None
    if part == "table":
        chosen = {
            **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs"), "q2_k"),
            **dict.fromkeys(("iq2_s", "iq2_m", "iq3_xxs"), "iq3_s"),
            **dict.fromkeys(("tq1_0", "tq2_0"), "q4_k"),
        }.get(recipe)
    elif recipe in _LOW:
        better = "iq3_s" if recipe in ("iq2_s", "iq2_m") else "q2_k"
        if part == "value":
            chosen = "q4_k" if shared or facts.experts >= 4 else better
        elif part == "key" and eight:
            chosen = "q4_k"
        elif part == "down" and first:
            chosen = better
        elif part == "out":
            low = {"iq1_s": "iq2_xxs", "iq1_m": "iq2_xxs", "iq2_s": "iq3_s", "iq2_m": "iq3_s"}
            chosen = "q5_k" if eight else low.get(recipe)
    elif part == "value":
        chosen = _value_format(recipe, i, more, shared, facts.with_importance) or base
        if facts.layers == 80 and shared and chosen in ("q3_k", "q4_k"):  # the 70B models: these tensors are small
            chosen = "q5_k"
        chosen = "q8_0" if eight else chosen
    elif part in ("key", "query"):
        chosen = {"iq3_xs": "iq3_xxs", "iq3_xxs": "iq2_s"}.get(recipe)
        chosen = "q8_0" if eight and part == "key" else chosen
    elif part == "down":
        chosen = _down_format(recipe, i, count, more, facts)
    elif part == "out" and eight:
        few = (
            "q2_k",
            "q3_k_s",
            "q3_k_m",
            "q4_k_s",
            "q4_k_m",
            "iq3_xs",
            "iq3_xxs",
            "iq3_s",
            "iq3_m",
            "iq4_nl",
            "iq4_xs",
        )
        chosen = "q5_k" if recipe in few else None
    elif part == "out":
        better = {"q2_k": "q3_k", "iq3_xxs": "iq3_s", "q3_k_m": "q4_k", "q3_k_l": "q5_k", "iq3_m": "q4_k"}
        chosen = better.get(recipe)
    elif part in ("gate", "up") and recipe == "iq3_xs" and count // 8 <= i < 7 * count // 8:
        chosen = "iq3_xxs"
    return chosen or base


def _value_format(recipe: str, i: int, more: bool, shared: bool, with_importance: bool) -> str | None:
    if recipe == "q2_k":
        return "q4_k" if shared else "q3_k"
    if recipe in ("q2_k_s", "iq3_xs", "iq3_s") and shared:
        return "q4_k"
    if recipe == "iq3_xxs":
        return "q4_k" if shared else None if with_importance else "iq3_s"
    if recipe == "iq3_m":
        return "q4_k"
    if recipe == "q3_k_m":
        return "q5_k" if i < 2 else "q4_k"
    if recipe == "q3_k_l" or (recipe in ("iq4_nl", "iq4_xs") and shared) or (recipe == "q4_k_s" and i < 4):
        return "q5_k"
    return "q6_k" if recipe in ("q4_k_m", "q5_k_m") and more else None


def _down_format(recipe: str, i: int, count: int, more: bool, facts: Facts) -> str | None:
    first = i < count // 8
    if recipe == "q2_k":
        return "q3_k"
    if recipe == "iq3_xxs" and not facts.with_importance:
        return "q4_k" if first else "q3_k"
    if recipe == "q3_k_m":
        return "q5_k" if i < count // 16 else "q4_k"
    if recipe == "q3_k_l":
        return "q5_k"
    if recipe in ("q4_k_m", "q5_k_m"):
        return "q6_k" if more else None
    if recipe == "iq3_m":
        return "q4_k" if first or (facts.experts == 8 and more) else None
    if first:
        plain = {"q2_k_s": "q4_k", "q4_k_s": "q5_k"}
        if not facts.with_importance:
            plain |= {"iq4_nl": "q5_k", "iq4_xs": "q5_k"}
        else:  # plain formats go astray in the first layers when an importance pulls at them
            plain |= {"q4_0": "q4_1", "q5_0": "q5_1"}
        return plain.get(recipe)
    return None
