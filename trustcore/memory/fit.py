"""`fit`: the cheapest way to take a gradient within a budget of memory, compiled and not guessed.

What can be given up for memory, in the order of what it costs:

    microbatches    rows of the batch one group after the other, gradients added: no further FLOPs, smaller products
    remat           what a block computed is computed again in the backward pass: all but its products, or all of it
    offload         its products go to the host's memory meanwhile, where the device has another one

With each of them the optimizer's state, and then the parameters as well, may lie in the host's memory from step to
step, which costs no FLOPs and the way there and back.

Blocks are what the function calls more than once (`jax.jit` within it) or scans over. Nothing in the function changes:
its jaxpr is run with `jax.checkpoint` around those calls. Chen et al., arXiv 1604.06174.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from trustcore import _jax, units
from trustcore.errors import ProgramError
from trustcore.graph.walk import bind, called, run
from trustcore.memory.account import host_bytes, peak_of
from trustcore.memory.offload import activation_policy, has_host_memory, memory_kinds, put
from trustcore.memory.offload import offload as to_host

REMAT = ("none", "products saved", "products offloaded", "nothing saved")
OFFLOADS = ("activations", "optimizer", "parameters")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A way to take the gradient, and what it takes.

    Attributes:
        remat: one of `REMAT`.
        microbatches: into how many groups of rows the batch is split.
        peak: bytes, arguments and gradients included; as `account` tells it.
        flops: of a step, as XLA counts them; 0 where it does not.
        host: bytes of the host's memory.
        offloaded: what lies there from step to step: the state of the "optimizer", the "parameters".
    """

    remat: str
    microbatches: int
    peak: int
    flops: float
    host: int = 0
    offloaded: tuple[str, ...] = ()

    def __str__(self) -> str:
        host = f" and {units.size(self.host)} of the host's" if self.host else ""
        rows = f"{self.microbatches} microbatches" if self.microbatches > 1 else "the whole batch"
        kept = f", {' and '.join(self.offloaded)} with the host" if self.offloaded else ""
        return f"{rows}, remat: {self.remat}{kept}: {units.size(self.peak)}{host}, {units.count(self.flops)}FLOP"


@dataclasses.dataclass(frozen=True)
class Fit:
    """What `fit` found.

    Attributes:
        step: `step(*args) -> (value, gradient)`, jitted: what `jax.value_and_grad(fn)` gives. With an optimizer
            `step(*args, state) -> (value, parameters, state)`. What the plan offloads is put into the host's memory, if
            it is not there yet, and its results lie there.
        plan: how it does so.
        plain: of the same without any of it.
        tried: all plans that were compiled, in order.
    """

    step: Callable[..., Any]
    plan: Plan
    plain: Plan
    tried: tuple[Plan, ...]

    def __str__(self) -> str:
        more = f"{self.plan.flops / self.plain.flops:.2f} times the FLOPs" if self.plain.flops else "FLOPs unknown"
        return f"{self.plan}\n{more} and {self.plan.peak / self.plain.peak:.2f} times the memory of the plain step"


