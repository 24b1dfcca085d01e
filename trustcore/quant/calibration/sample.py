"""An observer that keeps a sample of the rows themselves, for the methods that compare products before and after."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.quant.calibration.observers import Observer


class SampleState(NamedTuple):
    """The rows kept so far, float32 `[S, K]`, and what each drew; -inf where there is none yet."""

    rows: jax.Array
    drawn: jax.Array


@dataclasses.dataclass(frozen=True)
class Sample(Observer):
    """Rows of the inputs, `[at most count, K]`, spread evenly over the data.

    Each row of a batch draws a number by its place, and those with the largest numbers stay; batches draw alike, so
    that each gives its share.

    Args:
        count: S, how many rows to keep.
        seed: of the draw.
    """

    count: int = 512
    seed: int = 0

    def init(self, k: int) -> SampleState:
        """See `Observer`."""
        return SampleState(jnp.zeros((self.count, k), jnp.float32), jnp.full((self.count,), -jnp.inf))

    def update(self, state: SampleState, x: jax.Array) -> SampleState:
        """See `Observer`."""
        drawn = jax.random.uniform(jax.random.key(self.seed), (x.shape[0],))
        return self.merge(state, SampleState(x, drawn))

    def merge(self, a: SampleState, b: SampleState) -> SampleState:
        """See `Observer`."""
        drawn, places = jax.lax.top_k(jnp.concatenate([a.drawn, b.drawn]), self.count)
        return SampleState(jnp.take(jnp.concatenate([a.rows, b.rows]), places, axis=0), drawn)

    def finish(self, state: SampleState) -> np.ndarray:
        """Returns float32 `[rows, K]`."""
        return np.asarray(state.rows)[np.asarray(state.drawn) >= 0]
