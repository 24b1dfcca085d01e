"""Where the bytes of tensors lie: in a file mapped into memory, or nowhere until they are made.

Every failure of the operating system becomes a `CheckpointError` that names the file. Views are read-only and keep
the mapping alive: closing a file never invalidates an array that was taken from it.
"""

from __future__ import annotations

import mmap
import stat
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trustcore.errors import CheckpointError

# A platform without madvise (Windows) has neither name: `release` then does nothing.
_DONTNEED: int | None = getattr(mmap, "MADV_DONTNEED", None)
_WILLNEED: int | None = getattr(mmap, "MADV_WILLNEED", None)


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

    def prefetch(self, offset: int, nbytes: int) -> None:
        """Asks the operating system to read the range into its cache; resident memory does not grow by that."""
        if self._map is not None and _WILLNEED is not None and nbytes:
            first = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(_WILLNEED, first, offset + nbytes - first)

    def close(self) -> None:
        """Unmaps the file, at once or, where arrays still look into it, when the last of them goes."""
        mapping, self._map, self._bytes = self._map, None, None
        if mapping is not None:
            try:
                mapping.close()
            except BufferError:
                return  # arrays look into it: the mapping lives as long as they do


class MadeBytes:
    """The bytes of one tensor that stand in no file as they are: compressed, in pieces, or in a store.

    They are made when they are looked at, and kept as long as somebody looks. What `prefetch` made is kept until it
    has been taken once.

    Args:
        path: of the file, for errors.
        nbytes: that `make` gives.
        make: returns uint8 `[nbytes]`; called by one thread at a time, perhaps more than once.
    """

    def __init__(self, path: Path, nbytes: int, make: Callable[[], np.ndarray]):
        self.path, self.size = path, nbytes
        self._make: Callable[[], np.ndarray] | None = make
        self._lock = threading.Lock()
        self._seen: weakref.ref[np.ndarray] | None = None
        self._kept: np.ndarray | None = None

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """Returns `nbytes` bytes from `offset`, uint8, read-only."""
        with self._lock:
            found, self._kept = self._made(), None
        return found[offset : offset + nbytes]

    def prefetch(self, offset: int, nbytes: int) -> None:
        """Makes the bytes now, for whoever looks at them next."""
        del offset, nbytes
        with self._lock:
            self._kept = self._made()

    def release(self, offset: int, nbytes: int) -> None:
        """Lets what `prefetch` made go."""
        del offset, nbytes
        with self._lock:
            self._kept = None

    def close(self) -> None:
        """Makes nothing any more. Arrays that were taken stay."""
        self._make = self._kept = self._seen = None

    def _made(self) -> np.ndarray:
        seen = None if self._seen is None else self._seen()
        if seen is not None:
            return seen
        if self._make is None:
            raise CheckpointError("the checkpoint is closed; open it again, or take the arrays before", path=self.path)
        made = self._make()
        assert made.dtype == np.uint8 and made.shape == (self.size,), (made.dtype, made.shape, self.size)
        made.flags.writeable = False
        if made.size:  # views of it then hold this very array, and not one below it
            made = np.frombuffer(made.data, np.uint8)
        self._seen = weakref.ref(made)
        return made


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
