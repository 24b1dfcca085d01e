"""Two runs side by side: where they first part, and where they differ most.

    compare(f, g)(*args)                  two functions: dtypes, backends, quantized against float, before and after
    compare_recorded(f, arrays)(*args)    against activations that another framework gave, by module path

The values of both programs are matched in order: same path and shape, and the same primitive where programs differ.
The difference of two values a and b is max |a - b| / max |b|, b being the reference. The first divergence is the first
value, in the program's order, beyond the tolerance of its dtype; `growth` says how much larger its difference is than
the largest among its inputs'.

All watched values of both runs are held on the device at once: narrow `watch` where that is too much. Of a `while`, the
last turn is compared.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.debug.inspector import check_arguments
from trustcore.debug.stepping import timed
from trustcore.debug.tap import is_float
from trustcore.errors import DebugError
from trustcore.graph import Address, Node, Program, Scope, observe, origins, trace
from trustcore.graph.modules import split_arguments
from trustcore.graph.observe import Record, Sheet, leading

# Differences that rounding alone gives in a program of some depth, in units of the coarser dtype's epsilon.
ROUNDINGS = 200.0


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two values differ.

    Attributes:
        name: address in the run, or the name of the recorded array.
        address: in the run.
        reference: address in the other run; None for a recorded array.
        error: max |a - b| / max |b|; infinite where only one of them is finite, or shapes differ.
        growth: error over the largest error among the inputs' values; None where those are not compared.
        tolerance: above which the value counts as diverged.
        turn: of the outermost loop around, the first in which it diverged; None outside of loops.
        shapes: of both.
        dtypes: of both.
        order: sorts values by when they diverged: all those of one turn before those of the next.
        seconds: that its equation took in both runs, all turns together; None unless they were asked for.
    """

    name: str
    address: Address
    reference: Address | None
    error: float
    growth: float | None
    tolerance: float
    turn: int | None
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    order: tuple[int, ...]
    seconds: tuple[float, float] | None = None

    @property
    def diverged(self) -> bool:
        """Whether the error is above the tolerance."""
        return not self.error <= self.tolerance

    def __str__(self) -> str:
        turn = "" if self.turn is None else f" from turn {self.turn} on"
        growth = "" if self.growth is None else f", {self.growth:.3g} times that of its inputs"
        kinds = " against ".join(f"{d}{list(s)}" for d, s in zip(self.dtypes, self.shapes, strict=True))
        times = "" if self.seconds is None else "; {:.3f} ms against {:.3f}".format(*(1e3 * s for s in self.seconds))
        return f"{self.name}{turn}: error {self.error:.3g}{growth} ({kinds}){times}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        differences: of all values that were matched, in the order of the program.
        unmatched: addresses or names without a counterpart.
    """

    differences: tuple[Difference, ...]
    unmatched: tuple[str, ...]

    @property
    def first(self) -> Difference | None:
        """The first divergence in the order in which values are computed; None where there is none."""
        return min((d for d in self.differences if d.diverged), key=lambda d: d.order, default=None)

    @property
    def ranked(self) -> list[Difference]:
        """All values, the largest error first."""
        return sorted(self.differences, key=lambda d: -d.error)

    @property
    def slower(self) -> list[Difference]:
        """The values whose equations take longer than in the reference, the most seconds lost first."""
        timed = [(d.seconds[0] - d.seconds[1], d) for d in self.differences if d.seconds is not None]
        return [d for lost, d in sorted(timed, key=lambda pair: -pair[0]) if lost > 0]

    def __str__(self) -> str:
        first = self.first
        head = f"First divergence: {first}" if first else f"No divergence among {len(self.differences)} values."
        worst = [f"  {d}" for d in self.ranked[:10] if d.error > 0]
        slow = [f"  {d}" for d in self.slower[:5]]
        errors, times = (["Largest errors:", *worst] if worst else []), (["Slower:", *slow] if slow else [])
        return "\n".join([head, *errors, *times])

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain data."""
        return {
            "first": str(self.first) if self.first else None,
            "differences": [
                {
                    "name": d.name,
                    "error": d.error if np.isfinite(d.error) else None,
                    "turn": d.turn,
                    "seconds": d.seconds,
                    "text": str(d),
                }
                for d in self.ranked
            ],
            "unmatched": list(self.unmatched),
        }


