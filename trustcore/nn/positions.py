"""Positions that are added: to the stream (sinusoids, and tables, which are an `Embedding`) or to scores (T5, ALiBi).

Rotary positions, which turn queries and keys, are `trustcore.ops.rope`; in two dimensions they are here, made of those.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from trustcore.errors import ModelError
from trustcore.nn.parameter import parameter
from trustcore.ops.rope import RopeConfig, angles, rotate


def sinusoids(positions: Int[Array, "*rows"], features: int, *, spread: int | None = None) -> Float[Array, "*rows D"]:
    """Returns `sin(p w[i])` in the first half of the channels and `cos(p w[i])` in the second, float32.

    `w[i] = 10000 ** (-i / spread)`; `spread` None is D / 2, as in Vaswani et al., arXiv 1706.03762, section 3.5 (who
    interleave the halves); Whisper takes D / 2 - 1.

    Raises:
        ModelError: D is odd.
    """
    if features % 2:
        raise ModelError(f"sinusoids: {features} channels do not make pairs of sine and cosine.")
    half = features // 2
    rates = np.exp(-math.log(10000.0) / (spread or half) * np.arange(half)).astype(np.float32)
    turn = positions.astype(jnp.float32)[..., None] * jnp.broadcast_to(rates, (*positions.shape, half))
    return jnp.concatenate([jnp.sin(turn), jnp.cos(turn)], axis=-1)


def alibi_slopes(heads: int) -> np.ndarray:
    """Returns float64 `[N]`: `2 ** (-8 i / n)` for i = 1 .. n, n the largest power of two up to N; for the other heads,
    the odd ones of 2 n slopes. Press et al., arXiv 2108.12409, section 3 and the authors' code for other N.
    """
    n = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 * np.arange(1, n + 1) / n)
    more = 2.0 ** (-4.0 * np.arange(1, 2 * n + 1, 2) / n)
    return np.concatenate([slopes, more[: heads - n]])


def alibi(query_positions: Int[Array, " T"], key_positions: Int[Array, " S"], heads: int) -> Float[Array, "1 N T S"]:
    """Returns `-slope[n] * |t - s|`, the bias of scores of attention with linear biases, float32."""
    distance = jnp.abs(query_positions[:, None] - key_positions[None, :]).astype(jnp.float32)
    slopes = jnp.asarray(alibi_slopes(heads), jnp.float32)
    return -(slopes[:, None, None] * distance[None])[None]


class RelativeBias(nnx.Module):
    """T5's bias of scores: a number for each head and each bucket of `key position - query position`.

    Small distances have a bucket each, larger ones share them logarithmically, all from `distance` on the last. Raffel
    et al., arXiv 1910.10683, section 2.1.

    Args:
        heads: N.
        buckets: in all; in two directions, half of them for each.
        distance: from which on all share a bucket.
        two_sided: whether queries see what comes after them.
        dtype: of the table.
        rngs: None leaves the table abstract.
    """

    def __init__(
        self,
        heads: int,
        *,
        buckets: int = 32,
        distance: int = 128,
        two_sided: bool = True,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.table = parameter(jax.nn.initializers.normal(0.02), (buckets, heads), dtype, rngs)
        self.buckets, self.distance, self.two_sided = buckets, distance, two_sided

    def __call__(self, query_positions: Int[Array, " T"], key_positions: Int[Array, " S"]) -> Float[Array, "1 N T S"]:
        """Returns the bias; differentiable in the table."""
        ahead = key_positions[None, :] - query_positions[:, None]
        values = jnp.take(self.table.get_value(), self._bucket(ahead), axis=0, mode="clip")  # [T, S, N]
        return values.transpose(2, 0, 1)[None]

    def _bucket(self, ahead: jax.Array) -> jax.Array:
        count = self.buckets
        first = jnp.zeros_like(ahead)
        if self.two_sided:
            count //= 2
            first = jnp.where(ahead > 0, count, 0)
            apart = jnp.abs(ahead)
        else:
            apart = jnp.maximum(-ahead, 0)
        exact = count // 2
        ratio = jnp.log(jnp.maximum(apart, 1).astype(jnp.float32) / exact) / math.log(self.distance / exact)
        far = jnp.minimum(exact + (ratio * (count - exact)).astype(ahead.dtype), count - 1)
        return first + jnp.where(apart < exact, apart, far)


def rope_2d(
    x: Float[Array, "B T N H"], rows: Int[Array, "B T"], columns: Int[Array, "B T"], *, theta: float = 10000.0
) -> Float[Array, "B T N H"]:
    """Returns x with the first half of each head's channels turned by the row, the second by the column.

    Args:
        x: queries or keys of patches.
        rows, columns: where each patch stands.
        theta: base of the frequencies.

    Raises:
        ModelError: H is no multiple of four.

    Heo et al., arXiv 2403.13298, section 3.2 (axial frequencies). Differentiable in x.
    """
    size = x.shape[-1] // 2
    if x.shape[-1] % 4:
        raise ModelError(f"rope_2d: a head size of {x.shape[-1]} is no multiple of four.")
    config = RopeConfig(size, theta=theta)
    parts = zip(jnp.split(x, 2, axis=-1), (rows, columns), strict=True)
    return jnp.concatenate([rotate(part, angles(place, config), config) for part, place in parts], axis=-1)
