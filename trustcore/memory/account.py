"""`account`: how much memory a function will take, when, and for what, before it runs.

    account(fn, *args) -> Account        peak, the curve of live bytes, the buffers at the peak and their owners

The function is compiled, not run: arguments may be `jax.ShapeDtypeStruct`s. What is told is XLA's own plan of buffers
(`trustcore.memory.buffers`); where a backend does not show it (TPUs), its sizes, and buffers by the jaxpr
(`trustcore.memory.liveness`). Beside it stands an estimate from the jaxpr alone, which knows nothing of fusion: where
the two differ much, XLA saved that much, or kept what the program would have let go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from trustcore import units
from trustcore._jax import compiled_with_lines
from trustcore.errors import ProgramError
from trustcore.graph.hlo import Origin, read_program
from trustcore.memory.buffers import Buffer, buffers_of
from trustcore.memory.estimate import estimate
from trustcore.memory.liveness import buffers_by_liveness

_BY_JAXPR = "this backend does not show its buffers: what follows is told by the jaxpr, with nothing fused"


@dataclasses.dataclass(frozen=True)
class Account:
    """What a compiled program takes of one device's memory. All sizes are bytes.

    Attributes:
        peak: the most that is live at once: arguments, results, constants and temporaries.
        arguments, results: of the program; a result that takes the place of a donated argument counts as argument.
        temporaries: the arena that XLA reserves for all else.
        allocated: what is reserved in all; the peak, and what lies unused between buffers.
        host: what the program takes of the host's memory beside it: arguments, results and activations that lie there.
        estimate: the peak that the jaxpr alone lets expect, with nothing fused.
        curve: int64, live bytes at each step of the schedule.
        steps: origin of each step.
        buffers: all of them.
        by: who tells the curve and the buffers: the "compiler", or the "jaxpr" where the backend shows neither. The
            peak is then the compiler's still, which fuses what the curve does not.
    """

    peak: int
    arguments: int
    results: int
    temporaries: int
    allocated: int
    host: int
    estimate: int
    curve: np.ndarray
    steps: tuple[Origin, ...]
    buffers: tuple[Buffer, ...]
    by: Literal["compiler", "jaxpr"] = "compiler"

    @property
    def peak_step(self) -> int:
        """The step at which most is live."""
        return int(np.argmax(self.curve))

    def largest(self, count: int = 10, *, at: int | None = None) -> list[Buffer]:
        """Returns the largest buffers that are live at a step; None: at the peak."""
        step = self.peak_step if at is None else at
        live = [buffer for buffer in self.buffers if buffer.begin <= step <= buffer.end]
        return sorted(live, key=lambda buffer: -buffer.nbytes)[:count]

    def by_scope(self, depth: int = 1, *, at: int | None = None) -> dict[str, int]:
        """Returns the bytes that are live at a step by the first `depth` names of their scopes, largest first."""
        found: dict[str, int] = {}
        for buffer in self.largest(len(self.buffers), at=at):
            names = [name for name in buffer.origin.scope.split("/") if name][:depth]
            scope = "/".join(names) or "(no scope)"
            scope = scope if buffer.kind == "temporary" else f"({buffer.kind}s)"
            found[scope] = found.get(scope, 0) + buffer.nbytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def as_json(self) -> dict[str, Any]:
        """Returns the figures, the curve and the largest buffers as values that JSON can hold."""
        figures = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type == "int"}
        rows = [
            {"bytes": b.nbytes, "kind": b.kind, "shape": b.shape, "owner": b.origin.path, "file": b.origin.file,
             "line": b.origin.line, "begin": b.begin, "end": b.end}
            for b in self.largest()
        ]  # fmt: skip
        peak = self.steps[self.peak_step]
        at = {"owner": peak.path, "file": peak.file, "line": peak.line}
        return {**figures, "by": self.by, "peak_at": at, "curve": self.curve.tolist(), "largest": rows}

    def __str__(self) -> str:
        parts = f"{units.size(self.arguments)} arguments, {units.size(self.results)} results"
        lines = [
            f"peak {units.size(self.peak)} ({parts}), {units.size(self.allocated)} reserved, "
            f"{units.size(self.estimate)} by the jaxpr alone"
            + (f"; {units.size(self.host)} of the host's memory" if self.host else ""),
            *([] if self.by == "compiler" else [_BY_JAXPR]),
            f"at step {self.peak_step + 1} of {len(self.steps)}: {self.steps[self.peak_step]}",
            sparkline(self.curve),
        ]
        for buffer in self.largest():
            if buffer.nbytes < self.peak / 10**4:
                break
            lines.append(f"{units.size(buffer.nbytes):>10}  {buffer.kind:9}  {buffer.shape:28}  {buffer.origin}")
        return "\n".join(lines)


def account(fn: Callable[..., Any], *args: Any, static_argnums: Any = None, donate_argnums: Any = None,
            static_argnames: Any = None, **kwargs: Any) -> Account:  # fmt: skip
    """Returns what `fn(*args, **kwargs)` will take of one device's memory; nothing is run.

    Args:
        fn: a function, jitted or not; the options of `jax.jit` below count where it is not.
        args, kwargs: its arguments, or their shapes (`jax.ShapeDtypeStruct`, with a sharding if they have one).
        static_argnums, donate_argnums, static_argnames: as `jax.jit` takes them.

    Raises:
        Whatever tracing and compiling `fn` raises; a program that does not fit its device is refused there.
    """
    options: Mapping[str, Any] = {
        name: value
        for name, value in (
            ("static_argnums", static_argnums), ("donate_argnums", donate_argnums), ("static_argnames", static_argnames)
        )
        if value is not None
    }  # fmt: skip
    jitted = fn if hasattr(fn, "lower") and not options else jax.jit(fn, **options)
    traced = jitted.trace(*args, **kwargs)
    with compiled_with_lines():
        compiled = traced.lower().compile()
    return account_compiled(compiled, estimate=estimate(traced.jaxpr), jaxpr=traced.jaxpr)


def account_compiled(compiled: Any, *, estimate: int = 0, jaxpr: ClosedJaxpr | None = None) -> Account:
    """Returns the same of what `jax.jit(fn).lower(...).compile()` gave.

    Args:
        compiled: the program.
        estimate: what is told as such.
        jaxpr: of the function, for backends that do not tell how they place buffers.

    Raises:
        ProgramError: the backend does not tell how it places buffers, and there is no jaxpr.
    """
    analysis = compiled.memory_analysis()
    assignment = getattr(analysis, "serialized_buffer_assignment_proto", b"")
    if assignment:
        buffers, steps, allocated = buffers_of(read_program(compiled), assignment)
    elif jaxpr is not None:
        (buffers, steps), allocated = buffers_by_liveness(jaxpr), 0
    else:
        raise ProgramError("this backend does not tell where the buffers of its programs lie.")
    change = np.zeros(len(steps) + 1, np.int64)
    for buffer in buffers:
        change[buffer.begin] += buffer.nbytes
        change[buffer.end + 1] -= buffer.nbytes
    curve = np.cumsum(change)[:-1]
    held = {kind: sum(b.nbytes for b in buffers if b.kind == kind) for kind in ("argument", "result")}
    if not assignment:
        peak = _sizes(analysis) if analysis is not None else int(curve.max(initial=0))
        return Account(
            peak, held["argument"], held["result"], getattr(analysis, "temp_size_in_bytes", 0), peak,
            host_bytes(analysis), estimate, curve, tuple(steps), tuple(buffers), "jaxpr",
        )  # fmt: skip
    return Account(
        peak=int(curve.max(initial=0)),
        arguments=held["argument"],
        results=held["result"],
        temporaries=analysis.temp_size_in_bytes,
        allocated=allocated,
        host=host_bytes(analysis),
        estimate=estimate,
        curve=curve,
        steps=tuple(steps),
        buffers=tuple(buffers),
    )


def host_bytes(analysis: Any) -> int:
    """Returns the bytes that a program takes of the host's memory, of what `compiled.memory_analysis()` gives."""
    kinds = ("argument", "output", "temp")
    return sum(getattr(analysis, f"host_{kind}_size_in_bytes", 0) for kind in kinds) - getattr(
        analysis, "host_alias_size_in_bytes", 0
    )


def peak_of(compiled: Any) -> int:
    """Returns the peak that `account` tells; where the backend tells no buffers, that of the sizes it does tell."""
    analysis = compiled.memory_analysis()
    if getattr(analysis, "serialized_buffer_assignment_proto", b""):
        return account_compiled(compiled).peak
    if analysis is None:
        raise ProgramError("this backend does not tell what its programs take of its memory.")
    return _sizes(analysis)


def _sizes(analysis: Any) -> int:
    whole = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return whole - analysis.alias_size_in_bytes


def sparkline(curve: np.ndarray, width: int = 72) -> str:
    """Returns a curve as a line of text, `▁` none to `█` the most."""
    if not curve.size:
        return ""
    marks = "▁▂▃▄▅▆▇█"
    parts = [part.max() for part in np.array_split(curve, min(width, curve.size))]
    top = max(parts) or 1
    return "".join(marks[int(part * (len(marks) - 1) // top)] for part in parts)
