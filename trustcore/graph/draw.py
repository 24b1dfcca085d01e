"""Pictures of a program, collapsed by module: text, DOT, GraphML, JSON.

    graph = collapse(fn, *args, depth=2)        modules as nodes, what they hand to each other as edges
    print(as_text(graph)); Path("g.dot").write_text(as_dot(graph))

A node is a scope of `depth` names (`layers/3`); equations outside of all scopes go by their stage. An edge carries the
bytes of the values that one hands to another. Loops are opened: their bodies' equations stand where they are written.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from trustcore import units
from trustcore.errors import ProgramError
from trustcore.graph.cost import cost_of
from trustcore.graph.modules import trace
from trustcore.graph.program import Node, Program, origins
from trustcore.graph.walk import aval


@dataclasses.dataclass(frozen=True)
class Part:
    """A module of a program: how many equations, FLOPs and bytes (unfused) it has."""

    name: str
    equations: int
    flops: float
    nbytes: float


@dataclasses.dataclass(frozen=True)
class Picture:
    """A program by its modules.

    Attributes:
        parts: in the order in which they first run.
        edges: (from, to) -> bytes; "inputs" stands for the arguments.
    """

    parts: dict[str, Part]
    edges: dict[tuple[str, str], int]


def collapse(fn: Callable[..., Any], *args: Any, depth: int | None = 2, **kwargs: Any) -> Picture:
    """Returns the modules of `fn(*args, **kwargs)` and what they hand to each other; nothing is run.

    Args:
        fn: a function of arrays in pytrees.
        args, kwargs: its arguments.
        depth: how many names of a scope tell modules apart; None: all.
    """
    program = trace(fn, args, kwargs).program
    rows = {row.address: row for row in cost_of(program).rows}
    parts: dict[str, Part] = {}
    edges: dict[tuple[str, str], int] = {}
    for node in _leaves(program):
        name = _name(node, depth)
        row, old = rows.get(node.address), parts.get(name, Part(name, 0, 0.0, 0.0))
        flops, nbytes = (row.flops, row.nbytes) if row else (0.0, 0.0)
        parts[name] = Part(name, old.equations + 1, old.flops + flops, old.nbytes + nbytes)
    seen: set[tuple[Any, str]] = set()
    for node in _leaves(program):
        name = _name(node, depth)
        turns = tuple(0 for _ in node.scope.loops)
        for atom in node.eqn.invars:
            for origin in origins(node.scope, atom, turns):
                if origin.node is not None:
                    source, key = _name(origin.node, depth), (origin.node.number, origin.output)
                elif origin.argument is not None:
                    source, key = "inputs", ("input", origin.argument)
                else:
                    continue
                if source == name or (key, name) in seen:
                    continue
                seen.add((key, name))
                nbytes = aval(atom).size * aval(atom).dtype.itemsize if hasattr(aval(atom), "size") else 0
                edges[source, name] = edges.get((source, name), 0) + nbytes
    return Picture(parts, edges)


def as_text(picture: Picture, width: int = 30) -> str:
    """Returns a line for each module, with a bar for its share of the FLOPs and what it reads from whom."""
    whole = sum(part.flops for part in picture.parts.values()) or 1.0
    top = max((part.flops for part in picture.parts.values()), default=0.0) or 1.0
    names = max((len(name) for name in picture.parts), default=0)
    lines = []
    for name, part in picture.parts.items():
        sources = [a for a, b in picture.edges if b == name and a != "inputs"]
        bar = "#" * round(width * part.flops / top)
        told = f" <- {', '.join(sources[:4])}{' ...' if len(sources) > 4 else ''}" if sources else ""
        lines.append(f"{name:{names}}  {100 * part.flops / whole:5.1f}% {bar:{width}}{told}".rstrip())
    return "\n".join(lines)


def as_dot(picture: Picture) -> str:
    """Returns the picture in Graphviz' language: wider borders for more FLOPs, bytes on the edges."""
    whole = sum(part.flops for part in picture.parts.values()) or 1.0
    lines = ["digraph program {", "  rankdir=TB;", '  node [shape=box, fontname="Helvetica", style=rounded];']
    for name, part in picture.parts.items():
        share = part.flops / whole
        label = f"{name}\\n{units.count(part.flops)}FLOP, {part.equations} equations"
        lines.append(f"  {_quoted(name)} [label={_quoted(label, keep=True)}, penwidth={1 + 6 * share:.2f}];")
    if any(a == "inputs" for a, _ in picture.edges):
        lines.append('  "inputs" [shape=ellipse];')
    for (a, b), nbytes in picture.edges.items():
        lines.append(f'  {_quoted(a)} -> {_quoted(b)} [label="{units.size(nbytes)}"];')
    return "\n".join([*lines, "}"]) + "\n"


def as_svg(picture: Picture) -> str:
    """Returns the picture as SVG, drawn by Graphviz.

    Raises:
        ProgramError: Graphviz is not installed, or failed.
    """
    dot = shutil.which("dot")
    if dot is None:
        raise ProgramError("as_svg: Graphviz is not installed (its program is called dot); use as_dot or as_text.")
    done = subprocess.run([dot, "-Tsvg"], input=as_dot(picture), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProgramError(f"as_svg: dot failed: {done.stderr.strip()}")
    return done.stdout


def as_graphml(picture: Picture) -> str:
    """Returns the picture in GraphML, for yEd, Gephi and networkx."""
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        '<graphml xmlns="http://graphml.graphdrawing.org/xmlns">',
        '  <key id="flops" for="node" attr.name="flops" attr.type="double"/>',
        '  <key id="equations" for="node" attr.name="equations" attr.type="int"/>',
        '  <key id="bytes" for="edge" attr.name="bytes" attr.type="long"/>',
        '  <graph edgedefault="directed">',
    ]
    for name, part in picture.parts.items():
        data = f'<data key="flops">{part.flops}</data><data key="equations">{part.equations}</data>'
        lines.append(f"    <node id={quoteattr(name)}>{data}</node>")
    if any(a == "inputs" for a, _ in picture.edges):
        lines.append('    <node id="inputs"/>')
    for (a, b), nbytes in picture.edges.items():
        ends = f"source={quoteattr(a)} target={quoteattr(b)}"
        lines.append(f'    <edge {ends}><data key="bytes">{escape(str(nbytes))}</data></edge>')
    return "\n".join([*lines, "  </graph>", "</graphml>"]) + "\n"


def as_json(picture: Picture) -> str:
    """Returns the picture as JSON: `{"parts": [...], "edges": [...]}`."""
    parts = [dataclasses.asdict(part) for part in picture.parts.values()]
    edges = [{"from": a, "to": b, "bytes": nbytes} for (a, b), nbytes in picture.edges.items()]
    return json.dumps({"parts": parts, "edges": edges}, indent=2)


def _name(node: Node, depth: int | None) -> str:
    address = node.address
    name = "/".join(address.path[:depth]) or "(no module)"
    return name if address.stage == "forward" else f"{address.stage}: {name}"


def _leaves(program: Program) -> list[Node]:
    return [node for node in program.nodes if not node.bodies]


def _quoted(text: str, *, keep: bool = False) -> str:
    text = text if keep else text.replace("\\", "\\\\")
    return '"' + text.replace('"', '\\"') + '"'
