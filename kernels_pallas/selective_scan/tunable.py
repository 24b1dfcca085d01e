"""What may be tuned of the selective scan: the implementation, channels of a program, warps, and unrolling in XLA.

Outputs and gradients are checked on the last row of the batch and some channels from all over the call. Those of b and
c sum over channels, that of decay over rows: decay's is checked where there is one row, theirs where the channels that
are checked are all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import Target
from kernels_pallas.selective_scan import tpu, triton
from kernels_pallas.selective_scan.facts import facts
from kernels_pallas.selective_scan.front import SELECTIVE_SCAN, Call, selective_scan
from kernels_pallas.selective_scan.oracle import selective_scan_oracle
from kernels_pallas.tuning import Cost, Facts, Tunable, Values, completed

GRIDS = {
    "triton": {"channels": (4, 8, 16, 32, 64, 128, 256), "warps": (1, 2, 4, 8)},
    "mosaic_tpu": {"channels": (128, 256, 512, 1024, 2048)},
    "xla": {"unroll": (1, 2, 4, 8)},
}
CHECKED = 32  # channels
LARGEST = 2**31  # bytes of states that the oracle's gradient may hold
_DTYPES = ("float32", "bfloat16", "float16")
_NAMES = ("x", "dt", "decay", "b", "c", "state")


def _operands(known: Facts) -> tuple[Any, ...]:
    batch, length, inner, size = (known[n] for n in ("B", "T", "I", "S"))
    keys = jax.random.split(jax.random.key(0), 8)

    def normal(i: int, *shape: int) -> jax.Array:
        return jax.random.normal(keys[i], shape, jnp.float32)

    tokens, states = (batch, length, inner), (batch, inner, size)
    made = {"x": normal(0, *tokens), "dt": jax.nn.softplus(normal(1, *tokens) - 2.0)}
    made |= {n: normal(i, batch, length, size) for i, n in ((3, "b"), (4, "c"))}
    made = {n: z.astype(known["dtype"]) for n, z in made.items()}
    made |= {"decay": -jnp.exp(normal(2, inner, size)), "state": normal(5, *states)}
    cotangents = normal(6, *tokens).astype(known["dtype"]), normal(7, *states)
    return {n: made[n] for n in _NAMES}, cotangents


def _call(known: Facts, direction: str) -> Call:
    arrays, (of_y, of_last) = jax.eval_shape(lambda: _operands(known))
    if direction == "forward":
        return Call(arrays, known["chunk"], known["keep"])
    chunks = -(-known["T"] // known["chunk"])
    states = jax.ShapeDtypeStruct((known["B"], chunks, known["S"], known["I"]), jnp.float32)
    return Call({**arrays, "states": states, "of_y": of_y, "of_last": of_last}, known["chunk"])


def _sample(known: Facts) -> jax.Array:
    return jnp.linspace(0, known["I"] - 1, min(known["I"], CHECKED)).astype(jnp.int32)


def _part(known: Facts, name: str, z: jax.Array) -> jax.Array:
    """Of an operand or a result, the part that is checked."""
    if name in ("x", "dt", "y", "of_y"):
        return z[-1:, :, _sample(known)]
    if name == "decay":
        return z[_sample(known)]
    return z[-1:, _sample(known)] if name in ("state", "of_last") else z[-1:]


def _pull(function: Callable[..., Any], arrays: Any) -> Any:
    return jax.vjp(lambda given: function(**given), arrays)


def _tunable(direction: str) -> Tunable:
    name, backward = f"selective_scan_{direction}", direction == "backward"

    def complete(given: dict[str, Any]) -> dict[str, Any]:
        optional: dict[str, Any] = {"chunk": 32, "dtype": "float32"} | ({} if backward else {"keep": False})
        made = completed(name, given, ("B", "T", "I", "S"), optional)
        if made["dtype"] not in _DTYPES:
            raise ValueError(f"{name}: dtype is {made['dtype']!r}; choose of {', '.join(_DTYPES)}.")
        return made

    def from_operands(
        x: Any, dt: Any, decay: Any, b: Any, c: Any, state: Any = None, *, chunk: int = 32, keep: bool = False
    ) -> Facts | None:
        arrays = {"x": x, "dt": dt, "decay": decay, "b": b, "c": c} | ({"of_y": x} if backward else {})
        return facts(Call(arrays, chunk, keep))

    def wanted(known: Facts) -> set[str]:
        more = {"decay"} if known["B"] == 1 else set()
        return {"x", "dt", "state"} | more | ({"b", "c"} if known["I"] <= CHECKED else set())

    def op(known: Facts) -> Callable[..., Any]:
        return lambda **arrays: selective_scan(**arrays, chunk=known["chunk"])

    def prepare(known: Facts, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_pull(op(known), operands[0])[1], operands[1]) if backward else (operands[0],)

    def run(known: Facts) -> Callable[..., Any]:
        if backward:
            return lambda pull, cotangents: pull(cotangents)[0]
        if known["keep"]:  # what the backward pass needs comes along
            return lambda arrays: _pull(op(known), arrays)
        return lambda arrays: op(known)(**arrays)

    def checked(known: Facts, result: Any) -> Any:
        if backward:
            return {n: _part(known, n, z) for n, z in result.items() if n in wanted(known)}
        y, last = result[0] if known["keep"] else result
        return _part(known, "y", y), _part(known, "state", last)

    def oracle(known: Facts, operands: tuple[Any, ...]) -> Any:
        size = 12 * known["T"] * CHECKED * known["S"]
        if backward and size > LARGEST:
            raise ValueError(f"{name}: the oracle of T={known['T']} takes {size / 1e9:.0f} GB; tune a shorter length.")
        arrays, cotangents = operands
        arrays = {n: _part(known, n, z).astype(jnp.float32) for n, z in arrays.items()}
        found, pull = _pull(selective_scan_oracle, arrays)
        if not backward:
            return found
        of_y, of_last = (_part(known, n, z) for n, z in zip(("of_y", "of_last"), cotangents, strict=True))
        (gradients,) = pull((of_y.astype(jnp.float32), of_last))
        return {n: z for n, z in gradients.items() if n in wanted(known)}

    def refusal(target: Target, implementation: str, known: Facts) -> str:
        return SELECTIVE_SCAN.named(implementation).refusal(target, _call(known, direction))

    def constraint(target: Target, known: Facts, given: Values) -> str:
        if given["implementation"] == "xla" and target.platform in ("cuda", "rocm", "tpu"):
            return "the associative scan is taken there, which has no loop over tokens"
        if given["implementation"] != "triton":
            return ""
        numbers = given["channels"] * triton._power(known["S"]) / (32 * given["warps"])
        most = 8 if backward else 64
        if numbers > most:
            return f"{numbers:.0f} numbers of a state a thread, above {most}"
        return "" if numbers >= 1 else f"{32 * given['warps']} threads for fewer numbers"

    def resolved(target: Target, known: Facts, given: Values) -> Any:
        chosen = given.get("implementation")
        if chosen == "xla":
            return chosen, given.get("unroll", 1)
        call, module = _call(known, direction), triton if chosen == "triton" else tpu
        return chosen, module.fitting_blocks(call, given) if "channels" in given else module.blocks_of(call)

    def cost(target: Target, known: Facts, given: Values) -> Cost:
        batch, length, inner, size = (known[n] for n in ("B", "T", "I", "S"))
        moved = batch * length * (3 * inner + 2 * size) * jnp.dtype(known["dtype"]).itemsize
        flops = (25.0 if backward else 7.0) * batch * length * inner * size
        if given["implementation"] == "xla":
            return Cost(flops, moved, length / given.get("unroll", 1))
        blocks: Any = resolved(target, known, given)[1]
        programs = batch * -(-inner // blocks.channels)
        if given["implementation"] == "triton":
            return Cost(flops, moved, length * -(-programs // 132), programs)
        states = known["chunk"] * size * blocks.channels if backward else 0
        held = 4 * (2 * size * inner + 10 * known["chunk"] * blocks.channels + states)
        return Cost(flops, moved, programs * -(-length // known["chunk"]), onchip=held)

    return Tunable(
        op=name,
        sources=tuple(f"kernels_pallas.selective_scan.{n}" for n in ("xla", "triton", "tpu", "facts", "front")),
        grids={i.name: GRIDS[i.name] for i in SELECTIVE_SCAN.implementations},
        sizes=("B", "T", "I", "S", "chunk"),
        complete=complete,
        facts=from_operands,
        operands=_operands,
        prepare=prepare,
        run=run,
        oracle=oracle,
        checked=checked,
        refusal=refusal,
        constraint=constraint,
        resolved=resolved,
        cost=cost,
        reduction=lambda known: max(known["T"], known["S"], known["I"] if backward else 1),
    )


FORWARD, BACKWARD = _tunable("forward"), _tunable("backward")
TUNABLES = (FORWARD, BACKWARD)
