"""What a program costs, read off its jaxpr: FLOPs and bytes of every equation, by operation, line or module.

    cost(fn, *args) -> Cost          rows, one an equation; totals; tables by what they have in common
    roofline(cost, peaks())          the time each row needs at least, and which of the two limits it

A product of [M, K] and [K, N] is 2 M N K FLOPs; an element-wise operation one for each result, a reduction one for each
number it reads. Bytes are those of all operands and results, as if nothing were fused: XLA keeps part of them in
registers, so that they bound the traffic from above (`fused_bytes` is XLA's own count for the whole program). What
runs in a loop counts for every turn, of branches the costliest; the turns of a `while` are not known and count as one.
Williams, Waterman, Patterson: Roofline, CACM 2009.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from trustcore.graph.modules import trace
from trustcore.graph.program import Address, Node, Program, Scope

By = Literal["operation", "line", "module", "stage"]

_MOVES = frozenset(
    [
        "broadcast_in_dim",
        "reshape",
        "squeeze",
        "expand_dims",
        "transpose",
        "slice",
        "dynamic_slice",
        "dynamic_update_slice",
        "concatenate",
        "pad",
        "rev",
        "gather",
        "iota",
        "copy",
        "copy_p",
        "convert_element_type",
        "bitcast_convert_type",
        "select_n",
        "select_and_gather_add",
        "split",
        "device_put",
        "stop_gradient",
        "optimization_barrier",
        "sharding_constraint",
        "random_wrap",
        "random_unwrap",
    ]
)
_CHEAP = frozenset(
    ["reshape", "squeeze", "expand_dims", "stop_gradient", "sharding_constraint", "bitcast_convert_type"]
)
_OPAQUE = frozenset(["ffi_call", "pallas_call", "custom_call", "tpu_custom_call", "pure_callback", "io_callback"])


def _attention(inputs: Sequence[Any]) -> float:
    """One product of [B, T, N, H] queries and [B, S, K, H] keys, as if nothing were masked."""
    return 2.0 * _size(inputs[0]) * inputs[1].shape[1]


def _decoding(inputs: Sequence[Any]) -> float:
    """One product of [B, T, N, H] queries and a cache [B, K, H, S], of pages [P, K, H, S] all of P."""
    keys = next(x for x in inputs[1:] if len(x.shape) == 4)
    return 2.0 * _size(inputs[0]) * keys.shape[3] * max(1.0, keys.shape[0] / inputs[0].shape[0])


def _projection(inputs: Sequence[Any]) -> float:
    """One product of [R, D] rows and a table of V columns."""
    return 2.0 * inputs[0].shape[0] * _size(inputs[1])


# FLOPs of kernels of `kernels_pallas` by the names of their primitives, of our own handlers on the CPU by theirs: of
# operands and results. A backward pass computes its products anew.
FOREIGN: dict[str, Callable[[Sequence[Any], Sequence[Any]], float]] = {
    "attention_forward": lambda inputs, outputs: 2 * _attention(inputs),
    "attention_backward": lambda inputs, outputs: 5 * _attention(inputs),
    "decode_attention_forward": lambda inputs, outputs: 2 * _decoding(inputs),
    "decode_attention_backward": lambda inputs, outputs: 5 * _decoding(inputs),
    "packed_matmul_forward": lambda inputs, outputs: 2.0 * inputs[0].shape[-1] * sum(map(_size, outputs)),
    "cross_entropy_forward": lambda inputs, outputs: _projection(inputs),
    "cross_entropy_one_pass": lambda inputs, outputs: 2 * _projection(inputs),
    "cross_entropy_backward": lambda inputs, outputs: 3 * _projection(inputs),
    "grouped_matmul_rows": lambda inputs, outputs: 2.0 * _size(inputs[0]) * outputs[0].shape[-1],
    "grouped_matmul_sums": lambda inputs, outputs: 2.0 * _size(inputs[0]) * outputs[0].shape[-1],
    "selective_scan_forward": lambda inputs, outputs: 7.0 * _size(outputs[0]) * outputs[1].shape[-1],
    "selective_scan_backward": lambda inputs, outputs: 25.0 * _size(outputs[0]) * outputs[2].shape[-1],
    "trustcore_packed_matmul": lambda inputs, outputs: 2.0 * inputs[0].shape[-1] * sum(map(_size, outputs)),
    "trustcore_cached_attention": lambda inputs, outputs: 4.0 * _size(inputs[0]) * inputs[4].shape[-1],
    "trustcore_statistics": lambda inputs, outputs: 12.0 * _size(inputs[0]),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One equation, all its turns together.

    Attributes:
        address: where it stands.
        times: how often it runs.
        flops: of all of them; transcendental functions count as one.
        nbytes: read and written, unfused.
        known: whether the cost is; kernels and calls of foreign code do not tell theirs.
    """

    address: Address
    times: int
    flops: float
    nbytes: float
    known: bool = True

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.nbytes if self.nbytes else 0.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a program.

    Attributes:
        rows: one an equation, in the program's order.
        fused_bytes: XLA's count of the traffic of the compiled program; None where it was not compiled.
        unbounded: whether a `while` counts once for want of a known number of turns.
    """

    rows: tuple[Row, ...]
    fused_bytes: float | None = None
    unbounded: bool = False

    @property
    def flops(self) -> float:
        """In all."""
        return sum(row.flops for row in self.rows)

    @property
    def nbytes(self) -> float:
        """In all, unfused."""
        return sum(row.nbytes for row in self.rows)

    @property
    def unknown(self) -> tuple[Row, ...]:
        """Rows whose cost is not known."""
        return tuple(row for row in self.rows if not row.known)

    def by(self, what: By, depth: int | None = None) -> dict[str, tuple[float, float]]:
        """Returns (FLOPs, bytes) of rows that have something in common, the costliest first.

        Args:
            what: "operation" (primitive), "line" (of the user's code), "module" (scopes around) or "stage" (forward,
                backward, recomputed).
            depth: how many scopes of a module's path are told apart; None: all.
        """
        found: dict[str, tuple[float, float]] = {}
        for row in self.rows:
            key = _key(row.address, what, depth)
            flops, nbytes = found.get(key, (0.0, 0.0))
            found[key] = flops + row.flops, nbytes + row.nbytes
        return dict(sorted(found.items(), key=lambda item: (-item[1][0], -item[1][1])))

    def table(self, what: By = "module", count: int = 20, depth: int | None = None) -> str:
        """Returns the costliest of `by` as lines of text."""
        lines = [f"{'GFLOP':>10} {'share':>6} {'MB':>10}  {what}"]
        for name, (flops, nbytes) in list(self.by(what, depth).items())[:count]:
            share = 100 * flops / self.flops if self.flops else 0.0
            lines.append(f"{flops / 1e9:10.4f} {share:5.1f}% {nbytes / 1e6:10.2f}  {name}")
        lines.append(f"{self.flops / 1e9:10.4f} {100.0:5.1f}% {self.nbytes / 1e6:10.2f}  in all")
        if self.unknown:
            lines.append(f"{len(self.unknown)} equations do not tell their cost: {self.unknown[0].address}")
        return "\n".join(lines)

    __str__ = table


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What a device reaches: measured by `peaks`, or read off its data sheet.

    Attributes:
        flops: a second, of products of matrices.
        bandwidth: bytes a second, read and written.
    """

    flops: float
    bandwidth: float