class _Values:
    """A tap that keeps the float outputs of the equations that fit a pattern."""

    def __init__(self, patterns: Sequence[str]):
        self.patterns = patterns

    def wants(self, node: Node) -> bool:
        return any(is_float(v.aval) for v in node.eqn.outvars) and any(map(node.address.matches, self.patterns))

    def see(self, node: Node, inputs: Sequence[Any], outputs: Sequence[Any]) -> Record:
        return {str(i): x for i, x in enumerate(outputs) if is_float(node.eqn.outvars[i].aval)}

    def sheet(self, scope: Scope, records: dict[int, Record]) -> Sheet:
        return {"values": {str(number): record for number, record in records.items()}}

    def keep(self, scope: Scope, turn: jax.Array) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of a run: its equation, which output, and all its turns stacked."""

    node: Node
    output: int
    array: jax.Array

    @property
    def address(self) -> Address:
        """Of its equation."""
        return self.node.address


def record(fn: Callable[..., Any], watch: str | Sequence[str] = "*") -> Callable[..., dict[str, jax.Array]]:
    """Returns a function that gives every watched value of `fn` by address, turns of loops stacked."""
    patterns = [watch] if isinstance(watch, str) else list(watch)

    def recorded(*args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        values, _ = _run(fn, patterns, args, kwargs)
        return {f"{v.address}" + (f" output {v.output}" if v.output else ""): v.array for v in values}

    return recorded


def compare(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    *,
    watch: str | Sequence[str] = "*",
    tolerance: float | None = None,
    times: bool = False,
) -> Callable[..., Comparison]:
    """Returns a function that runs both on its arguments and compares every value within.

        print(compare(quantized_model, model)(tokens))

    Args:
        fn: the function in question.
        reference: what it is compared with; `functools.partial` gives it arguments of its own.
        watch: globs over the addresses of both.
        tolerance: relative error from which values count as diverged; None: 200 epsilons of the coarser dtype.
        times: whether both also run equation by equation, to tell how long each takes.
    """
    patterns = [watch] if isinstance(watch, str) else list(watch)

    def compared(*args: Any, **kwargs: Any) -> Comparison:
        a, program = _run(fn, patterns, args, kwargs)
        b, other = _run(reference, patterns, args, kwargs)
        pairs, lonely = _matched(a, b)
        found = _compared(program, [(x, y, y.address, f"{x.address}") for x, y in pairs], lonely, tolerance)
        if not times:
            return found
        leaves = split_arguments(args, kwargs)[0]
        mine, theirs = (timed(each, leaves, 0).by_node for each in (program, other))
        seconds = [(mine.get(x.node.number, 0.0), theirs.get(y.node.number, 0.0)) for x, y in pairs]
        told = [dataclasses.replace(d, seconds=s) for d, s in zip(found.differences, seconds, strict=True)]
        return Comparison(tuple(told), found.unmatched)

    return compared


def compare_recorded(
    fn: Callable[..., Any], recorded: Mapping[str, Any] | str | os.PathLike[str], *, tolerance: float | None = None
) -> Callable[..., Comparison]:
    """Returns a function that runs `fn` and compares its values with recorded arrays.

        print(compare_recorded(model, {"layers.0.attention": array, "layers.0": ...})(tokens))

    Args:
        fn: the function in question.
        recorded: arrays by module path, dots or slashes: each is compared with the last value of that path (or one
            below it) that has its shape. A glob or an address (`*/softmax/div`) is understood, too. Or the path of an
            `.npz` file that holds them, as `numpy.savez("run.npz", **activations)` writes it in the other framework.
        tolerance: as in `compare`.

    Raises:
        DebugError: the file cannot be read. When called: nothing fits a name.
    """
    arrays = recorded if isinstance(recorded, Mapping) else _read_arrays(Path(recorded))

    def compared(*args: Any, **kwargs: Any) -> Comparison:
        values, program = _run(fn, ["*"], args, kwargs)
        pairs, missing = [], []
        for name, array in arrays.items():
            array = jnp.asarray(array)
            found = [v for v in values if _belongs(v.address, name) and v.array.shape == array.shape]
            if not found:
                missing.append(name)
                continue
            value = found[-1]
            pairs.append((value, Value(value.node, value.output, array), None, f"{name} = {value.address}"))
        if not pairs:
            paths = sorted({"/".join(v.address.path) for v in values if v.address.path})[:5]
            raise DebugError(
                f"compare_recorded: nothing of the program has the path and shape of {', '.join(missing[:3])}; "
                f"paths are {', '.join(paths)}"
            )
        pairs.sort(key=lambda pair: pair[0].node.number)
        return _compared(program, pairs, missing, tolerance)

    return compared


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array without a name; write it with numpy.savez")
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DebugError(f"compare_recorded: {path} cannot be read as .npz: {error}") from error


def _belongs(address: Address, name: str) -> bool:
    if address.matches(name):
        return True
    path = tuple(name.replace(".", "/").split("/"))
    return address.path[: len(path)] == path


def _run(
    fn: Callable[..., Any], patterns: Sequence[str], args: tuple, kwargs: dict[str, Any]
) -> tuple[list[Value], Program]:
    leaves, names, _ = split_arguments(args, kwargs)
    check_arguments(leaves, names)
    program = trace(fn, args, kwargs).program
    tap = _Values(patterns)
    sheets = jax.jit(lambda *v: observe(program, v, tap)[1])(*[jnp.asarray(leaf) for leaf in leaves])
    values = []
    for number, sheet in sheets.items():
        for scope in leading(program.scopes[number]):
            if scope.kind in ("while", "test"):
                sheet = sheet["last"]
        for node, record_ in sheet["values"].items():
            values += [Value(program.nodes[int(node)], int(i), array) for i, array in record_.items()]
    values.sort(key=lambda value: (value.node.number, value.output))
    return values, program


def _matched(a: list[Value], b: list[Value]) -> tuple[list[tuple[Value, Value]], list[str]]:
    """Pairs of values in the order of both programs; casts are passed over."""
    a, b = ([v for v in values if v.address.primitive != "convert_element_type"] for values in (a, b))
    keys = [[(v.address.path, v.address.primitive, v.output, v.array.shape) for v in values] for values in (a, b)]
    pairs, lonely = [], []
    blocks = difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_matching_blocks()
    taken = set()
    for i, j, n in blocks:
        for k in range(n):
            pairs.append((a[i + k], b[j + k]))
            taken.add(i + k)
    lonely = [str(v.address) for i, v in enumerate(a) if i not in taken]
    return pairs, lonely


def _compared(program: Program, pairs: Sequence[Any], unmatched: Sequence[str], tolerance: float | None) -> Comparison:
    found: list[Difference] = []
    errors: dict[tuple[int, int], float] = {}
    for x, y, reference, name in pairs:
        limit = tolerance if tolerance is not None else ROUNDINGS * max(_epsilon(x.array), _epsilon(y.array))
        looped = any(scope.kind in ("scan", "shard") for scope in leading(x.node.scope))
        error, turn = _difference(x.array, y.array, limit, looped)
        errors[x.node.number, x.output] = error
        before = [
            errors[o.node.number, o.output]
            for atom in x.node.eqn.invars
            for o in origins(x.node.scope, atom, tuple(0 for _ in x.node.scope.loops))
            if o.node is not None and (o.node.number, o.output) in errors and o.node is not x.node
        ]
        growth = error / max(before) if before and max(before) > 0 else None
        kinds = (x.array.dtype.name, y.array.dtype.name)
        shapes = (x.array.shape, y.array.shape)
        outermost = next((s.owner for s in x.node.scope.around if s.kind == "scan" and s.owner), x.node)
        order = (outermost.number, turn or 0, x.node.number, x.output)
        found.append(Difference(name, x.address, reference, error, growth, limit, turn, shapes, kinds, order))
    return Comparison(tuple(found), tuple(unmatched))


def _epsilon(x: jax.Array) -> float:
    return float(jnp.finfo(x.dtype).eps)


def _difference(a: jax.Array, b: jax.Array, limit: float, looped: bool) -> tuple[float, int | None]:
    if a.shape != b.shape:
        return float("inf"), None
    if not a.size:
        return 0.0, None
    a, b = jax.device_put((a, b), jax.devices()[0])
    error, by_turn = (np.asarray(x) for x in _errors(a, b, looped))
    beyond = np.flatnonzero(~(by_turn <= limit))
    return float(error), int(beyond[0]) if looped and len(beyond) else None


@jax.jit
def _wide(x: jax.Array) -> jax.Array:
    return x if jnp.issubdtype(x.dtype, jnp.complexfloating) else x.astype(jnp.float32)


def _errors(a: jax.Array, b: jax.Array, looped: bool) -> tuple[jax.Array, jax.Array]:
    a, b = _wide(a), _wide(b)
    same = jnp.logical_or(a == b, jnp.logical_and(jnp.isnan(a), jnp.isnan(b)))
    gap = jnp.where(same, 0.0, jnp.abs(a - b))
    gap = jnp.where(jnp.isnan(gap), jnp.inf, gap)
    size = jnp.max(jnp.where(jnp.isfinite(b), jnp.abs(b), 0.0), initial=0.0)
    relative = gap / jnp.maximum(size, 1e-30)
    rows = relative.reshape(relative.shape[0], -1) if looped and relative.ndim else relative.reshape(1, -1)
    return jnp.max(relative), jnp.max(rows, axis=1)
