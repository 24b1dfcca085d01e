"""A machine for pickles that builds plain containers and runs nothing.

Python's own unpickler imports whatever a pickle names and calls it. This one has no import and no call of what a file
names: a name is looked up in two tables of the caller, of constants and of functions of ours that take plain values;
a name in neither is refused, by its name. Opcodes that make objects of classes (INST, OBJ, NEWOBJ), reach for copyreg's
registry (EXT) or for buffers from outside are refused. BUILD, which would set attributes, is taken for what state
dicts have it for, notes beside an OrderedDict, and these are dropped.

What `pickletools.genops` gives is only the text of the program: opcode, argument, place.

Bounds: the bytes of a pickle, its opcodes, the depth of its stack. A container in two places is one container, so
memory is linear in the opcodes; whoever walks what comes back has to count (`tree`).
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trustcore.errors import CheckpointError
from trustcore.weights.mapped import MappedFile

MAX_BYTES = 2**28
MAX_OPCODES = 2**22  # some 40 a tensor: 100,000 tensors in a file
MAX_STACK = 2**20
MAX_LINE = 2**16  # of opcodes whose argument is a line of text

Function = Callable[..., Any]

_MARK = object()
_KEYS = (str, int, float, bool, type(None))


class Global:
    """A function or class that a pickle named and the table of functions has."""

    def __init__(self, name: str, call: Function):
        self.name, self.call = name, call


class Notes(dict[Any, Any]):
    """An OrderedDict of a pickle."""


class Window:
    """The bytes of a file from `start` on, at most `MAX_BYTES` of them, as `pickletools` reads them."""

    def __init__(self, file: MappedFile, start: int, stop: int):
        self._map, self._at = file.map, start
        self._stop = min(stop, start + MAX_BYTES)

    def read(self, count: int) -> bytes:
        """Returns the next bytes, fewer at the end."""
        found = self._map[self._at : min(self._at + max(count, 0), self._stop)]
        self._at += len(found)
        return found

    def readline(self) -> bytes:
        """Returns the next bytes to a line feed and with it, or what is too long to be a line."""
        most = min(self._at + MAX_LINE, self._stop)
        end = self._map.find(b"\n", self._at, most)
        return self.read((most if end < 0 else end + 1) - self._at)

    def tell(self) -> int:
        """Returns where the next byte is in the file."""
        return self._at


class PickleMachine:
    """Runs the pickles of one file.

    Args:
        path: of the file, for errors.
        field: what the pickle is called in errors.
        constants: what names stand for that are not called.
        functions: what names stand for that are called, with plain values.
        persistent: from the persistent id of an object to what stands for it; None where there are none.
    """

    def __init__(
        self,
        path: Path,
        field: str,
        constants: Mapping[str, Any],
        functions: Mapping[str, Function],
        persistent: Callable[[Any], Any] | None = None,
    ):
        self.path, self.field = path, field
        self._constants, self._functions, self._persistent = constants, functions, persistent
        self._opcodes = 0
        self._at = 0

    def run(self, window: Any) -> Any:
        """Returns what the pickle at the window's place describes, and leaves the window behind its end.

        Args:
            window: `read`, `readline` and `tell`, as `Window` has them.

        Raises:
            CheckpointError: the pickle is cut short or broken, names what is not in the tables, or exceeds a bound.
        """
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._at = window.tell()
        try:
            for opcode, argument, place in pickletools.genops(window):
                self._at = place if place is not None else self._at
                self._opcodes += 1
                if self._opcodes > MAX_OPCODES:
                    raise self.error(f"the pickle has more than {MAX_OPCODES} opcodes")
                if opcode.name == "STOP":
                    return self._pop()
                step = _STEPS.get(opcode.name)
                if step is None:
                    raise self.error(f"opcode {opcode.name} {_REFUSED.get(opcode.name, 'is not used by weights')}")
                step(self, argument)
                if len(self._stack) > MAX_STACK:
                    raise self.error(f"the pickle's stack has more than {MAX_STACK} values")
        except CheckpointError:
            raise
        except (ValueError, UnicodeError, OverflowError) as fault:  # from pickletools
            raise self.error(f"the pickle is cut short or broken: {str(fault)[:200]}") from fault
        raise self.error("the pickle has no end")  # genops raises before

    def error(self, message: str) -> CheckpointError:
        """Returns an error at the opcode that is being run."""
        return CheckpointError(message, path=self.path, field=self.field, offset=self._at)

    def unknown(self, name: str) -> CheckpointError:
        """Returns the refusal of a name."""
        return self.error(
            f"the pickle names {name[:200]!r}, which is not among what weights are made of. Nothing was run. Where you "
            "trust the file, load it with the program that wrote it and save its tensors as safetensors "
            "(safetensors.torch.save_file)."
        )

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise self.error("the pickle takes a value from an empty stack")
        return self._stack.pop()

    def _top(self, kind: type | tuple[type, ...], what: str) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise self.error(f"the pickle has {shown(self._stack[-1]) if self._stack else 'nothing'} where {what} goes")
        return self._stack[-1]

    def _marked(self) -> list[Any]:
        """The values above the topmost mark, taken with it."""
        for place in range(len(self._stack) - 1, -1, -1):
            if self._stack[place] is _MARK:
                found = self._stack[place + 1 :]
                del self._stack[place:]
                return found
        raise self.error("the pickle goes back to a mark that is not there")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _global(self, name: str) -> None:
        if name in self._constants:
            self._push(self._constants[name])
        elif name in self._functions:
            self._push(Global(name, self._functions[name]))
        else:
            raise self.unknown(name)

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self.error("a name of the pickle is no text")
        self._global(f"{module}.{name}")

    def _reduce(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise self.error(f"the pickle calls {shown(function)} with {shown(arguments)}; nothing is called here")
        # What a function copies counts as opcodes: a list of a million values may stand in a million places.
        self._opcodes += sum(len(value) for value in arguments if isinstance(value, list | tuple | dict))
        try:
            self._push(function.call(*arguments))
        except TypeError as fault:
            raise self.error(f"{function.name} does not take these {len(arguments)} values") from fault

    def _build(self, _: Any) -> None:
        state = self._pop()
        if type(self._top(dict, "what BUILD changes")) is not Notes or not isinstance(state, dict):
            raise self.error(f"the pickle sets the state of {shown(self._stack[-1])}; no object has one here")

    def _persistent_id(self, _: Any) -> None:
        if self._persistent is None:
            raise self.error("the pickle refers to an object outside of it")
        self._push(self._persistent(self._pop()))

    def _put(self, index: Any) -> None:
        if not self._stack or self._stack[-1] is _MARK:
            raise self.error("the pickle keeps a value of an empty stack")
        self._memo[len(self._memo) if index is None else int(index)] = self._stack[-1]

    def _get(self, index: Any) -> None:
        if int(index) not in self._memo:
            raise self.error(f"the pickle takes value {index} back, which it has not kept")
        self._push(self._memo[int(index)])

    def _tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(values)))

    def _append(self, values: list[Any]) -> None:
        self._top(list, "a list").extend(values)

    def _set_items(self, values: list[Any]) -> None:
        into = self._top(dict, "a dict")
        if len(values) % 2:
            raise self.error("the pickle gives a dict a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in _KEYS:  # also: the hash of a nested tuple may take for ever
                raise self.error(f"a key of a dict is {shown(key)}; expected text or a number")
            into[key] = value

    def _dict(self, values: list[Any]) -> None:
        self._push({})
        self._set_items(values)

    def _set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _dup(self, _: Any) -> None:
        value = self._pop()
        self._stack += [value, value]

    def _drop(self, _: Any) -> None:
        if not self._stack:
            raise self.error("the pickle takes a value from an empty stack")
        self._stack.pop()


def shown(value: Any) -> str:
    """Returns a value of a pickle for an error: a container by its kind, for it may not end."""
    if isinstance(value, Global):
        return value.name
    if value is None or isinstance(value, bool | int | float | str | bytes):
        try:
            return repr(value[:64] if isinstance(value, str | bytes) else value)[:80]
        except ValueError:  # an integer of thousands of digits
            return "a huge integer"
    kind = "OrderedDict" if isinstance(value, Notes) else type(value).__name__.lstrip("_").lower()
    return f"a {kind}"


def ordered(*arguments: Any) -> Notes:
    """What `collections.OrderedDict(...)` of a pickle makes."""
    found = Notes()
    for pairs in arguments[:1]:
        for pair in pairs if isinstance(pairs, list | tuple) else ():
            if not isinstance(pair, list | tuple) or len(pair) != 2 or type(pair[0]) not in _KEYS:
                raise TypeError("no pairs")
            found[pair[0]] = pair[1]
    return found


def _value(machine: PickleMachine, argument: Any) -> None:
    if isinstance(argument, int) and argument.bit_length() > 128:  # the magic number of older files has 80
        raise machine.error(f"an integer of {argument.bit_length()} bits; expected at most 128")
    machine._push(argument)


# What each opcode does. What is missing is refused.
_STEPS: dict[str, Callable[[PickleMachine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, _: None),
    **dict.fromkeys(
        (
            *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
            *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
            *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        ),
        _value,
    ),
    "NONE": lambda m, _: m._push(None),
    "NEWTRUE": lambda m, _: m._push(True),
    "NEWFALSE": lambda m, _: m._push(False),
    "EMPTY_LIST": lambda m, _: m._push([]),
    "EMPTY_DICT": lambda m, _: m._push({}),
    "EMPTY_TUPLE": lambda m, _: m._push(()),
    "EMPTY_SET": lambda m, _: m._push([]),  # nothing here needs a set to be one
    "ADDITEMS": lambda m, _: m._append(m._marked()),
    "FROZENSET": lambda m, _: m._push(m._marked()),
    "MARK": lambda m, _: m._push(_MARK),
    "POP_MARK": lambda m, _: m._marked().clear(),
    "LIST": lambda m, _: m._push(m._marked()),
    "TUPLE": lambda m, _: m._push(tuple(m._marked())),
    "TUPLE1": lambda m, _: m._tuple(1),
    "TUPLE2": lambda m, _: m._tuple(2),
    "TUPLE3": lambda m, _: m._tuple(3),
    "DICT": lambda m, _: m._dict(m._marked()),
    "APPEND": lambda m, _: m._append([m._pop()]),
    "APPENDS": lambda m, _: m._append(m._marked()),
    "SETITEM": PickleMachine._set_item,
    "SETITEMS": lambda m, _: m._set_items(m._marked()),
    "DUP": PickleMachine._dup,
    "POP": PickleMachine._drop,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), PickleMachine._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), PickleMachine._get),
    "GLOBAL": lambda m, name: m._global(name.replace(" ", ".", 1)),
    "STACK_GLOBAL": PickleMachine._stack_global,
    "REDUCE": PickleMachine._reduce,
    "BUILD": PickleMachine._build,
    "BINPERSID": PickleMachine._persistent_id,
}

_REFUSED = {
    **dict.fromkeys(("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"), "makes an object of a class; none is made here"),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), "reaches for a registry of the program; there is none here"),
    "PERSID": "refers to an object outside of the pickle by a line of text; torch does not write it",
}