def fit(
    fn: Callable[..., Any],
    budget: int,
    *args: Any,
    batch: Sequence[int] = (),
    argnums: int = 0,
    donate: bool = False,
    offload: bool | Sequence[str] | None = None,
    optimizer: Any = None,
) -> Fit:
    """Returns the gradient of `fn`, or a step down it, within `budget` bytes, at the least cost in FLOPs found.

    Args:
        fn: to a scalar; for microbatches, a mean over rows of the batch, each of which counts the same.
        budget: bytes of device memory for arguments, gradients and all between.
        args: of it, or their shapes; integer leaves of the differentiated argument get no gradient but `float0`.
        batch: numbers of the arguments whose arrays have the batch as their first axis; none: it is not split.
        argnums: of the argument with respect to which to differentiate: the parameters.
        donate: whether that argument's memory may be taken for the gradient, and with an optimizer its state's, too.
        offload: what may go to the host's memory, of `OFFLOADS`; True: all; None: all where the device has one beside
            its own. On CPUs both are one, and nothing is saved by it.
        optimizer: of optax, over parameters of floats; its state counts then, and the step updates both.

    Raises:
        ProgramError: no plan fits; the message tells the smallest.

    Each plan is compiled, so that this takes as long as compiling the step a few times; nothing is run.
    """
    if budget <= 0:
        raise ProgramError(f"fit: the budget is {budget} bytes; it must be positive.")
    splits = microbatches(args, batch)
    allowed = _allowed(offload, args)
    state = () if optimizer is None else (_state(optimizer, args[argnums]),)
    kept = {"parameters": argnums, "optimizer": len(args)}
    sizes = {"parameters": _nbytes(args[argnums]), "optimizer": _nbytes(state)}
    hosted = [name for name in ("optimizer", "parameters") if name in allowed and sizes[name]]
    tried: dict[tuple[str, int, tuple[str, ...]], tuple[Plan, Any]] = {}

    def plan(remat: str, split: int, there: tuple[str, ...] = ()) -> Plan:
        if (remat, split, there) not in tried:
            step = step_of(fn, remat, split, tuple(batch), argnums)
            step = step if optimizer is None else _updated(step, optimizer, argnums)
            numbers = tuple(kept[name] for name in there)
            donated = (argnums, *(len(args) for _ in state)) if donate else ()
            jitted = jax.jit(_hosted(step, numbers, argnums, bool(state)), donate_argnums=donated)
            given = [_there(arg) if i in numbers else arg for i, arg in enumerate((*args, *state))]
            compiled = jitted.lower(*given).compile()
            cost = compiled.cost_analysis() or {}
            flops = float(cost.get("flops", 0.0)) * split  # XLA counts the body of a loop once
            host = host_bytes(compiled.memory_analysis())
            found = Plan(remat, split, peak_of(compiled), max(flops, 0.0), host, there)
            tried[remat, split, there] = found, _from_host(jitted, numbers) if there else jitted
        return tried[remat, split, there][0]

    plain = plan("none", 1)
    for remat in REMAT:
        if remat == "products offloaded" and "activations" not in allowed:
            continue
        for there in [tuple(hosted[:n]) for n in range(len(hosted) + 1)]:
            if there and plan(remat, splits[-1]).peak - sum(sizes[name] for name in there) > budget:
                continue
            whole = plan(remat, 1, there).peak <= budget
            if not whole and plan(remat, splits[-1], there).peak > budget:
                continue
            low, high = 0, 0 if whole else len(splits) - 1  # the fewest microbatches that fit, by bisection
            while low < high:
                middle = (low + high) // 2
                if plan(remat, splits[middle], there).peak <= budget:
                    high = middle
                else:
                    low = middle + 1
            best, step = tried[remat, splits[low], there]
            return Fit(step, best, plain, tuple(found for found, _ in tried.values()))
    least = min((found for found, _ in tried.values()), key=lambda found: found.peak)
    held = "" if len(splits) > 1 else " Name the arguments that hold the batch (batch=), so that it can be split."
    raise ProgramError(f"fit: nothing fits {units.size(budget)}; the least found is {least}.{held}")


def remat_blocks(fn: Callable[..., Any], *, policy: Any = None) -> Callable[..., Any]:
    """Returns `fn` with `jax.checkpoint` around what it calls more than once, and around the bodies of its scans.

    Args:
        fn: of arrays in pytrees.
        policy: what the checkpoint keeps, as `jax.checkpoint` takes it; None: nothing.

    The same function and gradient, computed in less memory and more FLOPs.
    """

    @functools.wraps(fn)
    def wrapped(*args: Any) -> Any:
        jaxpr, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        names = Counter(_call_name(eqn) for eqn in jaxpr.jaxpr.eqns)

        def step(eqn: Any, inputs: list[Any]) -> Sequence[Any]:
            body = called(eqn)
            if body is not None and eqn.primitive.name in ("jit", "pjit") and names[_call_name(eqn)] > 1:
                return jax.checkpoint(jaxpr_as_fun(body), policy=policy)(*inputs)
            if eqn.primitive.name == "scan":
                return _checkpointed_scan(eqn, inputs, policy)
            return bind(eqn, inputs)

        outputs = run(jaxpr, jax.tree.leaves(args), step)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return wrapped


def _call_name(eqn: Any) -> tuple[Any, ...]:
    """What makes two calls the same block: name and shapes."""
    if called(eqn) is None:
        return ()
    return (eqn.params.get("name"), *(str(atom.aval) for atom in eqn.outvars))


def _checkpointed_scan(eqn: Any, inputs: Sequence[Any], policy: Any) -> Sequence[Any]:
    consts, carries = _jax.scan_counts(eqn.params)
    body: ClosedJaxpr = eqn.params["jaxpr"]
    fixed, carry, xs = inputs[:consts], inputs[consts : consts + carries], inputs[consts + carries :]

    def turn(carry: Any, x: Any) -> Any:
        outputs = jax.checkpoint(jaxpr_as_fun(body), policy=policy, prevent_cse=False)(*fixed, *carry, *x)
        return list(outputs[:carries]), list(outputs[carries:])

    last, ys = jax.lax.scan(
        turn, list(carry), list(xs), length=eqn.params["length"], reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )  # fmt: skip
    return [*last, *ys]


def microbatches(args: Sequence[Any], batch: Sequence[int]) -> list[int]:
    """Returns the numbers of equal groups into which the batch can be split, 1 first."""
    for i in batch:
        if not 0 <= i < len(args):
            raise ProgramError(f"fit: argument {i} is named as batch; there are {len(args)} arguments.")
    rows = {leaf.shape[0] if leaf.shape else 0 for i in batch for leaf in jax.tree.leaves(args[i])}
    if not rows:
        return [1]
    if len(rows) > 1 or 0 in rows:
        raise ProgramError(f"fit: arrays of the batch have first axes of {sorted(rows)}; they must be of one length.")
    count = rows.pop()
    return [n for n in range(1, count + 1) if count % n == 0]


