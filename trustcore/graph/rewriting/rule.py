"""Rules: a pattern, what stands in its place, and when.

    Rule("double", lambda x: x + x, lambda x: 2 * x, (jax.ShapeDtypeStruct((8,), "float32"),))

The pattern is a plain JAX function. Its examples say how many operands it has and of which rank; sizes and dtypes are
those of the place where it is tried: there the pattern is traced anew. An operand `Static(0.5)` stands for a number
that is written in the program, as an epsilon or a scale is, and is handed to the replacement as a Python float.

A `Finder` is a rule that looks for its places itself, for what is written in too many ways to list.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from trustcore.errors import ProgramError
from trustcore.graph.rewriting.terms import Graph, Node, Value


@dataclasses.dataclass(frozen=True)
class Static:
    """A number that must be written in the program where a pattern is found.

    Attributes:
        value: an example of it.
    """

    value: float


@dataclasses.dataclass
class Match:
    """A place where a rule may be applied.

    Attributes:
        outputs: the values that are replaced; of one node or of several.
        operands: the values that the replacement takes.
        nodes: all that the replacement stands for; nothing else uses what they compute, but for the outputs.
        replacement: takes arrays for the operands, gives the outputs in turn; one or a tuple.
        static: the numbers that were bound, to be told.
        sample: takes a NumPy generator, returns arrays for the operands; None: random ones of any kind.
        certain: whether it needs no proof: the replacement is the same equation, or its own result.
    """

    outputs: list[Value]
    operands: list[Value]
    nodes: set[Node]
    replacement: Callable[..., Any]
    static: tuple[float, ...] = ()
    sample: Callable[[np.random.Generator], list[Any]] | None = None
    certain: bool = False


@dataclasses.dataclass(frozen=True)
class NearMiss:
    """A place that looks like a rule's, and why it is none."""

    reason: str


class Finding(Protocol):
    """What the engine needs of a rule."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def exact(self) -> bool:
        """Whether results are equal bit by bit."""
        ...

    @property
    def priority(self) -> int:
        """Higher goes first, where the strategy asks."""
        ...

    def find(self, graph: Graph, root: Value) -> Match | NearMiss | None:
        """Returns the place whose (first) result is `root`."""
        ...


@dataclasses.dataclass(frozen=True)
class Rule:
    """A pattern and its replacement; see the header of this file.

    Attributes:
        name: what reports call it.
        pattern: a function of the operands; or several, different ways to write the same.
        replacement: a function of the same operands; `Static` ones come as floats. It returns what the pattern returns,
            of the same shapes and dtypes.
        examples: for each operand an array, a `jax.ShapeDtypeStruct` or a `Static`.
        condition: takes shapes and dtypes of the operands (floats for `Static`), returns True, or False or a reason why
            not.
        exact: whether results are equal bit by bit; the proof then asks for that.
        priority: higher goes first in the strategy "prioritized".
        sample: takes a NumPy generator and `kinds=`, the operands' shapes and dtypes, returns the arrays that the rule
            is proven on; None: normal floats, small integers.

    Where a pattern has several results, the first must be computed from all others.

    Raises:
        ProgramError: the pattern cannot be traced with the examples, or is nothing but one of its operands.
    """

    name: str
    pattern: Callable[..., Any] | Sequence[Callable[..., Any]]
    replacement: Callable[..., Any]
    examples: tuple[Any, ...]
    condition: Callable[..., bool | str] | None = None
    exact: bool = False
    priority: int = 0
    sample: Callable[..., list[Any]] | None = None

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            graph = traced(pattern, example_avals(self.examples))
            if graph.outputs[0].maker is None:
                raise ProgramError(
                    f"rule {self.name!r}: its pattern returns an operand or a constant; it must compute something."
                )

    @property
    def patterns(self) -> tuple[Callable[..., Any], ...]:
        """The ways to write it."""
        return (self.pattern,) if callable(self.pattern) else tuple(self.pattern)

    @property
    def statics(self) -> tuple[bool, ...]:
        """Which operands are numbers."""
        return tuple(isinstance(example, Static) for example in self.examples)

    def find(self, graph: Graph, root: Value) -> Match | NearMiss | None:
        """See `Finding`."""
        from trustcore.graph.rewriting.matching import find_pattern

        return find_pattern(self, graph, root)


@dataclasses.dataclass(frozen=True)
class Finder:
    """A rule that finds its places by a function.

    Attributes:
        name, exact, priority: as of `Rule`.
        search: what `find` does.
    """

    name: str
    search: Callable[[Graph, Value], Match | NearMiss | None]
    exact: bool = False
    priority: int = 0

    def find(self, graph: Graph, root: Value) -> Match | NearMiss | None:
        """See `Finding`."""
        return self.search(graph, root)


def example_avals(examples: Sequence[Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns shape and dtype of each operand; of a number those of a Python float."""
    return tuple(aval_of(each) for each in examples)


def aval_of(example: Any) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype of an operand."""
    if isinstance(example, Static):
        kind = jax.numpy.result_type(float)
        return jax.ShapeDtypeStruct((), kind, weak_type=True)
    return jax.ShapeDtypeStruct(example.shape, example.dtype)


def traced(pattern: Callable[..., Any], avals: Sequence[Any]) -> Graph:
    """Returns a pattern as a graph.

    Raises:
        ProgramError: it cannot be traced.
    """
    try:
        return Graph(jax.make_jaxpr(lambda *operands: jax.tree.leaves(pattern(*operands)))(*avals))
    except (TypeError, ValueError) as error:
        name = getattr(pattern, "__name__", repr(pattern))
        given = len(inspect.signature(pattern).parameters) if callable(pattern) else 0
        raise ProgramError(
            f"the pattern {name} of {given} operands cannot be traced with {', '.join(map(str, avals))}: {error}"
        ) from error
