"""Importance matrices between the names of GGUF files and the paths of a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trustcore.errors import ModelError
from trustcore.models.names import decoder_names


def importance_by_path(importance: Mapping[str, Any], layers: int) -> dict[str, np.ndarray]:
    """Returns {path: [K]} of {GGUF tensor name: [K]}: what `quantize(importance=...)` takes.

    Args:
        importance: by tensor name, as `weights.read_imatrix(path).importance` gives it.
        layers: of the decoder.

    Raises:
        ModelError: a name is no weight of such a decoder.
    """
    return _renamed(importance, {name.gguf: name.path for name in decoder_names(layers)}, layers)


def importance_by_tensor(importance: Mapping[str, Any], layers: int) -> dict[str, np.ndarray]:
    """Returns {GGUF tensor name: [K]} of {path: [K]}: the inverse of `importance_by_path`.

    Raises:
        ModelError: a path is no weight of such a decoder.
    """
    return _renamed(importance, {name.path: name.gguf for name in decoder_names(layers)}, layers)


def _renamed(importance: Mapping[str, Any], names: Mapping[str, str], layers: int) -> dict[str, np.ndarray]:
    unknown = [name for name in importance if name not in names]
    if unknown:
        raise ModelError(
            f"importance: {', '.join(unknown[:5])} is no weight of a decoder of {layers} layers; names look like "
            f"{', '.join(list(names)[:3])}. Was the matrix made for another model?"
        )
    return {names[name]: np.asarray(values, np.float32) for name, values in importance.items()}
