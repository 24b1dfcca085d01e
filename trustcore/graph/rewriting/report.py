"""What rewriting did, where, and why not elsewhere."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from trustcore._jax import Frame, frames, scopes
from trustcore.graph.program import is_library, place
from trustcore.graph.rewriting.terms import Graph, Node


@dataclasses.dataclass(frozen=True)
class Applied:
    """A rule that was applied.

    Attributes:
        rule: its name.
        where: name scopes and loops around.
        frame: the line of the user's code; None where jax knows none.
        operands: shapes and dtypes.
        static: the numbers that were bound.
        nodes: operations that it took out.
        error: of the proof, relative; None where it was not asked for.
    """

    rule: str
    where: str
    frame: Frame | None
    operands: tuple[str, ...]
    static: tuple[float, ...]
    nodes: int
    error: float | None

    def __str__(self) -> str:
        at = ", ".join(part for part in (place(self.frame), self.where) if part)
        error = "" if self.error is None else f", off by {self.error:.1e}"
        static = "".join(f", {number:g}" for number in self.static)
        return f"{self.rule}({', '.join(self.operands)}{static}) for {self.nodes} operations{error} ({at})"


@dataclasses.dataclass(frozen=True)
class Refused:
    """A place that looked like a rule's and was left as it is; `reason` says why."""

    rule: str
    reason: str
    where: str
    frame: Frame | None

    def __str__(self) -> str:
        at = ", ".join(part for part in (place(self.frame), self.where) if part)
        return f"{self.rule}: {self.reason} ({at})"


@dataclasses.dataclass
class Rewriting:
    """All of one program.

    Attributes:
        applied, refused: in the order in which they happened.
        dead: equations of the program that had no part in its results.
        before, after: all others, those within loops and branches included; calls opened.
        rounds: how often the rules went over the program.
    """

    applied: list[Applied] = dataclasses.field(default_factory=list)
    refused: list[Refused] = dataclasses.field(default_factory=list)
    dead: int = 0
    before: int = 0
    after: int = 0
    rounds: int = 0

    def count(self, rule: str) -> int:
        """Returns how often a rule was applied."""
        return sum(each.rule == rule for each in self.applied)

    def table(self) -> str:
        """Returns a line for each rule, then the lines of the program where it was applied, and where not."""
        dead = f"; {self.dead} had no part in the results" if self.dead else ""
        lines = [f"{self.before} equations before, {self.after} after, in {self.rounds} rounds{dead}"]
        for rule, count in collections.Counter(each.rule for each in self.applied).most_common():
            lines.append(f"{count:6} x {rule}")
            places = collections.Counter(str(each) for each in self.applied if each.rule == rule)
            lines += [f"           {number} x {text}" for text, number in places.most_common(8)]
            lines += [f"           and {len(places) - 8} more places"] if len(places) > 8 else []
        reasons = collections.Counter(map(str, self.refused))
        lines += ["not applied:"] if reasons else []
        lines += [f"{count:6} x {text}" for text, count in reasons.most_common(20)]
        return "\n".join(lines)

    __str__ = table


def where(graph: Graph, node: Node) -> tuple[str, Frame | None]:
    """Returns the scopes, loops and branches around a node, and the line of the user's code that it was written at."""
    names: list[str] = []
    for outer in (*graph.around, node):
        for eqn in outer.written:
            names += [name for name, is_transform in scopes(eqn) if not is_transform]
        names += [outer.eqn.primitive.name] if outer is not node else []
    written = [eqn for outer in (*graph.around, node) for eqn in outer.written]
    return "/".join(names), line_of(written)


def line_of(written: Any) -> Frame | None:
    """Returns the innermost line that is not of a library; else the innermost of all."""
    found = [frame for eqn in reversed(written) for frame in frames(eqn)]
    return next((frame for frame in found if not is_library(frame.file)), found[0] if found else None)