def cost(fn: Callable[..., Any], *args: Any, compiled: bool = False, **kwargs: Any) -> Cost:
    """Returns what `fn(*args, **kwargs)` costs; the function is traced, not run.

    Args:
        fn: a function of arrays in pytrees.
        args, kwargs: its arguments.
        compiled: whether to compile it, too, for `fused_bytes`.

    Raises:
        Whatever tracing `fn` raises.
    """
    found = cost_of(trace(fn, args, kwargs).program)
    fused = None
    if compiled:
        told = jax.jit(fn).lower(*args, **kwargs).compile().cost_analysis() or {}
        fused = float(told["bytes accessed"]) if "bytes accessed" in told else None
    return dataclasses.replace(found, fused_bytes=fused)


def cost_of(program: Program) -> Cost:
    """Returns the same of a program that was traced already."""
    rows: list[Row] = []
    unbounded = _collect(program.root, 1, rows)
    return Cost(tuple(rows), unbounded=unbounded)


def roofline(found: Cost, limits: Peaks) -> list[tuple[Row, float, str]]:
    """Returns each row with the seconds it needs at least and what limits it, "compute" or "memory"; longest first."""
    rows = []
    for row in found.rows:
        compute, memory = row.flops / limits.flops, row.nbytes / limits.bandwidth
        rows.append((row, max(compute, memory), "compute" if compute >= memory else "memory"))
    return sorted(rows, key=lambda item: -item[1])


def peaks(dtype: Any = jnp.float32, *, size: int = 2048, seconds: float = 0.5) -> Peaks:
    """Returns what the default device reaches: products of square matrices, and copies of 256 MB.

    Args:
        dtype: of the matrices.
        size: of their sides.
        seconds: how long each of the two is measured; the best run counts.
    """
    a = jnp.ones((size, size), dtype)
    flops = 2 * size**3 / _best(jax.jit(lambda x: x @ x), a, seconds)
    # In place, so that no new pages are asked for.
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    bandwidth = 2 * 4 * (1 << 26) / _best(step, jnp.ones((1 << 26,), jnp.float32), seconds, fed=True)
    return Peaks(flops, bandwidth)


