"""Runs a program while a tap sees its equations, inside one jit: nothing goes to the host but what the tap returns.

    observe(program, inputs, tap) -> outputs, {scope: sheet}

A tap turns each leaf equation that it wants into a record, a dict of arrays. The records of one scope are its sheet;
the loops around it are in the sheet's leading axes, outermost first:

    scan        [length], in the order of what is walked over (a reverse scan runs it backwards)
    shard_map   [devices], along all mesh axes that it makes manual
    while       turns (how many there were), last (the sheet of the last one), and where the sheet has `flags`
                [F]: count [F] and first turn [F] (-1: none) of each flag, and `first`, the sheet of the first turn
                with any
    cond        `ran` of a branch not taken is 0, and so is all else

Equations that no tap wants, and all that is within them, run as they stand. The rest keeps its loops, branches, shards
and checkpoints; calls (jit, functions with derivatives of their own) are opened. The condition of a `while` is seen at
the beginning of each turn; that it fails at the end is not.

A `Probe` is a tap that keeps one turn of one equation instead of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from jax.sharding import PartitionSpec

from trustcore import _jax
from trustcore.graph.program import LOOPS, Node, Program, Scope
from trustcore.graph.walk import bind, run

Record = dict[str, Any]
Sheet = dict[str, Any]
Sheets = dict[int, Sheet]


class Tap(Protocol):
    """What is done at equations."""

    def wants(self, node: Node) -> bool:
        """Returns whether `see` is to be called for a leaf equation; not traced."""
        ...

    def see(self, node: Node, inputs: Sequence[Any], outputs: Sequence[Any]) -> Record:
        """Returns the record of an equation."""
        ...

    def sheet(self, scope: Scope, records: dict[int, Record]) -> Sheet:
        """Returns the sheet of a scope: the records of its equations, by number, as one pytree of arrays."""
        ...

    def keep(self, scope: Scope, turn: jax.Array) -> jax.Array | None:
        """Returns whether this turn of a loop is the one to keep; None to keep every turn."""
        ...


def observe(program: Program, inputs: Sequence[Any], tap: Tap) -> tuple[list[Any], Sheets]:
    """Returns the program's outputs and the sheets of the scopes that hold wanted equations, by their number."""
    return _Observer(program, tap).scope(program.root, list(inputs))


