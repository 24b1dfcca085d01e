"""Typed look-ups in configurations that came from a file: each value is checked where it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trustcore.errors import ModelError

LARGEST = 1 << 31  # no dimension of a real model comes near; keeps products of dimensions out of harm's way


class Values:
    """Typed look-ups in a mapping that came from a file; `where` says which, in errors."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values, self._where = values, where

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value as it stands."""
        return self._values.get(key, default)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def with_defaults(self, **defaults: Any) -> Values:
        """Returns the same values, and these where a key is not there."""
        return Values({**defaults, **self._values}, self._where)

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Returns an integer from `least` to `LARGEST` - 1."""
        value = self._read(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < LARGEST:
            raise ModelError(f"{self._where}: {key} is {value!r}; expected an integer of at least {least}.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a finite number."""
        value = self._read(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelError(f"{self._where}: {key} is {value!r}; expected a number.")
        return float(value)

    def text(self, key: str, default: str) -> str:
        """Returns a string."""
        value = self._read(key, default)
        if not isinstance(value, str):
            raise ModelError(f"{self._where}: {key} is {value!r}; expected a string.")
        return value

    def choice(self, key: str, default: str | None, allowed: Mapping[str, Any]) -> Any:
        """Returns what `allowed` has under the name that stands there."""
        value = self._read(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise ModelError(f"{self._where}: {key} is {value!r}; supported: {', '.join(allowed)}.")
        return allowed[value]

    def sequence(self, key: str, kind: type | tuple[type, ...], length: int) -> tuple[Any, ...] | None:
        """Returns a list of `length` values of that type as a tuple; None where there is none."""
        value = self._values.get(key)
        if value is None:
            return None
        value = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(value, list | tuple) or len(value) != length or not all(isinstance(x, kind) for x in value):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join(k.__name__ for k in kinds)
            raise ModelError(f"{self._where}: {key} is {str(value)[:64]!r}; expected a list of {length} of {wanted}.")
        return tuple(value)

    def flag(self, key: str, default: bool) -> bool:
        """Returns a truth value."""
        value = self._read(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self._where}: {key} is {value!r}; expected true or false.")
        return value

    def _read(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self._where}: {key} is missing.")
        return value.item() if hasattr(value, "item") else value


def integers(values: Values, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a list of at most 1024 positive integers.

    Raises:
        ModelError: it is something else.
    """
    given = values.get(key)
    given = list(default) if given is None else given
    good = isinstance(given, list) and 0 < len(given) <= 1024
    if not good or not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < LARGEST for n in given):
        raise ModelError(f"config.json: {key} is {given!r}; expected a list of positive integers.")
    return tuple(given)
