"""Runs a program equation by equation outside of jit: with times, or under a session in the terminal.

    session = Session(fn, *args)        step(fn)(*args) makes and runs one
    (tc) n                              commands: see `Session`

Loops and branches are run by Python here, shard_map and Pallas kernels as a whole. Every value of the scopes that are
being run is held. The results are those of the operations one by one; XLA, which fuses them, may differ in
the last bits.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore import _jax
from trustcore.debug.report import Operation, operation
from trustcore.debug.snapshot import Snapshot
from trustcore.debug.statistics import of
from trustcore.debug.tap import is_array, is_float
from trustcore.debug.watch import Watch
from trustcore.graph import Node, Program, Scope, aval, bind, run, trace
from trustcore.graph.modules import split_arguments
from trustcore.graph.observe import index_of
from trustcore.graph.program import described

Before = Callable[[Node, list[Any], tuple[int, ...]], None]
After = Callable[[Node, list[Any], list[Any], tuple[int, ...], float], None]


def evaluate(program: Program, leaves: Sequence[Any], before: Before, after: After) -> list[Any]:
    """Returns the program's outputs, computed equation by equation.

    Args:
        program: of the function.
        leaves: its inputs.
        before: called with each leaf equation, its inputs and the turns of the loops around, before it runs.
        after: called with the same, its outputs and the seconds it took; the time includes compiling on first use.
    """
    return _Runner(before, after).scope(program.root, [jnp.asarray(leaf) for leaf in leaves], ())


class _Runner:
    def __init__(self, before: Before, after: After):
        self.before, self.after = before, after

    def scope(self, scope: Scope, inputs: Sequence[Any], turns: tuple[int, ...]) -> list[Any]:
        nodes = iter(scope.nodes)

        def step(_: Any, values: list[Any]) -> Sequence[Any]:
            node = next(nodes)
            if node.bodies and node.bodies[0].kind != "shard":
                return self.control(node, values, turns)
            self.before(node, values, turns)
            began = time.perf_counter()
            outputs = bind(node.eqn, values)
            jax.block_until_ready([x for x in outputs if isinstance(x, jax.Array)])
            self.after(node, values, outputs, turns, time.perf_counter() - began)
            return outputs

        return run(scope.jaxpr, list(inputs), step)

    def control(self, node: Node, values: list[Any], turns: tuple[int, ...]) -> list[Any]:
        kind, params = node.bodies[0].kind, node.eqn.params
        if kind == "call":
            return self.scope(node.bodies[0], values, turns)
        if kind == "branch":
            index = int(np.clip(int(values[0]), 0, len(node.bodies) - 1))
            return self.scope(node.bodies[index], values[1:], turns)
        if kind == "scan":
            consts, carries = _jax.scan_counts(params)
            fixed, state, xs = values[:consts], values[consts : consts + carries], values[consts + carries :]
            rows: list[Any] = [None] * params["length"]
            for turn in range(params["length"]):
                at = params["length"] - 1 - turn if params["reverse"] else turn
                outputs = self.scope(node.bodies[0], [*fixed, *state, *(x[at] for x in xs)], (*turns, turn))
                state, rows[at] = outputs[:carries], outputs[carries:]
            kinds = [aval(var) for var in node.eqn.outvars[carries:]]
            if not rows:
                return [*state, *(jnp.zeros(kind.shape, kind.dtype) for kind in kinds)]
            return [*state, *(jnp.stack([row[i] for row in rows]) for i in range(len(kinds)))]
        test, body = node.bodies
        in_test, in_body = params["cond_nconsts"], params["body_nconsts"]
        of_test, of_body, state = values[:in_test], values[in_test : in_test + in_body], values[in_test + in_body :]
        turn = 0
        while bool(self.scope(test, [*of_test, *state], (*turns, turn))[0]):
            state = self.scope(body, [*of_body, *state], (*turns, turn))
            turn += 1
        return state


@dataclasses.dataclass
class Times:
    """What a timed run told.

    Attributes:
        history: the first operations, with their seconds.
        by_node: seconds of each equation, all its turns together, by its number.
        slow: for each condition on time, how often it held, and the equation and turns where first.
    """

    history: list[Operation]
    by_node: dict[int, float]
    slow: dict[int, tuple[int, Node, tuple[int, ...]]]


def timed(program: Program, leaves: Sequence[Any], limit: int, watches: Sequence[Watch] = ()) -> Times:
    """Returns the first `limit` operations with their seconds, and which of the watches on time were hit.

    The program runs twice, and the second run is timed: the first compiles every operation.
    """
    times = Times([], {}, {})
    limits = [(i, w.pattern, w.condition.seconds) for i, w in enumerate(watches) if w.condition is not None]

    def after(node: Node, _: Any, __: Any, turns: tuple[int, ...], seconds: float) -> None:
        if len(times.history) < limit:
            times.history.append(operation(node, index_of(node, turns), seconds))
        times.by_node[node.number] = times.by_node.get(node.number, 0.0) + seconds
        for i, pattern, most in limits:
            if most is not None and seconds >= most and node.address.matches(pattern):
                count, first, its = times.slow.get(i, (0, node, turns))
                times.slow[i] = count + 1, first, its

    evaluate(program, leaves, _nothing, _nothing)
    evaluate(program, leaves, _nothing, after)
    return times


def _nothing(*_: Any) -> None:
    return None


def replayed(program: Program, leaves: Sequence[Any], pattern: str, limit: int) -> list[Snapshot]:
    """Returns the first `limit` operations that fit a glob, each with what went in and came out."""
    found: list[Snapshot] = []

    def after(node: Node, inputs: list[Any], outputs: list[Any], turns: tuple[int, ...], _: float) -> None:
        if len(found) < limit and node.address.matches(pattern):
            found.append(_snapshot(node, inputs, outputs, turns))

    evaluate(program, leaves, _nothing, after)
    return found


class Quit(Exception):
    """The session was ended before the function was done."""


class Session:
    """A function that runs equation by equation and asks before each what to do.

        s, step            run this equation, stop at the next one
        n, next            run on to the next equation of this scope or one around it
        u, up              run on until the scope is left (a turn of a loop counts as one)
        c, continue        run on to the next breakpoint, or to the end
        b, break PATTERN   stop at equations that fit a glob; `b` lists them
        bad                run on to the first output with NaN or Inf
        p, print NAME      print a value: in0, in1, ..., out0, ... (of the equation before); without a name, all short
        w, where           the equation and its line
        l, list            the last ten equations that ran
        q, quit            end; `Quit` is raised

    Args:
        fn: a function, pure but for what it changes of nnx variables among its arguments.
        *args: its arguments.
        commands: lines to take instead of asking; it runs on when they end.
        write: where lines go.
        **kwargs: more arguments.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *args: Any,
        commands: Iterable[str] | None = None,
        write: Callable[[str], Any] = print,
        **kwargs: Any,
    ):
        self.given = args, kwargs
        self.leaves, _, _ = split_arguments(args, kwargs)
        self.traced = trace(fn, args, kwargs)
        self.commands = None if commands is None else iter(commands)
        self.write = write
        self.breakpoints: list[str] = []
        self.mode, self.depth, self.was = "step", 0, ()
        self.recent: list[str] = []
        self.last: Snapshot | None = None

    def run(self) -> Any:
        """Returns what the function returns.

        Raises:
            Quit: on the command `quit`.
        """
        outputs = evaluate(self.traced.program, self.leaves, self.before, self.after)
        return self.traced.finish(outputs, *self.given)

    def before(self, node: Node, inputs: list[Any], turns: tuple[int, ...]) -> None:
        """Stops before an equation if that is asked for."""
        if self.stops(node, turns):
            self.write(f"> {described(node.address, index_of(node, turns))}")
            while not self.obey(self.ask(), node, inputs, turns):
                pass

    def after(self, node: Node, inputs: list[Any], outputs: list[Any], turns: tuple[int, ...], _: float) -> None:
        """Notes what an equation gave."""
        self.recent = [*self.recent[-9:], described(node.address, index_of(node, turns))]
        self.last = _snapshot(node, inputs, outputs, turns)
        if self.mode == "bad" and self.last.first_bad() is not None:
            self.write(str(self.last))
            self.mode = "step"

    def stops(self, node: Node, turns: tuple[int, ...]) -> bool:
        """Returns whether to stop before an equation."""
        if any(node.address.matches(pattern) for pattern in self.breakpoints):
            return True
        depth = len(node.scope.around)
        if self.mode == "step":
            return True
        if self.mode == "next":
            return depth <= self.depth
        return self.mode == "up" and (depth < self.depth or turns != self.was)

    def ask(self) -> str:
        """Returns the next command."""
        if self.commands is None:
            try:
                return input("(tc) ")
            except EOFError:
                return "quit"
        return next(self.commands, "continue")

    def obey(self, line: str, node: Node, inputs: list[Any], turns: tuple[int, ...]) -> bool:
        """Obeys a command; returns whether the program goes on."""
        command, _, rest = line.strip().partition(" ")
        modes = {"s": "step", "n": "next", "u": "up", "c": "continue", "step": "step", "next": "next", "": "step"}
        modes |= {"up": "up", "continue": "continue", "bad": "bad"}
        if command in modes:
            self.mode, self.depth, self.was = modes[command], len(node.scope.around), turns
            return True
        if command in ("q", "quit"):
            raise Quit(described(node.address, index_of(node, turns)))
        if command in ("b", "break"):
            if rest:
                self.breakpoints.append(rest.strip())
            for pattern in self.breakpoints:
                self.write(f"breakpoint: {pattern}")
        elif command in ("w", "where"):
            self.write(described(node.address, index_of(node, turns)))
            self.write(str(node.eqn))
        elif command in ("l", "list"):
            for text in self.recent:
                self.write(text)
        elif command in ("p", "print"):
            self.show(rest.strip(), inputs)
        else:
            self.write(f"{command!r} is no command; there are s n u c b bad p w l q")
        return False

    def show(self, name: str, inputs: list[Any]) -> None:
        """Writes values of the equation that is to run, and outputs of the one before."""
        outputs = self.last.outputs if self.last else ()
        values = {f"in{i}": x for i, x in enumerate(inputs)} | {f"out{i}": x for i, x in enumerate(outputs)}
        if name:
            self.write(str(values[name]) if name in values else f"there are {', '.join(values)}")
            return
        for key, x in values.items():
            self.write(f"{key}: {of(x).short if is_float(jnp.asarray(x)) else str(x)}")


def step(
    fn: Callable[..., Any], *, commands: Iterable[str] | None = None, write: Callable[[str], Any] = print
) -> Callable[..., Any]:
    """Returns a function that runs `fn` equation by equation under a `Session` in the terminal."""

    def stepped(*args: Any, **kwargs: Any) -> Any:
        return Session(fn, *args, commands=commands, write=write, **kwargs).run()

    return stepped


def _snapshot(node: Node, inputs: list[Any], outputs: list[Any], turns: tuple[int, ...]) -> Snapshot:
    return Snapshot(node, index_of(node, turns), (), tuple(map(_host, inputs)), tuple(map(_host, outputs)))


def _host(x: Any) -> Any:
    return np.asarray(x) if is_array(getattr(x, "aval", None) or np.asarray(x)) else np.asarray(jax.random.key_data(x))


__all__ = ["Quit", "Session", "Times", "evaluate", "replayed", "step", "timed"]
