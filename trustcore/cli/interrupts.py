"""Ctrl-C that is not lost, and Ctrl-C that stops what is marked as stoppable and nothing else.

Python raises KeyboardInterrupt wherever the program happens to be. Where that is a callback (jax has one of the garbage
collector) or C++ code that falls back on any error, the exception is dropped and the program goes on: one press in
twenty of `trustcore quantize`. So a press is remembered, and `check()`, called at every step of what takes long, raises
again.

A process has one Ctrl-C, hence the state of this module.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_pressed = threading.Event()


def check() -> None:
    """Raises the KeyboardInterrupt of a press that was swallowed on its way."""
    if _pressed.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """In this block a press of Ctrl-C raises KeyboardInterrupt at once, and at each `check()` from then on."""
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    _pressed.clear()
    before, report = signal.signal(signal.SIGINT, _remember), sys.unraisablehook
    # What Python says of an exception in a callback is not said of this one, which is not lost.
    sys.unraisablehook = lambda lost: None if lost.exc_type is KeyboardInterrupt else report(lost)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = report
        _pressed.clear()


def _remember(number: int, frame: FrameType | None) -> None:
    _pressed.set()
    raise KeyboardInterrupt


class Interrupts:
    """Holds the process's SIGINT handler while it is entered; the one before comes back at the end.

    Invariant: outside the blocks of `stoppable()`, and in one that has been stopped, Ctrl-C is ignored: an impatient
    second one does not end the program while it tidies up after the first.
    """

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
        """In this block Ctrl-C raises KeyboardInterrupt, once, and at each `check()` from then on."""
        self._armed = True
        try:
            yield
        finally:
            self._armed = False
            _pressed.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            _remember(number, frame)
