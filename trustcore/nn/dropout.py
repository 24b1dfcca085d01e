"""Dropout of whole channels."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float


class SpatialDropout(nnx.Dropout):
    """Drops whole channels of an image or a sequence: one draw for all places of a channel.

    Neighbouring places are alike, so dropping them one by one takes little information away. Tompson et al., arXiv
    1411.4280, section 3.2. As `flax.nnx.Dropout`: `model.train()` turns it on, `model.eval()` off.

    Args:
        rate: share of channels that are dropped; the others grow by `1 / (1 - rate)`.
        places: axes between batch and channels: 1 for sequences `[B, T, D]`, 2 for images `[B, h, w, D]`.
        rngs: where its random bits come from.
    """

    def __init__(self, rate: float, *, places: int = 2, rngs: nnx.Rngs):
        super().__init__(rate, broadcast_dims=tuple(range(1, places + 1)), rngs=rngs)

    def __call__(self, x: Float[Array, "B *places D"], **options: object) -> Float[Array, "B *places D"]:
        """Returns x with some channels zero; options as `flax.nnx.Dropout` takes them."""
        return super().__call__(x, **options)  # pyright: ignore[reportArgumentType]
