"""Dtypes: which one sums are kept in, which one a user names, which one a model computes in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import ModelError


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


def compute_dtype(dtype: Any) -> np.dtype:
    """Returns the dtype that a model computes in: as named, or None for float32 on CPUs and bfloat16 elsewhere.

    Raises:
        ModelError: it is no float of 16 bits or more.
    """
    if dtype is None:
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    names = ("float32", "bfloat16", "float16", "float64")
    given = named_dtype(dtype, names)
    if given is None:
        raise ModelError(f"dtype is {dtype!r}; choose from {', '.join(names)}, or None for the platform's own.")
    return given
