"""The table of contents of a zip archive, proved against the file: which bytes are which entry's.

    entries | central directory | (zip64 record, zip64 locator) | end record, 22 bytes and a comment

Python's `zipfile` keeps half a kilobyte for every 46 bytes of a directory and leaves it open where an entry's bytes
lie, which a view of the file needs to know. An entry of the directory and its own header must agree, entries lie within
the file, side by side, and each name stands once. Bytes are stored, or deflated; every other method is refused.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from dataclasses import dataclass

import numpy as np

from trustcore.errors import CheckpointError
from trustcore.weights.mapped import MappedFile

MAGIC = b"PK\x03\x04"
MAX_ENTRIES = 2**18  # a file for each tensor: more than the largest models have
MAX_RATIO = 1040  # deflate makes at most 1032 bytes of one

_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_STORED, _DEFLATED = 0, 8
_PIECE = 2**20  # bytes that are unpacked at a time


@dataclass(frozen=True)
class ZipEntry:
    """An entry of an archive.

    Attributes:
        name: as the archive has it.
        offset: of its bytes in the file.
        stored: bytes that it has there.
        size: bytes that it stands for.
        deflated: whether they are compressed.
        checksum: CRC-32 of what it stands for.
    """

    name: str
    offset: int
    stored: int
    size: int
    deflated: bool
    checksum: int


def read_directory(file: MappedFile) -> dict[str, ZipEntry]:
    """Returns the entries of a zip archive by name, in the order of the directory.

    Raises:
        CheckpointError: the archive is cut short or broken, or has what is not read here: several disks, encryption,
            another compression than deflate, entries that share bytes or names.
    """
    start, nbytes, count = _end(file)
    if count > MAX_ENTRIES:
        raise _error(file, f"the archive has {count} entries; expected at most {MAX_ENTRIES}", start)
    directory = file.map[start : start + nbytes]
    entries: dict[str, ZipEntry] = {}
    place, ranges = 0, []
    for _ in range(count):
        if place + _CENTRAL.size > nbytes:
            raise _error(file, f"the directory ends after {len(entries)} of {count} entries", start + place)
        fields = _CENTRAL.unpack_from(directory, place)
        magic, flags, method, checksum, stored, size = (fields[i] for i in (0, 3, 4, 7, 8, 9))
        name_size, extra_size, comment_size, disk, header = (fields[i] for i in (10, 11, 12, 13, 16))
        tail = place + _CENTRAL.size
        if magic != b"PK\x01\x02" or tail + name_size + extra_size + comment_size > nbytes:
            raise _error(file, "the directory is broken: an entry is not where it should be", start + place)
        raw = directory[tail : tail + name_size]
        extra = directory[tail + name_size : tail + name_size + extra_size]
        name = raw.decode("utf-8" if flags & 0x800 else "cp437", "replace")
        size, stored, header, disk = _wide(extra, size, stored, header, disk)
        if flags & 0x2041 or disk:
            raise _error(file, f"entry {name[:200]!r} is encrypted or on another disk", start + place)
        if method not in (_STORED, _DEFLATED):
            raise _error(file, f"entry {name[:200]!r} is compressed by method {method}; expected 0 or 8", start + place)
        if name in entries:
            raise _error(file, f"entry {name[:200]!r} stands twice", start + place)
        offset = _data(file, header, raw, name, method, start)
        if offset + stored > start:
            raise _error(file, f"entry {name[:200]!r} has {stored} bytes from {offset} on, past the directory", offset)
        if size != stored if method == _STORED else size > MAX_RATIO * stored:
            raise _error(file, f"entry {name[:200]!r} makes {size} bytes of {stored}, which cannot be", offset)
        entries[name] = ZipEntry(name, offset, stored, size, method == _DEFLATED, checksum)
        ranges.append((header, offset + stored, name))
        place = tail + name_size + extra_size + comment_size
    ranges.sort()
    for (_, end, one), (begin, _, other) in itertools.pairwise(ranges):
        if begin < end:
            raise _error(file, f"entries {one[:200]!r} and {other[:200]!r} share bytes", begin)
    return entries


def read_entry(file: MappedFile, entry: ZipEntry, most: int) -> bytes:
    """Returns what an entry of at most `most` bytes stands for, its checksum proved.

    Raises:
        CheckpointError: it has more, or is broken.
    """
    if entry.size > most:
        raise _error(file, f"entry {entry.name[:200]!r} has {entry.size} bytes; expected at most {most}", entry.offset)
    data = inflated(file, entry, 0, entry.size).tobytes()
    if zlib.crc32(data) != entry.checksum:
        raise _damaged(file, entry)
    return data


def inflated(file: MappedFile, entry: ZipEntry, start: int, nbytes: int) -> np.ndarray:
    """Returns `nbytes` bytes from byte `start` of what an entry stands for, uint8; a view where they are stored.

    The checksum is proved where the entry is deflated and is unpacked to its end; not that of stored bytes, which a
    view does not read.

    Memory: `nbytes`, whatever the entry claims.

    Raises:
        CheckpointError: there are fewer, or they are broken.
    """
    raw = file.view(entry.offset, entry.stored)
    if not entry.deflated:
        return raw[start : start + nbytes]
    machine = zlib.decompressobj(-15)
    made = np.empty(nbytes, np.uint8)
    done, place, checksum, total = 0, 0, 0, start + nbytes
    try:
        while done < total and not machine.eof:
            piece = machine.unconsumed_tail
            if not piece and place >= entry.stored:
                break
            if not piece:
                piece = raw[place : place + _PIECE].tobytes()
                place += len(piece)
            piece = machine.decompress(piece, min(total - done, _PIECE))
            checksum = zlib.crc32(piece, checksum)
            found = np.frombuffer(piece, np.uint8)
            begin = min(max(start - done, 0), len(found))
            into = done + begin - start
            made[max(into, 0) : max(into, 0) + len(found) - begin] = found[begin:]
            done += len(found)
    except zlib.error as fault:
        raise _error(file, f"entry {entry.name[:200]!r} cannot be unpacked: {fault}", entry.offset) from fault
    if done < total:
        raise _error(file, f"entry {entry.name[:200]!r} ends after {done} of {total} bytes", entry.offset)
    if total == entry.size and checksum != entry.checksum:
        raise _damaged(file, entry)
    return made


def _end(file: MappedFile) -> tuple[int, int, int]:
    """Where the directory starts, its bytes and its entries."""
    tail_start = max(file.size - _END.size - 0xFFFF, 0)
    tail = file.map[tail_start:]
    place = tail.rfind(b"PK\x05\x06")
    while place >= 0 and place + _END.size > len(tail):
        place = tail.rfind(b"PK\x05\x06", 0, place)
    if place < 0:
        raise _error(file, "the archive has no end record: it is cut short. Fetch it again.", file.size)
    _, disk, first, here, count, nbytes, start, _ = _END.unpack_from(tail, place)
    at = end = tail_start + place
    if 0xFFFFFFFF in (nbytes, start) or 0xFFFF in (here, count):
        locator = at - _LOCATOR.size
        if locator >= 0 and file.map[locator : locator + 4] == b"PK\x06\x07":
            _, _, at, _ = _LOCATOR.unpack(file.map[locator : locator + _LOCATOR.size])
            if at + _END64.size > locator or file.map[at : at + 4] != b"PK\x06\x06":
                raise _error(file, "the zip64 end record is not where its locator says", locator)
            values = _END64.unpack(file.map[at : at + _END64.size])
            disk, first, here, count, nbytes, start = values[4:]
            end = at
    if disk or first or here != count:
        raise _error(file, "the archive spans several disks", at)
    if start + nbytes > end or count * _CENTRAL.size > nbytes:
        raise _error(
            file, f"a directory of {count} entries in {nbytes} bytes from {start} on does not lie in the file", at
        )
    return start, nbytes, count


def _wide(extra: bytes, size: int, stored: int, header: int, disk: int) -> tuple[int, int, int, int]:
    """The fields of an entry, those that did not fit taken from its zip64 field."""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, place)
        if kind == 1:
            words = extra[place + 4 : place + 4 + length]
            at = 0
            values = [size, stored, header]
            for i, value in enumerate(values):
                if value == 0xFFFFFFFF and at + 8 <= len(words):
                    values[i] = struct.unpack_from("<Q", words, at)[0]
                    at += 8
            size, stored, header = values
            if disk == 0xFFFF and at + 4 <= len(words):
                disk = struct.unpack_from("<L", words, at)[0]
            break
        place += 4 + length
    return size, stored, header, disk


def _data(file: MappedFile, header: int, raw: bytes, name: str, method: int, limit: int) -> int:
    """Where the bytes of an entry start, by its own header."""
    if header + _LOCAL.size > limit:
        raise _error(file, f"entry {name[:200]!r} starts at byte {header}, past the directory", header)
    magic, _, _, here, _, _, _, _, _, name_size, extra_size = _LOCAL.unpack(file.map[header : header + _LOCAL.size])
    begin = header + _LOCAL.size
    if magic != MAGIC or here != method or file.map[begin : begin + name_size] != raw:
        raise _error(file, f"entry {name[:200]!r} and the directory do not agree", header)
    return begin + name_size + extra_size


def _damaged(file: MappedFile, entry: ZipEntry) -> CheckpointError:
    return _error(file, f"the checksum of entry {entry.name[:200]!r} is wrong: the file is damaged", entry.offset)


def _error(file: MappedFile, message: str, offset: int) -> CheckpointError:
    return CheckpointError(message, path=file.path, field="zip archive", offset=offset)
