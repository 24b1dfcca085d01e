"""What would be chosen for a call and why, and the modes in which ops ask.

    off        nothing is looked up: every op takes its defaults. Costs one test for None. The mode at the start
    cached     tables are read
    first_use  as cached; an op that is called outside of any trace, and for whose bucket nothing was found yet, is
               tuned before it is computed. Inside a trace it reads tables, as cached does

A mode is a part of the key of jax's caches: under another mode, or after the device's table has changed and the mode
was entered anew, functions are traced again. Within one block a function that was traced keeps its choice.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import jax
from jax.core import Tracer

from kernels_pallas import Target, tuning
from kernels_pallas.tuning import Facts, Tunable, Values
from trustcore import _jax
from trustcore.errors import TrustcoreError, TuningError
from trustcore.tune import registry, table
from trustcore.tune.device import Device, this_device
from trustcore.tune.listing import described

Mode = Literal["off", "cached", "first_use"]
MODES = ("off", "cached", "first_use")
FIRST_USE_SECONDS = 2.0  # of timing; compiling the candidates comes to it


@dataclasses.dataclass(frozen=True)
class Choice:
    """What an op takes for a call.

    Attributes:
        op, facts: the call.
        values: what it takes; {} are its defaults.
        source: "cache", "nearest", "package" or "defaults".
        why: in words.
    """

    op: str
    facts: Facts
    values: Values
    source: str
    why: str

    def __str__(self) -> str:
        return f"{self.op} {text_of(self.facts)}\n  {described(self.values)}\n  {self.why}"


def best(op: str | Tunable, *shapes: Any, device: Device | None = None, **options: Any) -> Choice:
    """Returns what an op would take for a call where tables are read, and why.

    Args:
        op: its name, such as "attention_forward".
        shapes: the op's operands, arrays or `jax.ShapeDtypeStruct`; or one mapping of facts, or them as text:
            "B=1,T=2048,N=8,H=64".
        device: None: the one where arrays are computed by default.
        options: what the op takes by name; facts, where no shapes are given.

    Raises:
        TuningError: the op declares nothing, or the facts are not its.

    Example:
        >>> import trustcore as tc
        >>> tc.tune.best("attention_forward", B=1, T=8, N=2, H=64).op
        'attention_forward'
    """
    tunable = op if isinstance(op, Tunable) else registry.declared(op)
    facts = facts_of(tunable, shapes, options)
    return _choice(tunable, device or this_device(), facts, None)


def facts_of(tunable: Tunable, shapes: tuple[Any, ...], options: dict[str, Any]) -> Facts:
    """Returns the facts of a call that is given as operands, as a mapping or as text.

    Raises:
        TuningError: they are not the op's.
    """
    try:
        if shapes and not isinstance(shapes[0], dict | str):
            found = tunable.facts(*shapes, **options)
            if found is None:
                raise TuningError(f"{tunable.op}: a size of this call is symbolic or 0; nothing is tuned for it.")
            return tunable.complete(dict(found))
        given = shapes[0] if shapes else {}
        return tunable.complete({**(read_facts(given) if isinstance(given, str) else given), **options})
    except TrustcoreError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise TuningError(str(error)) from error


def read_facts(text: str) -> dict[str, Any]:
    """Returns facts that are written "B=1,T=2048,dtype=bfloat16,causal=true".

    Raises:
        TuningError: it is not written so.
    """
    facts: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = (p.strip() for p in part.partition("="))
        if not name or not equals:
            raise TuningError(f"{part!r} is no fact; write them as B=1,T=2048,N=8,H=64,dtype=bfloat16.")
        words = {"true": True, "false": False}
        facts[name] = int(value) if value.lstrip("-").isdigit() else words.get(value.lower(), value)
    return facts


def text_of(facts: Facts) -> str:
    """Returns facts as `read_facts` reads them."""
    return ",".join(f"{n}={str(x).lower() if isinstance(x, bool) else x}" for n, x in facts.items() if x != "")


def using(mode: Mode, **ops: Mode) -> Any:
    """Returns a context in which ops ask in that mode: `with tc.tune.using("cached"): ...`.

    Args:
        mode: of all ops.
        ops: the modes of single ops or families, in place of it: `using("first_use", attention="cached")`. An op's own
            name counts before its family's.

    Raises:
        TuningError: there is no such mode or op.
    """
    return tuning.CHOOSER(_chooser(mode, ops))


def set_mode(mode: Mode, **ops: Mode) -> None:
    """Lets the ops of this process ask in that mode, wherever `using` says nothing else.

    Args:
        mode: of all ops.
        ops: the modes of single ops or families, as in `using`.

    Raises:
        TuningError: there is no such mode or op.
    """
    tuning.CHOOSER.set_global(_chooser(mode, ops))


def current_mode(op: str | None = None) -> str:
    """Returns the mode in which ops ask here, or the one in which an op does; "pinned" where a search gives values."""
    chooser = tuning.CHOOSER.value
    if chooser is None:
        return "off"
    if not isinstance(chooser, Tables):
        return "pinned"
    return chooser.mode if op is None else chooser.mode_of(op)


def _chooser(mode: str, ops: Mapping[str, str]) -> Tables | None:
    for given in (mode, *ops.values()):
        if given not in MODES:
            raise TuningError(f"tune: mode {given!r} is not known; choose of {', '.join(MODES)}.")
    for op in ops:
        if not registry.members(op):
            known = ", ".join((*registry.FAMILIES, *registry.names()))
            raise TuningError(f"tune: {op!r} is no op that can be tuned, and no family; choose of {known}.")
    if all(given == "off" for given in (mode, *ops.values())):
        return None
    return Tables(mode, table.stamp(this_device()), tuple(sorted(ops.items())))


@dataclasses.dataclass(frozen=True)
class Tables:
    """The chooser that reads tables; `stamp` is what the device's one was when it was made, `ops` modes of some ops."""

    mode: str
    stamp: tuple[int, int]
    ops: tuple[tuple[str, str], ...] = ()

    def mode_of(self, op: str) -> str:
        """The mode of an op: its own, its family's, that of all."""
        return dict(self.ops).get(op) or dict(self.ops).get(registry.family_of(op), self.mode)

    def values(self, op: str, target: Target, facts: Facts, implementation: str | None) -> Values:
        """See `kernels_pallas.tuning.Chooser`."""
        tunable, device = registry.known(op), _device_for(target)
        if tunable is None or device is None or self.mode_of(op) == "off":
            return tuning.NO_VALUES
        return _choice(tunable, device, facts, implementation).values

    def before(self, op: str, target: Target, facts: Facts) -> None:
        """See `kernels_pallas.tuning.Chooser`: on first use, tunes."""
        tunable, device = registry.known(op), _device_for(target)
        if self.mode_of(op) != "first_use" or tunable is None or device is None or device != this_device() or tracing():
            return
        with _turn:
            exact, sizes = table.split(tunable, facts)
            tried = (op, tuple(sorted(exact.items())), tuple(table.bucket(n) for n in sizes.values()))
            found = table.find(tunable, device, facts)
            if tried in _tried or (found is not None and found.same_bucket and not found.packaged):
                return
            _tried.add(tried)
            from trustcore.tune.searching import search

            try:
                search(tunable, dict(facts), seconds=FIRST_USE_SECONDS)
            except TrustcoreError as error:
                warnings.warn(f"{op} is not tuned, and takes its defaults: {error}", stacklevel=2)


