"""What lies in device memory now, by the line that made it; what stays behind a block; and both as a flame graph.

    print(census())                          bytes and arrays by line of the user's code, largest first
    with leaks() as grown: train_step()      afterwards `grown` holds the lines that hold more than before

Read from the heap profile that jax keeps of its own (`jax.profiler.device_memory_profile`, a gzipped pprof message),
which knows the Python stack of every live buffer and of every compiled program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
from collections.abc import Iterator

import jax

from trustcore import units
from trustcore._jax import Frame
from trustcore.errors import ProgramError
from trustcore.graph.program import is_library, place
from trustcore.graph.wire import Message


@dataclasses.dataclass(frozen=True)
class Held:
    """Memory that one stack made.

    Attributes:
        nbytes: of all of it together.
        count: how many arrays (or programs) it is.
        kind: "buffer" or "executable".
        device: where it lies.
        stack: innermost frame first.
    """

    nbytes: int
    count: int
    kind: str
    device: str
    stack: tuple[Frame, ...]

    @property
    def frame(self) -> Frame:
        """The innermost line of the user's code, or the innermost of all."""
        own = (frame for frame in self.stack if frame.file and not is_library(frame.file))
        return next(own, self.stack[0] if self.stack else Frame("", 0, 0, "unknown"))


@dataclasses.dataclass(frozen=True)
class Census:
    """All memory that jax holds, of one moment."""

    held: tuple[Held, ...]

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return sum(h.nbytes for h in self.held if h.kind == "buffer")

    def by_line(self) -> dict[Frame, tuple[int, int]]:
        """Returns (bytes, arrays) of buffers by the line that made them, most bytes first."""
        found: dict[Frame, tuple[int, int]] = {}
        for h in self.held:
            if h.kind == "buffer":
                nbytes, count = found.get(h.frame, (0, 0))
                found[h.frame] = nbytes + h.nbytes, count + h.count
        return dict(sorted(found.items(), key=lambda item: -item[1][0]))

    def folded(self) -> str:
        """Returns a line `outer;inner bytes` for each stack, which tools for flame graphs read."""
        lines = []
        for h in self.held:
            if h.kind == "buffer" and h.nbytes:
                names = [_shown(f).replace(";", ",") for f in reversed(h.stack)]
                lines.append(f"{';'.join(names) or 'unknown'} {h.nbytes}")
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [f"{units.size(self.nbytes)} in {sum(h.count for h in self.held if h.kind == 'buffer')} arrays"]
        lines += [
            f"{units.size(n):>10} {count:6}  {_shown(frame)}" for frame, (n, count) in list(self.by_line().items())[:20]
        ]
        return "\n".join(lines)


def census(backend: str | None = None) -> Census:
    """Returns what lies in the memory of a platform's devices ("cpu", "gpu", "tpu"; None: the default one's).

    Raises:
        ProgramError: jax's profile cannot be read.
    """
    try:
        data = gzip.decompress(jax.profiler.device_memory_profile(backend))
    except (OSError, EOFError, RuntimeError) as error:
        raise ProgramError(f"census: jax gives no profile of this platform's memory: {error}") from error
    profile = Message(data)
    words = profile.texts(6)
    if not words:
        raise ProgramError("census: jax's profile of this platform's memory is empty.")
    word = lambda i: words[i] if 0 <= i < len(words) else ""  # noqa: E731
    functions = {m.number(1): (word(m.number(2)), word(m.number(4))) for m in profile.messages(5)}
    frames: dict[int, tuple[Frame, ...]] = {}
    for location in profile.messages(4):
        lines = [(functions.get(m.number(1), ("unknown", "")), m.number(2)) for m in location.messages(4)]
        frames[location.number(1)] = tuple(Frame(file, line, 0, name) for (name, file), line in lines)
    types = [word(m.number(1)) for m in profile.messages(1)]
    held = []
    for sample in profile.messages(2):
        values = dict(zip(types, sample.numbers(2), strict=False))
        labels = {word(m.number(1)): word(m.number(2)) for m in sample.messages(3)}
        stack = tuple(frame for id in sample.numbers(1) for frame in frames.get(id, ()))
        nbytes, count = values.get("space", 0), values.get("allocations", 0)
        held.append(Held(nbytes, count, labels.get("kind", ""), labels.get("device", ""), stack))
    return Census(tuple(held))


@dataclasses.dataclass
class Growth:
    """What `leaks` found; empty until its block ends.

    Attributes:
        lines: line -> (bytes, arrays) that it holds more than before, most bytes first.
    """

    lines: dict[Frame, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """In all."""
        return sum(nbytes for nbytes, _ in self.lines.values())

    def __str__(self) -> str:
        if not self.lines:
            return "nothing is left behind"
        told = [f"{units.size(n):>10} {count:6}  {_shown(frame)}" for frame, (n, count) in self.lines.items()]
        return "\n".join([f"{units.size(self.nbytes)} are left behind", *told])


@contextlib.contextmanager
def leaks(*, at_least: int = 1) -> Iterator[Growth]:
    """Notes which lines hold more arrays after the block than before, of `at_least` bytes each.

    Run a step or two before: what is made once is no leak.

    Raises:
        ProgramError: jax's profile cannot be read.
    """
    before = census().by_line()
    grown = Growth()
    yield grown
    after = census().by_line()
    change = {}
    for frame in {**after, **before}:
        (now, count), (then, old) = after.get(frame, (0, 0)), before.get(frame, (0, 0))
        change[frame] = now - then, count - old
    # A variable that another line set before holds as much as it did: `x = step(x)`.
    gone = [held for held in change.values() if held[0] < 0]
    left = {}
    for frame, held in sorted(change.items(), key=lambda item: -item[1][0]):
        if (-held[0], -held[1]) in gone:
            gone.remove((-held[0], -held[1]))
        elif held[0] >= at_least and held[1] > 0:
            left[frame] = held
    grown.lines = left


def _shown(frame: Frame) -> str:
    return f"{frame.function} ({place(frame)})"
