"""What costs people days, seen in a program before it runs.

lint(fn, *args) -> Findings, the costliest first

captured-constant   an array that the function closes over: it is copied into every program that is compiled
unrolled-layers     the same block many times in a row: compiling grows with depth; scan over stacked weights
float64             64-bit numbers where none came in: twice the bytes, and slow or missing on accelerators
widened-product     a product of float32 copies of narrower numbers: the units for them stand idle
weak-type           an argument that is a Python number: another type of it compiles anew
host-transfer       a callback into Python: the device waits for it
padded-product      a product that fills a matrix unit badly: its smallest axis is far from a multiple of the unit's
rematerialized      a tensor that XLA can only reshard by making it whole on every device (compiled=True alone)
replicated          a large argument that lies whole on each of several devices, where others are split
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from trustcore import units
from trustcore.graph.cost import cost_of
from trustcore.graph.modules import Traced, trace
from trustcore.graph.program import Address, Node, Program, place
from trustcore.graph.resharding import rematerializations
from trustcore.graph.walk import aval, called

LARGE = 1 << 20  # bytes from which an array is worth a word
BLOCKS = 8  # equal blocks from which a program is called unrolled
_CALLBACKS = ("pure_callback", "io_callback", "debug_callback", "debug_print", "outside_call")
_WIDE = ("float64", "complex128")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to look at.

    Attributes:
        rule: its name in the header of this file.
        message: what is there, what it costs, and what to do.
        address: of the equation; None where it is about an argument or the whole program.
        weight: bytes or FLOPs at stake, by which findings are sorted.
    """

    rule: str
    message: str
    address: Address | None
    weight: float

    def __str__(self) -> str:
        at = f" ({place(self.address.frame)})" if self.address and self.address.frame else ""
        return f"{self.rule}: {self.message}{at}"


def lint(
    fn: Callable[..., Any], *args: Any, unit: tuple[int, int] = (8, 128), compiled: bool = False, **kwargs: Any
) -> list[Finding]:
    """Returns what is worth a second look in the program of `fn(*args, **kwargs)`; nothing is run.

    Args:
        fn: a function of arrays in pytrees.
        args, kwargs: its arguments, with their shardings.
        compiled: whether to compile it, too, and look for what XLA's partitioner warns of.
        unit: rows and columns of the tiles that a matrix unit takes: (8, 128) of a TPU; (8, 8) for tensor cores.
    """
    traced = trace(fn, args, kwargs)
    program = traced.program
    leaves = [leaf for leaf in jax.tree.leaves((args, kwargs)) if isinstance(leaf, jax.Array)]
    found = [
        *_captured(program),
        *_unrolled(program),
        *_wide(program),
        *_widened(program),
        *_weak(program, args, kwargs),
        *_callbacks(program),
        *_padded(traced, unit),
        *_replicated(leaves),
        *(_rematerialized(fn, args, kwargs) if compiled else ()),
    ]
    return sorted(found, key=lambda finding: -finding.weight)


def _captured(program: Program) -> Iterator[Finding]:
    for value in program.jaxpr.consts:
        nbytes = getattr(value, "nbytes", 0)
        if nbytes >= LARGE:
            yield Finding(
                "captured-constant",
                f"an array of shape {list(value.shape)} ({units.size(nbytes)}) is part of the program; pass it as an "
                "argument",
                None,
                nbytes,
            )


def _unrolled(program: Program) -> Iterator[Finding]:
    for scope in program.scopes:
        alike: dict[Any, list[Node]] = collections.defaultdict(list)
        for node in scope.nodes:
            if called(node.eqn) is not None and node.eqn.primitive.name in ("jit", "pjit"):
                alike[_signature(node)].append(node)
        for nodes in alike.values():
            size = sum(1 for _ in nodes[0].within())
            if len(nodes) >= BLOCKS and size >= BLOCKS:
                yield Finding(
                    "unrolled-layers",
                    f"{nodes[0].eqn.params.get('name')!r} stands {len(nodes)} times in the program, {size} equations "
                    "each; stack its weights and use jax.lax.scan (trustcore.models.scan_layers), and compiling no "
                    "longer grows with depth",
                    nodes[0].address,
                    float(size * len(nodes)),
                )


def _signature(node: Node) -> tuple[Any, ...]:
    return (node.eqn.params.get("name"), *(str(aval(var)) for var in (*node.eqn.invars, *node.eqn.outvars)))


def _wide(program: Program) -> Iterator[Finding]:
    if any(_dtype(var) in _WIDE for var in program.jaxpr.jaxpr.invars):
        return
    first = next((n for n in _leaves(program) if any(_dtype(var) in _WIDE for var in n.eqn.outvars)), None)
    if first is not None:
        wide = [n for n in _leaves(program) for var in n.eqn.outvars if _dtype(var) in _WIDE]
        yield Finding(
            "float64",
            f"{len(wide)} values are 64 bits wide though no argument is; the first is made by "
            f"{first.eqn.primitive.name!r}. Give its constant a dtype",
            first.address,
            float(sum(math.prod(aval(var).shape) * 8 for n in wide for var in n.eqn.outvars)),
        )


