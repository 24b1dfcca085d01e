"""Gives memory that was freed back to the operating system.

Reading a tokenizer, tracing and compiling leave tens of megabytes of freed but kept heap behind, which would stay in
the process's size for good (40 to 80 MB for each program of the demo model). glibc returns it when asked; elsewhere
nothing is done.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any


def trim_heap() -> None:
    """Returns freed heap to the system. Takes a few milliseconds; call it after something large was done with."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except AttributeError:  # another C library
        return None
