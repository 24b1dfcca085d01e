"""Which family a checkpoint belongs to, by config.json's `model_type`.

A family is a configuration, a module and the names of its weights. All decoders are one shape, whose brands stand in
`trustcore.models.families`; every other family is a module of this package, imported when one of its models is opened.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from trustcore.errors import ModelError
from trustcore.models.config import DecoderConfig
from trustcore.models.decoder import Decoder
from trustcore.models.families import FAMILIES
from trustcore.models.model import Model
from trustcore.models.names import Names


@dataclasses.dataclass(frozen=True)
class Family:
    """A shape of model.

    Attributes:
        config: from config.json and the names of the weights (some parts are told by nothing else) to a configuration.
        module: of a configuration, called with `dtype=` too: an abstract module.
        names: of a configuration: the names of its weights.
    """

    config: Callable[[Mapping[str, Any], Collection[str]], Any]
    module: Callable[..., Model]
    names: Callable[[Any], Names]


DECODERS = Family(
    lambda described, names: DecoderConfig.from_hugging_face(described),
    Decoder,
    lambda config: FAMILIES[config.family].names_for(config),
)

# model_type -> the module that holds its FAMILY; those of decoders are in `trustcore.models.families`.
HOMES: Mapping[str, str] = {
    "bert": "bert",
    "roberta": "bert",
    "xlm-roberta": "bert",
    "camembert": "bert",
    "distilbert": "bert",
    "electra": "bert",
    "modernbert": "modern_bert",
    "deberta-v2": "deberta",
    "t5": "t5",
    "mt5": "t5",
    "umt5": "t5",
    "bart": "bart",
    "mbart": "bart",
    "marian": "bart",
    "pegasus": "bart",
    "whisper": "bart",
    "vit": "vit",
    "dinov2": "vit",
    "dinov2_with_registers": "vit",
    "clip_vision_model": "vit",
    "siglip_vision_model": "vit",
    "clip": "clip",
    "siglip": "clip",
    "resnet": "resnet",
    "convnext": "convnext",
    "efficientnet": "efficientnet",
    "mamba": "mamba",
    "mamba2": "mamba",
}


def family_named(name: str) -> Family:
    """Returns the family of a configuration, by its `family`."""
    return family_of({"model_type": name})


def family_of(described: Mapping[str, Any]) -> Family:
    """Returns the family of the model that a config.json describes.

    Raises:
        ModelError: there is none.
    """
    model_type, inner = described.get("model_type"), described.get("text_config")
    if isinstance(model_type, str) and model_type in HOMES:
        # Family is defined here, and its modules import it: they can only be loaded later.
        return importlib.import_module(f"trustcore.models.{HOMES[model_type]}").FAMILY
    of_text = inner.get("model_type") if isinstance(inner, Mapping) else None  # of a model that sees, too
    if any(isinstance(one, str) and one in FAMILIES for one in (model_type, of_text)):
        return DECODERS
    raise ModelError(f"config.json: model_type is {model_type!r}; supported: {', '.join((*FAMILIES, *HOMES))}.")
