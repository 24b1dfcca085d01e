"""Importance matrices between the names of GGUF files and the paths of a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trustcore.errors import ModelError
from trustcore.models.config import DecoderConfig
from trustcore.models.families import gguf_of


def gguf_names(config: DecoderConfig) -> dict[str, str]:
    """Returns {path: name of the tensor in GGUF files}; matrices that one tensor holds together have one name.

    Raises:
        ModelError: GGUF files hold the family in no way that is supported.
    """
    return {path: rule.stored for rule in gguf_of(config).names.rules(config) for path in rule.paths}


def importance_by_path(importance: Mapping[str, Any], config: DecoderConfig) -> dict[str, np.ndarray]:
    """Returns {path: [K]} of {GGUF tensor name: [K]}: what `quantize(importance=...)` takes.

    Args:
        importance: by tensor name, as `weights.read_imatrix(path).importance` gives it.
        config: of the decoder.

    Raises:
        ModelError: a name is no weight of such a decoder.
    """
    names: dict[str, list[str]] = {}
    for path, name in gguf_names(config).items():
        names.setdefault(name, []).append(path)
    return _renamed(importance, names, config.layers)


def importance_by_tensor(importance: Mapping[str, Any], config: DecoderConfig) -> dict[str, np.ndarray]:
    """Returns {GGUF tensor name: [K]} of {path: [K]}: the inverse of `importance_by_path`.

    Matrices that one tensor holds together read the same inputs, so that any of them speaks for it.

    Raises:
        ModelError: a path is no weight of such a decoder.
    """
    return _renamed(importance, {path: [name] for path, name in gguf_names(config).items()}, config.layers)


def _renamed(importance: Mapping[str, Any], names: Mapping[str, list[str]], layers: int) -> dict[str, np.ndarray]:
    unknown = [name for name in importance if name not in names]
    if unknown:
        raise ModelError(
            f"importance: {', '.join(unknown[:5])} is no weight of a decoder of {layers} layers; names look like "
            f"{', '.join(list(names)[:3])}. Was the matrix made for another model?"
        )
    found = importance.items()
    return {other: np.asarray(values, np.float32) for name, values in found for other in names[name]}
