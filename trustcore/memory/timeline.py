"""An account as a trace that Perfetto and chrome://tracing open: the curve of live bytes over the program's steps.

    Path("memory.json").write_text(json.dumps(trace_events(account(fn, *args))))

Three tracks: the curve (a counter), the scopes that the steps belong to (nested slices), and the largest buffers, each
from the step that makes it to the one that reads it last. Nothing has run: a step counts as a microsecond, whatever it
would take. The trace-event format, JSON object form, with events of phases M, C and X.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from trustcore.memory.account import Account

CURVE, BUFFERS = 1, 2  # processes of the trace
PROGRAM = 1  # thread of the scopes


def trace_events(account: Account, *, buffers: int = 200) -> dict[str, Any]:
    """Returns the trace as plain data for `json.dumps`.

    Args:
        account: of a program.
        buffers: how many of the largest are drawn.
    """
    events: list[dict[str, Any]] = [
        _named("process_name", CURVE, 0, "program"),
        _named("thread_name", CURVE, PROGRAM, "scopes, a step each microsecond"),
        _named("process_name", BUFFERS, 0, "largest buffers"),
    ]
    before = None
    for step, value in enumerate(account.curve.tolist()):
        if value != before:
            events.append(
                {"name": "live bytes", "ph": "C", "ts": step, "pid": CURVE, "tid": 0, "args": {"bytes": value}}
            )
        before = value
    events += _scopes(account)
    events += _buffers(account, buffers)
    figures = {"peak": account.peak, "peak step": account.peak_step, "reserved": account.allocated}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": figures}


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "ts": 0, "pid": pid, "tid": tid, "args": {"name": name}}


def _slice(name: str, begin: int, end: int, pid: int, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    """An event from step `begin` to before step `end`."""
    return {"name": name, "ph": "X", "ts": begin, "dur": end - begin, "pid": pid, "tid": tid, "args": args}


def _scopes(account: Account) -> list[dict[str, Any]]:
    """Slices of the names that steps which follow each other share; slices within slices."""
    found: list[dict[str, Any]] = []
    held: list[tuple[str, int]] = []  # open names, outermost first, and where they began

    def close(depth: int, now: int) -> None:
        while len(held) > depth:
            name, begin = held.pop()
            found.append(_slice(name, begin, now, CURVE, PROGRAM, {}))

    for step, origin in enumerate(account.steps):
        line = f" ({PurePath(origin.file).name}:{origin.line})" if origin.file else ""
        names = ["backward" if origin.backward else "forward", *filter(None, origin.scope.split("/"))]
        names.append((origin.path.rpartition("/")[2] or "made by the compiler") + line)
        same = 0
        while same < min(len(held), len(names)) and held[same][0] == names[same]:
            same += 1
        close(same, step)
        held += [(name, step) for name in names[same:]]
    close(0, len(account.steps))
    return sorted(found, key=lambda event: (event["ts"], -event["dur"]))


def _buffers(account: Account, count: int) -> list[dict[str, Any]]:
    """A slice for each of the largest buffers, on as few tracks as hold them side by side."""
    largest = sorted(account.buffers, key=lambda b: -b.nbytes)[:count]
    free: list[int] = []  # of each track, the step from which it is free
    found = []
    for buffer in sorted(largest, key=lambda b: (b.begin, -b.nbytes)):
        track = next((i for i, until in enumerate(free) if until <= buffer.begin), len(free))
        free[track : track + 1] = [buffer.end + 1]
        told = {"bytes": buffer.nbytes, "kind": buffer.kind, "owner": str(buffer.origin)}
        name = f"{buffer.kind} {buffer.shape}"
        found.append(_slice(name, buffer.begin, buffer.end + 1, BUFFERS, track + 1, told))
    return found
