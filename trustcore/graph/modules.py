"""Traces a function, and names what each flax.nnx module computes by the module's path.

While a function is traced here, the call of every nnx module opens a name scope: its path within the outermost module
that is being called (`layers/3/attention`), or `~Block:7` where a transformation made it anew so that it is no part
of the one around (see `trustcore.graph.program`). Nothing is left behind: outside, modules are as they were. Functions
under jit that were traced before are traced again, for the names are part of their programs.

What a function changes of nnx modules among its arguments in place (statistics of norms, counters of random keys) are
further results of its program, which `Traced.finish` puts into the caller's modules.

Leaves of the arguments that are arrays or floats are inputs of the program; all others (ints, strings, None) are fixed
in it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from trustcore import _jax
from trustcore.graph.program import ANEW, Program

_TRACING = threading.Lock()


class Traced(NamedTuple):
    """A function's program for arguments of one kind.

    Attributes:
        program: its equations.
        out_tree: the structure of its results.
        out_names: a name for each leaf of the results, and for each value that the function changes in place.
        changed: which leaves of (args, kwargs) those are.
    """

    program: Program
    out_tree: Any
    out_names: tuple[str, ...]
    changed: tuple[int, ...] = ()

    def finish(self, outputs: Sequence[Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Returns the function's result of the program's outputs; changes the modules as the function does."""
        count = self.out_tree.num_leaves
        if self.changed:
            leaves, tree = jax.tree.flatten((args, kwargs))
            for i, value in zip(self.changed, outputs[count:], strict=True):
                leaves[i] = value
            after = jax.tree.leaves(jax.tree.unflatten(tree, leaves), is_leaf=_is_variable)
            for mine, found in zip(jax.tree.leaves((args, kwargs), is_leaf=_is_variable), after, strict=True):
                if _is_variable(mine) and any(
                    a is not b for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(found), strict=True)
                ):
                    mine.set_value(found.get_value())
        return jax.tree.unflatten(self.out_tree, outputs[:count])


def split_arguments(args: tuple, kwargs: dict[str, Any]) -> tuple[list[Any], list[str], tuple[Any, Any]]:
    """Returns the leaves that are inputs, their names, and what is fixed: hashable if the fixed leaves are."""
    flat, tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
    moving = [(path, leaf) for path, leaf in flat if is_input(leaf)]
    fixed = tuple(_MOVING if is_input(leaf) else leaf for _, leaf in flat)
    return [leaf for _, leaf in moving], [argument_name(path) for path, _ in moving], (tree, fixed)


def is_input(leaf: Any) -> bool:
    """Returns whether a leaf of the arguments is an input of the program."""
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic, float, complex))


class _Moving:
    def __repr__(self) -> str:
        return "<input>"


_MOVING = _Moving()


def argument_name(path: tuple[Any, ...]) -> str:
    """Returns `args[0].layers[3].kernel` for a path into (args, kwargs)."""
    which, *rest = path
    head = "args" if getattr(which, "idx", 0) == 0 else "kwargs"
    return head + jax.tree_util.keystr(tuple(rest)).removesuffix(".value")


def trace(fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any] | None = None) -> Traced:
    """Returns the program of `fn(*args, **kwargs)`, with the paths of nnx modules in its addresses."""
    leaves, names, (tree, fixed) = split_arguments(args, kwargs or {})
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path((args, kwargs or {}))[0]]
    out_names: list[str] = []
    out_tree: list[Any] = []
    changed: list[int] = []

    def flat(*values: Any) -> list[Any]:
        moving = iter(values)
        args, kwargs = jax.tree.unflatten(tree, [next(moving) if leaf is _MOVING else leaf for leaf in fixed])
        before = jax.tree.leaves((args, kwargs))
        found, structure = jax.tree_util.tree_flatten_with_path(fn(*args, **kwargs))
        after = _changes(before, tree, args, kwargs)
        out_tree[:] = [structure]
        changed[:] = list(after)
        out_names[:] = ["result" + jax.tree_util.keystr(path) for path, _ in found]
        out_names.extend(f"{argument_name(paths[i])} afterwards" for i in after)
        return [*(leaf for _, leaf in found), *after.values()]

    with module_scopes():
        jaxpr = jax.make_jaxpr(flat)(*leaves)
    return Traced(Program(jaxpr, names), out_tree[0], tuple(out_names), tuple(changed))