class _Observer:
    def __init__(self, program: Program, tap: Tap):
        self.tap = tap
        self.wanted = {node.number for node in program.nodes if not node.bodies and tap.wants(node)}
        self.around = {
            owner.number
            for node in program.nodes
            if node.number in self.wanted
            for owner in (scope.owner for scope in node.scope.around)
            if owner is not None
        }

    def scope(self, scope: Scope, inputs: Sequence[Any]) -> tuple[list[Any], Sheets]:
        """Runs a scope with a sheet of its own."""
        sheets: Sheets = {}
        outputs = self.line(scope, inputs, sheets)
        return outputs, sheets

    def line(self, scope: Scope, inputs: Sequence[Any], sheets: Sheets) -> list[Any]:
        """Runs the equations of a scope, calls included, and adds the sheets."""
        records: dict[int, Record] = {}
        nodes = iter(scope.nodes)

        def step(_: Any, values: list[Any]) -> Sequence[Any]:
            node = next(nodes)
            if node.number in self.wanted:
                outputs = bind(node.eqn, values)
                records[node.number] = self.tap.see(node, values, outputs)
                return outputs
            if node.number not in self.around:
                return bind(node.eqn, values)
            outputs, found = self.control(node, values)
            sheets.update(found)
            return outputs

        outputs = run(scope.jaxpr, list(inputs), step, _lifted)
        if records:
            sheets[scope.number] = {"ran": jnp.ones((), jnp.uint32), **self.tap.sheet(scope, records)}
        return outputs

    def control(self, node: Node, values: list[Any]) -> tuple[list[Any], Sheets]:
        kind = node.bodies[0].kind
        return {
            "call": self.call,
            "scan": self.scan,
            "test": self.loop,
            "branch": self.cond,
            "shard": self.shard,
        }[kind](node, values)

    def call(self, node: Node, values: list[Any]) -> tuple[list[Any], Sheets]:
        (body,) = node.bodies
        if node.eqn.params.get("differentiated") and node.eqn.params.get("prevent_cse"):
            return self.rebuilt(node, [body], values)
        outputs, sheets = self.scope(body, values)
        for i, sharding in enumerate(node.eqn.params.get("out_shardings", ())):
            if isinstance(sharding, jax.sharding.NamedSharding):
                outputs[i] = jax.lax.with_sharding_constraint(outputs[i], sharding)
        return outputs, sheets

    def rebuilt(self, node: Node, scopes: Sequence[Scope], values: list[Any]) -> tuple[list[Any], Sheets]:
        """Runs an equation with programs that give their sheets as further outputs, all those of every one of them."""
        own = values[1:] if node.bodies[0].kind == "branch" else values
        shapes = [jax.eval_shape(lambda *v, s=scope: self.scope(s, v)[1], *own) for scope in scopes]
        every = {number: sheet for found in shapes for number, sheet in found.items()}
        keys, tree = jax.tree.flatten(every)

        def body(scope: Scope) -> Callable[..., list[Any]]:
            def run_it(*v: Any) -> list[Any]:
                outputs, sheets = self.scope(scope, v)
                full = {number: sheets.get(number) for number in every}
                full = {n: jax.tree.map(_zeros, every[n]) if sheet is None else sheet for n, sheet in full.items()}
                return [*outputs, *map(_matched, jax.tree.leaves(full), keys)]

            return run_it

        if node.bodies[0].kind == "branch" and node.eqn.params.get("branches_platforms") is None:
            found = jax.lax.switch(values[0].astype(jnp.int32), [body(scope) for scope in scopes], *own)
        else:  # what only the equation itself can say: the platforms of its branches, that nothing may be shared
            jaxprs = [_without_consts(jax.make_jaxpr(body(scope))(*own)) for scope in scopes]
            consts = [const for _, consts in jaxprs for const in consts]
            params = _jax.replace_bodies(node.eqn, _with_all_consts(jaxprs))
            at = len(values) - len(own)
            found = list(
                node.eqn.primitive.bind(*values[:at], *consts, *own, **node.eqn.primitive.get_bind_params(params))
            )
        count = len(node.eqn.outvars)
        return found[:count], jax.tree.unflatten(tree, found[count:])

    def cond(self, node: Node, values: list[Any]) -> tuple[list[Any], Sheets]:
        return self.rebuilt(node, node.bodies, values)

    def scan(self, node: Node, values: list[Any]) -> tuple[list[Any], Sheets]:
        (body,) = node.bodies
        params = node.eqn.params
        consts, carries = _jax.scan_counts(params)
        fixed, start, xs = values[:consts], values[consts : consts + carries], values[consts + carries :]

        def turn(carry: Any, x: list[Any]) -> Any:
            state, i, kept = carry
            outputs, sheets = self.scope(body, [*fixed, *state, *x])
            chosen = self.tap.keep(body, i)
            if chosen is not None:
                kept = _chosen(chosen, sheets, kept)
                sheets = {}
            return (outputs[:carries], i + 1, kept), (outputs[carries:], sheets)

        kept = self.nothing(body, values, len(fixed) + len(start))
        options = {"length": params["length"], "reverse": params["reverse"], "unroll": params["unroll"]}
        (state, _, kept), (ys, sheets) = jax.lax.scan(turn, (start, jnp.int32(0), kept), xs, **options)
        return [*state, *ys], {**kept, **sheets}

    def nothing(self, body: Scope, values: list[Any], whole: int) -> Sheets:
        """The empty sheets that a loop which keeps one turn begins with."""
        if self.tap.keep(body, jnp.int32(0)) is None:
            return {}
        shapes = jax.eval_shape(lambda *v: self.scope(body, [*v[:whole], *(x[0] for x in v[whole:])])[1], *values)
        return jax.tree.map(_zeros, shapes)

    def loop(self, node: Node, values: list[Any]) -> tuple[list[Any], Sheets]:
        test, body = node.bodies
        params = node.eqn.params
        in_test, in_body = params["cond_nconsts"], params["body_nconsts"]
        of_test, of_body, start = values[:in_test], values[in_test : in_test + in_body], values[in_test + in_body :]
        sees_test = any(inner.number in self.wanted for scope in [test] for n in scope.nodes for inner in n.within())

        def once(state: Sequence[Any]) -> tuple[list[Any], Sheets]:
            sheets = self.scope(test, [*of_test, *state])[1] if sees_test else {}
            outputs, found = self.scope(body, [*of_body, *state])
            return outputs, {**sheets, **found}

        empty = jax.tree.map(_zeros, jax.eval_shape(lambda *state: once(state)[1], *start))
        keeps_one = self.tap.keep(body, jnp.int32(0)) is not None
        kept = empty if keeps_one else {number: _first_while(sheet) for number, sheet in empty.items()}

        def turn(carry: Any) -> Any:
            state, i, kept = carry
            outputs, sheets = once(state)
            chosen = self.tap.keep(body, i)
            if chosen is not None:
                kept = _chosen(chosen, sheets, kept)
            else:
                kept = {number: _next_while(kept[number], sheet, i) for number, sheet in sheets.items()}
            return outputs, i + 1, kept

        def goes_on(carry: Any) -> Any:
            (going,) = run(test.jaxpr, [*of_test, *carry[0]], bind, _lifted)
            return going

        state, _, kept = jax.lax.while_loop(goes_on, turn, (start, jnp.int32(0), kept))
        return list(state), kept

    def shard(self, node: Node, values: list[Any]) -> tuple[list[Any], Sheets]:
        (body,) = node.bodies
        axes = _jax.manual_axes(node.eqn)

        def on_one(*local: Any) -> tuple[list[Any], Sheets]:
            outputs, sheets = self.scope(body, local)
            return outputs, jax.tree.map(lambda leaf: leaf[None], sheets)

        specs = (list(node.eqn.params["out_specs"]), PartitionSpec(axes))
        outputs, sheets = _jax.shard_mapped(node.eqn, on_one, specs)(*values)
        return outputs, sheets


