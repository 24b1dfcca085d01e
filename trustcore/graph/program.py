"""Every equation of a program, however deep, with one stable address.

    ClosedJaxpr -> Program: scopes (the programs within programs), each with its nodes (equations)
    Node        -> Address: name-stack path + primitive + source line, and which of several alike

A path joins the name scopes of the equations around (`jax.named_scope`; for nnx modules those of
`trustcore.graph.modules`) with the loops, branches and shards they run in: `layers/3/attention/exp`, `scan/cond:1/log`.
Calls (jit, checkpoint, custom derivatives) leave no trace in it, nor do the marks of vmap and differentiation; the
latter say the `stage`. An equation without a source line of its own has that of the call it belongs to. The same
program traced again has the same addresses.

A module that jit, checkpoint or another transformation made anew has lost its place in the one that calls it; its scope
is called `~Block:7`, the seventh such call. It gets the path that the arguments share which its equations, or the
call around them, are given: for `args[0].blocks[3].mlp.kernel` and others of `blocks[3]` that is `blocks/3`. Where they
share none, it stays `Block`.

A turn of a loop is named where it is known: `address.at((37,))` is `scan[37]/log`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from trustcore import _jax
from trustcore._jax import Frame
from trustcore.graph.walk import bodies

LOOPS = ("scan", "while", "test")  # kinds of scopes that run several times
_COMPONENTS = {"scan": "scan", "while": "while", "test": "while", "shard": "shard_map"}
ANEW = "~"  # begins the scope of a module that was made anew
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]|\['([^']*)'\]")
# Primitives through which an argument is still told.
_SAME = frozenset({"convert_element_type", "copy", "reshape", "squeeze", "transpose", "pvary", "stop_gradient"})
_MARKS = frozenset({"checkpoint", "rematted_computation", "remat", "remat2"})


@dataclasses.dataclass(frozen=True)
class Address:
    """Where an equation stands in its program and in the source.

    Attributes:
        path: scopes around it, outermost first.
        primitive: the operation.
        frame: the innermost line of the user's code; None where jax knows none.
        library: the innermost line of all, where that is one of an installed library or of trustcore.
        stage: "forward", "backward" (transposed by differentiation), or "recomputed" (by checkpoint).
        ordinal: 0 for the first equation that is alike in all of these, in the program's order.
        loops: which components of the path are loops.
    """

    path: tuple[str, ...]
    primitive: str
    frame: Frame | None
    library: Frame | None
    stage: str
    ordinal: int
    loops: tuple[int, ...]

    @property
    def name(self) -> str:
        """Path, primitive and ordinal, without the source line."""
        return self.at(())

    @property
    def place(self) -> str:
        """`file.py:12`, or "" where the line is unknown."""
        return place(self.frame)

    def at(self, turns: Sequence[int]) -> str:
        """Returns the name with the turns of the loops around, outermost first."""
        parts = list(self.path)
        for i, turn in zip(self.loops, turns, strict=False):
            parts[i] += f"[{turn}]"
        ordinal = f"#{self.ordinal}" if self.ordinal else ""
        return "/".join([*parts, self.primitive + ordinal])

    def matches(self, pattern: str) -> bool:
        """Returns whether a glob fits the name, the primitive alone, `file.py:12`, or any of them with its stage.

        `*` also crosses `/`; `layers/3/*`, `*/exp`, `exp`, `model.py:41`, `backward:*` are examples.
        """
        stage, colon, rest = pattern.partition(":")
        if colon and stage in ("forward", "backward", "recomputed"):
            return self.stage == stage and self.matches(rest)
        lines = [line for frame in (self.frame, self.library) if frame for line in (place(frame), full_place(frame))]
        return any(fnmatchcase(text, pattern) for text in (self.name, self.primitive, *lines))

    def __str__(self) -> str:
        return described(self, ())


def described(address: Address, turns: Sequence[int]) -> str:
    """Returns name, turns, line and stage in one line."""
    notes = [note for note in (address.place, "" if address.stage == "forward" else address.stage) if note]
    return f"{address.at(turns)} ({', '.join(notes)})" if notes else address.at(turns)


def place(frame: Frame | None) -> str:
    """Returns `file.py:12` of a frame, `cell:12` in a notebook, "" without one."""
    if frame is None:
        return ""
    file = Path(frame.file)
    return f"{'cell' if file.parent.name.startswith('ipykernel_') else file.name}:{frame.line}"


def full_place(frame: Frame) -> str:
    """Returns `/folder/file.py:12` of a frame, `cell:12` in a notebook."""
    short = place(frame)
    return short if short.startswith("cell:") else f"{frame.file}:{frame.line}"


class Scope:
    """A program, or one within an equation of another.

    Attributes:
        kind: "program", or as `trustcore.graph.bodies` names it.
        jaxpr: the program.
        owner: the equation that it belongs to; None for the whole.
        branch: its place among the bodies of its owner.
        nodes: its equations in their order.
        number: its place among all scopes.
    """

    def __init__(self, kind: str, jaxpr: ClosedJaxpr, owner: Node | None, branch: int, number: int):
        self.kind, self.jaxpr, self.owner, self.branch, self.number = kind, jaxpr, owner, branch, number
        self.nodes: list[Node] = []

    @functools.cached_property
    def producers(self) -> dict[Any, tuple[Node, int]]:
        """Returns the equation that computes each variable, and which of its outputs that is."""
        return {var: (node, i) for node in self.nodes for i, var in enumerate(node.eqn.outvars)}

    @functools.cached_property
    def inputs(self) -> dict[Any, int]:
        """Returns the place of each input among the inputs."""
        return {var: i for i, var in enumerate(self.jaxpr.jaxpr.invars)}

    @functools.cached_property
    def consts(self) -> dict[Any, Any]:
        """Returns the value of each constant."""
        return dict(zip(self.jaxpr.jaxpr.constvars, self.jaxpr.consts, strict=True))

    @property
    def parent(self) -> Scope | None:
        """The scope that its owner stands in."""
        return self.owner.scope if self.owner else None

    @functools.cached_property
    def around(self) -> tuple[Scope, ...]:
        """Returns the scopes from the whole program to this one."""
        return (*(self.parent.around if self.parent else ()), self)

    @property
    def loops(self) -> tuple[Scope, ...]:
        """The loops around, outermost first, this one included."""
        return tuple(scope for scope in self.around if scope.kind in LOOPS)


class Node:
    """An equation in its place.

    Attributes:
        eqn: the equation.
        scope: the program that it is part of.
        index: its place there.
        number: its place among all equations, an equation standing before those within it.
        address: where it stands.
        bodies: the programs within it; none for a leaf.
    """

    def __init__(self, eqn: JaxprEqn, scope: Scope, index: int, number: int, address: Address):
        self.eqn, self.scope, self.index, self.number, self.address = eqn, scope, index, number, address
        self.bodies: tuple[Scope, ...] = ()

    def __repr__(self) -> str:
        return f"<{self.address}>"

    def within(self) -> Iterator[Node]:
        """Yields this equation and all those within it."""
        yield self
        for scope in self.bodies:
            for node in scope.nodes:
                yield from node.within()


class Program:
    """A jaxpr with all its scopes and equations.

    Attributes:
        jaxpr: the program.
        root: its outermost scope.
        nodes: every equation; `nodes[i].number == i`.
        scopes: every scope; `scopes[i].number == i`.
        arguments: a name for each input.
        differentiated: whether a part of it was differentiated.
    """

    def __init__(self, jaxpr: ClosedJaxpr, arguments: Sequence[str] | None = None):
        self.jaxpr = jaxpr
        self.nodes: list[Node] = []
        self.scopes: list[Scope] = []
        self.arguments = tuple(arguments or (f"input {i}" for i in range(len(jaxpr.jaxpr.invars))))
        self.differentiated = False
        self._alike: collections.Counter[Any] = collections.Counter()
        nowhere = Address((), "", None, None, "forward", 0, ())
        self.root = self._scope("program", jaxpr, None, 0, nowhere, list(range(len(jaxpr.jaxpr.invars))), ())

    def _scope(
        self,
        kind: str,
        jaxpr: ClosedJaxpr,
        owner: Node | None,
        branch: int,
        around: Address,
        given: Sequence[int | None],
        shared: tuple[str, ...],
    ) -> Scope:
        """Adds a scope.

        Args:
            kind, jaxpr, owner, branch: see `Scope`.
            around: the address of its owner.
            given: for each input, which argument of the program it is, if it is one.
            shared: the path that the arguments given to its owner have in common.
        """
        scope = Scope(kind, jaxpr, owner, branch, len(self.scopes))
        self.scopes.append(scope)
        told = {var: which for var, which in zip(jaxpr.jaxpr.invars, given, strict=True) if which is not None}
        used: list[list[int | None]] = []
        anew: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
        for eqn in jaxpr.jaxpr.eqns:
            own = [None if isinstance(atom, Literal) else told.get(atom) for atom in eqn.invars]
            used.append(own)
            if eqn.primitive.name in _SAME and own[0] is not None:
                told[eqn.outvars[0]] = own[0]
            names = [name for name, is_transform in _jax.scopes(eqn) if not is_transform]
            for i, name in enumerate(names):
                if name.startswith(ANEW):
                    inner = tuple(n for n in names[i + 1 :] if n not in _MARKS and not n.startswith(ANEW))
                    anew.setdefault(name, []).extend(self._owners(own, inner))
        paths = {name: _shared(owners) or shared for name, owners in anew.items()}
        for index, (eqn, own) in enumerate(zip(jaxpr.jaxpr.eqns, used, strict=True)):
            address = self._address(eqn, around, paths)
            node = Node(eqn, scope, index, len(self.nodes), address)
            self.nodes.append(node)
            scope.nodes.append(node)
            found = bodies(eqn)
            node.bodies = tuple(
                self._scope(
                    kind,
                    body,
                    node,
                    i,
                    _entered(address, kind, i),
                    _given(eqn, kind, own),
                    _shared(self._owners(own, ())) or shared,
                )
                for i, (kind, body) in enumerate(found)
            )
        return scope

    def _owners(self, own: Sequence[int | None], inner: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
        """For each argument its tree, and the path of the module that has it, or whose part `inner` has it."""
        found = []
        for root, steps in (_steps(self.arguments[which]) for which in own if which is not None):
            if len(steps) > 1:
                ends = [i for i in range(len(steps)) if inner and steps[i : i + len(inner)] == inner]
                found.append((root, steps[: ends[-1]] if ends else steps[:-1]))
        return found

    def _address(self, eqn: JaxprEqn, around: Address, anew: Mapping[str, tuple[str, ...]]) -> Address:
        path, stage = list(around.path), around.stage
        for name, is_transform in _jax.scopes(eqn):
            if name == "rematted_computation":
                stage = "recomputed"
            elif is_transform and name == "transpose":
                stage = "backward"
            elif is_transform and name == "jvp":
                self.differentiated = True
            if not is_transform and name.startswith(ANEW):
                known = anew[name]
                within = list(known[: len(path)]) == path
                path += (known[len(path) :] if within else known) if known else (name[1:].partition(":")[0],)
            elif not is_transform and name not in _MARKS:
                path += name.split("/")
        frames = [frame for frame in _jax.frames(eqn) if not _is_insight(frame.file)]
        own = next((frame for frame in frames if not is_library(frame.file)), None)
        inner = frames[0] if frames and frames[0] != own else None
        if own is None and around.frame is not None:
            own, inner = around.frame, inner or around.library
        elif own is None and inner is not None:
            own, inner = inner, None
        name = eqn.primitive.name
        key = (tuple(path), name, own and own[:2], stage)
        self._alike[key] += 1
        return Address(tuple(path), name, own, inner, stage, self._alike[key] - 1, around.loops)


def _entered(address: Address, kind: str, branch: int) -> Address:
    component = f"cond:{branch}" if kind == "branch" else _COMPONENTS.get(kind)
    if component is None:
        return address
    loops = (*address.loops, len(address.path)) if kind in LOOPS else address.loops
    return dataclasses.replace(address, path=(*address.path, component), loops=loops)


def _given(eqn: JaxprEqn, kind: str, own: Sequence[int | None]) -> list[int | None]:
    """Which arguments of the program the inputs of a body are; what a loop carries is none."""
    if kind == "branch":
        return list(own[1:])
    if kind == "scan":
        consts, carries = _jax.scan_counts(eqn.params)
        return [*own[:consts], *[None] * carries, *own[consts + carries :]]
    if kind in ("test", "while"):
        in_test, in_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        fixed = own[:in_test] if kind == "test" else own[in_test : in_test + in_body]
        return [*fixed, *[None] * (len(own) - in_test - in_body)]
    return list(own)


def _shared(owners: Sequence[tuple[str, tuple[str, ...]]]) -> tuple[str, ...]:
    """What paths have in common, of those of the tree that has most of them."""
    if not owners:
        return ()
    most = collections.Counter(root for root, _ in owners).most_common(1)[0][0]
    columns = zip(*(steps for root, steps in owners if root == most), strict=False)
    return tuple(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


@functools.lru_cache(maxsize=4096)
def _steps(argument: str) -> tuple[str, tuple[str, ...]]:
    """`args[0].blocks[1].kernel` -> `args[0]`, (blocks, 1, kernel)."""
    found = list(_STEP.finditer(argument))
    head = argument.partition("[")[0]
    steps = tuple(next(group for group in step.groups() if group is not None) for step in found)
    return head + "/".join(steps[:1]), steps[1:]


@functools.cache
def is_library(file: str) -> bool:
    """Returns whether a source file is Python's own, of an installed package, of trustcore, or none (`<string>`)."""
    path = Path(file)
    return (
        file.startswith("<")
        or "site-packages" in path.parts
        or "dist-packages" in path.parts
        or path.is_relative_to(sysconfig.get_path("stdlib"))
        or path.is_relative_to(Path(__file__).parents[1])
    )