def _changes(before: list[Any], tree: Any, args: tuple, kwargs: dict[str, Any]) -> dict[int, Any]:
    """The leaves within nnx variables that are not what they were, by their numbers; none where variables came or went.

    Other containers are copies here, as they are under jit: what is done to them stays within the function.
    """
    nodes = jax.tree.leaves((args, kwargs), is_leaf=_is_variable)
    leaves, structure = jax.tree.flatten((args, kwargs))
    if structure != tree:
        return {}
    kept = [_is_variable(node) for node in nodes for _ in jax.tree.leaves(node)]
    return {
        i: new
        for i, (old, new, variable) in enumerate(zip(before, leaves, kept, strict=True))
        if variable and new is not old and is_input(new)
    }


def _is_variable(node: Any) -> bool:
    if "flax.nnx" not in sys.modules:
        return False
    from flax import nnx

    return isinstance(node, nnx.Variable)


@contextlib.contextmanager
def module_scopes() -> Iterator[None]:
    """A context in which this thread's calls of nnx modules open name scopes."""
    if "flax.nnx" not in sys.modules:
        yield
        return
    from flax import nnx

    with _TRACING, contextlib.ExitStack() as undo:
        calls = _Calls(threading.get_ident())
        for cls in _classes(nnx.Module):
            method = vars(cls).get("__call__")
            if callable(method):
                type.__setattr__(cls, "__call__", calls.scoped(method))
                undo.callback(type.__setattr__, cls, "__call__", method)
        undo.enter_context(_jax.tracing_anew("module scopes"))
        yield


def _classes(base: type) -> set[type]:
    found = set(base.__subclasses__())
    return found.union(*(_classes(cls) for cls in found))


class _Calls:
    """The modules that are being called, outermost first: each with the paths of all modules below it."""

    def __init__(self, thread: int):
        self.thread, self.anew = thread, 0
        self.active: list[tuple[Any, dict[int, tuple[str, ...]], tuple[str, ...]]] = []

    def scoped(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self.thread or (self.active and self.active[-1][0] is module):
                return method(module, *args, **kwargs)
            with contextlib.ExitStack() as stack:
                for name in self._enter(module):
                    stack.enter_context(jax.named_scope(name))
                try:
                    return method(module, *args, **kwargs)
                finally:
                    self.active.pop()

        return call

    def _enter(self, module: Any) -> tuple[str, ...]:
        """Notes that a module is called; returns the names between it and the one that calls it."""
        if not self.active:
            self.active.append((module, _paths(module), ()))
            return ()
        _, paths, here = self.active[-1]
        path = paths.get(id(module))
        if path is None:  # made anew by a transformation
            self.active.append((module, _paths(module), ()))
            self.anew += 1
            return (f"{ANEW}{type(module).__name__}:{self.anew}",)
        self.active.append((module, paths, path))
        return path[len(here) :] if path[: len(here)] == here else path


def _paths(root: Any) -> dict[int, tuple[str, ...]]:
    """Returns the path of every module below one, by identity; the shortest where there are several."""
    from flax import nnx

    found: dict[int, tuple[str, ...]] = {id(root): ()}
    level: list[tuple[Any, tuple[str, ...]]] = [(root, ())]
    seen = {id(root)}
    while level:
        below = []
        for value, path in level:
            if isinstance(value, nnx.Module):
                items = [(name, part) for name, part in vars(value).items() if not name.startswith("_pytree")]
            elif isinstance(value, dict):
                items = list(value.items())
            elif isinstance(value, (list, tuple)):
                items = list(enumerate(value))
            else:
                continue
            for name, part in items:
                if id(part) in seen or not isinstance(part, (nnx.Module, dict, list, tuple)):
                    continue
                seen.add(id(part))
                where = (*path, str(name))
                if isinstance(part, nnx.Module):
                    found[id(part)] = where
                below.append((part, where))
        level = below
    return found
