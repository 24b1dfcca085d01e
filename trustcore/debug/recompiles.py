"""`recompiles`: a context that says of every retrace what changed, against which earlier call.

    with recompiles() as log:
        train()
    print(log)

JAX tells its listeners that it traces or compiles; the arguments are those of the call on the stack above. Each call is
kept as its signature: for every leaf of the arguments shape, dtype, weak type and sharding, or its value where it is
static. A call that had to be traced or compiled is compared with the earlier one of the same function that is closest.
Calls that were compiled before the context was entered are not known to it: the first of a function after that is new.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import jax
from jax import monitoring
from jax.core import Tracer

from trustcore import _jax
from trustcore.graph.program import place

_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "traced",
    "/jax/core/compile/backend_compile_duration": "compiled",
}
MANY = 5  # programs of one function from which on a warning is given


class RecompileWarning(UserWarning):
    """A function is traced again and again."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a compiled program depends on in one leaf of the arguments.

    Attributes:
        shape, dtype, weak_type, sharding: of an array; None for a static value.
        static: a static value, as text; None for an array.
    """

    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    weak_type: bool | None = None
    sharding: str | None = None
    static: str | None = None


@dataclasses.dataclass(frozen=True)
class Change:
    """What differs in an argument from an earlier call.

    Attributes:
        argument: its name and path.
        what: "shape", "dtype", "weak type", "sharding", "static value", "structure" (it was not there, or is gone),
            "function" (another function of the same name and line), "context" (none of the arguments: a setting of jax,
            a mesh, or a value that the function closes over).
        before, now: as text.
    """

    argument: str
    what: str
    before: str
    now: str

    def __str__(self) -> str:
        subject = f"{self.what} of {self.argument}" if self.argument else self.what
        return f"{subject}: {self.before} before, {self.now} now"


@dataclasses.dataclass(frozen=True)
class Recompile:
    """A call that had to be traced or compiled.

    Attributes:
        function: its name.
        defined: where it is defined, `file.py:12`.
        caller: the line of the call.
        number: which of its calls that had to be: 0 is the first, which is no retrace.
        against: number of the closest earlier one; None for the first.
        changes: what differs from that one.
        nested: whether the call was made while another function was traced.
        seconds: spent tracing and compiling it.
    """

    function: str
    defined: str
    caller: str
    number: int
    against: int | None
    changes: tuple[Change, ...]
    nested: bool
    seconds: float

    def __str__(self) -> str:
        where = f"{self.function} ({self.defined}), called at {self.caller}"
        if self.against is None:
            return f"{where}: first program, {self.seconds:.2f} s"
        reasons = "; ".join(map(str, self.changes))
        return (
            f"{where}: program {self.number + 1} ({self.seconds:.2f} s), unlike program {self.against + 1}: {reasons}"
        )


class RecompileLog:
    """What `recompiles` saw.

    Attributes:
        calls: every call that had to be traced or compiled, in order; operations outside of jit are left out.
    """

    def __init__(self, warn_after: int):
        self.calls: list[Recompile] = []
        self._warn_after = warn_after
        self._known: dict[Any, list[tuple[dict[str, Leaf], Any]]] = {}
        self._open: dict[Any, int] = {}

    @property
    def retraces(self) -> list[Recompile]:
        """The calls that are not the first of their function."""
        return [call for call in self.calls if call.against is not None]

    @property
    def counts(self) -> dict[str, int]:
        """Programs by function."""
        return dict(collections.Counter(f"{call.function} ({call.defined})" for call in self.calls))

    def __str__(self) -> str:
        return "\n".join(map(str, self.calls)) or "Nothing was traced or compiled."

    def add(self, kind: str, seconds: float, call: _jax.Call) -> None:
        """Notes that a call is being traced or compiled."""
        code = getattr(call.function, "__code__", None)
        module = getattr(call.function, "__module__", None) or ""
        if code is None or module.split(".")[0] in ("jax", "jaxlib"):
            return
        key = (code.co_filename, code.co_firstlineno, getattr(call.function, "__qualname__", "?"))
        sign = signature(call)
        in_progress = (key, id(call.args), id(call.kwargs), threading.get_ident())
        if in_progress in self._open and kind == "compiled":
            index = self._open.pop(in_progress)
            self.calls[index] = dataclasses.replace(self.calls[index], seconds=self.calls[index].seconds + seconds)
            return
        known = self._known.setdefault(key, [])
        against, changes = _closest(sign, call.function, known)
        nested = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((call.args, call.kwargs)))
        if kind == "traced":
            self._open[in_progress] = len(self.calls)
        self.calls.append(
            Recompile(
                function=getattr(call.function, "__name__", "?"),
                defined=place(_jax.Frame(code.co_filename, code.co_firstlineno, 0, "")),
                caller=place(call.caller) or "?",
                number=len(known),
                against=against,
                changes=changes,
                nested=nested,
                seconds=seconds,
            )
        )
        known.append((sign, call.function))
        if self._warn_after and len(known) == self._warn_after and not nested:
            last = self.calls[-1]
            warnings.warn(
                f"{last.function} ({last.defined}) has been traced {len(known)} times; at last for "
                + "; ".join(map(str, changes)),
                RecompileWarning,
                stacklevel=2,
            )


@contextlib.contextmanager
def recompiles(*, warn_after: int = MANY) -> Iterator[RecompileLog]:
    """A context that notes every call of a jitted function that has to be traced or compiled, and why.

    Args:
        warn_after: programs of one function at which a `RecompileWarning` is given, once; 0: never.
    """
    log = RecompileLog(warn_after)
    busy = threading.local()

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        kind = _EVENTS.get(event)
        if kind is None or getattr(busy, "now", False):
            return
        call = _jax.jit_call_in_progress()
        if call is not None:
            busy.now = True
            try:
                log.add(kind, duration_secs, call)
            finally:
                busy.now = False

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield log
    finally:
        monitoring.unregister_event_duration_listener(listen)


def signature(call: _jax.Call) -> dict[str, Leaf]:
    """Returns what a program depends on, by the path of each leaf of the arguments."""
    names = _parameters(call.function)
    found: dict[str, Leaf] = {}
    fixed = {i % max(len(call.args), 1) if i < 0 else i for i in call.static_argnums}
    for i, value in enumerate(call.args):
        name = names[i] if i < len(names) else f"args[{i}]"
        found.update(_leaves(name, value, i in fixed or name in call.static_argnames))
    for name, value in call.kwargs.items():
        found.update(_leaves(name, value, name in call.static_argnames))
    return found


def _parameters(function: Any) -> list[str]:
    code = getattr(function, "__code__", None)
    return list(code.co_varnames[: code.co_argcount]) if code is not None else []


def _leaves(name: str, value: Any, static: bool) -> dict[str, Leaf]:
    if static:
        return {name: Leaf(static=_text(value))}
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
        found[name + jax.tree_util.keystr(path)] = _leaf(leaf)
    return found or {name: Leaf(static=_text(value))}


def _leaf(leaf: Any) -> Leaf:
    try:
        aval = jax.typeof(leaf)
    except TypeError:
        return Leaf(static=_text(leaf))
    sharding = None
    if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.committed:
        sharding = str(leaf.sharding)
    return Leaf(tuple(aval.shape), str(aval.dtype), bool(getattr(aval, "weak_type", False)), sharding)


def _text(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _closest(
    sign: dict[str, Leaf], function: Any, known: list[tuple[dict[str, Leaf], Any]]
) -> tuple[int | None, tuple[Change, ...]]:
    best: tuple[int, int] | None = None
    for i, (other, _) in enumerate(known):
        distance = len(_changes(other, sign))
        if best is None or distance <= best[0]:
            best = (distance, i)
    if best is None:
        return None, ()
    changes = _changes(known[best[1]][0], sign)
    if not changes and known[best[1]][1] is not function:
        changes = [Change("", "function", "another object of the same definition", "one made anew")]
    elif not changes:
        changes = [Change("", "context", "other settings of jax, mesh or closure", "the same arguments")]
    return best[1], tuple(changes)


def _changes(before: dict[str, Leaf], now: dict[str, Leaf]) -> list[Change]:
    found = []
    for name in {**before, **now}:
        a, b = before.get(name), now.get(name)
        if a is None or b is None:
            there = "there" if a else "not there"
            found.append(Change(name, "structure", there, "not there" if a else "there"))
            continue
        if a.static != b.static:
            found.append(Change(name, "static value", a.static or "an array", b.static or "an array"))
            continue
        for what, attribute in (
            ("shape", "shape"),
            ("dtype", "dtype"),
            ("weak type", "weak_type"),
            ("sharding", "sharding"),
        ):
            x, y = getattr(a, attribute), getattr(b, attribute)
            if x != y:
                found.append(Change(name, what, str(x) if x is not None else "any", str(y) if y is not None else "any"))
    return found
