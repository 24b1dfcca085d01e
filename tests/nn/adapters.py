"""Adapters for tests."""

import jax
import jax.numpy as jnp
import numpy as np


def moved(adapters, seed=1):
    """The adapters with random numbers added everywhere."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype), adapters)
