"""How layers make their parameters: drawn when there are random keys, otherwise shapes that a loader fills."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx


def parameter(initializer: Any, shape: tuple[int, ...], dtype: Any, rngs: nnx.Rngs | None) -> nnx.Param[Any]:
    """Returns a parameter of that shape: `initializer(key, shape, dtype)`, or abstract when `rngs` is None."""
    if rngs is None:
        return nnx.Param(jax.ShapeDtypeStruct(shape, dtype))
    return nnx.Param(initializer(rngs.params(), shape, dtype))
