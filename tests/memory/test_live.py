"""What lies in memory, by line; what a block leaves behind."""

from __future__ import annotations

import gzip
import inspect

import jax
import jax.numpy as jnp
import pytest

from trustcore.errors import ProgramError
from trustcore.memory import census, leaks

KEPT: list[jax.Array] = []
double = jax.jit(lambda x: 2 * x)


def keep(x: jax.Array) -> jax.Array:
    y = double(x)
    KEPT.append(y)
    return y


def lines_of(function) -> range:
    source, first = inspect.getsourcelines(function)
    return range(first, first + len(source))


def test_arrays_are_counted_by_the_line_that_made_them() -> None:
    KEPT.clear()
    before = census().nbytes
    mine = jnp.ones((256, 1024))
    for _ in range(3):
        keep(mine)
    found = census()
    assert found.nbytes - before == 4 * mine.nbytes
    here = {f.line: held for f, held in found.by_line().items() if f.file == __file__}
    assert next(held for line, held in here.items() if line in lines_of(keep)) == (3 * mine.nbytes, 3)
    assert "test_live.py" in str(found) and f" {mine.nbytes}" in found.folded()
    assert all(line.rpartition(" ")[2].isdigit() for line in found.folded().splitlines())


def test_what_a_block_leaves_behind_is_told_by_line() -> None:
    KEPT.clear()
    x = jnp.ones((128, 1024))
    double(x)
    with leaks() as grown:
        for _ in range(5):
            x = keep(x)
    (frame, (nbytes, count)), *rest = grown.lines.items()
    assert frame.line in lines_of(keep) and nbytes == 5 * x.nbytes and count == 5 and not rest
    assert "2.6 MB are left behind" in str(grown)


def test_a_healthy_loop_leaves_nothing() -> None:
    KEPT.clear()
    x = double(jnp.ones((128, 1024)))
    with leaks() as grown:
        for _ in range(5):
            x = double(x)
    assert grown.lines == {} and str(grown) == "nothing is left behind"


@pytest.mark.parametrize("data", [b"", b"no gzip", gzip.compress(b"\x0f")], ids=["empty", "no gzip", "no pprof"])
def test_profiles_that_cannot_be_read_are_refused(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(jax.profiler, "device_memory_profile", lambda backend=None: data)
    with pytest.raises(ProgramError):
        census()
