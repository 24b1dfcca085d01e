"""The buffers of a compiled program: size, owner, and from when to when each is needed.

XLA's buffer assignment says which logical buffer (what one instruction makes) lies where in which allocation. It holds
no times; they are found by walking the schedule: a buffer lives from the instruction that makes it to the last one
that reads it, through tuples, bitcasts, calls and loops, which hand buffers on without a copy. Buffers that share their
place and follow each other are one, updated in place. Arguments, constants and results are held for the whole program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from trustcore.errors import ProgramError
from trustcore.graph.hlo import Computation, Index, Instruction, Origin, Program
from trustcore.graph.wire import Message

Kind = Literal["argument", "result", "constant", "temporary"]
HOST = 5  # XLA's number for the host's memory
Values = dict[Index, frozenset[int]]  # the logical buffers that may stand at each place of an instruction's result


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A piece of memory for some time.

    Attributes:
        nbytes: its size.
        kind: what it is for.
        shape: `float32[8,128]`, of the value that it holds first.
        origin: of the instruction that makes it first.
        begin, end: steps of the schedule during which it is held, both included.
        number: of an argument; -1 for others.
    """

    nbytes: int
    kind: Kind
    shape: str
    origin: Origin
    begin: int
    end: int
    number: int = -1


@dataclasses.dataclass(frozen=True)
class _Logical:
    id: int
    nbytes: int
    instruction: int
    index: Index


@dataclasses.dataclass(frozen=True)
class _Allocation:
    nbytes: int
    kind: Kind
    number: int
    assigned: tuple[tuple[int, int, int], ...]  # (logical buffer, offset, size)


def buffers_of(program: Program, assignment: bytes) -> tuple[list[Buffer], list[Origin], int]:
    """Returns the buffers of a program, the origin of each step of its schedule, and the bytes of its allocations.

    Args:
        program: what `trustcore.graph.hlo.read_program` gives.
        assignment: XLA's serialized buffer assignment.

    Raises:
        ProgramError: they do not belong together.
    """
    logical, allocations = _read(assignment)
    times = _Times(program, logical)
    last = len(times.steps) - 1
    found: list[Buffer] = []
    for allocation in allocations:
        parts = [(*times.span(id), offset, size, logical[id]) for id, offset, size in allocation.assigned]
        if allocation.kind != "temporary":  # one place, held throughout; temporaries may have lain there before
            owner = max((*reversed(parts),), key=lambda part: (part[3], part[0]))[-1]
            places = [(0, last, allocation.nbytes, owner)]
        else:
            places = _places(parts)
        for begin, end, nbytes, owner in places:
            made = program.instruction(owner.instruction)
            origin = made.origin if made.origin.path else times.reader(owner.id)
            shape = str(made.shape.at(owner.index))
            found.append(Buffer(nbytes, allocation.kind, shape, origin, begin, end, allocation.number))
    return found, times.steps, sum(allocation.nbytes for allocation in allocations)


def _places(parts: Sequence[tuple[int, int, int, int, _Logical]]) -> list[tuple[int, int, int, _Logical]]:
    """Joins what lies at one place and touches in time: (begin, end, bytes, first owner)."""
    open_at: dict[int, list[Any]] = {}
    done: list[tuple[int, int, int, _Logical]] = []
    for begin, end, offset, size, owner in sorted(parts, key=lambda part: part[:4]):
        held = open_at.get(offset)
        if held is not None and begin <= held[1]:
            held[1], held[2] = max(held[1], end), max(held[2], size)
            continue
        if held is not None:
            done.append(tuple(held))
        open_at[offset] = [begin, end, size, owner]
    return [*done, *(tuple(held) for held in open_at.values())]


