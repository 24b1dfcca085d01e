"""A file mapped into memory for reading: the only way that bytes of a checkpoint are reached.

Every failure of the operating system becomes a `CheckpointError` that names the file. Views are read-only and keep
the mapping alive: closing a file never invalidates an array that was taken from it.
"""

from __future__ import annotations

import mmap
import stat
from pathlib import Path

import numpy as np

from trustcore.errors import CheckpointError

# A platform without madvise (Windows) has neither name: `release` then does nothing.
_DONTNEED: int | None = getattr(mmap, "MADV_DONTNEED", None)


class MappedFile:
    """A regular file that is not empty, mapped whole."""

    def __init__(self, path: Path):
        self.path = path
        self._map: mmap.mmap | None = None
        _refuse_empty(path, file_size(path))
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot be mapped into memory: {error}", path=path) from error
        self.size = len(self._map)  # what is mapped bounds everything, whatever stat said before
        self._bytes: np.ndarray | None = np.frombuffer(self._map, np.uint8)

    @property
    def map(self) -> mmap.mmap:
        """The mapping itself."""
        if self._map is None:
            raise CheckpointError("the checkpoint is closed; open it again, or take the arrays before", path=self.path)
        return self._map

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """Returns `nbytes` bytes from `offset`, uint8, read-only; the caller has checked that they are in the file."""
        assert 0 <= offset <= offset + nbytes <= self.size, (offset, nbytes, self.size)
        self.map  # noqa: B018 - raises when closed
        assert self._bytes is not None
        return self._bytes[offset : offset + nbytes]

    def release(self, offset: int, nbytes: int) -> None:
        """Lets the operating system drop the whole pages inside the range; the data stay readable."""
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and _DONTNEED is not None and last > first:
            self._map.madvise(_DONTNEED, first, last - first)

    def close(self) -> None:
        """Unmaps the file, at once or, where arrays still look into it, when the last of them goes."""
        mapping, self._map, self._bytes = self._map, None, None
        if mapping is not None:
            try:
                mapping.close()
            except BufferError:
                return  # arrays look into it: the mapping lives as long as they do


def file_size(path: Path) -> int:
    """Returns the bytes of a regular file; anything else, and a missing file, is a CheckpointError."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise CheckpointError("no such file", path=path) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise CheckpointError(f"cannot be opened: {error}", path=path) from error
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError("this is a folder; give a file, or use open_checkpoint to look inside", path=path)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError("this is not a regular file (a pipe, a socket or a device)", path=path)
    return status.st_size


def read_bytes(path: Path, nbytes: int) -> bytes:
    """Returns the first `nbytes` bytes, or fewer where it ends before, of a regular file that is not empty."""
    _refuse_empty(path, file_size(path))
    try:
        with open(path, "rb") as file:
            return file.read(nbytes)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error}", path=path) from error


def _refuse_empty(path: Path, size: int) -> None:
    if size == 0:
        raise CheckpointError("the file is empty; expected a checkpoint. Fetch it again.", path=path, offset=0)
