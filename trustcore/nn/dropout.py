"""Dropout, of single numbers and of whole channels. No mask is drawn or kept: see `kernels_pallas.dropout`."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.dropout import dropout


class Dropout(nnx.Dropout):
    """Drops numbers and lets the others grow, in training: `flax.nnx.Dropout` with other random bits.

    A number's fate is a hash of the key and its place, computed again in the backward pass. `model.train()` turns it
    on, `model.eval()` off; arguments are those of `flax.nnx.Dropout`. Srivastava et al., JMLR 15 (2014).
    """

    def __call__(
        self, inputs: Float[Array, "*shape"], *, deterministic: bool | None = None, rngs: Any = None
    ) -> Float[Array, "*shape"]:
        """Returns x with some numbers zero.

        Args:
            inputs: x.
            deterministic: None as the layer is set; True returns x as it is.
            rngs: a key, stream or `nnx.Rngs` in place of the layer's own.
        """
        still = self.deterministic if deterministic is None else deterministic
        source = self.rngs if rngs is None else rngs
        if still is None or still or source is None or self.rate in (0.0, 1.0):
            return super().__call__(inputs, deterministic=deterministic, rngs=rngs)  # nothing random, or its error
        source = source[self.rng_collection] if isinstance(source, nnx.Rngs) else source
        key = source if isinstance(source, jax.Array) else source()
        return dropout(inputs, key, rate=self.rate, shared=tuple(self.broadcast_dims))


class SpatialDropout(Dropout):
    """Drops whole channels of an image or a sequence: one draw for all places of a channel.

    Neighbouring places are alike, so dropping them one by one takes little information away. Tompson et al., arXiv
    1411.4280, section 3.2. As `Dropout`: `model.train()` turns it on, `model.eval()` off.

    Args:
        rate: share of channels that are dropped; the others grow by `1 / (1 - rate)`.
        places: axes between batch and channels: 1 for sequences `[B, T, D]`, 2 for images `[B, h, w, D]`.
        rngs: where its random bits come from.
    """

    def __init__(self, rate: float, *, places: int = 2, rngs: nnx.Rngs):
        super().__init__(rate, broadcast_dims=tuple(range(1, places + 1)), rngs=rngs)
