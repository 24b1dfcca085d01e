"""Where the time goes: a program cut into its modules, each measured beside what the device could do at best.

    pieces(fn, *args) -> Timed          measured and predicted seconds by module, the whole beside their sum
    critical_path(fn, *args)            the longest chain of equations that wait for each other

A piece is a run of equations of one module (or name scope) and one stage; it is compiled by itself and run on what the
pieces before it gave. Its operands and results therefore go through memory and nothing is fused across its border, so
that the sum is more than the whole; `whole` is the program as it is. Predicted is what a roofline allows: the larger of
FLOPs over peak and of its operands' and results' bytes over bandwidth (Williams, Waterman, Patterson: Roofline, CACM
2009). Loops, branches and checkpoints are within one piece.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any
from xml.sax.saxutils import escape

import jax

from trustcore import units
from trustcore.graph.cost import Peaks, equation_cost, peaks
from trustcore.graph.modules import split_arguments, trace
from trustcore.graph.program import Address, Program
from trustcore.graph.rewriting.terms import Graph, Node, Value, evaluate, is_plain_call


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of equations of one module.

    Attributes:
        name: path of the module, "(no module)" outside of all.
        stage: "forward", "backward" or "recomputed".
        equations: how many.
        flops: of them.
        nbytes: of operands and results.
        predicted: seconds that a roofline allows.
        seconds: measured, the least.
        start: when it would begin if pieces followed each other.
    """

    name: str
    stage: str
    equations: int
    flops: float
    nbytes: float
    predicted: float
    seconds: float
    start: float

    @property
    def label(self) -> str:
        """Name and stage."""
        return self.name if self.stage == "forward" else f"{self.stage}: {self.name}"


@dataclasses.dataclass(frozen=True)
class Timed:
    """A measured program.

    Attributes:
        pieces: in the order in which they run.
        whole: seconds of the program as it is, the least.
        limits: what the device reaches.
    """

    pieces: tuple[Piece, ...]
    whole: float
    limits: Peaks

    def by_module(self) -> dict[str, tuple[float, float]]:
        """Returns measured and predicted seconds of each module and stage, the longest first."""
        found: dict[str, tuple[float, float]] = {}
        for piece in self.pieces:
            seconds, predicted = found.get(piece.label, (0.0, 0.0))
            found[piece.label] = (seconds + piece.seconds, predicted + piece.predicted)
        return dict(sorted(found.items(), key=lambda item: -item[1][0]))

    def table(self, top: int = 20) -> str:
        """Returns a line a module: measured, predicted, and how far apart they are."""
        rows = self.by_module()
        total = sum(seconds for seconds, _ in rows.values())
        lines = [" measured  predicted  ratio  module"]
        for name, (seconds, predicted) in list(rows.items())[:top]:
            ratio = f"{seconds / predicted:6.1f}" if predicted else "     -"
            lines.append(f"{1e3 * seconds:6.2f} ms  {1e3 * predicted:6.2f} ms {ratio}  {name}")
        lines.append(f"{1e3 * total:6.2f} ms in all pieces; {1e3 * self.whole:.2f} ms as one program")
        return "\n".join(lines)

    __str__ = table

    def to_trace(self) -> str:
        """Returns the pieces one after the other as Chrome's trace events (Perfetto, chrome://tracing)."""
        events = [
            {
                "name": piece.label, "ph": "X", "pid": 0, "tid": 0, "ts": 1e6 * piece.start, "dur": 1e6 * piece.seconds,
                "args": {"flops": piece.flops, "bytes": piece.nbytes, "predicted_us": 1e6 * piece.predicted},
            }
            for piece in self.pieces
        ]  # fmt: skip
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})

    def to_svg(self, width: int = 960) -> str:
        """Returns a timeline: a lane a module, a bar a piece, its predicted part filled darker."""
        lanes = list(dict.fromkeys(piece.label for piece in self.pieces))
        end = max((piece.start + piece.seconds for piece in self.pieces), default=0.0) or 1.0
        left, row = 8 + 7 * max(map(len, lanes), default=0), 20
        scale = (width - left - 16) / end
        height = row * (len(lanes) + 2)
        out = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
            'font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]
        for i, lane in enumerate(lanes):
            y = row * (i + 1)
            out.append(f'<text x="{left - 6}" y="{y + 14}" text-anchor="end">{escape(lane)}</text>')
            out.append(f'<line x1="{left}" x2="{width - 16}" y1="{y + row}" y2="{y + row}" stroke="#ddd"/>')
        for piece in self.pieces:
            x, y = left + scale * piece.start, row * (lanes.index(piece.label) + 1) + 3
            told = f"{piece.label}: {1e3 * piece.seconds:.3f} ms, predicted {1e3 * piece.predicted:.3f} ms"
            for seconds, color in ((piece.seconds, "#9ecae1"), (min(piece.predicted, piece.seconds), "#3182bd")):
                out.append(
                    f'<rect x="{x:.2f}" y="{y}" width="{max(scale * seconds, 0.5):.2f}" height="{row - 6}" '
                    f'fill="{color}"><title>{escape(told)}</title></rect>'
                )
        for part in range(5):
            x, anchor = left + (width - left - 16) * part / 4, "end" if part == 4 else "middle"
            out.append(f'<text x="{x:.0f}" y="14" text-anchor="{anchor}">{1e3 * end * part / 4:.3g} ms</text>')
        return "\n".join([*out, "</svg>"]) + "\n"


