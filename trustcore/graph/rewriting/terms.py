"""A program as a graph whose parts can be taken out and replaced, and run again.

    graph = graph_of(closed_jaxpr);  graph.replace(value, by);  graph.run(inputs) == the program's outputs

Plain calls (jit without shardings) are opened: their equations stand in the graph, so that what is matched may lie on
both sides of a call. A call in which nothing was replaced, and of which nothing but its results is used, is bound as it
stood. Loops, branches, checkpoints, shards and functions with derivatives of their own are nodes with graphs of their
own (`bodies`): nothing is matched across their borders, and where nothing in them was replaced they are bound as they
stood. In the body of a custom derivative the derivative's own rule stays as it is.

Invariants: a node whose results nobody uses is not in the graph, unless it has an effect. Effects keep their order.
Equations keep their name scopes and lines; those of a replacement have the ones of what they replace.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from trustcore import _jax
from trustcore.graph.walk import bind, bodies, called

_PLAIN_CALLS = ("jit", "pjit", "closed_call", "core_call")
_OPENED = ("scan", "while", "cond", "shard_map", "checkpoint", "remat", "remat2", "custom_jvp_call", "custom_vjp_call")


class Value:
    """What an equation, an input or a constant gives.

    Attributes:
        aval: shape and dtype.
        maker: the node that computes it; None for inputs and constants.
        const: a constant's array or number, else None.
        users: the nodes that take it, once for each time.
    """

    __slots__ = ("aval", "const", "maker", "memo", "users")

    def __init__(self, aval: Any, maker: Node | None = None, const: Any = None):
        self.aval, self.maker, self.const = aval, maker, const
        self.users: list[Node] = []
        self.memo: dict[str, Any] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.aval.shape)

    @property
    def dtype(self) -> Any:
        """Its dtype."""
        return self.aval.dtype

    @property
    def name(self) -> str:
        """The operation that gives it, "" for inputs and constants."""
        return self.maker.eqn.primitive.name if self.maker else ""

    @property
    def inputs(self) -> list[Value]:
        """What its maker takes."""
        return self.maker.inputs if self.maker else []

    def __repr__(self) -> str:
        return f"<{self.name or ('constant' if self.const is not None else 'input')} {self.aval}>"


class Call:
    """A plain call that was opened.

    Attributes:
        eqn: the call.
        inputs, outputs: its values.
        around: the calls that it stands in, itself last.
        touched: whether something in it was replaced.
    """

    def __init__(self, eqn: JaxprEqn, inputs: list[Value], around: tuple[Call, ...]):
        self.eqn, self.inputs, self.outputs = eqn, inputs, list[Value]()
        self.around = (*around, self)
        self.touched = False


class Node:
    """One equation.

    Attributes:
        eqn: as jax has it.
        inputs, outputs: values.
        calls: the opened calls around, outermost first.
        written: equations that give its name scopes, outermost first; the last also its line.
        bodies: graphs of the programs within it.
        spliced: whether it came with a replacement.
        order: its place; nodes run in this order where their inputs allow.
    """

    def __init__(self, eqn: JaxprEqn, inputs: list[Value], calls: tuple[Call, ...], written: tuple[JaxprEqn, ...]):
        self.eqn, self.inputs, self.calls, self.written = eqn, inputs, calls, written
        self.outputs = [Value(var.aval, self) for var in eqn.outvars]
        self.bodies: list[Graph] = []
        self.order: tuple[int, ...] = ()
        self.spliced = False

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of its equation."""
        return self.eqn.params

    def __repr__(self) -> str:
        return f"<{self.eqn.primitive.name} -> {', '.join(str(v.aval) for v in self.outputs)}>"


