"""Ctrl-C that stops what is marked as stoppable, and nothing else.

Invariant: outside the blocks of `stoppable()`, and in one that has been stopped, Ctrl-C is ignored: an impatient second
one does not end the program while it tidies up after the first.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Interrupts:
    """Holds the process's SIGINT handler while it is entered; the one before comes back at the end."""

    def __init__(self) -> None:
        self._armed = False
        self._before = signal.getsignal(signal.SIGINT)

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """In this block Ctrl-C raises KeyboardInterrupt, once."""
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt
