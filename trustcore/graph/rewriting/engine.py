"""`rewrite`: a function with parts of its program replaced, as rules say.

    trace -> graph -> rules, by a strategy, each application proven -> the graph is run in the function's place

Strategies:

    once          every rule is tried at every value of the program as it was
    exhaustive    one rule after the other, each until it finds no more
    fixpoint      all rules in turn, over and over, until none finds any
    prioritized   of all places, the one of the rule of the highest priority, then the one with most operations; again

What was rewritten is kept for each structure, shape and dtype of the arguments; the function may be called under jit,
grad and vmap, where it is rewritten while it is traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import jaxpr_as_fun

from trustcore.errors import ProgramError
from trustcore.graph.modules import split_arguments, trace
from trustcore.graph.rewriting.matching import escaping
from trustcore.graph.rewriting.proof import BUDGET, prove
from trustcore.graph.rewriting.report import Applied, Refused, Rewriting, where
from trustcore.graph.rewriting.rule import Finding, Match, NearMiss
from trustcore.graph.rewriting.terms import Graph, Node, Value

Strategy = Literal["once", "exhaustive", "fixpoint", "prioritized"]
STRATEGIES: tuple[str, ...] = ("once", "exhaustive", "fixpoint", "prioritized")
ROUNDS = 50  # after which rules are said to go in circles
_KEPT = 32  # programs of one function


class _Program(NamedTuple):
    run: Callable[..., Any]
    out_tree: Any
    report: Rewriting


class Rewritten:
    """A function whose program is rewritten; see `rewrite`.

    Attributes:
        report: of the last program that was rewritten; None before the first.
    """

    def __init__(self, fn: Callable[..., Any], rules: Sequence[Finding], strategy: str, prove: bool, budget: int):
        self.fn, self.rules, self.strategy, self.prove, self.budget = fn, tuple(rules), strategy, prove, budget
        self.report: Rewriting | None = None
        self._programs: dict[Any, _Program] = {}
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the function does, by the rewritten program."""
        program, leaves = self._program(args, kwargs)
        return jax.tree.unflatten(program.out_tree, program.run(*leaves))

    def explain(self, *args: Any, **kwargs: Any) -> Rewriting:
        """Returns what is done to the program for these arguments, which may be shapes; it is not run."""
        return self._program(args, kwargs)[0].report

    def _program(self, args: tuple, kwargs: dict[str, Any]) -> tuple[_Program, list[Any]]:
        leaves, _, (tree, fixed) = split_arguments(args, kwargs)
        key = (tree, fixed, tuple(map(_kind, leaves)), jax.config.jax_enable_x64)  # type: ignore[attr-defined]
        try:
            found = self._programs.get(key)
        except TypeError:  # a fixed argument that cannot be hashed
            key, found = None, None
        if found is None:
            found, lasting = self._rewritten(args, kwargs)
            if key is not None and lasting:
                while len(self._programs) >= _KEPT:
                    self._programs.pop(next(iter(self._programs)))
                self._programs[key] = found
        self.report = found.report
        return found, leaves

    def _rewritten(self, args: tuple, kwargs: dict[str, Any]) -> tuple[_Program, bool]:
        traced = trace(self.fn, args, kwargs)
        closed = traced.program.jaxpr
        graph = Graph(closed)
        parts = list(graph.within())
        report = Rewriting(dead=sum(part.dead for part in parts), before=sum(len(part.nodes) for part in parts))
        _Engine(graph, self.rules, report, self.prove, self.budget).run(self.strategy)
        report.after = sum(len(part.nodes) for part in graph.within())

        def rewritten(*values: Any) -> list[Any]:
            return graph.run(values)

        rewritten.__name__ = rewritten.__qualname__ = getattr(self.fn, "__name__", "rewritten")
        lasting = not any(isinstance(const, Tracer) for const in closed.consts)
        return _Program(jax.jit(rewritten), traced.out_tree, report), lasting


def rewrite(
    fn: Callable[..., Any],
    rules: Finding | Sequence[Finding],
    *,
    strategy: Strategy = "fixpoint",
    prove: bool = True,
    proof_budget: int = BUDGET,
) -> Rewritten:
    """Returns a function that computes what `fn` does, by a program in which rules were applied.

    It works through jit, scan, while, cond, checkpoint, shard_map and functions with derivatives of their own, and may
    itself be differentiated, mapped and compiled. Nothing is matched across the border of a loop, branch or checkpoint.

    Args:
        fn: a pure function of arrays in pytrees.
        rules: `Rule`s and others of their kind, in the order in which they are tried.
        strategy: "once", "exhaustive", "fixpoint" or "prioritized"; see the header of this file.
        prove: whether each application is run both ways on random operands first, and refused where they disagree.
        proof_budget: bytes of intermediate values of a place up to which it is proven; beyond, it is refused.

    Returns:
        The function; its `report` says what was done, `explain(*args)` the same without running it.

    Raises:
        ProgramError: the strategy is unknown, or rules go in circles.
    """
    if strategy not in STRATEGIES:
        raise ProgramError(f"rewrite: strategy {strategy!r} is not known; choose of {', '.join(STRATEGIES)}.")
    listed = list(rules) if isinstance(rules, (list, tuple)) else [rules]
    return Rewritten(fn, listed, strategy, prove, proof_budget)  # type: ignore[arg-type]