def _lifted(value: Any) -> Any:
    return value


def _without_consts(closed: ClosedJaxpr) -> tuple[Any, list[Any]]:
    """A jaxpr that takes its constants as its first inputs, and the constants."""
    inner = closed.jaxpr
    return inner.replace(constvars=[], invars=[*inner.constvars, *inner.invars]), list(closed.consts)


def _with_all_consts(jaxprs: list[tuple[Any, list[Any]]]) -> list[ClosedJaxpr]:
    """The programs, each taking the constants of all of them first."""
    if len(jaxprs) == 1:
        return [ClosedJaxpr(jaxprs[0][0], ())]
    kinds = [[jax.ShapeDtypeStruct(jnp.shape(c), jnp.result_type(c)) for c in consts] for _, consts in jaxprs]
    programs = []
    for i, (inner, consts) in enumerate(jaxprs):
        before = sum(len(k) for k in kinds[:i])
        after = sum(len(k) for k in kinds)

        own = slice(before, before + len(consts))

        def run_it(*v: Any, inner: Any = inner, own: slice = own, n: int = after) -> Any:
            return run(ClosedJaxpr(inner, ()), [*v[own], *v[n:]], bind)

        rest = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in inner.invars[len(consts) :]]
        programs.append(jax.make_jaxpr(run_it)(*(k for group in kinds for k in group), *rest))
    return programs


