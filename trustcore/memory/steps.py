"""What each step of a loop took at its peak, and how scattered the memory that is left lies.

    log = StepPeaks()
    for batch in batches:
        with log.step():
            params = train_step(params, batch)
    print(log)

A device that counts its bytes (`memory_stats`: GPU, TPU) is asked every millisecond by a thread, and its own peak is
taken where the step raised it. A CPU counts nothing: there the process's resident memory is told, whose peak Linux
keeps exactly and lets one reset.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any, Literal

import jax

from trustcore import units
from trustcore.errors import ProgramError
from trustcore.heap import trim_heap
from trustcore.memory.account import sparkline

INTERVAL = 1e-3  # seconds between two looks


@dataclasses.dataclass(frozen=True)
class StepPeak:
    """A step.

    Attributes:
        name: of it.
        before, after: bytes in use when it began and when it ended.
        peak: the most in between.
    """

    name: str
    before: int
    after: int
    peak: int

    @property
    def left(self) -> int:
        """Bytes that it left behind."""
        return self.after - self.before


class StepPeaks:
    """Peaks of steps; see the head of this file.

    Args:
        device: whose memory is meant; None: the default one.

    Attributes:
        source: whether the device's own bytes are told, or those of the process.
        steps: those that ended.

    Raises:
        ProgramError: neither the device nor the system tells.
    """

    def __init__(self, device: Any = None):
        self._device = device or jax.devices()[0]
        told = self._device.memory_stats() or {}
        self.source: Literal["device", "process"] = "device" if "bytes_in_use" in told else "process"
        self.steps: list[StepPeak] = []
        self._now()  # raises where nobody tells

    @contextlib.contextmanager
    def step(self, name: str = "") -> Iterator[None]:
        """A context that is one step; what was begun in it is waited for at its end."""
        if self.source == "process":
            trim_heap()  # what was freed and kept would hide what the step takes
        before, seen, done = self._now(), [0], threading.Event()
        exact = self._reset()

        def look() -> None:
            while not done.wait(INTERVAL):
                seen[0] = max(seen[0], self._now())

        watcher = None if exact == "process" else threading.Thread(target=look, daemon=True)
        if watcher is not None:
            watcher.start()
        try:
            yield
            jax.block_until_ready([array for array in jax.live_arrays() if not array.is_deleted()])
        finally:
            done.set()
            if watcher is not None:
                watcher.join()
            after = self._now()
            peak = max(before, after, seen[0], self._exact(exact))
            self.steps.append(StepPeak(name or f"step {len(self.steps)}", before, after, peak))

    def __str__(self) -> str:
        whose = "the device's memory" if self.source == "device" else "the process's resident memory"
        lines = [f"peaks of {len(self.steps)} steps, of {whose}"]
        if self.steps:
            import numpy as np

            lines.append(sparkline(np.array([step.peak for step in self.steps])))
        lines += [
            f"{units.size(s.peak):>10}  {'+' if s.left >= 0 else '-'}{units.size(abs(s.left)):>9} left  {s.name}"
            for s in self.steps[-20:]
        ]
        return "\n".join(lines)

    def _now(self) -> int:
        if self.source == "device":
            return int(self._device.memory_stats()["bytes_in_use"])
        return _status("VmRSS")

    def _reset(self) -> str | int:
        """Begins an exact measurement: "process", or the device's peak so far; -1 where there is none."""
        if self.source == "device":
            return int(self._device.memory_stats().get("peak_bytes_in_use", -1))
        try:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")  # sets the peak to what is resident now
        except OSError:
            return -1
        return "process"

    def _exact(self, began: str | int) -> int:
        if began == "process":
            return _status("VmHWM")
        if self.source == "device":
            peak = int(self._device.memory_stats().get("peak_bytes_in_use", -1))
            return peak if isinstance(began, int) and peak > began >= 0 else 0
        return 0


@dataclasses.dataclass(frozen=True)
class Fragmentation:
    """How the memory that a device has left lies.

    Attributes:
        left: bytes.
        largest: bytes of the largest piece in one.
        reserved: bytes that the allocator holds.
        in_use: bytes of these that arrays take.
    """

    left: int
    largest: int
    reserved: int
    in_use: int

    @property
    def share(self) -> float:
        """Share of what is left that one array could not have: 0 where it lies in one piece."""
        return 1 - min(self.largest / self.left, 1.0) if self.left else 0.0

    def __str__(self) -> str:
        return (
            f"{units.size(self.left)} left, the largest piece {units.size(self.largest)} ({self.share:.0%} scattered); "
            f"{units.size(self.in_use)} of {units.size(self.reserved)} held are in use"
        )


def fragmentation(device: Any = None) -> Fragmentation | None:
    """Returns how scattered a device's memory is; None where the backend does not tell, as on CPUs."""
    told = (device or jax.devices()[0]).memory_stats() or {}
    if "largest_free_block_bytes" not in told or "bytes_in_use" not in told:
        return None
    in_use = int(told["bytes_in_use"])
    reserved = int(told.get("pool_bytes", told.get("bytes_reserved", 0)) or in_use)
    limit = int(told.get("bytes_limit", reserved))
    return Fragmentation(max(limit - in_use, 0), int(told["largest_free_block_bytes"]), reserved, in_use)


def _status(field: str) -> int:
    """Bytes that Linux says of this process."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))
    except (OSError, StopIteration, ValueError) as error:
        raise ProgramError("StepPeaks: neither this device nor this system tells what is in use.") from error
