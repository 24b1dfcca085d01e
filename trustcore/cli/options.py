"""The options of sampling that `generate` and `chat` share, declared once.

A value that is not given is not passed on: the defaults are those of the Python API, in one place.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Annotated, Any

import typer

_SAMPLING = "Sampling"
_RUNNING = "Running"


class FloatType(enum.Enum):
    """Dtypes that a model computes in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class CacheType(enum.Enum):
    """Dtypes of the key-value cache."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A file or folder, a catalogue name (smollm2, minilm), or owner/name[:Q4_K_M]."
    ),
]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Stop after this many tokens.", rich_help_panel=_SAMPLING)]
Temperature = Annotated[
    float | None, typer.Option(min=0, help="0 takes the likeliest token.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[int | None, typer.Option(min=0, help="Only the K likeliest tokens.", rich_help_panel=_SAMPLING)]
TopP = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Only the likeliest tokens with this mass.", rich_help_panel=_SAMPLING),
]
MinP = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Only tokens this likely, next to the likeliest.", rich_help_panel=_SAMPLING),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Divides the logits of tokens seen; 1 is off.", rich_help_panel=_SAMPLING)
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="Subtracted for each time a token was generated.", rich_help_panel=_SAMPLING)
]
PresencePenalty = Annotated[
    float | None, typer.Option(help="Subtracted once a token was generated.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.", rich_help_panel=_SAMPLING)]
Stop = Annotated[
    list[str] | None, typer.Option(help="Stop before this text; may be given again.", rich_help_panel=_SAMPLING)
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end.", rich_help_panel=_SAMPLING)]
Context = Annotated[
    int | None, typer.Option(min=1, help="Tokens of prompt and answer to make room for.", rich_help_panel=_RUNNING)
]
CacheDtype = Annotated[CacheType | None, typer.Option(help="How keys and values are kept.", rich_help_panel=_RUNNING)]
Dtype = Annotated[
    FloatType | None,
    typer.Option(help="Decode the weights to this and compute in it; else they stay packed.", rich_help_panel=_RUNNING),
]

AsJson = Annotated[bool, typer.Option("--json", help="Everything, as one JSON object.")]


# Options of `trustcore.generate` and `trustcore.chat`, under the names that the commands give them too.
_NAMES = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "stop",
    "ignore_eos",
    "context",
    "cache_dtype",
)


def sampling(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of the Python API that a command was given, from all its arguments by name."""
    chosen = given(**{name: arguments[name] for name in _NAMES if name in arguments})
    return {name: value.value if isinstance(value, enum.Enum) else value for name, value in chosen.items()}


def given(**options: Any) -> dict[str, Any]:
    """Returns the options that have a value: not None, not False, not an empty list."""
    return {name: value for name, value in options.items() if value is not None and value is not False and value != []}