def _read(assignment: bytes) -> tuple[dict[int, _Logical], list[_Allocation]]:
    message = Message(assignment)
    logical = {}
    for m in message.messages(1):
        at = m.message(3)
        logical[m.number(1)] = _Logical(m.number(1), m.number(2), at.number(4), tuple(at.numbers(3)))
    allocations = []
    for m in message.messages(3):
        if m.number(3) or m.number(8) == HOST:  # of one thread, on its stack; or no memory of the device
            continue
        kind: Kind = "temporary"
        if m.number(5):
            kind = "argument"
        elif m.number(7):
            kind = "result"
        elif m.number(12):
            kind = "constant"
        assigned = tuple((a.number(1), a.number(2), a.number(3)) for a in m.messages(9))
        assigned = tuple(a for a in assigned if a[0] in logical)
        if assigned:
            allocations.append(_Allocation(m.number(2), kind, m.number(6) if m.number(5) else -1, assigned))
    if not allocations:
        raise ProgramError("this backend does not tell where the buffers of its programs lie.")
    return logical, allocations


class _Times:
    """From when to when each logical buffer is read, by walking the schedule once."""

    def __init__(self, program: Program, logical: dict[int, _Logical]):
        self.steps: list[Origin] = []
        self._program = program
        self._begin: dict[int, int] = {}
        self._end: dict[int, int] = {}
        self._readers: dict[int, Origin] = {}
        self._made: dict[int, list[tuple[Index, int]]] = {}
        for id, buffer in logical.items():
            self._made.setdefault(buffer.instruction, []).append((buffer.index, id))
        result = self._run(program.computations[program.entry], ())
        self._use([result])

    def span(self, id: int) -> tuple[int, int]:
        """The steps at which a logical buffer is made and last read."""
        begin = self._begin.get(id, 0)
        return begin, max(self._end.get(id, begin), begin)

    def reader(self, id: int) -> Origin:
        """Where the first instruction that reads a logical buffer, and has an origin, came from."""
        return self._readers.get(id, Origin())

    def _run(self, computation: Computation, arguments: Sequence[Values]) -> Values:
        values: dict[int, Values] = {}
        for instruction in computation.instructions:
            self.steps.append(instruction.origin)
            operands = [values.get(id, {}) for id in instruction.operands]
            result = self._result(instruction, operands, arguments)
            for index, id in self._made.get(instruction.id, ()):
                self._begin.setdefault(id, len(self.steps) - 1)
                result = {**result, index: frozenset((id,))}
            values[instruction.id] = result
        return values.get(computation.root, {})

    def _result(self, made: Instruction, operands: Sequence[Values], arguments: Sequence[Values]) -> Values:
        """What the instruction hands on from its operands; marks those that it reads."""
        if made.opcode == "parameter":
            return arguments[made.parameter] if made.parameter < len(arguments) else {}
        if made.opcode == "tuple":
            return {(i, *index): held for i, operand in enumerate(operands) for index, held in operand.items()}
        if made.opcode == "get-tuple-element":
            return {index[1:]: held for index, held in operands[0].items() if index[:1] == (made.element,)}
        if made.opcode in ("bitcast", "opt-barrier", "optimization-barrier"):
            return operands[0]
        self._use(operands)
        called = [self._program.computations[id] for id in made.called if id in self._program.computations]
        if made.opcode == "while":
            results = [operands[0], *(self._run(body, operands[:1]) for body in called)]
        elif made.opcode == "conditional":
            results = [self._run(body, [operand]) for body, operand in zip(called, operands[1:], strict=False)]
        elif made.opcode in ("call", "async-start"):
            results = [self._run(body, operands) for body in called]
        else:  # what a fusion computes has no buffers of its own
            return {}
        self._use(results)  # a loop holds what it carries to its end
        merged: Values = {}
        for result in results:
            for index, held in result.items():
                merged[index] = merged.get(index, frozenset()) | held
        return {} if made.opcode == "conditional" and not merged else merged

    def _use(self, values: Sequence[Values]) -> None:
        now = len(self.steps) - 1
        for value in values:
            for held in value.values():
                for id in held:
                    self._end[id] = now
                    if self.steps[now].path:
                        self._readers.setdefault(id, self.steps[now])