_tried: set[Any] = set()
_turn = threading.Lock()


def tracing(*operands: Any) -> bool:
    """Returns whether this is called within a trace, or with values of one."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(operands)) or _jax.jit_call_in_progress() is not None


def _device_for(target: Target) -> Device | None:
    """The device that a program is lowered for; a chip that is not here has no number of cores."""
    here = this_device()
    if here.serves(target):
        return here
    return Device(target.platform, target.architecture, 0) if target.architecture else None


def _choice(tunable: Tunable, device: Device, facts: Facts, implementation: str | None) -> Choice:
    def made(values: Values, source: str, why: str) -> Choice:
        return Choice(tunable.op, facts, values, source, why)

    found = table.find(tunable, device, facts)
    if found is None:
        return made({}, "defaults", f"defaults: nothing was measured on {device} for calls like this one")
    entry = found.entry
    values = dict(entry.values)
    if implementation is not None and values.get("implementation") != implementation:
        values = dict(entry.implementations.get(implementation, {}).get("values", {}))
    problem = _problem(tunable, device, facts, values)
    if problem:
        return made({}, "defaults", f"defaults: what was measured does not serve this call: {problem}")
    gain = entry.default_seconds / entry.seconds if entry.seconds > 0 else 1.0
    told = f"{entry.seconds * 1e3:.3g} ms, the defaults {entry.default_seconds * 1e3:.3g} ms ({gain:.2f}), {entry.date}"
    told += _compiling(entry)
    sizes = text_of(entry.sizes)
    if found.packaged:
        near = "" if found.same_bucket else "the nearest, "
        return made(values, "package", f"table of the package for {device.architecture}: {near}{sizes}: {told}")
    if found.same_bucket:
        return made(values, "cache", f"measured here: {sizes}: {told}")
    return made(values, "nearest", f"nearest of what was measured here: {sizes}: {told}")


def _compiling(entry: table.Entry) -> str:
    """What compiling takes in each implementation, where it counts."""
    known = {n: told.get("compile_seconds") for n, told in entry.implementations.items()}
    parts = [f"{n} {x:.3g} s" for n, x in known.items() if isinstance(x, int | float)]
    return f"; with its share of compiling: {', '.join(parts)}" if parts else ""


def _problem(tunable: Tunable, device: Device, facts: Facts, values: Values) -> str:
    """Why values of a file cannot be taken for a call; "" if they can."""
    if not values:
        return ""
    name = values.get("implementation")
    grid = tunable.grids.get(name) if isinstance(name, str) else None
    if grid is None:
        return f"implementation {name!r} is not declared"
    given = {n: x for n, x in values.items() if n != "implementation"}
    unknown = [n for n, x in given.items() if n not in grid or x not in grid[n]]
    if unknown or (given and set(given) != set(grid)):
        return f"{', '.join(unknown) or 'a set of parameters'} is not as declared"
    if not given:
        return ""
    return tunable.constraint(device.target, facts, values)
