"""Models of a given shape with random weights: for measurements, tests, and training from nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.models.registry import family_of
from trustcore.quant.quantize import path_name

_STD = 0.02  # of matrices, as GPT-2's (Radford et al., 2019)


def random_model(config: Mapping[str, Any], *, seed: int = 0, dtype: Any = jnp.float32) -> Any:
    """Returns a model of the shape that a `config.json` describes: matrices normal, gains one, biases zero.

    Args:
        config: contents of a config.json, `model_type` and sizes; what is missing takes the family's defaults.
        seed: of the weights.
        dtype: of weights and activations.

    Raises:
        ModelError: the family is not known, or a value is missing or out of range.
    """
    family = family_of(config)
    model = family.module(family.config(config, ()), dtype=dtype)
    model.described = json.dumps(dict(config))
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _drawn(path_name(path), leaf, rng), model)


def _drawn(path: str, leaf: Any, rng: np.random.Generator) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if len(leaf.shape) > 1:
        return jnp.asarray(rng.normal(0, _STD, leaf.shape), leaf.dtype)
    ones = path.rpartition(".")[2] in ("weight", "scale", "var")
    return jnp.full(leaf.shape, 1 if ones else 0, leaf.dtype)
