"""Which family a checkpoint belongs to, by config.json's `model_type`; the decoders have a loader of their own.

A family is a configuration, a module and a table of names; `trustcore.load` finds it here. Modules of families are
imported when one of their models is opened.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from trustcore.dtypes import compute_dtype
from trustcore.errors import ModelError
from trustcore.models.model import Model
from trustcore.models.sentence import read_pooling
from trustcore.models.table import Progress, Table, fill, stored
from trustcore.weights import Checkpoint


@dataclasses.dataclass(frozen=True)
class Family:
    """A shape of model.

    Attributes:
        config: from config.json and the names of the tensors (some parts are told by nothing else) to a configuration.
        module: of a configuration, called with `dtype=` too: an abstract module.
        table: of a configuration: the names of its tensors.
    """

    config: Callable[[Mapping[str, Any], Collection[str]], Any]
    module: Callable[..., Model]
    table: Callable[[Any], Table]


# model_type -> the module that holds its FAMILY.
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


def is_known(model_type: Any) -> bool:
    """Returns whether a family here reads models of that type."""
    return isinstance(model_type, str) and model_type in HOMES


def family_of(model_type: Any) -> Family:
    """Returns the family of config.json's `model_type`.

    Raises:
        ModelError: there is none.
    """
    if not is_known(model_type):
        raise ModelError(f"config.json: model_type is {model_type!r}; expected one of {', '.join(HOMES)}.")
    # Family is defined here, and its modules import it: they can only be loaded later.
    return importlib.import_module(f"trustcore.models.{HOMES[model_type]}").FAMILY


def model_from_checkpoint(checkpoint: Checkpoint, *, dtype: Any = None, progress: Progress | None = None) -> Model:
    """Returns the model whose configuration and weights the checkpoint holds.

    Args:
        checkpoint: an opened safetensors model with a config.json.
        dtype: of weights and activations; None: float32 on CPUs, bfloat16 elsewhere.
        progress: called with (bytes done, bytes in all) after each tensor.

    Raises:
        ModelError: the family is unknown, a value of config.json is impossible, or tensors do not fit: all of them in
            one message.
    """
    described = checkpoint.metadata.get("config")
    if described is None:
        raise ModelError(f"{checkpoint.path}: there is no config.json beside the weights; put the model's there.")
    compute = compute_dtype(dtype)
    family = family_of(described.get("model_type"))
    if described.get("quantization_config") is not None:
        raise ModelError(
            "config.json: quantization_config: packed weights of this family are not read; take its floats."
        )
    config = family.config(described, checkpoint.keys())
    if _layers(config) > len(checkpoint):  # bounds the work below by the file's own size
        raise ModelError(
            f"the configuration has {_layers(config)} layers, the checkpoint only {len(checkpoint)} tensors."
        )
    table = family.table(config)
    model = family.module(config, dtype=compute)
    fill(model, table, checkpoint, dtype=compute, what=config.family, progress=progress)
    model.source, model.origin = checkpoint.path.name, str(checkpoint.path.absolute())
    model.pooling = read_pooling(checkpoint.path.parent)
    return model


def tensors(model: Model) -> dict[str, Any]:
    """Returns the tensors of a model under the names, and in the layouts, of checkpoints: NumPy arrays."""
    return stored(model, family_of(model.config.family).table(model.config))


def _layers(config: Any) -> int:
    """How many layers a configuration, and those in it, have together."""
    values = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]
    inner = sum(_layers(value) for _, value in values if dataclasses.is_dataclass(value))
    own = getattr(config, "layers", 0)
    return inner + own + sum(value for name, value in values if name.endswith("_layers"))
