"""A compiled program as XLA runs it: instructions in the order of their schedule, shapes, and where each came from.

    compiled = jax.jit(fn).lower(*args).compile()
    program = read_program(compiled)
    for instruction in program.schedule(program.entry): ...

Read from the serialized module, which every PJRT client gives. Numbers of fields: xla/service/hlo.proto.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from trustcore._jax import Frame
from trustcore.errors import ProgramError
from trustcore.graph.program import place
from trustcore.graph.wire import Message

# xla_data.proto, PrimitiveType: bits of one number.
_BITS = {
    1: 8, 2: 8, 3: 16, 4: 32, 5: 64, 6: 8, 7: 16, 8: 32, 9: 64, 10: 16, 11: 32, 12: 64, 15: 64, 16: 16, 18: 128,
    19: 8, 20: 8, 21: 4, 22: 4, 23: 8, 24: 8, 25: 8, 26: 2, 27: 2, 28: 8, 29: 8, 30: 1, 31: 1, 32: 4, 33: 8,
}  # fmt: skip
_NAMES = {
    1: "bool", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "uint8", 7: "uint16", 8: "uint32", 9: "uint64",
    10: "float16", 11: "float32", 12: "float64", 15: "complex64", 16: "bfloat16", 18: "complex128",
    19: "float8_e5m2", 20: "float8_e4m3fn", 21: "int4", 22: "uint4",
}  # fmt: skip
_TUPLE = 13

Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a value: an array, or a tuple of shapes.

    Attributes:
        dtype: of an array; "tuple", or XLA's number of a type that has no name here.
        dims: of an array.
        elements: of a tuple.
        bits: of one number.
    """

    dtype: str
    dims: tuple[int, ...]
    elements: tuple[Shape, ...] | None
    bits: int

    def leaves(self, at: Index = ()) -> list[Index]:
        """Returns the places of its arrays."""
        if self.elements is None:
            return [at]
        return [index for i, element in enumerate(self.elements) for index in element.leaves((*at, i))]

    def at(self, index: Index) -> Shape:
        """Returns the shape at a place."""
        shape = self
        for i in index:
            if shape.elements is None or i >= len(shape.elements):
                raise ProgramError(f"the compiled program has no element {list(index)} of {self}.")
            shape = shape.elements[i]
        return shape

    def __str__(self) -> str:
        if self.elements is not None:
            return f"({', '.join(map(str, self.elements))})"
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an instruction came from.

    Attributes:
        path: names of transforms, scopes and modules, and the operation: `jit(step)/jvp(layer)/dot_general`.
        file, line: the innermost frame of the user's program that XLA kept; "" and 0 where it kept none.
    """

    path: str = ""
    file: str = ""
    line: int = 0

    @property
    def scope(self) -> str:
        """The path without transforms and the operation's name: `layer`."""
        parts = [part for part in re.split(r"[/()]", self.path)[:-1] if part]
        kept = [part for part in parts if part not in _TRANSFORMS]
        return "/".join(kept[1:] if self.path.startswith("jit(") else kept)

    @property
    def backward(self) -> bool:
        """Whether it belongs to the backward pass."""
        return "transpose(" in self.path

    def __str__(self) -> str:
        at = place(Frame(self.file, self.line, 0, "")) if self.file else ""
        return " ".join(part for part in (self.path, f"({at})" if at and self.path else at) if part) or "unknown"


