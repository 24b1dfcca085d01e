"""What XLA made one kernel of, what it kept apart, and how many bytes that moves: read off the compiled program.

    fusions(fn, *args) -> Fused        kernels in the order of their schedule; values that one hands to another

A kernel is an instruction of the schedule that computes: a fusion, a library call (product, convolution, custom call),
a sort, a copy. Its bytes are those of its operands and results: what a kernel slices it reads less of, so that they
bound the traffic from above. A value that is written by one kernel and read by others costs its size once more for
each of them; `apart` lists such values with the reason. What lies in a loop is counted once (`in_loop` says so): XLA's
schedule does not tell how often it runs.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from trustcore import units
from trustcore._jax import Frame, compiled_with_lines
from trustcore.graph.hlo import Computation, Instruction, Program, Shape, read_program
from trustcore.graph.program import place

_FREE = frozenset(
    {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "opt-barrier", "partition-id",
     "replica-id", "iota", "add-dependency", "domain", "call-start"}
)  # fmt: skip
_LIBRARY = frozenset({"dot", "convolution", "custom-call", "sort", "fft", "cholesky", "triangular-solve", "scatter",
                      "all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "rng",
                      "rng-bit-generator", "outfeed", "infeed", "conditional"})  # fmt: skip


_CONTROL = ("while", "conditional", "call")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        name: XLA's name of it.
        kind: "fusion", or the opcode.
        operations: the operations of the program that it computes, with how often.
        places: source lines that they come from.
        scope: the module or name scope that most of them belong to.
        read, written: bytes.
        in_loop: whether it is part of a loop.
    """

    name: str
    kind: str
    operations: tuple[tuple[str, int], ...]
    places: tuple[str, ...]
    scope: str
    read: float
    written: float
    in_loop: bool

    @property
    def label(self) -> str:
        """Its operations in a few words."""
        parts = [name if count == 1 else f"{count} {name}" for name, count in self.operations[:5]]
        rest = len(self.operations) - 5
        return ", ".join(parts) + (f" and {rest} more" if rest > 0 else "") or self.kind


@dataclasses.dataclass(frozen=True)
class Apart:
    """A value that one kernel writes and others read.

    Attributes:
        writer, readers: kernels.
        nbytes: written once and read by each reader: what one kernel in their place would not move.
        reason: why they are not one.
    """

    writer: Kernel
    readers: tuple[Kernel, ...]
    nbytes: float
    reason: str


@dataclasses.dataclass(frozen=True)
class Fused:
    """The kernels of a compiled program.

    Attributes:
        kernels: in the order of their schedule.
        apart: the values between them, the largest first.
    """

    kernels: tuple[Kernel, ...]
    apart: tuple[Apart, ...]

    @property
    def nbytes(self) -> float:
        """Read and written by all."""
        return sum(kernel.read + kernel.written for kernel in self.kernels)

    @property
    def avoidable(self) -> float:
        """Bytes between kernels of which neither is a library call: what fusing could save at most."""
        return sum(each.nbytes for each in self.apart if each.reason == _HEURISTIC)

    def of(self, operation: str) -> tuple[Kernel, ...]:
        """Returns the kernels that compute an operation, by its name in the jaxpr."""
        return tuple(kernel for kernel in self.kernels if any(name == operation for name, _ in kernel.operations))

    def table(self, top: int = 12) -> str:
        """Returns the kernels that move most, and the values that are most costly to hand over."""
        whole = self.nbytes or 1.0
        lines = [f"{len(self.kernels)} kernels move {units.size(self.nbytes)}", "     bytes   share  kernel"]
        for kernel in sorted(self.kernels, key=lambda k: -(k.read + k.written))[:top]:
            moved = kernel.read + kernel.written
            at = f" ({', '.join(kernel.places[:3])})" if kernel.places else ""
            loop = ", in a loop" if kernel.in_loop else ""
            scope = f" in {kernel.scope}" if kernel.scope else ""
            told = f"{kernel.kind}: {kernel.label}{scope}{loop}{at}"
            lines.append(f"{units.size(moved):>10} {100 * moved / whole:6.1f}%  {told}")
        lines.append("kept apart:")
        for each in self.apart[:top]:
            readers = "; ".join(kernel.label for kernel in each.readers[:2])
            lines.append(f"{units.size(each.nbytes):>10}  [{each.writer.label}] -> [{readers}]: {each.reason}")
        return "\n".join(lines)

    __str__ = table


_HEURISTIC = "XLA's heuristics kept them apart"