@functools.cache
def _is_insight(file: str) -> bool:
    """Whether a file only passes the user's function on."""
    own = Path(__file__).parents[1]
    return any(Path(file).is_relative_to(own / folder) for folder in ("graph", "debug"))


# ---- where a value comes from ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Origin:
    """What gave a value: a leaf equation, an input of the program, or a constant.

    Attributes:
        node: the equation; None for an input or a constant.
        output: which of its outputs.
        turns: of the loops around it, in the order in which they run; None where all of a loop's turns took part.
        argument: which input of the program.
        value: of a constant.
    """

    node: Node | None = None
    output: int = 0
    turns: tuple[int | None, ...] = ()
    argument: int | None = None
    value: Any = None


def origins(scope: Scope, atom: Any, turns: Sequence[int | None]) -> list[Origin]:
    """Returns what gave a variable of `scope` its value in those turns of the loops around.

    Several where branches meet, or a loop that may not run. What a scan walks over leads to the whole of it.
    """
    turns = tuple(turns)
    if isinstance(atom, Literal):
        return [Origin(value=atom.val)]
    if atom in scope.consts:
        return [Origin(value=scope.consts[atom])]
    if atom in scope.producers:
        node, output = scope.producers[atom]
        return _of_output(node, output, turns)
    return _of_input(scope, scope.inputs[atom], turns)


