"""Ops that go over the rows of matrices: one function of a tile, run by XLA and by two kinds of kernels.

An op says by a `Program` what its tiles are and by one plain jax function what becomes of them. The function sees
float32 (float64 in XLA's form for float64); the machines load, mask, round, store and sum:

    xla         the whole matrix is one tile
    triton      grid (row blocks, column blocks). What lies beyond R and D is masked in loads and stores. Where
                columns are summed over rows, at most PROGRAMS programs go through the rows in a loop and write one
                partial sum each, which XLA adds up
    mosaic_tpu  grid (column blocks, row blocks), the last in turn: sums stay in VMEM. What lies beyond R is garbage of
                its own row, and left out of sums

A program that needs whole rows (a mean) has one column block; Triton fills it up to a power of two. No operand is
padded in memory. Nothing here has been measured on a GPU or TPU. The three machines stand side by side in one file, so
that what a tile is stands in one place.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl

from kernels_pallas import _compat, tuning
from kernels_pallas.dispatch import (
    Explanation,
    Implementation,
    Op,
    Target,
    no_mosaic_tpu,
    no_triton,
    primitive,
)

# "row": [R, D]. "column": [D], one for every column. "number": [R], one for every row. "sum": [D], over all rows.
Kind = Literal["row", "column", "number", "sum"]
WIDEST = 16384  # D of a program that needs whole rows: 64 KB of float32 in registers or VMEM
WIDEST_SUMS = 8192  # the same of Triton's programs that sum over rows as well: beyond, they spill
FLOAT8 = 8.9  # compute capability from which Triton converts to float8; before, its compiler ends the process
PROGRAMS = 256  # of Triton where rows are summed: about two for each multiprocessor of an H100 or A100


def _erf(x: jax.Array) -> jax.Array:
    """The error function, which Pallas-Triton lacks, within 1.5e-7: Abramowitz and Stegun, eq. 7.1.26."""
    t = 1.0 / (1.0 + 0.3275911 * jnp.abs(x))
    series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    beyond = 1.0 - series * jnp.exp(-x * x)
    return jnp.where(x < 0, -beyond, beyond)


class Tile(NamedTuple):
    """Where a tile is: `size` is D, `dtype` that of rows in memory, `inside` which columns lie within D (None: all)."""

    size: Any
    dtype: Any
    inside: jax.Array | None = None
    erf: Callable[[jax.Array], jax.Array] = jax.lax.erf

    def sum(self, x: jax.Array) -> jax.Array:
        """Returns the sum of each row, `[r, 1]`."""
        x = x if self.inside is None else jnp.where(self.inside, x, jnp.zeros((), x.dtype))
        return jnp.sum(x, axis=1, keepdims=True)

    def mean(self, x: jax.Array) -> jax.Array:
        """Returns the mean of each row, `[r, 1]`."""
        return self.sum(x) / self.size

    def max(self, x: jax.Array) -> jax.Array:
        """Returns the largest of each row, `[r, 1]`."""
        x = x if self.inside is None else jnp.where(self.inside, x, jnp.asarray(-jnp.inf, x.dtype))
        return jnp.max(x, axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Program:
    """What one direction of an op does with a tile.

    Attributes:
        name: of the kernel.
        body: of a `Tile` and the operands' tiles by name (`[r, d]`; columns `[1, d]`, numbers `[r, 1]`); returns the
            results' tiles by name, for a sum what each row adds.
        inputs: kinds of the operands.
        outputs: kinds and dtypes of the results; None is the dtype of the rows.
        whole: whether a tile must hold whole rows.
    """

    name: str
    body: Callable[[Tile, Mapping[str, jax.Array]], Mapping[str, jax.Array]]
    inputs: Mapping[str, Kind]
    outputs: Mapping[str, tuple[Kind, Any]]
    whole: bool


class Call(NamedTuple):
    """A call as implementations see it: its program, and arrays or their types by name."""

    program: Program
    arrays: Mapping[str, Any]

    @property
    def rows(self) -> Any:
        """The first operand that is a matrix of floats: of its shape, `[R, D]`, and dtype are the others."""
        rows = (self.arrays[n] for n, kind in self.program.inputs.items() if kind == "row")
        return next(x for x in rows if jnp.issubdtype(x.dtype, jnp.floating))

    @property
    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """The types of the results, in order."""
        rows, size = self.rows.shape
        shapes = {"row": (rows, size), "number": (rows,), "sum": (size,)}
        wide = _wide(self.rows.dtype)
        return [
            jax.ShapeDtypeStruct(shapes[kind], dtype or (self.rows.dtype if kind == "row" else wide))
            for kind, dtype in self.program.outputs.values()
        ]

    def __str__(self) -> str:
        shapes = (f"{n} {x.dtype}[{','.join(map(str, x.shape))}]" for n, x in self.arrays.items())
        return f"({', '.join(shapes)})"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows and columns of a tile; how many tiles a program of Triton goes through, and its warps."""

    rows: int
    columns: int
    turns: int = 1
    warps: int = 4