def fusions(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Fused:
    """Returns the kernels that XLA makes of `fn(*args, **kwargs)` here; it is compiled, not run.

    Args:
        fn: a function of arrays in pytrees; jitted functions are compiled as they are, with their donations.
        args, kwargs: its arguments, arrays or their types.

    Raises:
        ProgramError: the backend does not show its compiled program.
    """
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    with compiled_with_lines():
        return fusions_of(jitted.lower(*args, **kwargs).compile())


def fusions_of(compiled: Any) -> Fused:
    """Returns the same of a program that was compiled already."""
    return _Reader(read_program(compiled)).read()


class _Reader:
    def __init__(self, program: Program):
        self.program = program
        self.kernels: list[Kernel] = []
        self.made: dict[int, Kernel] = {}
        self.apart: list[Apart] = []

    def read(self) -> Fused:
        self.computation(self.program.computations[self.program.entry], in_loop=False)
        return Fused(tuple(self.kernels), tuple(sorted(self.apart, key=lambda each: -each.nbytes)))

    def computation(self, computation: Computation, *, in_loop: bool) -> None:
        own = [i for i in computation.instructions if i.opcode not in _FREE]
        for instruction in own:
            if instruction.opcode in _CONTROL and not self._is_one(instruction):
                inside = in_loop or instruction.opcode == "while"
                for called in instruction.called:
                    self.computation(self.program.computations[called], in_loop=inside)
                continue
            kernel = self.kernel(instruction, in_loop)
            self.kernels.append(kernel)
            self.made[instruction.id] = kernel
        readers: dict[int, list[Kernel]] = collections.defaultdict(list)
        for instruction in own:
            if instruction.id in self.made:
                for source in {self.source(operand) for operand in instruction.operands}:
                    if source in self.made:
                        readers[source].append(self.made[instruction.id])
        for source, found in readers.items():
            moved = nbytes(self.program.instruction(source).shape) * (1 + len(found))
            self.apart.append(Apart(self.made[source], tuple(found), moved, self.reason(source, found)))

    def _is_one(self, instruction: Instruction) -> bool:
        """Whether a call holds one kernel: the CPU's backend splits a fusion among threads that way."""
        if instruction.opcode != "call":
            return False
        inner = self.program.computations[instruction.called[0]].instructions
        own = [i for i in inner if i.opcode not in _FREE]
        return len(own) == 1 and (own[0].opcode not in _CONTROL or self._is_one(own[0]))

    def source(self, id: int) -> int:
        """The instruction that computes an operand, beneath bitcasts and parts of tuples."""
        instruction = self.program.instruction(id)
        while instruction.opcode in ("bitcast", "get-tuple-element", "opt-barrier") and instruction.operands:
            instruction = self.program.instruction(instruction.operands[0])
        return instruction.id

    def kernel(self, instruction: Instruction, in_loop: bool) -> Kernel:
        inner = list(self.inner(instruction))
        names = collections.Counter(_operation(i) for i in inner)
        places = collections.Counter(
            place(Frame(i.origin.file, i.origin.line, 0, "")) for i in inner if i.origin.file and i.origin.line
        )
        scopes = collections.Counter(i.origin.scope for i in inner if i.origin.path)
        operands = {self.source(operand): self.program.instruction(operand).shape for operand in instruction.operands}
        kind = inner[0].opcode if len(inner) == 1 else "fusion"
        kinds = {i.opcode for i in inner}
        kind = next((k for k in ("dot", "convolution", "custom-call") if k in kinds and len(kinds - _PLAIN) <= 1), kind)
        return Kernel(
            name=instruction.name,
            kind=kind,
            operations=tuple(names.most_common()),
            places=tuple(name for name, _ in places.most_common()),
            scope=scopes.most_common(1)[0][0] if scopes else "",
            read=sum(map(nbytes, operands.values())),
            written=nbytes(instruction.shape),
            in_loop=in_loop,
        )

    def inner(self, instruction: Instruction) -> Any:
        """The instructions that a kernel computes."""
        if instruction.opcode not in ("fusion", "call"):
            yield instruction
            return
        for called in instruction.called[:1]:
            for each in self.program.computations[called].instructions:
                if each.opcode not in _FREE:
                    yield from self.inner(each)

    def reason(self, source: int, readers: list[Kernel]) -> str:
        writer = self.made[source]
        if writer.kind in _LIBRARY:
            return f"{writer.kind} stores its result"
        if any(reader.kind in _LIBRARY for reader in readers):
            which = next(reader.kind for reader in readers if reader.kind in _LIBRARY)
            return f"{which} reads its operands from memory"
        if len(readers) > 1:
            return f"{len(readers)} kernels read it"
        return _HEURISTIC


_PLAIN = frozenset({"bitcast", "copy", "transpose", "reshape", "convert", "broadcast", "parameter", "tuple"})


def _operation(instruction: Instruction) -> str:
    last = instruction.origin.path.rpartition("/")[2]
    return last if last and not last.endswith(")") else instruction.opcode


def nbytes(shape: Shape) -> float:
    """Returns how many bytes a value takes; of a tuple, all of its arrays together."""
    if shape.elements is not None:
        return sum(map(nbytes, shape.elements))
    return math.prod(shape.dims) * shape.bits / 8