def _of_output(node: Node, output: int, turns: tuple[int | None, ...]) -> list[Origin]:
    if not node.bodies:
        return [Origin(node, output, turns)]
    kind = node.bodies[0].kind
    if kind == "test":
        body = node.bodies[1]
        ran = origins(body, body.jaxpr.jaxpr.outvars[output], (*turns, -1))
        skipped = node.eqn.params["cond_nconsts"] + node.eqn.params["body_nconsts"]
        return [*ran, *origins(node.scope, node.eqn.invars[skipped + output], turns)]
    if kind == "scan":
        body = node.bodies[0]
        _, carries = _jax.scan_counts(node.eqn.params)
        last = node.eqn.params["length"] - 1 if output < carries else None
        return origins(body, body.jaxpr.jaxpr.outvars[output], (*turns, last))
    return [origin for body in node.bodies for origin in origins(body, body.jaxpr.jaxpr.outvars[output], turns)]


def _of_input(scope: Scope, place: int, turns: tuple[int | None, ...]) -> list[Origin]:
    owner = scope.owner
    if owner is None:
        return [Origin(argument=place)]
    given = owner.eqn.invars
    if scope.kind == "branch":
        return origins(owner.scope, given[1 + place], turns)
    if scope.kind not in LOOPS:
        return origins(owner.scope, given[place], turns)
    before, turn = turns[:-1], turns[-1]
    if scope.kind == "scan":
        consts, carries = _jax.scan_counts(owner.eqn.params)
        outer, body, carry = place, scope, place - consts
    else:
        in_test, in_body = owner.eqn.params["cond_nconsts"], owner.eqn.params["body_nconsts"]
        own = in_test if scope.kind == "test" else in_body
        carry, body, carries = place - own, owner.bodies[1], len(owner.eqn.outvars)
        outer = (
            place if scope.kind == "test" and carry < 0 else in_test + place if carry < 0 else in_test + in_body + carry
        )
    if not 0 <= carry < carries or turn == 0:
        return origins(owner.scope, given[outer], before)
    if turn is None or turn < 0:
        return [Origin(argument=None, value=None)]
    return origins(body, body.jaxpr.jaxpr.outvars[carry], (*before, turn - 1))


def avals(jaxpr: ClosedJaxpr) -> list[jax.ShapeDtypeStruct]:
    """Returns shape and dtype of each input."""
    return [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in jaxpr.jaxpr.invars]
