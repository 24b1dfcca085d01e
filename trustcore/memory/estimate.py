"""The peak of live bytes that a jaxpr lets expect: every equation makes its outputs, nothing is fused.

    peak(jaxpr) = max over equations of (live before + outputs + peak inside what the equation calls)

A value lives from its equation to the last one that reads it. Arguments are held throughout, as a program that does not
own them must hold them.
"""

from __future__ import annotations

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Literal

from trustcore.graph.walk import aval, bodies


def estimate(jaxpr: ClosedJaxpr) -> int:
    """Returns the most bytes that are live at once while the program runs as it is written."""
    arguments = sum(_nbytes(var) for var in (*jaxpr.jaxpr.invars, *jaxpr.jaxpr.constvars))
    return arguments + _inside(jaxpr.jaxpr)


def _inside(jaxpr: Any) -> int:
    """The most that is live beyond the arguments."""
    last: dict[Any, int] = {}
    count = len(jaxpr.eqns)
    for i, eqn in enumerate(jaxpr.eqns):
        last.update({atom: i for atom in eqn.invars if not isinstance(atom, Literal)})
    last.update({atom: count for atom in jaxpr.outvars if not isinstance(atom, Literal)})
    dies: dict[int, list[Any]] = {}
    live = peak = 0
    for i, eqn in enumerate(jaxpr.eqns):
        made = sum(_nbytes(var) for var in eqn.outvars)
        inner = max((_inside(body.jaxpr) for _, body in bodies(eqn)), default=0)
        # What a body returns is counted with the equation's outputs.
        peak = max(peak, live + max(made, inner))
        for var in eqn.outvars:
            if var in last:
                live += _nbytes(var)
                dies.setdefault(last[var], []).append(var)
        for atom in dies.pop(i, ()):
            live -= _nbytes(atom)
        peak = max(peak, live)
    return peak


def _nbytes(var: Any) -> int:
    kind = aval(var)
    return math.prod(getattr(kind, "shape", ())) * getattr(getattr(kind, "dtype", None), "itemsize", 0)