def pieces(
    fn: Callable[..., Any],
    *args: Any,
    depth: int | None = 2,
    limits: Peaks | None = None,
    repeats: int = 5,
    **kwargs: Any,
) -> Timed:
    """Returns measured and predicted seconds of the modules of `fn(*args, **kwargs)`; they are compiled and run.

    Args:
        fn: a function of arrays in pytrees, without side effects.
        args, kwargs: its arguments, arrays.
        depth: how many names of a module's path tell modules apart; None: all.
        limits: what the device reaches; None measures it.
        repeats: runs of each piece; the least counts, for others disturb a run and nothing speeds it up.
    """
    limits = limits or peaks()
    leaves, _, _ = split_arguments(args, kwargs)
    program = trace(fn, args, kwargs).program
    graph = Graph(program.jaxpr)
    addresses = _addresses(program)
    runs = _runs(graph, addresses, depth)
    env: dict[Value, Any] = dict(zip(graph.inputs, leaves, strict=True))
    found, start = [], 0.0
    for (name, stage), nodes in runs:
        inputs, outputs = _border(graph, nodes)
        step = jax.jit(lambda *given, i=inputs, o=outputs: evaluate(o, dict(zip(i, given, strict=True))))
        seconds, results = _timed(step, [env[value] for value in inputs], repeats)
        env.update(zip(outputs, results, strict=True))
        flops = sum(_flops(node) for node in nodes)
        size = sum(_size(value) for value in (*inputs, *outputs))
        predicted = max(flops / limits.flops, size / limits.bandwidth)
        found.append(Piece(name, stage, len(nodes), flops, size, predicted, seconds, start))
        start += seconds
    whole, _ = _timed(jax.jit(graph.run), [leaves], repeats)
    return Timed(tuple(found), whole, limits)


@dataclasses.dataclass(frozen=True)
class Path:
    """The longest chain of equations that wait for each other.

    Attributes:
        steps: address, and the seconds that a roofline allows it, in the order in which they run.
        seconds: of the chain.
        work: of all equations.
    """

    steps: tuple[tuple[Address, float], ...]
    seconds: float
    work: float

    @property
    def parallelism(self) -> float:
        """How many equations could run at a time, on average: work over path."""
        return self.work / self.seconds if self.seconds else 1.0

    def __str__(self) -> str:
        lines = [f"{1e3 * self.seconds:.3f} ms of {1e3 * self.work:.3f} ms; {len(self.steps)} equations"]
        lines += [f"{1e3 * seconds:9.4f} ms  {address}" for address, seconds in self.steps if seconds > 0]
        return "\n".join(lines)


