"""How many bytes of free buffers a pool may keep: a fixed number, or one that follows what happens.

    limit(usage) -> bytes        asked after every request and whenever a buffer comes back

What is kept between `least` and `most` moves with the share of requests that found a buffer (`HitRate`), with the
memory that the device has left (`Pressure`), or with what the next requests will need (`Predictive`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from trustcore.errors import PoolError


class Usage(NamedTuple):
    """What a limit is told.

    Attributes:
        hits, misses, evictions: so far.
        free: bytes of free buffers.
        lent: bytes of buffers that are out.
        predicted: bytes of the buffers that the next requests are expected to want.
    """

    hits: int
    misses: int
    evictions: int
    free: int
    lent: int
    predicted: int


class Limit(Protocol):
    """See the head of this file."""

    def __call__(self, usage: Usage) -> int:
        """Returns the bytes that free buffers may take now."""
        ...


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Always the same."""

    nbytes: int

    def __post_init__(self) -> None:
        _check(self.nbytes, self.nbytes)

    def __call__(self, usage: Usage) -> int:
        """See `Limit`."""
        return self.nbytes


@dataclasses.dataclass
class HitRate:
    """Grows by half while too few requests find a buffer and buffers are being evicted; shrinks by an eighth otherwise.

    Attributes:
        least, most: bytes between which it stays; it begins at `least`.
        target: share of requests that should find a buffer.
        window: requests after which it is looked at again.
    """

    least: int
    most: int
    target: float = 0.9
    window: int = 64

    def __post_init__(self) -> None:
        _check(self.least, self.most)
        if not 0 < self.target <= 1 or self.window < 1:
            raise PoolError(f"HitRate: target {self.target} and window {self.window}; expected 0 to 1 and at least 1.")
        self._now = max(self.least, 1)
        self._then = Usage(0, 0, 0, 0, 0, 0)

    def __call__(self, usage: Usage) -> int:
        """See `Limit`."""
        hits, misses = usage.hits - self._then.hits, usage.misses - self._then.misses
        if hits + misses >= self.window:
            rate = hits / (hits + misses)
            if rate < self.target and usage.evictions > self._then.evictions:
                self._now = max(self._now * 3 // 2, self._now + 1)
            elif rate >= self.target:
                self._now -= self._now // 8
            self._then = usage
        self._now = min(max(self._now, self.least), self.most)
        return self._now


@dataclasses.dataclass(frozen=True)
class Pressure:
    """A share of the memory that would be left if there were no free buffers.

    Attributes:
        least, most: bytes between which it stays.
        share: of that memory.
        left: gives the bytes that are left now; None: what the device says (`memory_stats`), or on Linux, where it says
            nothing, what the system says is available.
    """

    least: int
    most: int
    share: float = 0.5
    left: Callable[[], int] | None = None

    def __post_init__(self) -> None:
        _check(self.least, self.most)
        if not 0 < self.share <= 1:
            raise PoolError(f"Pressure: share {self.share}; expected more than 0, at most 1.")

    def __call__(self, usage: Usage) -> int:
        """See `Limit`."""
        left = (self.left or memory_left)() + usage.free
        return int(min(max(self.share * left, self.least), self.most))


@dataclasses.dataclass(frozen=True)
class Predictive:
    """What the next requests are expected to want, and a little more.

    Attributes:
        least, most: bytes between which it stays.
        margin: times what is predicted.
    """

    least: int
    most: int
    margin: float = 1.25

    def __post_init__(self) -> None:
        _check(self.least, self.most)

    def __call__(self, usage: Usage) -> int:
        """See `Limit`."""
        return int(min(max(self.margin * usage.predicted, self.least), self.most))


def memory_left(device: Any = None) -> int:
    """Returns the bytes that a device (None: the default one) has left.

    Raises:
        PoolError: neither the device nor the system tells.
    """
    import jax

    stats = (device or jax.devices()[0]).memory_stats() or {}
    if "bytes_limit" in stats and "bytes_in_use" in stats:
        return max(stats["bytes_limit"] - stats["bytes_in_use"], 0)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass  # another system, which is said below
    raise PoolError("this device does not tell how much memory it has left; pass Pressure(left=...) or another limit.")


def _check(least: int, most: int) -> None:
    if not 0 <= least <= most:
        raise PoolError(f"a limit from {least} to {most} bytes; expected 0 <= least <= most.")
