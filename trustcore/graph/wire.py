"""Protocol buffers as numbered fields: what is needed to read XLA's own descriptions, without the protobuf package.

message = (key, value)*      key = field number << 3 | kind      kind 0: varint, 1: 8 bytes, 2: length and bytes,
                                                                  5: 4 bytes
"""

from __future__ import annotations

from collections.abc import Iterator

from trustcore.errors import ProgramError

Value = int | bytes


class Message:
    """The fields of one message, by their numbers; unknown ones are kept and never looked at."""

    def __init__(self, data: bytes):
        self._fields: dict[int, list[Value]] = {}
        for number, value in _fields(data):
            self._fields.setdefault(number, []).append(value)

    def number(self, field: int, default: int = 0) -> int:
        """Returns a varint, the last where there are several."""
        value = self._fields.get(field, [default])[-1]
        return value if isinstance(value, int) else int.from_bytes(value, "little")

    def text(self, field: int) -> str:
        """Returns a text; "" where there is none."""
        value = self._fields.get(field, [b""])[-1]
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else ""

    def message(self, field: int) -> Message:
        """Returns a message within this one; an empty one where there is none."""
        value = self._fields.get(field, [b""])[-1]
        return Message(value if isinstance(value, bytes) else b"")

    def messages(self, field: int) -> list[Message]:
        """Returns all messages of a repeated field."""
        return [Message(value) for value in self._fields.get(field, []) if isinstance(value, bytes)]

    def texts(self, field: int) -> list[str]:
        """Returns all texts of a repeated field."""
        found = self._fields.get(field, [])
        return [value.decode("utf-8", "replace") for value in found if isinstance(value, bytes)]

    def numbers(self, field: int) -> list[int]:
        """Returns all varints of a repeated field, packed or not."""
        found: list[int] = []
        for value in self._fields.get(field, []):
            if isinstance(value, int):
                found.append(value)
                continue
            at = 0
            while at < len(value):
                number, at = _varint(value, at)
                found.append(number)
        return found


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ProgramError(f"a field of kind {kind} at byte {at} of what XLA says of its program cannot be read.")
        if at + length > len(data):
            raise ProgramError("what XLA says of its program ends in the middle of a field.")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ProgramError("what XLA says of its program ends in the middle of a number.")