def critical_path(fn: Callable[..., Any], *args: Any, limits: Peaks | None = None, **kwargs: Any) -> Path:
    """Returns the longest chain of equations of `fn(*args, **kwargs)`, in seconds of a roofline; nothing is run.

    What no chain of dependences holds together could run at the same time. A loop counts as one equation, with all its
    turns; bytes are unfused (see `trustcore.graph.cost`).

    Args:
        fn: a function of arrays in pytrees.
        args, kwargs: its arguments.
        limits: what the device reaches; None measures it.
    """
    limits = limits or peaks()
    program = trace(fn, args, kwargs).program
    graph, addresses = Graph(program.jaxpr), _addresses(program)
    ends: dict[Node, tuple[float, Node | None]] = {}
    weights: dict[Node, float] = {}
    for node in graph.ordered():
        weights[node] = _bound(node, limits)
        before = max((v.maker for v in node.inputs if v.maker), key=lambda other: ends[other][0], default=None)
        ends[node] = (weights[node] + (ends[before][0] if before else 0.0), before)
    node = max(ends, key=lambda other: ends[other][0], default=None)
    seconds, chain = (ends[node][0] if node else 0.0), []
    while node is not None:
        chain.append((addresses[node.order[0] - 1], weights[node]))
        node = ends[node][1]
    return Path(tuple(reversed(chain)), seconds, sum(weights.values()))


def _addresses(program: Program) -> list[Address]:
    """The addresses of the equations that a graph of the program has as nodes, in the order in which it makes them."""
    return [
        node.address
        for node in program.nodes
        if not is_plain_call(node.eqn)
        and all(scope.owner is None or is_plain_call(scope.owner.eqn) for scope in node.scope.around)
    ]


def _runs(graph: Graph, addresses: Sequence[Address], depth: int | None) -> list[tuple[tuple[str, str], list[Node]]]:
    found: list[tuple[tuple[str, str], list[Node]]] = []
    for node in graph.ordered():
        address = addresses[node.order[0] - 1]
        key = ("/".join(address.path[:depth]) or "(no module)", address.stage)
        if found and found[-1][0] == key:
            found[-1][1].append(node)
        else:
            found.append((key, [node]))
    return found


def _border(graph: Graph, nodes: Sequence[Node]) -> tuple[list[Value], list[Value]]:
    """What a run of nodes takes from outside, and what others use of it."""
    own = set(nodes)
    inputs = dict.fromkeys(
        v for node in nodes for v in node.inputs if v.const is None and (v.maker is None or v.maker not in own)
    )
    outputs = [v for node in nodes for v in node.outputs if graph.used(v, own)]
    return list(inputs), outputs


def _timed(step: Callable[..., Any], given: Sequence[Any], repeats: int) -> tuple[float, Any]:
    results = jax.block_until_ready(step(*given))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(step(*given))
        times.append(time.perf_counter() - begin)
    return min(times), results


def _flops(node: Node) -> float:
    if not node.bodies:
        return equation_cost(node.eqn)[0]
    inner = [sum(map(_flops, body.nodes)) for body in node.bodies]
    return _turns(node) * (max(inner) if node.bodies[0].kind == "branch" else sum(inner))


def _bound(node: Node, limits: Peaks) -> float:
    if not node.bodies:
        flops, size, _ = equation_cost(node.eqn)
        return max(flops / limits.flops, size / limits.bandwidth)
    inner = [sum(_bound(each, limits) for each in body.nodes) for body in node.bodies]
    return _turns(node) * (max(inner) if node.bodies[0].kind == "branch" else sum(inner))


def _turns(node: Node) -> int:
    return node.params["length"] if node.eqn.primitive.name == "scan" else 1


def _size(value: Value) -> int:
    return value.aval.size * value.dtype.itemsize if hasattr(value.dtype, "itemsize") else 0


def histogram(values: Sequence[float], *, bins: int = 12, width: int = 40, unit: str = "B") -> str:
    """Returns how many values lie in each of `bins` powers of a number, as bars of text.

    Args:
        values: none negative; zeros have a line of their own.
        bins: lines.
        width: of the longest bar.
        unit: written behind the bounds.
    """
    import math

    positive = [value for value in values if value > 0]
    zeros = len(values) - len(positive)
    lines = [f"{'0 ' + unit:>24}  {zeros:6}"] if zeros else []
    if positive:
        low, high = math.log10(min(positive)), math.log10(max(positive))
        step = (high - low) / bins or 1.0
        counts = [0] * bins
        for value in positive:
            counts[min(int((math.log10(value) - low) / step), bins - 1)] += 1
        for i, count in enumerate(counts):
            bounds = " to ".join(units.count(10 ** (low + step * j)) + unit for j in (i, i + 1))
            lines.append(f"{bounds:>24}  {count:6}  {'#' * round(width * count / max(counts))}".rstrip())
    return "\n".join(lines)