def _zeros(kind: Any) -> jax.Array:
    return _jax.varying_like(jnp.zeros(kind.shape, kind.dtype), _jax.varying(kind))


def _matched(leaf: jax.Array, kind: Any) -> jax.Array:
    return _jax.varying_like(leaf, _jax.varying(kind))


def _chosen(chosen: jax.Array, sheets: Sheets, kept: Sheets) -> Sheets:
    return jax.tree.map(lambda new, old: jnp.where(chosen, new, old), sheets, kept)


def _raised(sheet: Sheet) -> jax.Array | None:
    """Which flags of a sheet are raised; those of a loop within count if they were in any of its turns."""
    if "flags" in sheet:
        return sheet["flags"] > 0
    return sheet["count"] > 0 if "count" in sheet else None


def _first_while(empty: Sheet) -> Sheet:
    state = {"turns": jnp.int32(0), "last": empty}
    raised = _raised(empty)
    if raised is not None:
        none = raised.astype(jnp.int32)
        state |= {"count": none, "first_turn": none - 1, "first": empty}
    return state


def _next_while(kept: Sheet, sheet: Sheet, turn: jax.Array) -> Sheet:
    state = {"turns": turn + 1, "last": sheet}
    raised = _raised(sheet)
    if raised is not None:
        before = jnp.any(kept["count"] > 0)
        new = jnp.logical_and(jnp.any(raised), jnp.logical_not(before))
        state["count"] = kept["count"] + raised.astype(jnp.int32)
        state["first_turn"] = jnp.where(jnp.logical_and(raised, kept["count"] == 0), turn, kept["first_turn"])
        state["first"] = jax.tree.map(lambda a, b: jnp.where(new, a, b), sheet, kept["first"])
    return state


class Probe:
    """A tap that keeps the inputs and outputs of one equation in one turn of the loops around it.

    Args:
        node: the equation.
        turns: of the loops around, outermost first, each in the order in which they run.

    Its sheet has `inputs` and `outputs`, lists of arrays.
    """

    def __init__(self, node: Node, turns: Sequence[int]):
        self.node = node
        self.turns = dict(zip((scope.number for scope in node.scope.loops), turns, strict=True))

    def wants(self, node: Node) -> bool:
        """See `Tap`."""
        return node is self.node

    def see(self, node: Node, inputs: Sequence[Any], outputs: Sequence[Any]) -> Record:
        """See `Tap`."""
        return {"inputs": [_plain(x) for x in inputs], "outputs": [_plain(x) for x in outputs]}

    def sheet(self, scope: Scope, records: dict[int, Record]) -> Sheet:
        """See `Tap`."""
        return records[self.node.number]

    def keep(self, scope: Scope, turn: jax.Array) -> jax.Array:
        """See `Tap`."""
        loop = scope if scope.number in self.turns else scope.owner.bodies[0]  # type: ignore[union-attr]
        return turn == self.turns.get(loop.number, 0)


def _plain(x: Any) -> jax.Array:
    """An array of numbers: the data of a random key."""
    return jax.random.key_data(x) if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key) else jnp.asarray(x)


def index_of(node: Node, turns: Sequence[int]) -> tuple[int, ...]:
    """Returns where the turns of the loops around lie in a stacked sheet: reverse scans count from the end."""
    found = []
    for scope, turn in zip(node.scope.loops, turns, strict=True):
        owner = scope.owner
        backwards = scope.kind == "scan" and owner is not None and owner.eqn.params["reverse"]
        found.append(owner.eqn.params["length"] - 1 - turn if backwards else turn)  # type: ignore[union-attr]
    return tuple(found)


def leading(scope: Scope) -> tuple[Scope, ...]:
    """Returns the scopes around that give a sheet its leading axes or its `while` form, outermost first."""
    return tuple(s for s in scope.around if s.kind in (*LOOPS, "shard"))


def as_numpy(tree: Any) -> Any:
    """Returns a pytree of arrays on the host."""
    return jax.tree.map(np.asarray, tree)