_TRANSFORMS = {
    "jit", "pjit", "jvp", "transpose", "vmap", "remat", "checkpoint", "rematted_computation", "while", "body", "cond",
    "branch_0_fun", "branch_1_fun", "closed_call", "shard_map",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; `id` is unique in the program."""

    id: int
    name: str
    opcode: str
    shape: Shape
    operands: tuple[int, ...]
    called: tuple[int, ...]
    parameter: int
    element: int
    origin: Origin


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program: its instructions as they are scheduled, and which of them is its result."""

    id: int
    name: str
    instructions: tuple[Instruction, ...]
    root: int


@dataclasses.dataclass(frozen=True)
class Program:
    """All of it.

    Attributes:
        computations: by their ids.
        entry: id of the computation that runs first.
    """

    computations: dict[int, Computation]
    entry: int

    def instruction(self, id: int) -> Instruction:
        """Returns the instruction of that id."""
        return self._by_id[id]

    @property
    def _by_id(self) -> dict[int, Instruction]:
        found = self.__dict__.get("_instructions")
        if found is None:
            found = {i.id: i for c in self.computations.values() for i in c.instructions}
            self.__dict__["_instructions"] = found
        return found


def read_program(compiled: Any) -> Program:
    """Returns the program of what `jax.jit(fn).lower(*args).compile()` gives.

    Raises:
        ProgramError: the backend does not hand out its program, or it cannot be read.
    """
    module = _module(compiled)
    origins = _origins(module.message(17))
    order = {entry.number(1): entry.message(2).numbers(1) for entry in module.message(7).messages(1)}
    computations = {}
    for message in module.messages(3):
        id = message.number(5)
        instructions = {i.id: i for i in (_instruction(m, id, origins) for m in message.messages(2))}
        scheduled = [instructions[i] for i in (_unique(i, id) for i in order.get(id, ())) if i in instructions]
        rest = [i for i in instructions.values() if id not in order]
        root = _unique(message.number(6), id)
        computations[id] = Computation(id, message.text(1), (*scheduled, *rest), root)
    entry = module.number(6)
    if entry not in computations:
        raise ProgramError("the compiled program has no first computation.")
    return Program(computations, entry)


def _module(compiled: Any) -> Message:
    try:
        modules = compiled.runtime_executable().hlo_modules()
        data = modules[0].as_serialized_hlo_module_proto()
    except Exception as error:
        raise ProgramError(f"this backend does not show its compiled program: {error}") from error
    return Message(data)


def frame_lookup(compiled: Any) -> Callable[[int], tuple[str, int]]:
    """Returns a function from the number of a stack frame, to file and line; "" and 0 where it has none.

    Raises:
        ProgramError: the backend does not hand out its program.
    """
    return _origins(_module(compiled).message(17))


def _unique(id: int, computation: int) -> int:
    return id if id >> 32 else computation << 32 | id


def _instruction(message: Message, computation: int, origins: Any) -> Instruction:
    metadata = message.message(7)
    file, line = metadata.text(3), metadata.number(4)
    frame = metadata.number(15)
    if not file and frame:
        file, line = origins(frame)
    return Instruction(
        id=_unique(message.number(35), computation),
        name=message.text(1),
        opcode=message.text(2),
        shape=_shape(message.message(3)),
        operands=tuple(_unique(i, computation) for i in message.numbers(36)),
        called=tuple(message.numbers(38)),
        parameter=message.number(9),
        element=message.number(13),
        origin=Origin(metadata.text(2), file, line),
    )


def _shape(message: Message) -> Shape:
    kind = message.number(2)
    if kind == _TUPLE:
        return Shape("tuple", (), tuple(map(_shape, message.messages(4))), 0)
    dims = tuple(message.numbers(3))
    return Shape(_NAMES.get(kind, f"type {kind}"), dims, None, _BITS.get(kind, 0))


def _origins(index: Message) -> Any:
    """A function from the number of a stack frame to its file and line."""
    files = index.texts(1)
    locations = [(m.number(1), m.number(3)) for m in index.messages(3)]
    frames = [m.number(1) for m in index.messages(4)]

    def origin(frame: int) -> tuple[str, int]:
        if not 0 < frame <= len(frames) or not 0 < frames[frame - 1] <= len(locations):
            return "", 0
        file, line = locations[frames[frame - 1] - 1]
        return (files[file - 1], line) if 0 < file <= len(files) else ("", 0)

    return origin
