"""Buffers of a program by its jaxpr alone, where a backend does not show its own plan: nothing fused, nothing reused.

    buffers_by_liveness(jaxpr) -> buffers, steps        each equation is a step and makes its outputs

A value is held from the step that makes it to the last one that reads it; arguments, constants and results are held as
a program holds them that does not own them. Bodies of loops and branches are walked once; what a scan stacks is held
from its beginning. Sizes are those of whole arrays, on however many devices they lie.
"""

from __future__ import annotations

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Literal

from trustcore.graph.hlo import Origin
from trustcore.graph.program import Address, Program, Scope
from trustcore.memory.buffers import Buffer, Kind


def buffers_by_liveness(jaxpr: ClosedJaxpr) -> tuple[list[Buffer], list[Origin]]:
    """Returns the buffers, and the origin of each step."""
    walk = _Walk()
    program = Program(jaxpr)
    inner = jaxpr.jaxpr
    for number, var in enumerate(inner.invars):
        walk.held[var] = walk.make("argument", var.aval, Origin(program.arguments[number]), number)
    for var in inner.constvars:
        walk.held[var] = walk.make("constant", var.aval, Origin("constant"))
    walk.scope(program.root)
    last = max(len(walk.steps) - 1, 0)
    results = {walk.held[var] for var in inner.outvars if not isinstance(var, Literal) and var in walk.held}
    found = []
    for i, (kind, value, origin, number, begin, end) in enumerate(walk.made):
        kind = "result" if i in results and kind == "temporary" else kind
        end = end if kind == "temporary" else last
        begin = begin if kind in ("temporary", "result") else 0
        found.append(Buffer(_nbytes(value), kind, value.str_short(), origin, min(begin, last), end, number))
    return [buffer for buffer in found if buffer.nbytes], walk.steps or [Origin()]


class _Walk:
    def __init__(self) -> None:
        self.steps: list[Origin] = []
        self.made: list[list[Any]] = []  # kind, aval, origin, number, begin, end
        self.held: dict[Any, int] = {}  # of each variable, the buffer it lies in

    def make(self, kind: Kind, value: Any, origin: Origin, number: int = -1) -> int:
        now = len(self.steps)
        self.made.append([kind, value, origin, number, now, now])
        return len(self.made) - 1

    def read(self, atoms: Any, now: int) -> None:
        for atom in atoms:
            if not isinstance(atom, Literal) and atom in self.held:
                self.made[self.held[atom]][5] = now

    def scope(self, scope: Scope) -> None:
        for node in scope.nodes:
            eqn, origin = node.eqn, _origin(node.address)
            if not node.bodies:
                for var in eqn.outvars:
                    self.held[var] = self.make("temporary", var.aval, origin)
                self.read(eqn.invars, len(self.steps))
                self.steps.append(origin)
                continue
            if node.bodies[0].kind == "call":
                inner = node.bodies[0].jaxpr.jaxpr
                self.alias(inner.invars, eqn.invars)
                self.scope(node.bodies[0])
                self.alias(eqn.outvars, inner.outvars, origin)
            else:
                for var in eqn.outvars:
                    self.held[var] = self.make("temporary", var.aval, origin)
                for body in node.bodies:
                    whole = {var: atom for var, atom in _paired(body, eqn.invars) if var.aval.shape == atom.aval.shape}
                    self.alias(whole, whole.values())
                    for var in body.jaxpr.jaxpr.invars:
                        if var not in whole:  # a row of what a scan walks over
                            self.held[var] = self.make("temporary", var.aval, origin)
                    self.scope(body)
            self.read(eqn.invars, len(self.steps) - 1)

    def alias(self, variables: Any, atoms: Any, origin: Origin | None = None) -> None:
        """Lets variables lie where others do."""
        for var, atom in zip(variables, atoms, strict=True):
            if not isinstance(atom, Literal) and atom in self.held:
                self.held[var] = self.held[atom]
            elif origin is not None:
                self.held[var] = self.make("temporary", var.aval, origin)


def _paired(body: Scope, atoms: Any) -> list[tuple[Any, Any]]:
    """The inputs of a body with those of its equation, as far as they are the same values from the last one on."""
    inner = body.jaxpr.jaxpr.invars
    return list(zip(inner[::-1], list(atoms)[::-1], strict=False))


def _origin(address: Address) -> Origin:
    frame = address.frame
    path = "/".join((*address.path, address.primitive))
    path = f"transpose({path})" if address.stage == "backward" else path
    return Origin(path, frame.file if frame else "", frame.line if frame else 0)


def _nbytes(value: Any) -> int:
    return math.prod(getattr(value, "shape", ())) * getattr(getattr(value, "dtype", None), "itemsize", 0)
