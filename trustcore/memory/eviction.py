"""Which free buffer of a pool goes when there are too many: five policies over kinds of buffers.

A kind is a (shape, dtype, sharding); buffers of one kind are all the same. A policy is told of every request, and asked
for a victim among the kinds that have free buffers:

    lru      the kind whose last request lies farthest back
    lfu      the kind with the fewest requests; of several, the least recent
    size     the kind with the largest buffers; of several, the least recent
    arc      kinds requested once (T1) and those requested again (T2) share the room; to which of them evicted kinds
             (B1, B2) come back says how the room is divided. Megiddo and Modha, FAST 2003, counted in bytes
    hybrid   the kind with the least L + requests / bytes, L being that of the last victim: recency, frequency and size
             at once (GreedyDual-Size-Frequency; Cherkasova, HPL-98-69)

Policies hold no buffers and no locks: the pool does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Protocol

from trustcore.errors import PoolError

MOST_KINDS = 4096  # that a policy remembers, those that hold nothing any more among them


class Policy(Protocol):
    """What a pool asks of a policy.

    Attributes:
        name: under which its evictions are counted.
    """

    name: str

    def requested(self, kind: Hashable, nbytes: int) -> None:
        """Notes that a buffer of a kind was asked for, whether there was one or not."""
        ...

    def victim(self, free: Mapping[Hashable, int]) -> Hashable:
        """Returns the kind that loses a buffer, of those given with the bytes of one buffer each; never empty."""
        ...


class _Counted:
    """Requests of each kind, the least recent first."""

    def __init__(self) -> None:
        self.requests: OrderedDict[Hashable, int] = OrderedDict()

    def requested(self, kind: Hashable, nbytes: int) -> None:
        """See `Policy`."""
        del nbytes
        self.requests[kind] = self.requests.get(kind, 0) + 1
        self.requests.move_to_end(kind)
        while len(self.requests) > MOST_KINDS:
            self.requests.popitem(last=False)

    def age(self) -> dict[Hashable, int]:
        """Returns the place of each kind, 0 for the least recent; kinds that are not remembered have none."""
        return {kind: i for i, kind in enumerate(self.requests)}


class LRU(_Counted):
    """See the head of this file."""

    name = "lru"

    def victim(self, free: Mapping[Hashable, int]) -> Hashable:
        """See `Policy`."""
        age = self.age()
        return min(free, key=lambda kind: age.get(kind, -1))


class LFU(_Counted):
    """See the head of this file."""

    name = "lfu"

    def victim(self, free: Mapping[Hashable, int]) -> Hashable:
        """See `Policy`."""
        age = self.age()
        return min(free, key=lambda kind: (self.requests.get(kind, 0), age.get(kind, -1)))


class Size(_Counted):
    """See the head of this file."""

    name = "size"

    def victim(self, free: Mapping[Hashable, int]) -> Hashable:
        """See `Policy`."""
        age = self.age()
        return min(free, key=lambda kind: (-free[kind], age.get(kind, -1)))


class ARC:
    """See the head of this file.

    Attributes:
        target: bytes that kinds requested once may hold before they are the ones to go.
    """

    name = "arc"

    def __init__(self) -> None:
        self.once: OrderedDict[Hashable, int] = OrderedDict()  # T1 and T2: bytes of a buffer, the least recent first
        self.again: OrderedDict[Hashable, int] = OrderedDict()
        self.once_gone: OrderedDict[Hashable, int] = OrderedDict()  # B1 and B2
        self.again_gone: OrderedDict[Hashable, int] = OrderedDict()
        self.target = 0.0

    def requested(self, kind: Hashable, nbytes: int) -> None:
        """See `Policy`."""
        ghosts = sum(self.once_gone.values()), sum(self.again_gone.values())
        if kind in self.once or kind in self.again:
            self.once.pop(kind, None)
        elif kind in self.once_gone:
            self.target += nbytes * max(1.0, ghosts[1] / max(ghosts[0], 1))
            del self.once_gone[kind]
        elif kind in self.again_gone:
            self.target = max(0.0, self.target - nbytes * max(1.0, ghosts[0] / max(ghosts[1], 1)))
            del self.again_gone[kind]
        else:
            self.once[kind] = nbytes
            return
        self.again[kind] = nbytes
        self.again.move_to_end(kind)

    def victim(self, free: Mapping[Hashable, int]) -> Hashable:
        """See `Policy`."""
        once = [kind for kind in self.once if kind in free]
        again = [kind for kind in self.again if kind in free]
        known = {*once, *again}
        stray = next((kind for kind in free if kind not in known), None)
        if stray is not None:
            return stray
        held = sum(free[kind] for kind in once)
        from_once = bool(once) and (held > self.target or not again)
        kind = once[0] if from_once else again[0]
        source, ghosts = (self.once, self.once_gone) if from_once else (self.again, self.again_gone)
        ghosts[kind] = source.pop(kind)
        for gone in (self.once_gone, self.again_gone):
            while len(gone) > MOST_KINDS:
                gone.popitem(last=False)
        # The target stays within what is there to divide.
        self.target = min(self.target, float(sum((*self.once.values(), *self.again.values(), *ghosts.values()))))
        return kind


class Hybrid(_Counted):
    """See the head of this file.

    Attributes:
        floor: the priority of the last victim, to which those of later requests are added.
    """

    name = "hybrid"

    def __init__(self) -> None:
        super().__init__()
        self.floor = 0.0
        self.priority: dict[Hashable, float] = {}

    def requested(self, kind: Hashable, nbytes: int) -> None:
        """See `Policy`."""
        super().requested(kind, nbytes)
        self.priority[kind] = self.floor + self.requests[kind] / max(nbytes, 1)
        if len(self.priority) > 2 * MOST_KINDS:
            self.priority = {kind: p for kind, p in self.priority.items() if kind in self.requests}

    def victim(self, free: Mapping[Hashable, int]) -> Hashable:
        """See `Policy`."""
        kind = min(free, key=lambda kind: self.priority.get(kind, -1.0))
        self.floor = max(self.floor, self.priority.get(kind, 0.0))
        return kind


POLICIES = {made.name: made for made in (LRU, LFU, Size, ARC, Hybrid)}


def policy_named(name: str | Policy) -> Policy:
    """Returns a policy of that name without a past; a policy itself as it is.

    Raises:
        PoolError: there is none of that name.
    """
    if not isinstance(name, str):
        return name
    if name not in POLICIES:
        raise PoolError(f"policy {name!r} is none of {', '.join(POLICIES)}.")
    return POLICIES[name]()
