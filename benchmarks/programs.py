"""Compiled programs of one process side by side: they must agree, and take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def side_by_side(
    row: dict[str, Any],
    makers: Mapping[str, Callable[[], Any]],
    operands: Iterable[Any],
    *,
    seconds: float,
    memory: int,
) -> dict[str, Any]:
    """Fills a row with each program's seconds (a list), temporary bytes and seconds of compiling, and returns it.

    Args:
        row: what is measured; gets "seconds", "bytes" and "compile".
        makers: a function for each name that compiles its program; results must agree within 1e-4 of the largest.
        operands: of all of them.
        seconds: how long they take turns, twice each at least.
        memory: programs whose temporaries take more bytes are compiled and not run.
    """
    import jax

    operands = tuple(operands)
    row.update(seconds={}, bytes={}, compile={})
    programs = {}
    for name, make in makers.items():
        begin = time.perf_counter()
        program = make()
        row["compile"][name] = time.perf_counter() - begin
        row["bytes"][name] = program.memory_analysis().temp_size_in_bytes
        if row["bytes"][name] <= memory:
            programs[name], row["seconds"][name] = program, []
    first, *others = [jax.block_until_ready(program(*operands)) for program in programs.values()]
    for other in others:
        pairs = zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
        worst = max(float(abs(a - b).max() / (abs(b).max() + 1e-9)) for a, b in pairs)
        assert worst < 1e-4, (row, worst)
    del first, others
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, row["seconds"].values())) < 2:
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(*operands))
            row["seconds"][name].append(time.perf_counter() - begin)
    told = {name: f"{statistics.median(times) * 1e3:.2f} ms" for name, times in row["seconds"].items()}
    what = {key: value for key, value in row.items() if key not in ("seconds", "bytes", "compile")}
    print(what, told, row["bytes"], flush=True)
    return row


def figures(row: Mapping[str, Any], ours: str, theirs: str) -> list[str]:
    """Returns the cells of a row: both medians (lowest to highest) in ms, theirs / ours, both temporaries in MB.

    Programs that were not run leave their cells empty.
    """
    median = {name: statistics.median(times) for name, times in row["seconds"].items()}

    def milliseconds(name: str) -> str:
        times = row["seconds"].get(name)
        return f"{median[name] * 1e3:.3g} ({min(times) * 1e3:.3g} to {max(times) * 1e3:.3g})" if times else ""

    ratio = f"{median[theirs] / median[ours]:.2f}" if theirs in median else ""
    memory = [f"{row['bytes'][name] / 1e6:.4g}" for name in (ours, theirs)]
    return [milliseconds(ours), milliseconds(theirs), ratio, *memory]
