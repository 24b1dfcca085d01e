"""What changed between two accounts: of a function before and after a change, with and without remat, of two dtypes.

    print(difference(account(before, *args), account(after, *args)))

Buffers that are live at the peak of each are added up by owner, kind and shape, and the sums compared.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from trustcore import units
from trustcore.memory.account import Account

FIGURES = ("peak", "arguments", "results", "temporaries", "allocated", "host")


@dataclasses.dataclass(frozen=True)
class Change:
    """Buffers of one owner, kind and shape at the peaks: bytes and how many, before and after."""

    owner: str
    kind: str
    shape: str
    before: int
    after: int
    count_before: int
    count_after: int

    @property
    def nbytes(self) -> int:
        """By how many bytes it grew; negative where it shrank."""
        return self.after - self.before

    def __str__(self) -> str:
        counts = f"{self.count_before} -> {self.count_after}"
        return f"{_signed(self.nbytes):>11}  {counts:>10}  {self.kind:9}  {self.shape:28}  {self.owner}"


@dataclasses.dataclass(frozen=True)
class Difference:
    """What `difference` found.

    Attributes:
        before, after: the accounts' figures by name.
        changes: what takes more or less at the peak, the largest change first.
    """

    before: dict[str, int]
    after: dict[str, int]
    changes: tuple[Change, ...]

    def as_json(self) -> dict[str, Any]:
        """Returns all of it as plain data."""
        return {**dataclasses.asdict(self), "changes": [dataclasses.asdict(change) for change in self.changes]}

    def __str__(self) -> str:
        lines = [
            f"{name}: {units.size(self.before[name])} -> {units.size(self.after[name])} "
            f"({_signed(self.after[name] - self.before[name])})"
            for name in FIGURES
            if self.before[name] or self.after[name]
        ]
        if not self.changes:
            lines.append("the same buffers at both peaks")
        return "\n".join([*lines, *(str(change) for change in self.changes[:20])])


def difference(before: Account, after: Account) -> Difference:
    """Returns what the second account has more and less than the first."""
    sums: dict[tuple[str, str, str], list[int]] = {}
    for side, account in enumerate((before, after)):
        for buffer in account.largest(len(account.buffers)):
            held = sums.setdefault((str(buffer.origin), buffer.kind, buffer.shape), [0, 0, 0, 0])
            held[side] += buffer.nbytes
            held[2 + side] += 1
    changes = [Change(*key, *found) for key, found in sums.items() if found[0] != found[1] or found[2] != found[3]]
    changes.sort(key=lambda change: (-abs(change.nbytes), change.owner))
    figures = [{name: getattr(account, name) for name in FIGURES} for account in (before, after)]
    return Difference(figures[0], figures[1], tuple(changes))


def _signed(nbytes: int) -> str:
    return f"{'+' if nbytes > 0 else '-' if nbytes < 0 else ''}{units.size(abs(nbytes))}"