def step_of(fn: Callable[..., Any], remat: str, split: int, batch: tuple[int, ...], argnums: int) -> Callable[..., Any]:
    """Returns `value_and_grad` of a function, with one of `REMAT`, over a batch that is split."""
    policies = {
        "products saved": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "products offloaded": activation_policy(),
    }
    if remat != "none":
        fn = remat_blocks(fn, policy=policies.get(remat))
    gradient = jax.value_and_grad(fn, argnums, allow_int=True)
    if split == 1:
        return gradient

    def accumulated(*args: Any) -> Any:
        rows = {
            i: jax.tree.map(lambda x: jnp.reshape(x, (split, x.shape[0] // split, *x.shape[1:])), args[i])
            for i in batch
        }

        def turn(total: Any, group: Any) -> Any:
            found = gradient(*(group.get(i, arg) for i, arg in enumerate(args)))
            return jax.tree.map(lambda t, x: t if _no_gradient(x) else t + x / split, total, found), None

        shapes = jax.eval_shape(gradient, *args)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, bool if _no_gradient(s) else s.dtype), shapes)
        total, _ = jax.lax.scan(turn, zeros, rows)
        return jax.tree.map(lambda s, t: _float0(s.shape) if _no_gradient(s) else t, shapes, total)

    return accumulated


def _allowed(offload: bool | Sequence[str] | None, args: Any) -> tuple[str, ...]:
    device = _device_of(args)
    if offload is None:
        offload = has_host_memory(device)
    if isinstance(offload, bool):
        found = OFFLOADS if offload else ()
    else:
        found = (offload,) if isinstance(offload, str) else tuple(offload)
    wrong = [name for name in found if name not in OFFLOADS]
    if wrong:
        raise ProgramError(f"fit: {wrong[0]!r} cannot be offloaded; there are {', '.join(OFFLOADS)}.")
    if found and "pinned_host" not in memory_kinds(device):
        raise ProgramError("fit: this device reaches no memory of kind pinned_host; pass offload=False.")
    return found


def _state(optimizer: Any, parameters: Any) -> Any:
    """The shapes of an optimizer's state, placed as the parameters of the same shape are."""
    given = [leaf for leaf in jax.tree.leaves(parameters) if getattr(leaf, "sharding", None) is not None]
    by_shape = {leaf.shape: leaf.sharding for leaf in reversed(given)}

    def placed(leaf: Any) -> Any:
        own = by_shape.get(leaf.shape)
        if own is None and given:
            own = given[0].sharding
            if isinstance(own, jax.sharding.NamedSharding):
                own = jax.sharding.NamedSharding(own.mesh, jax.sharding.PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own)

    return jax.tree.map(placed, jax.eval_shape(optimizer.init, parameters))


def _updated(gradient: Callable[..., Any], optimizer: Any, argnums: int) -> Callable[..., Any]:
    """A step down the gradient: `(*args, state) -> (value, parameters, state)`."""

    def step(*args: Any) -> Any:
        *given, state = args
        value, slope = gradient(*given)
        change, state = optimizer.update(slope, state, given[argnums])
        moved = jax.tree.map(lambda p, c: (p + c).astype(p.dtype), given[argnums], change)
        return value, moved, state

    return step


def _hosted(step: Callable[..., Any], numbers: tuple[int, ...], argnums: int, updates: bool) -> Callable[..., Any]:
    """The step over arguments that lie in the host's memory, with the results that take their place there."""
    if not numbers:
        return step

    def inside(*args: Any) -> Any:
        given = [put(arg, jax.memory.Space.Device) if i in numbers else arg for i, arg in enumerate(args)]
        value, *found = step(*given)
        places = (argnums, len(args) - 1) if updates else (argnums,)
        kept = [put(x, jax.memory.Space.Host) if i in numbers else x for i, x in zip(places, found, strict=True)]
        return (value, *kept)

    return inside


def _from_host(jitted: Callable[..., Any], numbers: tuple[int, ...]) -> Callable[..., Any]:
    def step(*args: Any) -> Any:
        return jitted(*(to_host(arg) if i in numbers else arg for i, arg in enumerate(args)))

    return step


def _there(tree: Any) -> Any:
    """The shapes of a tree, to lie in the host's memory."""

    def placed(leaf: Any) -> Any:
        own = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own.with_memory_kind("pinned_host"))

    return jax.tree.map(placed, tree)


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _device_of(args: Any) -> Any:
    """The device of the first argument that lies on one, or is to lie there."""
    for leaf in jax.tree.leaves(args):
        sharding = getattr(leaf, "sharding", None)
        if sharding is not None:
            return next(iter(sharding.device_set))
    return None


def _no_gradient(x: Any) -> bool:
    return x.dtype == jax.dtypes.float0


def _float0(shape: tuple[int, ...]) -> Any:
    return np.zeros(shape, jax.dtypes.float0)
