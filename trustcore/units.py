"""Numbers for people: bytes and counts in powers of 1000, as disks and model pages count."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """Returns bytes as "98.4 MB"."""
    return f"{nbytes:.0f} B" if abs(nbytes) < 1000 else f"{_scaled(nbytes)}B"


def count(number: float) -> str:
    """Returns a count as "134.5 M"; below a thousand, the number itself."""
    return f"{number:.0f}" if abs(number) < 1000 else _scaled(number)


def _scaled(number: float) -> str:
    for unit in "kMG":
        number /= 1000
        if abs(number) < 1000:
            return f"{number:.1f} {unit}"
    return f"{number / 1000:.1f} T"