class Graph:
    """A program; see the header of this file.

    Attributes:
        inputs, outputs: values.
        nodes: those that are used, in no particular order.
        around: nodes of other graphs that it stands in, outermost first.
        kind: as `trustcore.graph.bodies` names it, "program" for the whole.
        dead: how many nodes nobody used.
        changed: whether something in it, or within one of its nodes, was replaced.
    """

    def __init__(self, closed: ClosedJaxpr, kind: str = "program", around: tuple[Node, ...] = ()):
        self.kind, self.around, self.changed = kind, around, False
        self.closed = closed
        self.inputs = [Value(var.aval) for var in closed.jaxpr.invars]
        self.nodes: dict[Node, None] = {}
        self.calls: list[Call] = []
        env: dict[Any, Value] = dict(zip(closed.jaxpr.invars, self.inputs, strict=True))
        self._count = 0
        self.outputs = self._line(closed, env, (), ())
        self.pinned = [node for node in self.nodes if node.eqn.effects]
        count = len(self.nodes)
        for node in reversed(list(self.nodes)):
            self._drop_unused(node)
        self.dead = count - len(self.nodes)

    def _line(
        self, closed: ClosedJaxpr, env: dict[Any, Value], calls: tuple[Call, ...], written: tuple[JaxprEqn, ...]
    ) -> list[Value]:
        env.update((v, Value(v.aval, const=c)) for v, c in zip(closed.jaxpr.constvars, closed.consts, strict=True))

        def read(atom: Any) -> Value:
            return Value(atom.aval, const=atom.val) if isinstance(atom, Literal) else env[atom]

        for eqn in closed.jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            if is_plain_call(eqn):
                body = called(eqn)
                assert body is not None
                call = Call(eqn, inputs, calls)
                self.calls.append(call)
                inner = dict(zip(body.jaxpr.invars, inputs, strict=True))
                call.outputs = self._line(body, inner, call.around, (*written, eqn))
                env.update(zip(eqn.outvars, call.outputs, strict=True))
                continue
            node = self.add(eqn, inputs, calls, (*written, eqn))
            self._count += 1
            node.order = (self._count,)
            if eqn.primitive.name in _OPENED:
                node.bodies = [Graph(body, kind, (*self.around, node)) for kind, body in bodies(eqn)]
            env.update(zip(eqn.outvars, node.outputs, strict=True))
        return [read(atom) for atom in closed.jaxpr.outvars]

    def add(self, eqn: JaxprEqn, inputs: list[Value], calls: tuple[Call, ...], written: tuple[JaxprEqn, ...]) -> Node:
        """Adds a node."""
        node = Node(eqn, inputs, calls, written)
        self.nodes[node] = None
        for value in inputs:
            value.users.append(node)
        return node

    def ordered(self) -> list[Node]:
        """Returns the nodes in the order of the program."""
        return sorted(self.nodes, key=lambda node: node.order)

    def within(self) -> Iterator[Graph]:
        """Yields this graph and all those within its nodes."""
        yield self
        for node in self.ordered():
            for body in node.bodies:
                yield from body.within()

    def used(self, value: Value, among: Iterable[Node] = ()) -> bool:
        """Returns whether a value is used by anything but these nodes: another node, or as a result."""
        known = set(among)
        return any(user not in known for user in value.users) or any(value is out for out in self.outputs)

    # ---- replacing ---------------------------------------------------------------------------------------------------

    def splice(self, closed: ClosedJaxpr, operands: Sequence[Value], like: Node) -> list[Value]:
        """Adds the equations of a program that takes `operands`, in the place of `like`; returns its outputs."""
        part = Graph(closed, self.kind, self.around)
        swaps = dict(zip(part.inputs, operands, strict=True))
        for node in part.ordered():
            node.inputs = [swaps.get(value, value) for value in node.inputs]
            node.calls, node.written = like.calls, like.written
            node.order, node.spliced = (*like.order, *node.order), True
            self.nodes[node] = None
            self.pinned += [node] if node.eqn.effects else []
        for value, operand in swaps.items():
            operand.users += value.users
        return [swaps.get(value, value) for value in part.outputs]

    def replace(self, value: Value, by: Value) -> None:
        """Lets everything that uses `value` use `by`; what nobody uses then is gone."""
        if value is by:
            return
        if value.maker is not None:
            for call in value.maker.calls:
                call.touched = True
        for user in value.users:
            user.inputs = [by if each is value else each for each in user.inputs]
        by.users += value.users
        value.users = []
        self.outputs = [by if each is value else each for each in self.outputs]
        for call in self.calls:
            call.inputs = [by if each is value else each for each in call.inputs]
            call.outputs = [by if each is value else each for each in call.outputs]
        self.mark()
        if value.maker is not None:
            self._drop_unused(value.maker)

    def mark(self) -> None:
        """Notes that something in it was replaced, for the graphs around as well."""
        self.changed = True
        for node in self.around:
            for call in node.calls:
                call.touched = True

    def _drop_unused(self, node: Node) -> None:
        waiting = [node]
        while waiting:
            node = waiting.pop()
            if node not in self.nodes or node.eqn.effects or any(self.used(value) for value in node.outputs):
                continue
            del self.nodes[node]
            for value in node.inputs:
                value.users = [user for user in value.users if user is not node]
                if value.maker is not None:
                    waiting.append(value.maker)

    # ---- running -----------------------------------------------------------------------------------------------------

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Returns the outputs of the program as it is now."""
        env = dict(zip(self.inputs, inputs, strict=True))
        return _Run(self, env).outputs()

    def is_changed(self) -> bool:
        """Returns whether anything was replaced, here or within."""
        return self.changed or any(body.is_changed() for node in self.nodes for body in node.bodies)


def graph_of(closed: ClosedJaxpr) -> Graph:
    """Returns a program as a graph."""
    return Graph(closed)


def is_plain_call(eqn: JaxprEqn) -> bool:
    """Returns whether an equation is a call that may be opened: no shardings, donation or options of the compiler."""
    if eqn.primitive.name not in _PLAIN_CALLS:
        return False
    params = eqn.params
    shardings = (*params.get("in_shardings", ()), *params.get("out_shardings", ()))
    return (
        not any(isinstance(s, jax.sharding.Sharding) for s in shardings)
        and not any(params.get("donated_invars", ()))
        and not params.get("compiler_options_kvs")
    )


def evaluate(outputs: Sequence[Value], env: dict[Value, Any]) -> list[Any]:
    """Returns values, computed from those in `env` and constants; every call is opened."""
    run = _Run(None, dict(env))
    return [run.read(value) for value in outputs]


def is_traced(value: Value) -> bool:
    """Returns whether a constant belongs to a trace around, so that its numbers are not known."""
    return isinstance(value.const, Tracer)


class _Run:
    """Computes values, each once: `env` holds what is known."""

    def __init__(self, graph: Graph | None, env: dict[Value, Any]):
        self.graph, self.env = graph, env
        self.whole: set[Call] = set()

    def outputs(self) -> list[Any]:
        assert self.graph is not None
        self.whole = self._untouched(self.graph)
        for node in self.graph.ordered():
            if node.eqn.effects or any(value.users for value in node.outputs) or not node.outputs:
                self.node(node)
        return [self.read(value) for value in self.graph.outputs]

    def read(self, value: Value) -> Any:
        if value.maker is None:
            return value.const if value.const is not None else self.env[value]
        if value not in self.env:
            self.node(value.maker)
        return self.env[value]

    def node(self, node: Node) -> None:
        if node.outputs and node.outputs[0] in self.env:
            return
        whole = next((call for call in node.calls if call in self.whole), None)
        if whole is not None:
            self.whole_call(whole, node)
            return
        values = [self.read(value) for value in node.inputs]
        if node.spliced:  # it was traced without the axes along which operands differ from device to device
            axes = frozenset().union(*map(_jax.varying, values))
            values = [_jax.varying_like(value, axes) for value in values] if axes else values
        with _jax.written_like(node.written):
            found = run_node(node, values)
        self.env.update(zip(node.outputs, found, strict=True))

    def whole_call(self, call: Call, node: Node) -> None:
        if call.outputs and all(out in self.env or out.maker is None for out in call.outputs):
            return
        values = [self.read(value) for value in call.inputs]
        written = (*(outer.eqn for outer in call.around[:-1]), call.eqn)
        with _jax.written_like(written):
            found = bind(call.eqn, values)
        for out, value in zip(call.outputs, found, strict=True):
            self.env.setdefault(out, value)

    def _untouched(self, graph: Graph) -> set[Call]:
        """The calls that can be bound as they stood: untouched, and nothing but their results is used outside."""
        whole = {call for call in graph.calls if not call.touched and not call.eqn.effects}
        for node in graph.nodes:
            for value in node.inputs:
                if value.maker is not None:
                    for call in value.maker.calls:
                        if call not in node.calls and not any(value is out for out in call.outputs):
                            whole.discard(call)
        for value in graph.outputs:
            for call in value.maker.calls if value.maker else ():
                if not any(value is out for out in call.outputs):
                    whole.discard(call)
        return whole


# ---- nodes whose bodies changed --------------------------------------------------------------------------------------


def run_node(node: Node, values: Sequence[Any]) -> list[Any]:
    """Returns the outputs of a node: of its equation as it stands, or with its bodies as they are now."""
    if not any(body.is_changed() for body in node.bodies):
        return bind(node.eqn, values)
    name = node.eqn.primitive.name
    rebuild: Callable[[Node, list[Any]], Any] = {
        "scan": _scan,
        "while": _while,
        "cond": _cond,
        "shard_map": _shard,
    }.get(name, _with_body)
    return list(rebuild(node, list(values)))


def _scan(node: Node, values: list[Any]) -> list[Any]:
    params, (body,) = node.params, node.bodies
    consts, carries = _jax.scan_counts(params)
    fixed, start, xs = values[:consts], values[consts : consts + carries], values[consts + carries :]

    def turn(carry: Any, x: Any) -> Any:
        found = body.run([*fixed, *carry, *x])
        return found[:carries], found[carries:]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    last, stacked = jax.lax.scan(turn, start, xs, **options)
    return [*last, *stacked]


def _while(node: Node, values: list[Any]) -> list[Any]:
    test, body = node.bodies
    in_test, in_body = node.params["cond_nconsts"], node.params["body_nconsts"]
    of_test, of_body, start = values[:in_test], values[in_test : in_test + in_body], values[in_test + in_body :]
    return jax.lax.while_loop(
        lambda state: test.run([*of_test, *state])[0], lambda state: body.run([*of_body, *state]), start
    )


def _cond(node: Node, values: list[Any]) -> list[Any]:
    if node.params.get("branches_platforms") is not None:
        return bind(node.eqn, values)  # which branch runs is chosen by the platform: only the equation can say
    index = jnp.asarray(values[0]).astype(jnp.int32)
    return jax.lax.switch(index, [lambda *given, body=body: body.run(given) for body in node.bodies], *values[1:])


def _shard(node: Node, values: list[Any]) -> list[Any]:
    (body,) = node.bodies
    specs = list(node.params["out_specs"])
    return _jax.shard_mapped(node.eqn, lambda *local: body.run(local), specs)(*values)


def _with_body(node: Node, values: list[Any]) -> list[Any]:
    """Checkpoints, custom derivatives: the equation with another program in it."""
    (body,) = node.bodies
    kinds = [jax.ShapeDtypeStruct(v.shape, v.dtype, weak_type=v.aval.weak_type) for v in body.inputs]
    closed = jax.make_jaxpr(lambda *given: body.run(given))(*kinds)
    params = dict(node.params)
    if "call_jaxpr" in params:
        params["call_jaxpr"] = closed
        if closed.consts:  # its rules know no further inputs
            return bind(node.eqn, values)
    else:
        inner = closed.jaxpr
        params["jaxpr"] = inner.replace(constvars=[], invars=[*inner.constvars, *inner.invars])
        values = [*closed.consts, *values]
    primitive = node.eqn.primitive
    with contextlib.ExitStack() as stack:
        stack.enter_context(node.eqn.ctx.manager)
        found = primitive.bind(*values, **primitive.get_bind_params(params))
    return list(found)
