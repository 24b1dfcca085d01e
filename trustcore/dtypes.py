"""Dtypes: which one sums are kept in, and which one a user names."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np


def accumulation_dtype(dtype: Any) -> np.dtype:
    """Returns float64 for float64 and float32 for every narrower dtype, whatever jax's promotion mode is."""
    return np.dtype(np.float64 if jnp.dtype(dtype) == np.float64 else np.float32)


def named_dtype(given: Any, allowed: tuple[str, ...]) -> np.dtype | None:
    """Returns the dtype that `given` (a name, dtype or scalar type) stands for; None if it is not one of `allowed`."""
    try:
        found = jnp.dtype(given)
    except TypeError:
        return None
    return found if found.name in allowed else None
