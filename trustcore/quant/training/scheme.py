"""What a trained weight will be packed as: which codes there are, and which weights share a scale.

    "int4"  "int8:tensor"  "int4:g64:asym"  "fp8_e4m3:128x128"

A *grid* is the set of codes q, a *scheme* a grid with its granularity. A matrix `[..., K, N]` has scales `[..., G, C]`:

    tensor [1, 1]    channel [1, N]    group of g [K / g, N]    block g x h [ceil(K / g), ceil(N / h)]
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import QuantizationError
from trustcore.quant.formats import SCALED_FORMATS, ScaledFormat
from trustcore.quant.formats.names import Storage, parse

_FLOATS = {"fp8_e4m3": np.dtype(jnp.float8_e4m3fn), "fp8_e5m2": np.dtype(jnp.float8_e5m2)}
FORMATS = ("int1", "ternary", *(f"int{bits}" for bits in range(2, 9)), *_FLOATS)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The codes of a format, as numbers.

    Args:
        low: the least code.
        high: the largest; Q_P in the literature.
        dtype: of a float format; None for integers.
        binary: whether the codes are -1 and 1 alone.
    """

    low: float
    high: float
    dtype: np.dtype | None = None
    binary: bool = False

    def nearest(self, v: jax.Array) -> jax.Array:
        """Returns the code next to each v, float32; ties go to even codes, and zero to 1 where codes are binary."""
        if self.binary:
            return jnp.where(v >= 0, 1.0, -1.0)
        v = jnp.clip(v, self.low, self.high)
        return jnp.round(v) if self.dtype is None else v.astype(self.dtype).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A format with its granularity; hashable, so that it may be static.

    Args:
        storage: the format, and which weights share a scale.
    """

    storage: Storage

    @staticmethod
    def parse(text: str) -> Scheme:
        """Returns the scheme that `text` names, such as "int4:g64:asym"; see `formats.names`.

        Raises:
            QuantizationError: the format cannot be trained, or the granularity is not known.
        """
        storage = parse(text)
        if storage.format.name not in FORMATS:
            raise QuantizationError(f"format {text!r} cannot be trained; choose from {', '.join(FORMATS)}.")
        return Scheme(storage)

    @property
    def format(self) -> str:
        """Its name, without granularity."""
        return self.storage.format.name

    @property
    def rows(self) -> int | None:
        """Of K that share a scale; None: all."""
        return self.storage.rows or None

    @property
    def columns(self) -> int | None:
        """Of N that share a scale; None: all."""
        return self.storage.columns or None

    @property
    def asymmetric(self) -> bool:
        """Whether codes are shifted by a zero point."""
        return self.storage.asymmetric

    @property
    def stored(self) -> ScaledFormat:
        """The entry of the format table."""
        return SCALED_FORMATS[self.format]

    @property
    def grid(self) -> Grid:
        """The codes.

        Integers with a zero point and fewer than 8 bits count from 0, as they are stored; all others around 0.
        """
        if self.format in _FLOATS:
            top = float(jnp.finfo(_FLOATS[self.format]).max)
            return Grid(-top, top, _FLOATS[self.format])
        if self.format in ("int1", "ternary"):
            return Grid(-1, 1, binary=self.format == "int1")
        bits = self.stored.bits
        if self.asymmetric and bits < 8:
            return Grid(0, 2**bits - 1)
        return Grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns `[..., G, C]` for a matrix `[..., K, N]`."""
        *lead, k, n = shape
        groups = 1 if self.rows is None else math.ceil(k / self.rows)
        return (*lead, groups, 1 if self.columns is None else math.ceil(n / self.columns))


def expand(scale: jax.Array, shape: tuple[int, ...], scheme: Scheme) -> jax.Array:
    """Returns `[..., K, N]`: the scale of each weight, from scales `[..., G, C]`. Its transpose sums gradients."""
    for axis, size, each in ((-2, shape[-2], scheme.rows), (-1, shape[-1], scheme.columns)):
        if scale.shape[axis] != 1 and each != 1:
            scale = jnp.repeat(scale, each or size, axis)
            scale = jax.lax.slice_in_dim(scale, 0, size, axis=axis)
    return jnp.broadcast_to(scale, shape)


def shared(x: jax.Array, scheme: Scheme, reduce: str) -> jax.Array:
    """Returns `[..., G, C]`: the "mean", "max" or "min" of the numbers that share a scale."""
    start = {"mean": 0.0, "max": -jnp.inf, "min": jnp.inf}[reduce]
    combine = {"mean": jnp.sum, "max": jnp.max, "min": jnp.min}[reduce]

    def tiles(x: jax.Array, fill: float) -> jax.Array:
        *lead, k, n = x.shape
        rows, columns = scheme.rows or k, scheme.columns or n
        edges = [(0, 0)] * len(lead) + [(0, -k % rows), (0, -n % columns)]
        x = jnp.pad(x, edges, constant_values=fill)
        return x.reshape(*lead, -(-k // rows), rows, -(-n // columns), columns)

    found = combine(tiles(x, start), axis=(-3, -1))
    return found / jnp.sum(tiles(jnp.ones_like(x), 0.0), axis=(-3, -1)) if reduce == "mean" else found
