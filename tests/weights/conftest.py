"""Helpers of the tests of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trustcore.weights import Checkpoint


class Folder:
    """Writes files, each under a fresh inode: a file that is mapped must not change in place."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, data: bytes, name: str = "model.gguf") -> Path:
        path = self.path / name
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        return path


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """For hypothesis, which runs many examples in one call."""
    return Folder(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def touch_all() -> Callable[[Checkpoint], int]:
    """Reads every byte of every tensor and checks what each array says of itself; returns the number of bytes."""

    def touch(checkpoint: Checkpoint) -> int:
        total = 0
        for name, array in checkpoint.items():
            assert array.name == name
            raw = array.raw()
            assert raw.dtype == np.uint8 and raw.size == array.nbytes and raw.shape[:-1] == array.shape[:-1]
            assert len(raw.tobytes()) == array.nbytes
            total += array.nbytes
            if array.dtype is not None:
                numbers = array.numpy()
                assert numbers.shape == array.shape and numbers.dtype == array.dtype
        return total

    return touch
