"""`Shelf`: trees of arrays on disk, brought into memory one at a time, the next one read ahead.

    number = shelf.put(tree)       appended to the file; what is on the shelf never changes
    shelf.fetch(number)            the arrays, read-only views of the file's pages
    shelf.inside(number, after)    the same within a program: a callback, whose result is a temporary of the program

Each array begins at a boundary of pages and is mapped by itself, so that a process needs address space for the trees
that it looks at and not for the file. When a tree is fetched, a thread maps the one behind it and touches its pages;
those of the tree before are handed back. Trees that are walked through in order (layers) are then read while the one
before is computed, and two of them are in memory at a time.

The file has no name where the system allows that, and vanishes with the process.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import tempfile
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import ProgramError

_WILLNEED: int | None = getattr(mmap, "MADV_WILLNEED", None)


@dataclasses.dataclass(frozen=True)
class _Stored:
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Shelf:
    """See the head of this file. Equal and hashed by identity, so that a model may hold one beside its arrays.

    Args:
        folder: where the file is made; None: where temporary files go. It must have room for what is put there.

    Attributes:
        fetched, ahead: trees that were asked for, and how many of them had been read when they were.

    Raises:
        ProgramError: no file can be made there.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None):
        try:
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, prefix="trustcore-shelf-")  # noqa: SIM115 - kept open
        except OSError as error:
            raise ProgramError(f"Shelf: no file can be made in {folder or tempfile.gettempdir()}: {error}") from error
        self._trees: list[tuple[Any, tuple[_Stored, ...]]] = []
        self._end = 0
        self._lock = threading.Lock()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trustcore-shelf")
        self._coming: tuple[int, Future[list[np.ndarray]]] | None = None
        self.fetched = self.ahead = 0
        self._closed = weakref.finalize(self, _close, self._file, self._reader)

    def __len__(self) -> int:
        return len(self._trees)

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(stored.nbytes for _, leaves in self._trees for stored in leaves)

    def put(self, tree: Any) -> int:
        """Appends a tree and returns its number; its arrays may be let go then.

        Raises:
            ProgramError: the disk is full, or the file cannot be written.
        """
        leaves, structure = jax.tree.flatten(tree)
        with self._lock:
            stored = tuple(self._append(np.asarray(leaf)) for leaf in leaves)
            self._trees.append((structure, stored))
            return len(self._trees) - 1

    def join(self, structure: Any, numbers: list[int]) -> int:
        """Returns the number of a tree made of the arrays of others, in this structure; nothing is copied."""
        with self._lock:
            leaves = tuple(stored for number in numbers for stored in self._trees[number][1])
            assert structure.num_leaves == len(leaves), (structure, len(leaves))
            self._trees.append((structure, leaves))
            return len(self._trees) - 1

    def shapes(self, number: int) -> Any:
        """Returns the tree with a `jax.ShapeDtypeStruct` in the place of each array."""
        structure, leaves = self._trees[number]
        return jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(s.shape, s.dtype) for s in leaves])

    def fetch(self, number: int, following: int | None = None) -> Any:
        """Returns a tree, its arrays read-only views of the file; begins to read the one that follows it."""
        structure, _ = self._trees[number]
        return jax.tree.unflatten(structure, self._leaves(number, following))

    def inside(self, number: Any, of: int, after: Any, following: Any) -> Any:
        """Returns a tree within a program that is being traced.

        Args:
            number: of the tree, int32, perhaps known only when the program runs.
            of: the number of any tree of the same structure and shapes.
            after: an array that the program has computed before it needs the tree: not fetched earlier.
            following: the number of the tree that is wanted next.

        Arrays are constants to derivatives.
        """
        structure, stored = self._trees[of]
        shapes = [jax.ShapeDtypeStruct(s.shape, s.dtype) for s in stored]
        started = jax.lax.stop_gradient(jnp.ravel(after)[0])
        numbers = [jnp.asarray(n, jnp.int32) for n in (number, following)]

        def leaves(number: Any, following: Any, started: Any) -> list[np.ndarray]:
            del started
            return self._leaves(int(number), int(following))

        return jax.tree.unflatten(structure, jax.pure_callback(leaves, shapes, *numbers, started))

    def close(self) -> None:
        """Removes the file. Arrays that were fetched stay readable."""
        self._closed()

    def _append(self, array: np.ndarray) -> _Stored:
        offset = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        stored = _Stored(array.shape, array.dtype, offset)
        try:
            self._file.seek(offset)
            self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            self._file.flush()
        except (OSError, ValueError) as error:
            raise ProgramError(f"Shelf: {array.nbytes} bytes cannot be written: {error}") from error
        self._end = offset + max(array.nbytes, 1)
        return stored

    def _leaves(self, number: int, following: int | None) -> list[np.ndarray]:
        with self._lock:
            coming, self._coming = self._coming, None
            self.fetched += 1
            if coming is not None and coming[0] == number:
                self.ahead += 1
                found = coming[1].result()
            else:
                found = [self._view(stored) for stored in self._trees[number][1]]
            if following is not None and following != number:
                self._coming = following, self._reader.submit(self._read, following)
            return found

    def _read(self, number: int) -> list[np.ndarray]:
        """Views of a tree whose pages are in memory."""
        found = [self._view(stored) for stored in self._trees[number][1]]
        for view in found:
            if view.size:  # NumPy adds up without the interpreter's lock, while a program runs
                np.add.reduce(view.reshape(-1).view(np.uint8)[:: mmap.PAGESIZE], dtype=np.int64)
        return found

    def _view(self, stored: _Stored) -> np.ndarray:
        if not stored.nbytes:
            return np.zeros(stored.shape, stored.dtype)
        try:
            window = mmap.mmap(
                self._file.fileno(), stored.nbytes, access=mmap.ACCESS_READ, offset=stored.offset
            )  # unmapped when the last view of it goes
        except (OSError, ValueError) as error:
            raise ProgramError(f"Shelf: {stored.nbytes} bytes cannot be mapped: {error}") from error
        if _WILLNEED is not None:
            window.madvise(_WILLNEED)
        return np.frombuffer(window, np.uint8, stored.nbytes).view(stored.dtype).reshape(stored.shape)


def _close(file: Any, reader: ThreadPoolExecutor) -> None:
    reader.shutdown(wait=False)
    file.close()
