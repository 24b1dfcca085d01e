"""Statistics of an array on the host, read from the words that `trustcore.ops.statistics` made on the device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from trustcore.ops.statistics import BINS, COUNTS, FLOATS, HUGE, TINY

_BARS = " ▁▂▃▄▅▆▇█"


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What an array held.

    Attributes:
        shape: of the array.
        dtype: its name.
        min, max, mean, std, rms, norm: over its finite values; None where it has none.
        zeros, nan, inf, negative_inf, subnormal: how many elements are.
        tiny: how many are not zero and below 1e-7 in magnitude.
        huge: how many are finite and above 1e6 in magnitude.
        dead_units: positions of the last axis that are zero in every row; None below two rows.
        zero_rows: rows (all axes but the last) of zeros alone; None below two rows.
        histogram: 64 bins of magnitudes; bin b counts 2 ** (4 b - 127) <= |x| < 2 ** (4 b - 123), the first one zeros
            and subnormals too, the last one Inf and NaN.
    """

    shape: tuple[int, ...]
    dtype: str
    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    rms: float | None
    norm: float | None
    zeros: int
    nan: int
    inf: int
    negative_inf: int
    subnormal: int
    tiny: int
    huge: int
    dead_units: int | None
    zero_rows: int | None
    histogram: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements; those of complex arrays count twice."""
        return math.prod(self.shape) * (2 if self.dtype.startswith("complex") else 1)

    @property
    def bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    @property
    def bad(self) -> int:
        """Elements that are NaN or infinite."""
        return self.nan + self.inf + self.negative_inf

    @property
    def all_zero(self) -> bool:
        """Whether there is nothing but zeros."""
        return self.size > 0 and self.zeros == self.size

    @property
    def vanishing(self) -> float:
        """Fraction below 1e-7 in magnitude, zeros not counted."""
        return self.tiny / self.size if self.size else 0.0

    @property
    def exploding(self) -> float:
        """Fraction above 1e6 in magnitude."""
        return self.huge / self.size if self.size else 0.0

    @property
    def largest(self) -> float:
        """Largest finite magnitude; 0 where there is none."""
        return max(abs(self.min or 0.0), abs(self.max or 0.0))

    @property
    def sparkline(self) -> str:
        """The histogram from 1e-8 to 1e8 in a few characters, zeros first and what is beyond last."""
        if not self.size:
            return ""
        edges = range(25, 39)  # 2 ** -27 to 2 ** 25
        counts = [sum(self.histogram[: edges[0]]), *(self.histogram[b] for b in edges), sum(self.histogram[39:])]
        most = max(counts) or 1
        return "".join(_BARS[math.ceil(8 * math.sqrt(c / most))] for c in counts)

    @property
    def short(self) -> str:
        """Shape, range and what is wrong, in a line."""
        kind = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        if self.bad:
            parts = [("NaN", self.nan), ("+Inf", self.inf), ("-Inf", self.negative_inf)]
            kind += " with " + ", ".join(f"{n} {name}" for name, n in parts if n) + f" of {self.size}"
        if self.min is not None:
            kind += f", {self.min:.4g}" if self.min == self.max else f" in [{self.min:.4g}, {self.max:.4g}]"
        return kind

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain data; Inf and NaN do not occur in it."""
        return dataclasses.asdict(self) | {"bytes": self.bytes}

    @classmethod
    def from_words(cls, words: np.ndarray, shape: Sequence[int], dtype: Any) -> Statistics:
        """Returns the statistics that words tell of an array of this shape and dtype."""
        words = np.asarray(words, np.uint32)
        floats: dict[str, Any] = dict(zip(FLOATS, words[: len(FLOATS)].view(np.float32).tolist(), strict=True))
        at = len(FLOATS)
        counts: dict[str, Any] = dict(zip(COUNTS, words[at : at + len(COUNTS)].tolist(), strict=True))
        size = math.prod(shape) * (2 if jnp.issubdtype(dtype, jnp.complexfloating) else 1)
        if counts["nan"] + counts["inf"] + counts["negative_inf"] == size:
            floats = dict.fromkeys(floats)
        rows = size // shape[-1] if len(shape) > 0 and shape[-1] else 0
        dead, zero_rows = counts.pop("dead_columns"), counts.pop("zero_rows")
        return cls(
            shape=tuple(shape),
            dtype=jnp.dtype(dtype).name,
            min=floats.pop("least"),
            max=floats.pop("greatest"),
            **{name: None if value is None or not math.isfinite(value) else value for name, value in floats.items()},
            **counts,
            dead_units=dead if rows > 1 and len(shape) > 1 else None,
            zero_rows=zero_rows if rows > 1 and len(shape) > 1 else None,
            histogram=tuple(words[-BINS:].tolist()),
        )


def of(x: Any) -> Statistics:
    """Returns the statistics of an array of floats on the host, computed by NumPy in float64."""
    x = np.asarray(x)
    shape, dtype = x.shape, x.dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        x = np.stack([x.real, x.imag])
    wide = x.astype(np.float64)
    size = np.abs(wide)
    finite = wide[np.isfinite(wide)]
    square = float(np.mean(finite**2)) if finite.size else None
    rows = wide.reshape(-1, shape[-1]) if len(shape) > 1 and shape[-1] else None
    grouped = rows is not None and len(rows) > 1
    bits = np.minimum(size, np.finfo(np.float32).max).astype(np.float32).view(np.uint32) >> 25
    bits = np.where(np.isfinite(size), bits, BINS - 1)
    return Statistics(
        shape=shape,
        dtype=jnp.dtype(dtype).name,
        min=float(finite.min()) if finite.size else None,
        max=float(finite.max()) if finite.size else None,
        mean=float(finite.mean()) if finite.size else None,
        std=float(finite.std()) if finite.size else None,
        rms=None if square is None else math.sqrt(square),
        norm=None if square is None else math.sqrt(square * finite.size),
        zeros=int(np.sum(wide == 0)),
        nan=int(np.sum(np.isnan(wide))),
        inf=int(np.sum(wide == np.inf)),
        negative_inf=int(np.sum(wide == -np.inf)),
        subnormal=int(np.sum((size > 0) & (size < float(jnp.finfo(dtype).tiny)))),
        tiny=int(np.sum((size > 0) & (size < np.float32(TINY)))),
        huge=int(np.sum((size > np.float32(HUGE)) & np.isfinite(wide))),
        dead_units=int(np.sum(np.all(rows == 0, axis=0))) if grouped else None,
        zero_rows=int(np.sum(np.all(rows == 0, axis=1))) if grouped else None,
        histogram=tuple(np.bincount(bits.reshape(-1), minlength=BINS).tolist()),
    )
