"""What may be tuned of grouped products: the implementation, and the tiles of each, for rows and for sums.

Measured with groups of uneven size, as a router makes them. Rows are checked on some from all over the call, sums on
the last group.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import Target
from kernels_pallas.grouped_matmul import tpu, triton, xla
from kernels_pallas.grouped_matmul.front import GROUPED_MATMUL, Call, grouped_matmul
from kernels_pallas.grouped_matmul.oracle import grouped_matmul_oracle
from kernels_pallas.tuning import Cost, Facts, Tunable, Values, completed

GRIDS = {
    "triton": {
        "rows": (16, 32, 64, 128), "deep": (32, 64, 128), "wide": (32, 64, 128, 256), "warps": (4, 8),
        "stages": (2, 3, 4),
    },
    "mosaic_tpu": {"rows": (64, 128, 256, 512), "deep": (256, 512, 1024), "wide": (128, 256, 512, 1024)},
    "xla": {"piece": (8, 16, 32, 64, 128, 256, 512)},
}  # fmt: skip
CHECKED = 64  # rows
_DTYPES = ("float32", "bfloat16", "float16")


def _operands(known: Facts) -> tuple[Any, ...]:
    rows, groups, depth, width = (known[n] for n in ("R", "E", "K", "N"))
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, depth), jnp.float32)
    shape = (rows, width) if "transposed" not in known else (groups, depth, width)
    shape = (groups, width, depth) if known.get("transposed") else shape
    second = jax.random.normal(keys[1], shape, jnp.float32) * (1.0 if len(shape) == 2 else depth**-0.5)
    chosen = jax.random.categorical(keys[2], jnp.linspace(0.0, 1.0, groups), shape=(rows,))
    sizes = jnp.bincount(chosen, length=groups).astype(jnp.int32)
    return x.astype(known["dtype"]), second.astype(known["dtype"]), sizes


def _types(known: Facts, direction: str) -> Call:
    x, second, sizes = jax.eval_shape(lambda: _operands(known))
    return Call(direction, x, second, sizes, sizes, known.get("transposed", False))


def _pull(known: Facts, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """What computes the gradient of one operand alone: sums those of the matrices, rows transposed those of rows."""
    x, second, sizes = operands
    groups, depth, width = (known[n] for n in ("E", "K", "N"))
    if "transposed" not in known:
        w = jnp.zeros((groups, depth, width), x.dtype)
        return jax.vjp(lambda w: grouped_matmul(x, w, sizes), w)[1], second
    of = jnp.zeros((known["R"], width), x.dtype)
    return jax.vjp(lambda of: grouped_matmul(of, second, sizes), of)[1], x


def _sample(known: Facts) -> jax.Array:
    return jnp.linspace(0, known["R"] - 1, min(known["R"], CHECKED)).astype(jnp.int32)


def _facts_of(direction: str) -> Any:
    def facts(x: Any, second: Any, sizes: Any, *, transposed: bool = False) -> Facts | None:
        found = {"R": x.shape[0], "E": sizes.shape[0], "K": x.shape[1], "N": second.shape[1 if transposed else -1]}
        made = {**found, "dtype": x.dtype.name}
        return made if direction == "sums" else {**made, "transposed": transposed}

    return facts


def _tunable(direction: str) -> Tunable:
    name = f"grouped_matmul_{direction}"

    def complete(given: dict[str, Any]) -> dict[str, Any]:
        optional = {"dtype": "float32"} | ({} if direction == "sums" else {"transposed": False})
        made = completed(name, given, ("R", "E", "K", "N"), optional)
        if made["dtype"] not in _DTYPES:
            raise ValueError(f"{name}: dtype is {made['dtype']!r}; choose of {', '.join(_DTYPES)}.")
        return made

    def prepare(known: Facts, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        return _pull(known, operands) if direction == "sums" or known["transposed"] else operands

    def run(known: Facts) -> Any:
        if direction == "sums" or known["transposed"]:
            return lambda pull, cotangent: pull(cotangent)[0]
        return grouped_matmul

    def oracle(known: Facts, operands: tuple[Any, ...]) -> Any:
        x, second, sizes = operands
        x, second = x.astype(jnp.float32), second.astype(jnp.float32)
        if direction == "sums":
            own = (jnp.arange(known["R"]) >= jnp.sum(sizes[:-1])) & (jnp.arange(known["R"]) < jnp.sum(sizes))
            return jnp.matmul(jnp.where(own[:, None], x, 0.0).T, second, precision="highest")
        sample = _sample(known)
        group = jnp.searchsorted(jnp.cumsum(sizes), sample, side="right")
        counts = jnp.bincount(group, length=known["E"])
        matrices = jnp.swapaxes(second, 1, 2) if known["transposed"] else second
        return grouped_matmul_oracle(x[sample], matrices, counts)

    def refusal(target: Target, implementation: str, known: Facts) -> str:
        return GROUPED_MATMUL.named(implementation).refusal(target, _types(known, direction))

    def constraint(target: Target, known: Facts, given: Values) -> str:
        if given["implementation"] == "xla" and target.platform in xla.NATIVE:
            return "XLA's own ragged product is taken there, which has no pieces"
        if given["implementation"] != "triton":
            return ""
        # float32 sums of a tile, in registers: 255 a thread, of which operands need some
        tile = given["wide"] * (given["deep"] if direction == "sums" else given["rows"])
        each = tile / (32 * given["warps"])
        return f"{each:.0f} sums a thread, above 128" if each > 128 else ""

    def resolved(target: Target, known: Facts, given: Values) -> Any:
        call, chosen = _types(known, direction), given.get("implementation")
        if chosen == "xla":
            return chosen, xla.piece_of(call, given)
        module = triton if chosen == "triton" else tpu
        return chosen, module.fitting_blocks(call, given) if "rows" in given else module.blocks_of(call)

    def cost(target: Target, known: Facts, given: Values) -> Cost:
        rows, groups, depth, width = (known[n] for n in ("R", "E", "K", "N"))
        size = jnp.dtype(known["dtype"]).itemsize
        if given["implementation"] == "xla":
            piece = xla.piece_of(_types(known, direction), given)
            pieces = rows / piece + groups / 2
            return Cost(2.0 * pieces * piece * depth * width, size * pieces * depth * width, pieces)
        blocks: Any = resolved(target, known, given)[1]
        columns = -(-width // blocks.wide)
        if direction == "sums":
            tiles = groups * -(-depth // blocks.deep) * columns
            steps = tiles * max(1, rows // groups // blocks.rows)
            moved = size * rows * (depth * columns + width * -(-depth // blocks.deep))
            tile = blocks.rows * (blocks.deep + blocks.wide)
        else:
            pieces = rows // blocks.rows + groups
            tiles, moved = pieces * columns, size * (rows * depth * columns + pieces * depth * width)
            steps, tile = tiles * -(-depth // blocks.deep), blocks.deep * (blocks.rows + blocks.wide)
        sums = 4 * blocks.wide * (blocks.deep if direction == "sums" else blocks.rows)
        held = given.get("stages", 2) * tile * size + (0 if given["implementation"] == "triton" else sums)
        return Cost(2.0 * rows * depth * width, moved, steps, tiles, held)

    return Tunable(
        op=name,
        sources=tuple(f"kernels_pallas.grouped_matmul.{n}" for n in ("xla", "triton", "tpu", "visits", "front")),
        grids={i.name: GRIDS[i.name] for i in GROUPED_MATMUL.implementations},
        sizes=("R", "E", "K", "N"),
        complete=complete,
        facts=_facts_of(direction),
        operands=_operands,
        prepare=prepare,
        run=run,
        oracle=oracle,
        checked=lambda known, result: result[-1] if direction == "sums" else result[_sample(known)],
        refusal=refusal,
        constraint=constraint,
        resolved=resolved,
        cost=cost,
        reduction=lambda known: known["R"] if direction == "sums" else known["K"],
    )


ROWS, SUMS = _tunable("rows"), _tunable("sums")
TUNABLES = (ROWS, SUMS)