def _wide(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _refusal(call: Call, dtypes: tuple[str, ...]) -> str:
    rows = call.rows
    if not all(isinstance(n, int) for n in rows.shape):
        return "shapes are symbolic, and it needs numbers."
    if min(rows.shape) == 0:
        return "an axis is empty."
    if rows.dtype.name not in dtypes:
        return f"it takes {', '.join(dtypes[:-1])} and {dtypes[-1]}, not {rows.dtype}."
    if call.program.whole and rows.shape[1] > WIDEST:
        return f"rows of {rows.shape[1]} are longer than {WIDEST}."
    return ""


def triton_refusal(target: Target, call: Call) -> str:
    """Returns why Pallas-Triton cannot compute a call there; "" where it can."""
    if reason := no_triton(target):
        return reason
    sums = any(kind == "sum" for kind, _ in call.program.outputs.values())
    if call.program.whole and sums and isinstance(call.rows.shape[1], int) and call.rows.shape[1] > WIDEST_SUMS:
        return f"rows of {call.rows.shape[1]} are longer than {WIDEST_SUMS}, and sums over rows take registers, too."
    eights = any("float8" in str(dtype) for _, dtype in call.program.outputs.values())
    if eights and target.platform == "cuda" and target.capability is not None and target.capability < FLOAT8:
        return f"codes of 8-bit floats need compute capability {FLOAT8} there, and the chip has {target.capability}."
    return _refusal(call, ("float32", "bfloat16", "float16"))


def tpu_refusal(target: Target, call: Call) -> str:
    """Returns why Pallas-Mosaic for TPUs cannot compute a call there; "" where it can."""
    if reason := no_mosaic_tpu(target):
        return reason
    return _refusal(call, ("float32", "bfloat16"))


def triton_blocks(call: Call) -> Blocks:
    """Returns the block sizes of Triton's kernel: powers of two."""
    rows, size = call.rows.shape
    columns = _power(size) if call.program.whole else min(_power(size), 1024)
    block = min(_power(rows), max(1, 4096 // columns))
    warps = min(16, max(4, block * columns // 512))
    return Blocks(block, columns, _turns(call, block), warps)


def tpu_blocks(call: Call) -> Blocks:
    """Returns the block sizes of the TPU's kernel: multiples of 16 by 128, or all of a shorter axis."""
    rows, size = call.rows.shape
    columns = size if call.program.whole else min(size, 2048)
    block = max(16, 2**17 // max(columns, 128) // 16 * 16)
    return Blocks(min(rows, block), columns)


def facts(call: Call) -> tuning.Facts | None:
    """Returns what the speed of a call depends on; None where a size is symbolic or 0."""
    rows, size = call.rows.shape
    if not (isinstance(rows, int) and isinstance(size, int) and rows > 0 and size > 0):
        return None
    made = {"R": rows, "D": size, "dtype": call.rows.dtype.name}
    return {**made, "operands": " ".join(sorted(call.arrays)), "results": " ".join(sorted(call.program.outputs))}


def tuned_blocks(target: Target, call: Call, implementation: str) -> Blocks | None:
    """Returns the block sizes that were found for a call; None where none were."""
    found = tuning.values(call.program.name, target, lambda: facts(call), implementation)
    return fitting_blocks(call, found) if "rows" in found else None


def fitting_blocks(call: Call, found: tuning.Values) -> Blocks:
    """Returns blocks of that many rows, columns and warps, cut to the call."""
    rows, size = call.rows.shape
    if "warps" not in found:  # a TPU's
        return Blocks(min(rows, found["rows"]), size if call.program.whole else min(size, found["columns"]))
    columns = _power(size) if call.program.whole else min(_power(size), found["columns"])
    block = min(_power(rows), found["rows"])
    return Blocks(block, columns, _turns(call, block), found["warps"])


def _turns(call: Call, block: int) -> int:
    sums = any(kind == "sum" for kind, _ in call.program.outputs.values())
    return pl.cdiv(pl.cdiv(call.rows.shape[0], block), PROGRAMS) if sums else 1


def run_xla(target: Target, call: Call, interpret: bool) -> list[jax.Array]:
    """Computes a call as one tile."""
    wide = _wide(call.rows.dtype)
    kinds = call.program.inputs
    place = {"row": lambda x: x, "column": lambda x: x[None, :], "number": lambda x: x[:, None]}
    tiles = {n: place[kinds[n]](x.astype(wide)) for n, x in call.arrays.items()}
    found = call.program.body(Tile(call.rows.shape[1], call.rows.dtype), tiles)
    results = []
    for shape, (name, (kind, _)) in zip(call.shapes, call.program.outputs.items(), strict=True):
        x = found[name]
        x = jnp.sum(x, axis=0) if kind == "sum" else x[:, 0] if kind == "number" else x
        results.append(x.astype(shape.dtype))
    return results


def run_triton(target: Target, call: Call, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Computes a call by Pallas-Triton."""
    triton, program = _compat.triton(), call.program
    blocks = blocks or tuned_blocks(target, call, "triton") or triton_blocks(call)
    rows, size = call.rows.shape
    programs = pl.cdiv(rows, blocks.rows * blocks.turns)
    specs = {
        "row": pl.BlockSpec((blocks.rows * blocks.turns, blocks.columns), lambda i, j: (i, j)),
        "column": pl.BlockSpec((blocks.columns,), lambda i, j: (j,)),
        "number": pl.BlockSpec((blocks.rows * blocks.turns,), lambda i, j: (i,)),
        "sum": pl.BlockSpec((None, blocks.columns), lambda i, j: (i, j)),
    }
    kinds, made = program.inputs, {n: kind for n, (kind, _) in program.outputs.items()}
    summed = [n for n, kind in made.items() if kind == "sum"]
    names = list(call.arrays)
    shapes = [
        jax.ShapeDtypeStruct((programs, size), jnp.float32) if made[n] == "sum" else s
        for n, s in zip(program.outputs, call.shapes, strict=True)
    ]

    def body(*refs: Any) -> None:
        given = dict(zip([*names, *(f"out {n}" for n in program.outputs)], refs, strict=True))
        first, start = pl.program_id(0) * (blocks.rows * blocks.turns), pl.program_id(1) * blocks.columns
        within = start + jnp.arange(blocks.columns, dtype=jnp.int32) < size
        tile = Tile(size, call.rows.dtype, within[None, :], _erf)

        def turn(t: Any, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
            place = pl.ds(t * blocks.rows, blocks.rows)
            here = first + t * blocks.rows + jnp.arange(blocks.rows, dtype=jnp.int32) < rows
            both = here[:, None] & within[None, :]
            parts = {
                "row": lambda ref: (ref.at[place, :], both),
                "column": lambda ref: (ref, within),
                "number": lambda ref: (ref.at[place], here),
            }
            tiles = {}
            for n in names:
                ref, keep = parts[kinds[n]](given[n])
                zero = 0.0 if jnp.issubdtype(ref.dtype, jnp.floating) else 0
                x = triton.load(ref, mask=keep, other=zero).astype(jnp.float32)
                tiles[n] = {"row": x, "column": x[None, :] if x.ndim == 1 else x, "number": x[:, None]}[kinds[n]]
            found = program.body(tile, tiles)
            for n, kind in made.items():
                if kind == "sum":
                    sums[n] = sums[n] + jnp.sum(jnp.where(both, found[n], 0.0), axis=0)
                else:
                    ref, keep = parts[kind](given[f"out {n}"])
                    x = jnp.sum(found[n], axis=1) if kind == "number" else found[n]  # [r, 1]: Triton has no squeeze
                    triton.store(ref, x.astype(ref.dtype), mask=keep)
            return sums

        sums = {n: jnp.zeros((blocks.columns,), jnp.float32) for n in summed}
        sums = turn(0, sums) if blocks.turns == 1 else jax.lax.fori_loop(0, blocks.turns, turn, sums)
        for n, x in sums.items():
            triton.store(given[f"out {n}"], x, mask=within)

    results = pl.pallas_call(
        body,
        grid=(programs, pl.cdiv(size, blocks.columns)),
        in_specs=[specs[kinds[n]] for n in names],
        out_specs=[specs[made[n]] for n in program.outputs],
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=2),
        interpret=interpret,
        name=program.name,
    )(*(call.arrays[n] for n in names))
    return [
        jnp.sum(x, axis=0).astype(s.dtype) if made[n] == "sum" else x
        for n, x, s in zip(program.outputs, results, call.shapes, strict=True)
    ]


def run_tpu(target: Target, call: Call, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Computes a call by Pallas-Mosaic for TPUs."""
    from jax.experimental.pallas import tpu as pltpu

    program = call.program
    blocks = blocks or tuned_blocks(target, call, "mosaic_tpu") or tpu_blocks(call)
    rows, size = call.rows.shape
    specs = {
        "row": pl.BlockSpec((blocks.rows, blocks.columns), lambda j, i: (i, j)),
        "column": pl.BlockSpec((1, blocks.columns), lambda j, i: (0, j)),
        "number": pl.BlockSpec((blocks.rows, 1), lambda j, i: (i, 0)),
        "sum": pl.BlockSpec((1, blocks.columns), lambda j, i: (0, j)),
    }
    kinds, made = program.inputs, {n: kind for n, (kind, _) in program.outputs.items()}
    names = list(call.arrays)
    laid = {"row": lambda x: x, "column": lambda x: x[None, :], "number": lambda x: x[:, None]}
    flat = {"row": (rows, size), "number": (rows, 1), "sum": (1, size)}
    shapes = [
        jax.ShapeDtypeStruct(flat[made[n]], jnp.float32 if made[n] == "sum" else s.dtype)
        for n, s in zip(program.outputs, call.shapes, strict=True)
    ]

    def body(*refs: Any) -> None:
        given = dict(zip([*names, *(f"out {n}" for n in program.outputs)], refs, strict=True))
        turn = pl.program_id(1)
        tiles = {n: given[n][...].astype(jnp.float32) for n in names}
        found = program.body(Tile(size, call.rows.dtype), tiles)
        for n, kind in made.items():
            ref = given[f"out {n}"]
            if kind != "sum":
                ref[...] = found[n].astype(ref.dtype)
                continue
            part = found[n]
            if rows % blocks.rows:
                here = turn * blocks.rows + jax.lax.broadcasted_iota(jnp.int32, (blocks.rows, 1), 0) < rows
                part = jnp.where(here, part, 0.0)
            _add(ref, jnp.sum(part, axis=0, keepdims=True), turn)

    results = pl.pallas_call(
        body,
        grid=(pl.cdiv(size, blocks.columns), pl.cdiv(rows, blocks.rows)),
        in_specs=[specs[kinds[n]] for n in names],
        out_specs=[specs[made[n]] for n in program.outputs],
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=program.name,
    )(*(laid[kinds[n]](call.arrays[n]) for n in names))
    return [x.reshape(s.shape).astype(s.dtype) for x, s in zip(results, call.shapes, strict=True)]


def _add(ref: Any, part: jax.Array, turn: Any) -> None:
    """Adds to a result that stays in VMEM from turn to turn."""

    @pl.when(turn == 0)
    def _start() -> None:
        ref[...] = part

    @pl.when(turn > 0)
    def _next() -> None:
        ref[...] += part


@jax.tree_util.register_static
class _Names(tuple):
    """Names of operands: static in what the backward pass keeps."""


class RowOp:
    """An op over rows, with its gradient, on all implementations.

    Args:
        name: of the op.
        forward: of the static description of a call and the operands' names, the program.
        backward: of the description, the operands' names and those whose gradients are wanted; its results have the
            names of the operands that they are gradients of.
        visible: results that a caller sees, in the order in which they are returned; the others are kept.
        keep: of the description, operands and results by name, the operands of the backward program; cotangents come to
            them as "of_" and the result's name, and those that are zero do not come.
        alike: operands whose gradient is that of another.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[Any, tuple[str, ...]], Program],
        backward: Callable[[Any, tuple[str, ...], tuple[str, ...]], Program],
        *,
        visible: tuple[str, ...],
        keep: Callable[[Any, dict[str, Any], dict[str, Any]], dict[str, Any]],
        alike: Mapping[str, str] | None = None,
    ) -> None:
        self.program, self.visible, self.keep, self.alike = forward, visible, keep, dict(alike or {})

        def both(run: Callable[..., Any]) -> dict[str, Any]:
            return {"forward": run, "backward": run}

        self.op = Op(
            name,
            (
                Implementation("triton", triton_refusal, both(run_triton), home="cuda"),
                Implementation("mosaic_tpu", tpu_refusal, both(run_tpu), home="tpu"),
                Implementation("xla", lambda target, call: "", both(run_xla)),
            ),
            lambda direction, call: (call.program.name, facts(call)),
        )

        def call_of(*operands: Any, spec: Any, fields: tuple[str, ...], wanted: tuple[str, ...] | None = None) -> Call:
            program = forward(spec, fields) if wanted is None else backward(spec, fields, wanted)
            return Call(program, dict(zip(fields, operands, strict=True)))

        def folded(bind: Any, operands: Any, axes: Any, **params: Any) -> Any:
            return _folded(call_of, bind, operands, axes, **params)

        def shapes(call: Call) -> list[jax.ShapeDtypeStruct]:
            return call.shapes

        self._primitives = {d: primitive(self.op, d, call_of, shapes, folded) for d in ("forward", "backward")}
        self._computed = jax.custom_vjp(self._results, nondiff_argnums=(0,))
        self._computed.defvjp(self._with_kept, self._gradients, symbolic_zeros=True)

    def __call__(self, spec: Any, arrays: dict[str, jax.Array], implementation: str | None, interpret: bool) -> Any:
        """Returns the visible results of operands by name, matrices as `[R, D]`.

        Raises:
            ImplementationError: the named implementation cannot compute the call.
        """
        call = Call(self.program(spec, tuple(arrays)), arrays)
        self.op.check(call, implementation, interpret)
        return self._computed((spec, implementation, interpret), _vary_alike(arrays))

    def explain(self, spec: Any, arrays: dict[str, Any], platform: str | None, architecture: str | None) -> Explanation:
        """Returns what becomes of every implementation for operands or their types by name."""
        platform = platform or _compat.default_platform()
        target = Target(platform, architecture or _compat.device_kind(platform))
        return self.op.explain(target, Call(self.program(spec, tuple(arrays)), arrays))

    def _bind(self, direction: str, static: Any, arrays: dict[str, Any], **params: Any) -> Any:
        spec, implementation, interpret = static
        params = {"spec": spec, "implementation": implementation, "interpret": interpret, **params}
        return self._primitives[direction].bind(*arrays.values(), fields=tuple(arrays), **params)

    def _all(self, static: Any, arrays: dict[str, Any]) -> dict[str, Any]:
        names = self.program(static[0], tuple(arrays)).outputs
        return dict(zip(names, self._bind("forward", static, arrays), strict=True))

    def _results(self, static: Any, arrays: dict[str, Any]) -> Any:
        found = self._all(static, arrays)
        return tuple(found[n] for n in self.visible if n in found)

    def _with_kept(self, static: Any, arrays: Any) -> Any:
        wanted = _Names(n for n, x in arrays.items() if x.perturbed and n not in self.alike)
        if any(n in arrays and arrays[n].perturbed for n in self.alike):
            wanted = _Names(dict.fromkeys((*wanted, *self.alike.values())))
        arrays = {n: x.value for n, x in arrays.items()}
        found = self._all(static, arrays)
        results = {n: found[n] for n in self.visible if n in found}
        like = {n: jnp.zeros((), x.dtype) for n, x in arrays.items()}  # which operands there are, and their dtypes
        return tuple(results.values()), (self.keep(static[0], arrays, found), like, wanted, _Names(results))

    def _gradients(self, static: Any, kept: Any, cotangents: Any) -> Any:
        arrays, like, wanted, names = kept
        found: dict[str, Any] = dict.fromkeys(like)
        moved = {f"of_{n}": g for n, g in zip(names, cotangents, strict=True) if not isinstance(g, SymbolicZero)}
        if moved and wanted:
            results = self._bind("backward", static, _vary_alike({**arrays, **moved}), wanted=tuple(wanted))
            found |= {n: g.astype(like[n].dtype) for n, g in zip(wanted, results, strict=True)}
        for n, other in self.alike.items():
            if n in like:
                found[n] = found[other]
        return (found,)


def _vary_alike(arrays: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(arrays, _compat.vary_alike(list(arrays.values())), strict=True))


def _folded(call_of: Any, bind: Any, operands: Any, axes: Any, **params: Any) -> Any:
    """A mapped axis becomes more rows; one by one where columns are mapped, or sums over rows are wanted."""
    fields = params["fields"]
    mapped = dict(zip(fields, axes, strict=True))
    count = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    front = {
        n: x if mapped[n] is None else jnp.moveaxis(x, mapped[n], 0) for n, x in zip(fields, operands, strict=True)
    }
    static = {n: v for n, v in params.items() if n not in ("implementation", "interpret")}
    program = call_of(*operands, **static).program
    columns = [n for n, kind in program.inputs.items() if kind == "column"]
    sums = any(kind == "sum" for kind, _ in program.outputs.values())
    if sums or any(mapped[n] is not None for n in columns):
        moving = {n: x for n, x in front.items() if mapped[n] is not None}
        found = jax.lax.map(lambda part: bind.bind(*({**front, **part}[n] for n in fields), **params), moving)
        return found, [0] * len(found)

    def folded(name: str, x: jax.Array) -> jax.Array:
        if name in columns:
            return x
        x = jnp.broadcast_to(x[None], (count, *x.shape)) if mapped[name] is None else x
        return x.reshape(count * x.shape[1], *x.shape[2:])

    found = bind.bind(*(folded(n, front[n]) for n in fields), **params)
    return [x.reshape(count, x.shape[0] // count, *x.shape[1:]) for x in found], [0] * len(found)


def flattened(name: str, x: Any, **others: Any) -> tuple[tuple[int, ...], list[Any]]:
    """Returns the shape of x and it and the others as matrices of rows.

    Raises:
        ValueError: one of the others has another shape or dtype, or a dtype is not a float.
    """
    if not x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: x is {x.dtype}{list(x.shape)}; it must be floats, [..., D].")
    for other, y in others.items():
        if y is not None and (y.shape != x.shape or y.dtype != x.dtype):
            raise ValueError(f"{name}: {other} is {y.dtype}{list(y.shape)} and must be as x, {x.dtype}{list(x.shape)}.")
    count = functools.reduce(lambda a, b: a * b, x.shape[:-1], 1)
    shape = (count, x.shape[-1])

    def matrix(y: Any) -> Any:
        if y is None:
            return None
        return jax.ShapeDtypeStruct(shape, y.dtype) if isinstance(y, jax.ShapeDtypeStruct) else y.reshape(shape)

    return tuple(x.shape), [matrix(y) for y in (x, *others.values())]
