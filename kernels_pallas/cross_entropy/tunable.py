"""What may be tuned of cross-entropy: the columns of a chunk, in each of its three programs.

    forward   losses alone                  one_pass  losses, and what the gradient of hidden follows from
    backward  gradients of hidden and table

Losses and gradients of hidden are checked row by row, on rows from all over the call; the gradient of the table, which
sums over rows, is checked as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.cross_entropy import xla
from kernels_pallas.cross_entropy.front import CROSS_ENTROPY, Call, Spec, cross_entropy
from kernels_pallas.cross_entropy.oracle import cross_entropy_oracle
from kernels_pallas.dispatch import Target
from kernels_pallas.tuning import Cost, Facts, Tunable, Values, completed

GRIDS = {"xla": {"chunk": (256, 512, 1024, 2048, 4096, 8192, 16384)}}
LARGEST = 2**31  # bytes of logits that the oracle may hold
CHECKED = 64  # rows
_DTYPES = ("float32", "bfloat16", "float16")


def _complete(given: dict[str, Any]) -> dict[str, Any]:
    made = completed("cross_entropy", given, ("R", "D", "V"), {"dtype": "float32", "transposed": False})
    if made["dtype"] not in _DTYPES:
        raise ValueError(f"cross_entropy: dtype is {made['dtype']!r}; choose of {', '.join(_DTYPES)}.")
    return made


def _facts(hidden: Any, table: Any, labels: Any, *, transposed: bool = False, **_: Any) -> Facts | None:
    rows = 1
    for n in hidden.shape[:-1]:
        rows *= n
    made = jax.ShapeDtypeStruct((rows, hidden.shape[-1]), hidden.dtype)
    return xla.facts(Call(_spec(table.shape[0 if transposed else 1], transposed), {"hidden": made}))


def _spec(vocabulary: int, transposed: bool) -> Spec:
    return Spec(vocabulary, transposed, 1.0, None, 0.0, 0.0, -100, None)


def _operands(known: Facts) -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    rows, size, vocabulary, dtype = known["R"], known["D"], known["V"], known["dtype"]
    table = jax.random.normal(keys[1], (vocabulary, size), jnp.float32) * size**-0.5
    table = table if known["transposed"] else table.T
    return (
        jax.random.normal(keys[0], (rows, size), jnp.float32).astype(dtype),
        table.astype(dtype),
        jax.random.randint(keys[2], (rows,), 0, vocabulary),
        jax.random.uniform(keys[3], (rows,)),
    )


def _loss(known: Facts, labels: jax.Array, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda hidden, table: function(hidden, table, labels, transposed=known["transposed"])


def _pull(known: Facts, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, table, labels, weights = operands
    return jax.vjp(_loss(known, labels, cross_entropy), hidden, table)[1], weights


def _sample(known: Facts) -> jax.Array:
    rows = known["R"]
    return jnp.arange(rows) if rows <= CHECKED else jnp.linspace(0, rows - 1, CHECKED).astype(jnp.int32)


def _pulled(loss: Callable[..., Any], hidden: jax.Array, table: jax.Array, weights: jax.Array) -> Any:
    """Losses and the gradient of hidden of their weighted sum."""
    losses, pull = jax.vjp(lambda x: loss(x, table), hidden)
    return losses, pull(weights)[0]


def _fits(known: Facts, rows: int) -> None:
    size = rows * known["V"] * 4
    if size > LARGEST:
        raise ValueError(
            f"cross_entropy: the oracle of R={known['R']} and V={known['V']} takes {size / 1e9:.0f} GB; tune fewer "
            "rows, whose values serve more."
        )


def _tunable(direction: str) -> Tunable:
    def run(known: Facts) -> Callable[..., Any]:
        if direction == "backward":
            return lambda pull, weights: pull(weights)

        def one(hidden: Any, table: Any, labels: Any, weights: Any) -> Any:
            loss = _loss(known, labels, cross_entropy)
            return loss(hidden, table) if direction == "forward" else _pulled(loss, hidden, table, weights)

        return one

    def oracle(known: Facts, operands: tuple[Any, ...]) -> Any:
        hidden, table, labels, weights = operands
        hidden, table = hidden.astype(jnp.float32), table.astype(jnp.float32)
        if direction == "backward":
            _fits(known, 3 * known["R"])
            with jax.default_matmul_precision("highest"):
                of_hidden, of_table = jax.vjp(_loss(known, labels, cross_entropy_oracle), hidden, table)[1](weights)
            return of_hidden[_sample(known)], of_table
        sample = _sample(known)
        loss = _loss(known, labels[sample], cross_entropy_oracle)
        with jax.default_matmul_precision("highest"):
            found = _pulled(loss, hidden[sample], table, weights[sample])
        return found[0] if direction == "forward" else found

    def checked(known: Facts, result: Any) -> Any:
        sample = _sample(known)
        if direction == "forward":
            return result[sample]
        return result[0][sample], result[1] if direction == "backward" else result[1][sample]

    def resolved(target: Target, known: Facts, given: Values) -> Any:
        hidden = jax.ShapeDtypeStruct((known["R"], known["D"]), known["dtype"])
        spec = _spec(known["V"], known["transposed"])
        spec = spec if "chunk" not in given else Spec(**{**vars(spec), "chunk": given["chunk"]})
        return xla.chunk_of(Call(spec, {"hidden": hidden}), target.platform)

    def cost(target: Target, known: Facts, given: Values) -> Cost:
        chunk = resolved(target, known, given)
        rows, size, vocabulary = known["R"], known["D"], known["V"]
        products = {"forward": 1, "one_pass": 2, "backward": 3}[direction]
        count = -(-vocabulary // chunk)
        moved = (vocabulary * size + count * rows * size * (products - 1 or 1)) * jnp.dtype(known["dtype"]).itemsize
        return Cost(2.0 * products * count * chunk * rows * size, moved, count, tile=rows * chunk * 4)

    return Tunable(
        op=f"cross_entropy_{direction}",
        sources=("kernels_pallas.cross_entropy.xla", "kernels_pallas.cross_entropy.front"),
        grids={i.name: GRIDS.get(i.name, {}) for i in CROSS_ENTROPY.implementations},
        sizes=("R", "D", "V"),
        complete=_complete,
        facts=_facts,
        operands=_operands,
        prepare=_pull if direction == "backward" else lambda known, operands: operands,
        run=run,
        oracle=oracle,
        checked=checked,
        resolved=resolved,
        cost=cost,
        reduction=lambda known: max(known["V"], known["D"], known["R"]),
    )


FORWARD, ONE_PASS, BACKWARD = (_tunable(direction) for direction in ("forward", "one_pass", "backward"))
TUNABLES = (FORWARD, ONE_PASS, BACKWARD)