class _Engine:
    def __init__(self, graph: Graph, rules: Sequence[Finding], report: Rewriting, prove: bool, budget: int):
        self.graph, self.rules, self.report, self.prove, self.budget = graph, rules, report, prove, budget
        self.missed: set[tuple[int, int, str]] = set()  # so that a place is told once
        self.dead: set[tuple[int, Value]] = set()  # places where a rule was tried and refused

    def run(self, strategy: str) -> None:
        if strategy == "once":
            self.report.rounds = 1
            for graph in list(self.graph.within()):
                for value in _values(graph):
                    if value.maker in graph.nodes:
                        self.first(graph, value, self.rules)
        elif strategy == "prioritized":
            self._until_none(self._best)
        elif strategy == "exhaustive":
            for rule in self.rules:
                self._until_none(lambda rule=rule: self._pass([rule]))
        else:
            self._until_none(lambda: self._pass(self.rules))

    def _until_none(self, step: Callable[[], int]) -> None:
        limit = ROUNDS if step != self._best else 100 * ROUNDS
        for _ in range(limit):
            self.report.rounds += 1
            if not step():
                return
        names = ", ".join(sorted({each.rule for each in self.report.applied[-20:]}))
        raise ProgramError(
            f"rewrite: {limit} rounds did not come to an end; the rules {names} undo each other or grow without end. "
            'Leave one of them out, or pass strategy="once".'
        )

    def _pass(self, rules: Sequence[Finding]) -> int:
        count = 0
        for graph in list(self.graph.within()):
            for value in _values(graph):
                if value.maker in graph.nodes:
                    count += self.first(graph, value, rules)
        return count

    def _best(self) -> int:
        found = []
        for graph in self.graph.within():
            for value in _values(graph):
                for rule in self.rules:
                    match = self.look(graph, value, rule)
                    if match is not None:
                        found.append((rule.priority, len(match.nodes), -len(found), graph, rule, match))
        for _, _, _, graph, rule, match in sorted(found, key=lambda item: item[:3], reverse=True):
            if self.apply(graph, rule, match):
                return 1
        return 0

    def first(self, graph: Graph, value: Value, rules: Sequence[Finding]) -> int:
        """Applies the first rule that may be applied at a value; returns how many were."""
        for rule in rules:
            match = self.look(graph, value, rule)
            if match is not None and self.apply(graph, rule, match):
                return 1
        return 0

    def look(self, graph: Graph, value: Value, rule: Finding) -> Match | None:
        if (id(rule), value) in self.dead:
            return None
        found = rule.find(graph, value)
        if isinstance(found, NearMiss):
            self.refuse(graph, value, rule, found.reason)
            return None
        return found

    def apply(self, graph: Graph, rule: Finding, match: Match) -> bool:
        root = match.outputs[0]
        missed = escaping(graph, match.outputs, match.nodes)
        if missed is not None:
            self.refuse(graph, root, rule, missed.reason)
            return False
        replacement, reason = _traced(match)
        error = None
        if not reason and self.prove and not match.certain:
            try:
                proof = prove(match, replacement, exact=rule.exact, budget=self.budget)
                error, reason = proof.error, proof.reason
            except (TypeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as failure:
                reason = f"it cannot be run: {_first_line(failure)}"
        if reason:
            self.refuse(graph, root, rule, reason)
            self.dead.add((id(rule), root))
            return False
        maker = root.maker
        assert maker is not None
        place, frame = where(graph, maker)
        operands = tuple(value.aval.str_short() for value in match.operands)
        self.report.applied.append(Applied(rule.name, place, frame, operands, match.static, len(match.nodes), error))
        for value, by in zip(match.outputs, graph.splice(replacement, match.operands, maker), strict=True):
            graph.replace(value, by)
        return True

    def refuse(self, graph: Graph, value: Value, rule: Finding, reason: str) -> None:
        key = (id(rule), id(value), reason)
        if key in self.missed:
            return
        self.missed.add(key)
        maker = value.maker
        place, frame = where(graph, maker) if maker is not None else ("", None)
        self.report.refused.append(Refused(rule.name, reason, place, frame))


def _values(graph: Graph) -> Iterator[Value]:
    """The values of a program, the last first: what contains others comes before them."""
    nodes: list[Node] = graph.ordered()
    for node in reversed(nodes):
        if node in graph.nodes:
            yield from node.outputs


def _traced(match: Match) -> tuple[Any, str]:
    """A replacement's program, or why there is none."""
    kinds = [
        jax.ShapeDtypeStruct(v.shape, v.dtype, weak_type=getattr(v.aval, "weak_type", False)) for v in match.operands
    ]
    try:
        closed = jax.make_jaxpr(lambda *operands: jax.tree.leaves(match.replacement(*operands)))(*kinds)
    except (TypeError, ValueError, NotImplementedError) as error:
        return None, f"the replacement does not take such operands: {_first_line(error)}"
    found = [(tuple(aval.shape), aval.dtype) for aval in closed.out_avals]
    wanted = [(value.shape, value.dtype) for value in match.outputs]
    if found != wanted:
        told = [", ".join(f"{d}{list(s)}" for s, d in each) for each in (found, wanted)]
        return None, f"the replacement gives {told[0]} where {told[1]} is wanted"
    weak = [getattr(value.aval, "weak_type", False) for value in match.outputs]
    if any(getattr(a, "weak_type", False) != w for a, w in zip(closed.out_avals, weak, strict=True)):
        if any(weak):
            return None, "its result takes the dtype of what it meets (a weak type)"
        strong = jaxpr_as_fun(closed)
        closed = jax.make_jaxpr(lambda *operands: [jnp.asarray(x, x.dtype) for x in strong(*operands)])(*kinds)
    return closed, ""


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return (leaf.shape, leaf.dtype)
    return jax.typeof(leaf)
