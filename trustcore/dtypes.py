"""Which dtype sums are kept in."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np


def accumulation_dtype(dtype: Any) -> np.dtype:
    """Returns float64 for float64 and float32 for every narrower dtype, whatever jax's promotion mode is."""
    return np.dtype(np.float64 if jnp.dtype(dtype) == np.float64 else np.float32)