def _widened(program: Program) -> Iterator[Finding]:
    for scope in program.scopes:
        for node in scope.nodes:
            if node.eqn.primitive.name != "dot_general":
                continue
            makers = [scope.producers.get(atom, (None, 0))[0] for atom in node.eqn.invars if not hasattr(atom, "val")]
            narrow = [m for m in makers if m is not None and m.eqn.primitive.name == "convert_element_type"]
            from_half = [m for m in narrow if _dtype(m.eqn.invars[0]) in ("bfloat16", "float16")]
            out = aval(node.eqn.outvars[0])
            if len(from_half) == 2 and _dtype(node.eqn.invars[0]) == "float32":
                yield Finding(
                    "widened-product",
                    f"both operands of a product [{', '.join(map(str, out.shape))}] are widened from "
                    f"{_dtype(from_half[0].eqn.invars[0])} to float32 first; multiply as they are with "
                    "preferred_element_type=jnp.float32",
                    node.address,
                    2.0 * math.prod(out.shape),
                )


def _weak(program: Program, args: Any, kwargs: Any) -> Iterator[Finding]:
    for name, var in zip(program.arguments, program.jaxpr.jaxpr.invars, strict=True):
        if getattr(aval(var), "weak_type", False):
            yield Finding(
                "weak-type",
                f"{name} is a Python number: it takes the type of what it meets, and a call with a NumPy or jax scalar "
                "compiles the program anew. Pass jnp.float32(...) or make it static",
                None,
                1.0,
            )


def _callbacks(program: Program) -> Iterator[Finding]:
    for node in _leaves(program):
        if node.eqn.primitive.name in _CALLBACKS:
            nbytes = sum(math.prod(aval(a).shape) * aval(a).dtype.itemsize for a in node.eqn.invars)
            turns = " in a loop" if node.scope.loops else ""
            yield Finding(
                "host-transfer",
                f"{node.eqn.primitive.name}{turns} sends {nbytes} bytes to the host each time it runs",
                node.address,
                float(nbytes * (1000 if turns else 1) + 1),
            )


def _padded(traced: Traced, unit: tuple[int, int]) -> Iterator[Finding]:
    rows = {row.address: row for row in cost_of(traced.program).rows}
    whole = sum(row.flops for row in rows.values())
    for node in _leaves(traced.program):
        if node.eqn.primitive.name != "dot_general":
            continue
        row = rows.get(node.address)  # None in a branch that is not the costliest
        share = _used(node.eqn, unit)
        if row is not None and share < 0.5 and row.flops > 0.01 * whole:
            lhs, rhs = (list(aval(atom).shape) for atom in node.eqn.invars)
            yield Finding(
                "padded-product",
                f"a product of {lhs} and {rhs} fills {100 * share:.0f}% of the {unit[0]} x {unit[1]} tiles of a matrix "
                f"unit, and is {100 * row.flops / whole:.0f}% of the work; batch what is alike, or pad to a multiple",
                node.address,
                row.flops,
            )


def _used(eqn: Any, unit: tuple[int, int]) -> float:
    """The share of the tiles that a product fills: rows, columns, and what it sums over."""
    (left, right), (batch, _) = eqn.params["dimension_numbers"]
    a, b = (aval(atom).shape for atom in eqn.invars)
    rows = math.prod(n for i, n in enumerate(a) if i not in left and i not in batch)
    columns = math.prod(n for i, n in enumerate(b) if i not in right and i not in eqn.params["dimension_numbers"][1][1])
    inner = math.prod(a[i] for i in left)
    share = 1.0
    for size, tile in ((rows, unit[0]), (columns, unit[1]), (inner, unit[1])):
        share *= size / (tile * math.ceil(size / tile)) if size else 1.0
    return share


def _replicated(leaves: Sequence[jax.Array]) -> Iterator[Finding]:
    placed = [leaf for leaf in leaves if not isinstance(leaf, Tracer) and len(leaf.sharding.device_set) > 1]
    if not any(not leaf.sharding.is_fully_replicated for leaf in placed):
        return
    for leaf in placed:
        if leaf.sharding.is_fully_replicated and leaf.nbytes >= LARGE:
            yield Finding(
                "replicated",
                f"an argument of shape {list(leaf.shape)} ({units.size(leaf.nbytes)}) lies whole on each of "
                f"{len(leaf.sharding.device_set)} devices, while others are split; give it a sharding",
                None,
                float(leaf.nbytes * (len(leaf.sharding.device_set) - 1)),
            )


def _rematerialized(fn: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[Finding]:
    for found in rematerializations(fn, *args, **kwargs):
        dims = [int(n) for n in found.shape.partition("[")[2].rstrip("]").split(",") if n]
        message = f"{found}; give what is before and after it shardings of which one follows from the other"
        yield Finding("rematerialized", message, None, 4.0 * math.prod(dims) * jax.device_count())


def _leaves(program: Program) -> Iterator[Node]:
    return (node for node in program.nodes if not node.bodies)


def _dtype(atom: Any) -> str:
    dtype = getattr(getattr(atom, "aval", None), "dtype", None)
    return dtype.name if isinstance(dtype, np.dtype) else ""  # keys have a type of jax's own