def _best(fn: Callable[[jax.Array], jax.Array], x: jax.Array, seconds: float, *, fed: bool = False) -> float:
    """The least seconds of a call; `fed`: each takes what the one before gave."""
    y = jax.block_until_ready(fn(x))
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or best == math.inf:
        began = time.perf_counter()
        y = jax.block_until_ready(fn(y if fed else x))
        best = min(best, time.perf_counter() - began)
    return best


def _key(address: Address, what: By, depth: int | None) -> str:
    if what == "operation":
        return address.primitive
    if what == "line":
        return address.place or "(unknown)"
    if what == "stage":
        return address.stage
    return "/".join(address.path[:depth]) or "(no module)"


def _collect(scope: Scope, times: int, rows: list[Row]) -> bool:
    """Adds the rows of a scope that runs `times` times; returns whether a loop's turns are unknown."""
    unbounded = False
    for node in scope.nodes:
        if not node.bodies:
            rows.append(_leaf(node, times))
            continue
        kind = node.bodies[0].kind
        if kind == "branch":
            unbounded |= _dearest(node.bodies, times, rows)
            continue
        turns = times * node.eqn.params["length"] if kind == "scan" else times
        unbounded |= kind in ("while", "test")
        for body in node.bodies:
            unbounded |= _collect(body, turns, rows)
    return unbounded


def _dearest(branches: Sequence[Scope], times: int, rows: list[Row]) -> bool:
    found = []
    for branch in branches:
        own: list[Row] = []
        found.append((own, _collect(branch, times, own)))
    own, unbounded = max(found, key=lambda item: sum(row.flops + row.nbytes for row in item[0]))
    rows.extend(own)
    return unbounded


def _leaf(node: Node, times: int) -> Row:
    flops, nbytes, known = equation_cost(node.eqn)
    return Row(node.address, times, times * flops, times * nbytes, known)


def equation_cost(eqn: Any) -> tuple[float, float, bool]:
    """Returns FLOPs and bytes of one equation without programs in it, and whether its cost is known."""
    name = eqn.primitive.name
    inputs, outputs = [atom.aval for atom in eqn.invars], [var.aval for var in eqn.outvars]
    nbytes = 0 if name in _CHEAP else _nbytes(inputs) + _nbytes(outputs)
    if name in ("dynamic_slice", "gather"):  # they read what they return
        nbytes = 2 * _nbytes(outputs)
    elif name in ("dynamic_update_slice", "scatter", "scatter-add", "scatter_add"):  # in place, where nobody else reads
        nbytes = 3 * _nbytes(inputs[1:2] if name.startswith("dynamic") else inputs[2:3])
    rule = FOREIGN.get(str(eqn.params.get("target_name", "")) if name == "ffi_call" else name)
    flops = _flops(name, eqn, inputs, outputs) if rule is None else rule(inputs, outputs)
    return flops, nbytes, rule is not None or name not in _OPAQUE


def _flops(name: str, eqn: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> float:
    if name in _OPAQUE or name in _MOVES:
        return 0.0
    made = sum(_size(out) for out in outputs)
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * made * math.prod(inputs[0].shape[i] for i in contracted)
    if name in ("ragged_dot_general", "ragged_dot"):  # every row meets one of the matrices
        return 2.0 * _size(inputs[0]) * inputs[1].shape[-1] if inputs[1].ndim == 3 else 2.0 * _size(inputs[0])
    if name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        window = math.prod(inputs[1].shape[i] for i in numbers.rhs_spec[1:])
        return 2.0 * made * window
    if name.startswith(("reduce_", "arg", "cum")) or name == "reduce":
        return float(_size(inputs[0]))
    if name == "sort":
        axis = inputs[0].shape[eqn.params["dimension"]]
        return float(_size(inputs[0])) * max(1.0, math.log2(max(axis, 2)))
    if name == "top_k":
        return float(_size(inputs[0])) * max(1.0, math.log2(max(eqn.params["k"], 2)))
    if name.startswith("scatter"):
        return float(_size(inputs[2])) if name != "scatter" else 0.0
    return float(made)


def _size(aval: Any) -> int:
    return math.prod(getattr(aval, "shape", ()))


def _nbytes(avals: Iterable[Any]) -> int:
    return sum(_size(aval) * getattr(getattr(aval, "dtype", None), "itemsize", 0) for aval in avals)
