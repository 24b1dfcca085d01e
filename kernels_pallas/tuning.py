"""What an op declares so that it can be tuned, and how it asks for what was found.

An op keeps one `Tunable` a direction beside it. Whoever searches lists candidates from it, makes operands, runs them
and checks them; nothing here does. Where an op would take a default, it asks

    values(op, target, facts, implementation) -> the parameters to take instead, {} for the defaults

while a program is traced or lowered. What answers is the chooser of jax's context: None by default, and then a call
costs a test for None. A chooser is a part of the key of jax's caches: a function that was traced under another one (or
none) is traced anew. It answers from memory and computes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import jax

if TYPE_CHECKING:
    from kernels_pallas.dispatch import Target

Facts = Mapping[str, Any]  # sizes by axis letter, dtype, flags: what a program's speed depends on
Values = Mapping[str, Any]  # parameters by name; "implementation" is one of them


class Chooser(Protocol):
    """What answers: immutable, equal to another one that answers alike (jax keys its caches by it)."""

    def values(self, op: str, target: Target, facts: Facts, implementation: str | None) -> Values:
        """Returns the values for a call; of the named implementation alone where one is named."""
        ...

    def before(self, op: str, target: Target, facts: Facts) -> None:
        """Told of a call that is computed at once, outside of any trace, before its program is made."""
        ...


CHOOSER: Any = jax.make_user_context(None)
NO_VALUES: Values = MappingProxyType({})


def values(op: str, target: Target, facts: Callable[[], Facts | None], implementation: str | None = None) -> Values:
    """Returns the values that were found for a call; {} means the op's defaults.

    Args:
        op: a declaration's name.
        target: where the program will run.
        facts: called if there is anybody to ask; None (symbolic shapes, what no declaration covers) means the defaults.
        implementation: None asks for the best one of all; a name for what is best within it.
    """
    chooser = CHOOSER.value
    if chooser is None:
        return NO_VALUES
    known = facts()
    return NO_VALUES if known is None else chooser.values(op, target, known, implementation)


def before(op: str, target: Target, facts: Callable[[], Facts | None]) -> None:
    """Tells the chooser that a call is about to be computed outside of any trace."""
    chooser = CHOOSER.value
    if chooser is not None and (known := facts()) is not None:
        chooser.before(op, target, known)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one call costs under some values, for an order of candidates; none of it needs to be exact.

    Attributes:
        flops: of products, with those of tiles that are computed for nothing.
        nbytes: between memory and the chip.
        steps: of loops and grids, each of which costs some time by itself.
        programs: that may run side by side.
        onchip: bytes that one of them holds in shared memory or VMEM.
        tile: bytes that should stay in the nearest cache from step to step, where a program is plain XLA.
    """

    flops: float
    nbytes: float
    steps: float
    programs: int = 1
    onchip: int = 0
    tile: int = 0


def _anything(*_: Any) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Tunable:
    """What may be tuned of an op.

    Attributes:
        op: the name under which `values` is asked.
        sources: names of modules (or functions) whose text decides what a candidate computes and how fast: a change of
            it makes results stale.
        calls: of facts, between how many calls the time of compiling is divided, to count with theirs; 0: it does not.
        revision: raised by hand where measurements of earlier sources mislead; read-only tables go by it.
        grids: implementation -> parameter -> the values to try. An implementation without parameters has {}.
        sizes: facts that are numbers and may differ between neighbours: results serve nearby sizes.
        complete: fills up facts that were given by hand, and says by ValueError what is wrong with them.
        facts: of operands (or their types) and options as the op takes them, the facts; None: not to be tuned.
        refusal: of a target, an implementation and facts: "" or why it cannot run there.
        constraint: of a target, facts and values: "" or why these values cannot be.
        resolved: of a target, facts and values: what the op makes of them; candidates that it finds equal are one.
        cost: of a target, facts and values.
        operands: of facts, the operands of a call.
        prepare: of facts and operands, what `run` takes, made once with the op's defaults.
        arrange: of facts, what `prepare` gave and values, the operands of that candidate, where its form is in them.
        run: of facts, the function that is compiled and measured.
        oracle: of facts and operands, what `checked` of its result must be: plain jax, float32 and wider.
        checked: of facts and a result, what is compared with the oracle: all of it, or parts that are cheap to know.
        reduction: of facts, the length of the longest sum, which sets how far results may lie apart.
    """

    op: str
    sources: tuple[str | Callable[..., Any], ...]
    grids: Mapping[str, Mapping[str, tuple[Any, ...]]]
    sizes: tuple[str, ...]
    complete: Callable[[dict[str, Any]], dict[str, Any]]
    facts: Callable[..., Facts | None]
    operands: Callable[[Facts], tuple[Any, ...]]
    run: Callable[[Facts], Callable[..., Any]]
    oracle: Callable[[Facts, tuple[Any, ...]], Any]
    refusal: Callable[[Target, str, Facts], str] = _anything
    constraint: Callable[[Target, Facts, Values], str] = _anything
    resolved: Callable[[Target, Facts, Values], Any] = lambda target, facts, given: tuple(sorted(given.items()))
    cost: Callable[[Target, Facts, Values], Cost] | None = None
    prepare: Callable[[Facts, tuple[Any, ...]], tuple[Any, ...]] = lambda facts, operands: operands
    arrange: Callable[[Facts, tuple[Any, ...], Values], tuple[Any, ...]] = lambda facts, operands, given: operands
    checked: Callable[[Facts, Any], Any] = lambda facts, result: result
    reduction: Callable[[Facts], int] = lambda facts: 1
    calls: Callable[[Facts], int] = lambda facts: 0
    revision: int = 1


def completed(op: str, given: Mapping[str, Any], required: tuple[str, ...], optional: Facts) -> dict[str, Any]:
    """Returns facts with the optional ones filled in; what a declaration's `complete` begins with.

    Raises:
        ValueError: one is missing, unknown, or no size where a size is wanted.
    """
    unknown = sorted(set(given) - set(required) - set(optional))
    missing = sorted(set(required) - set(given))
    if unknown or missing:
        what = f"does not know {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
        raise ValueError(f"{op}: it {what}; it takes {', '.join((*required, *optional))}.")
    for name, value in given.items():
        like = optional.get(name, 1)
        if isinstance(like, int) and not isinstance(like, bool) and not _is_size(value):
            raise ValueError(f"{op}: {name} is {value!r} and must be a number of at least 1 and below 2**31.")
        if not isinstance(like, int) and not isinstance(value, str):
            raise ValueError(f"{op}: {name} is {value!r} and must be a word.")
        if isinstance(like, bool) and not isinstance(value, bool):
            raise ValueError(f"{op}: {name} is {value!r} and must be true or false.")
    return {**{n: given[n] for n in required}, **optional, **given}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
