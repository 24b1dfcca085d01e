"""What XLA's partitioner says while it compiles: tensors that it could only reshard by making them whole everywhere.

    rematerializations(fn, *args) -> list[Rematerialization]

XLA writes "Involuntary full rematerialization" to the error stream of the process, with its own name of the operation
and no line of the program. The stream is caught while the program is compiled, and the line looked up in the compiled
module; what else was written is passed on.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from trustcore._jax import Frame
from trustcore.graph.hlo import frame_lookup
from trustcore.graph.program import place

_WARNING = re.compile(
    r"Involuntary full rematerialization.*?from sharding (?P<source>\{.*?\}) to (?P<target>\{.*?\}) efficiently "
    r"for HLO operation %(?P<name>\S+) = (?P<dtype>\w+)\[(?P<dims>[\d,]*)\].*?metadata=\{(?P<metadata>.*?)\}",
)
_STREAM = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Rematerialization:
    """A tensor that is made whole on every device to get from one sharding to another.

    Attributes:
        shape: of a device's part before, as XLA writes it: `f32[2,4,8,16]`.
        source, target: shardings, as XLA writes them.
        operation: path and name: `jit(step)/blocks/0/reshape`.
        frame: the line of the program; None where XLA kept none.
    """

    shape: str
    source: str
    target: str
    operation: str
    frame: Frame | None

    def __str__(self) -> str:
        at = f" ({place(self.frame)})" if self.frame else ""
        return (
            f"{self.operation.rpartition('/')[2]} of {self.shape} goes from {self.source} to {self.target} by making "
            f"the tensor whole on every device{at}"
        )


def rematerializations(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Rematerialization]:
    """Returns the involuntary rematerializations of `fn(*args, **kwargs)`; it is compiled, not run.

    Args:
        fn: a function of arrays in pytrees, not jitted (or jitted without shardings of its own).
        args, kwargs: its arguments, arrays or their types, with their shardings.
    """

    def anew(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    # A name of its own: a program that is taken from the cache of compiled ones gives no warnings.
    anew.__name__ = f"{getattr(fn, '__name__', 'fn').strip('<>')}_{uuid.uuid4().hex[:8]}"
    lowered = jax.jit(anew).lower(*args, **kwargs)
    least = jax.config.jax_persistent_cache_min_compile_time_secs  # type: ignore[attr-defined]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    try:
        with _caught() as said:
            compiled = lowered.compile()
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    found = [match for line in said for match in _WARNING.finditer(line)]
    frames = frame_lookup(compiled) if found else None
    told: dict[Rematerialization, None] = {}
    for match in found:
        metadata = _fields(match["metadata"])
        file, line = metadata.get("source_file", ""), int(metadata.get("source_line", 0))
        if not file and frames is not None and "stack_frame_id" in metadata:
            file, line = frames(int(metadata["stack_frame_id"]))
        operation = metadata.get("op_name", match["name"]).replace(anew.__name__, getattr(fn, "__name__", "fn"))
        frame = Frame(file, line, 0, "") if file else None
        shape = f"{match['dtype']}[{match['dims']}]"
        told[Rematerialization(shape, match["source"], match["target"], operation, frame)] = None
    return list(told)


def _fields(text: str) -> dict[str, str]:
    return {name: quoted or bare for name, quoted, bare in re.findall(r'(\w+)=(?:"([^"]*)"|(\S+))', text)}


@contextmanager
def _caught() -> Iterator[list[str]]:
    """Catches what the process writes to its error stream, from C++ as well; the list is filled at the end."""
    said: list[str] = []
    with _STREAM, tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said += file.read().decode(errors="replace").splitlines()
            for line in said:
                if "Involuntary full rematerialization" not in line:
                    print(line, file=sys.stderr)
