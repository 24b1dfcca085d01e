"""Watchpoints: which values are looked at, and what is to be true of them.

    Watch("layers/*/attention/*", has_nan())            counted and placed, wherever the glob fits
    Watch("*/exp", exceeds(1e4), stop=True)             stops the call with a snapshot of the first hit
    Watch("*/dot_general", takes(1e-3))                 a millisecond or more; with inspect(trace="times")

A condition is a function of the array that is traced into the inspected program; only its answer leaves the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trustcore.errors import DebugError


@dataclasses.dataclass(frozen=True)
class Condition:
    """Something that is true of an array or not.

    Attributes:
        name: how reports call it.
        holds: of an array to one boolean, in jax.numpy.
        seconds: from which on an operation counts as slow; None: it is no condition on time.
    """

    name: str
    holds: Callable[[jax.Array], Any]
    seconds: float | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns whether it is true of x, bool `[]`."""
        answer = jnp.asarray(self.holds(x))
        if answer.shape != () or answer.dtype != jnp.bool_:
            raise DebugError(
                f"condition {self.name!r} gave {answer.dtype}{list(answer.shape)} for {x.dtype}{list(x.shape)}; it "
                "must give one boolean. Write for example lambda x: jnp.any(x > 3)."
            )
        return answer


@dataclasses.dataclass(frozen=True)
class Watch:
    """A watchpoint.

    Attributes:
        pattern: a glob over addresses, see `trustcore.graph.Address.matches`.
        condition: what is looked for; None: only the statistics.
        stop: whether the first hit ends the call with `Breakpoint`.
    """

    pattern: str = "*"
    condition: Condition | None = None
    stop: bool = False

    def __post_init__(self) -> None:
        if self.stop and self.condition is None:
            raise DebugError(f"Watch({self.pattern!r}, stop=True) names no condition; write has_nan(), for example.")

    def __str__(self) -> str:
        return self.pattern if self.condition is None else f"{self.pattern}: {self.condition.name}"


def has_nan() -> Condition:
    """Returns the condition that an element is NaN."""
    return Condition("has_nan", lambda x: jnp.any(jnp.isnan(x)) if _inexact(x) else jnp.bool_(False))


def has_inf() -> Condition:
    """Returns the condition that an element is +Inf or -Inf."""
    return Condition("has_inf", lambda x: jnp.any(jnp.isinf(x)) if _inexact(x) else jnp.bool_(False))


def exceeds(limit: float) -> Condition:
    """Returns the condition that an element is above a limit in magnitude (that of a complex number, too)."""
    return Condition(f"exceeds({limit:g})", lambda x: jnp.any(_wide(x) > limit))


def below(limit: float) -> Condition:
    """Returns the condition that no element reaches a limit in magnitude, and not all are zero."""

    def holds(x: jax.Array) -> jax.Array:
        most = jnp.max(_wide(x), initial=0.0)
        return jnp.logical_and(most < limit, most > 0)

    return Condition(f"below({limit:g})", holds)


def shape_equals(*shape: int) -> Condition:
    """Returns the condition that the array has this shape."""
    return Condition(f"shape_equals{shape}", lambda x: jnp.bool_(x.shape == shape))


def takes(seconds: float) -> Condition:
    """Returns the condition that an operation takes so long; `inspect(trace="times")` runs it alone to tell.

    Raises:
        DebugError: that is no time.
    """
    if not seconds > 0:
        raise DebugError(f"takes({seconds!r}): it must be a number of seconds above 0, such as 1e-3.")
    return Condition(f"takes({seconds:g} s)", lambda x: jnp.bool_(False), seconds)


def predicate(holds: Callable[[jax.Array], Any], name: str | None = None) -> Condition:
    """Returns a condition of one's own: a function of an array to one boolean, in jax.numpy."""
    return Condition(name or getattr(holds, "__name__", "predicate"), holds)


def watches(given: str | Watch | Iterable[str | Watch] | None) -> tuple[Watch, ...]:
    """Returns watchpoints; a string is one without a condition.

    Raises:
        DebugError: something else is among them.
    """
    items: Sequence[Any] = [] if given is None else [given] if isinstance(given, (str, Watch)) else list(given)
    wrong = [item for item in items if not isinstance(item, (str, Watch))]
    if wrong:
        raise DebugError(f"watch: {wrong[0]!r} is neither a glob nor a Watch; write Watch('*/exp', has_nan()).")
    return tuple(Watch(item) if isinstance(item, str) else item for item in items)


def _inexact(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _wide(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.float32)
    return jnp.abs(x).astype(jnp.float32)
