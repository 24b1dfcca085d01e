"""Which calls a program makes of ops that can be tuned: found by tracing it, without running anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from kernels_pallas import Target, tuning
from kernels_pallas.tuning import Facts, Values
from trustcore.tune import registry


class _Recorder:
    """A chooser that writes down what is asked and answers with the defaults; equal to itself alone."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, tuple[tuple[str, Any], ...]], Facts] = {}

    def values(self, op: str, target: Target, facts: Facts, implementation: str | None) -> Values:
        """See `kernels_pallas.tuning.Chooser`. What an op asks for one implementation it was told to take."""
        if implementation is None:
            self.calls.setdefault((op, tuple(sorted(facts.items()))), facts)
        return tuning.NO_VALUES

    def before(self, op: str, target: Target, facts: Facts) -> None:
        """Does nothing."""


def calls_of(function: Callable[..., Any], *args: Any) -> list[tuple[str, Facts]]:
    """Returns the calls of tunable ops in `function(*args)`, each op and its facts once, in the order of the program.

    The function is traced and lowered for the default device. Calls that name their implementation are not among them.

    Args:
        function: any function of arrays.
        args: arrays or `jax.ShapeDtypeStruct`, in any pytrees.
    """
    recorder = _Recorder()
    with tuning.CHOOSER(recorder):
        jax.jit(function).lower(*args)
    return [(op, facts) for (op, _), facts in recorder.calls.items() if registry.known(op) is not None]
