"""One walker over jaxprs: equations in their order, each handed to a function that says what becomes of it.

    jaxpr, values of its inputs -> step(eqn, inputs) -> outputs      for each equation

The values may be arrays, tracers, or anything that `step` understands; `lift` makes one of a literal or a constant.
`step` usually ends in `bind`, which computes the equation as it stands, or in another `run` over the jaxpr that the
equation calls (`called`). `bodies` lists the programs within an equation of any kind: calls, loops, branches, shards.
What has none is a leaf, `pallas_call` among them. `trustcore.graph.program` gives every equation its address.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from trustcore import _jax

Step = Callable[[JaxprEqn, list[Any]], Sequence[Any]]

# Equations that only call another program, and the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "composite": "jaxpr",
}


def run(
    jaxpr: ClosedJaxpr, inputs: Sequence[Any], step: Step, lift: Callable[[Any], Any] = lambda value: value
) -> list:
    """Returns the outputs of `jaxpr`, computed equation by equation.

    Args:
        jaxpr: the program.
        inputs: a value for each of its inputs.
        step: takes an equation and the values of its inputs, gives those of its outputs.
        lift: makes a value of a constant.
    """
    env = dict(zip(jaxpr.jaxpr.constvars, map(lift, jaxpr.consts), strict=True))
    env.update(zip(jaxpr.jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return lift(atom.val) if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.jaxpr.eqns:
        env.update(zip(eqn.outvars, step(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in jaxpr.jaxpr.outvars]


def aval(atom: Any) -> Any:
    """Returns shape and dtype of a variable or literal."""
    return atom.aval


def bind(eqn: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Returns the outputs of one equation, computed as it stands."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*inputs, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def called(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """Returns the program that an equation calls once, with its own inputs and outputs; None where it does not.

    True of jit, checkpoint and functions with a derivative of their own. Not of loops and branches.
    """
    name = _CALLS.get(eqn.primitive.name)
    if name is None:
        return None
    jaxpr = eqn.params[name]
    return jaxpr if hasattr(jaxpr, "consts") else ClosedJaxpr(jaxpr, ())


def bodies(eqn: JaxprEqn) -> tuple[tuple[str, ClosedJaxpr], ...]:
    """Returns the programs within an equation, each with what it is there; empty for a leaf.

    The kinds are "call" (runs once), "scan", "test" and "while" (the condition and the body of a `while`), "branch"
    (of a `cond`, in the order of its index) and "shard" (what `shard_map` runs on each device).
    """
    body = called(eqn)
    if body is not None:
        return (("call", body),)
    params = eqn.params
    if eqn.primitive.name == "scan":
        return (("scan", params["jaxpr"]),)
    if eqn.primitive.name == "while":
        return (("test", params["cond_jaxpr"]), ("while", params["body_jaxpr"]))
    if eqn.primitive.name == "cond":
        return tuple(("branch", branch) for branch in params["branches"])
    if eqn.primitive.name == "shard_map":
        return (("shard", ClosedJaxpr(params["jaxpr"], ())),)
    return ()


def inline(jaxpr: ClosedJaxpr, marked: Sequence[bool]) -> ClosedJaxpr:
    """Returns the same program in one straight line: no call is left, nor a scan that takes something marked.

    Args:
        jaxpr: the program.
        marked: for each of its inputs whether a scan over it is written out, turn by turn. What is computed of marked
            inputs alone is marked too.

    A scan of L turns becomes L copies of its body. The result has no derivative rules of its own.
    """

    def step(eqn: JaxprEqn, inputs: list[tuple[Any, bool]]) -> list[tuple[Any, bool]]:
        values = [value for value, _ in inputs]
        body = called(eqn)
        if body is not None:
            return run(body, inputs, step, lift)
        if eqn.primitive.name == "scan" and any(mark for _, mark in inputs):
            return _unrolled(eqn, inputs, step, lift)
        mark = bool(inputs) and any(mark for _, mark in inputs) and all(m or _is_constant(v) for v, m in inputs)
        return [(value, mark) for value in bind(eqn, values)]

    def lift(value: Any) -> tuple[Any, bool]:
        return value, False

    def straight(*values: Any) -> list[Any]:
        return [value for value, _ in run(jaxpr, list(zip(values, marked, strict=True)), step, lift)]

    avals = [jax.ShapeDtypeStruct(aval(var).shape, aval(var).dtype) for var in jaxpr.jaxpr.invars]
    return jax.make_jaxpr(straight)(*avals)


def _is_constant(value: Any) -> bool:
    return not isinstance(value, Tracer)


def _unrolled(eqn: JaxprEqn, inputs: list[tuple[Any, bool]], step: Step, lift: Callable[[Any], Any]) -> list[Any]:
    consts, carries = _jax.scan_counts(eqn.params)
    length, body = eqn.params["length"], eqn.params["jaxpr"]
    fixed, carry, xs = inputs[:consts], inputs[consts : consts + carries], inputs[consts + carries :]
    turns = range(length - 1, -1, -1) if eqn.params["reverse"] else range(length)
    stacked: dict[int, list[Any]] = {}
    for i in turns:
        here = [(jax.lax.index_in_dim(x, i, keepdims=False), mark) for x, mark in xs]
        outputs = run(body, [*fixed, *carry, *here], step, lift)
        carry, stacked[i] = outputs[:carries], [value for value, _ in outputs[carries:]]
    columns = [[stacked[i][j] for i in range(length)] for j in range(len(eqn.outvars) - carries)]
    ys = [
        jnp.stack(column) if length else jnp.zeros(aval(var).shape, aval(var).dtype)
        for column, var in zip(columns, eqn.outvars[carries:], strict=True)
    ]
    return [*carry, *((y, False) for y in ys)]
