"""What is asked for next, learned from what was asked for after what.

    next(a, b) = the kind that most often followed the kinds a, b; without a past for both, that which followed b alone

A Markov chain of second order over requests, with one of first order behind it. Loops that ask for the same buffers in
the same order are predicted after one turn.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

MOST_CONTEXTS = 1024

K = TypeVar("K", bound=Hashable)


class Pattern(Generic[K]):
    """The order of requests so far."""

    def __init__(self) -> None:
        self._after: OrderedDict[tuple[K, ...], Counter[K]] = OrderedDict()
        self._last: tuple[K, ...] = ()

    def requested(self, kind: K) -> None:
        """Notes a request."""
        for context in (self._last, self._last[1:]):
            if context:
                self._after.setdefault(context, Counter())[kind] += 1
                self._after.move_to_end(context)
        while len(self._after) > MOST_CONTEXTS:
            self._after.popitem(last=False)
        self._last = (*self._last, kind)[-2:]

    def predicted(self, count: int) -> list[K]:
        """Returns the next `count` kinds that are expected, fewer where nothing is known of what follows."""
        last, found = self._last, list[K]()
        while len(found) < count:
            followers = self._after.get(last) or self._after.get(last[1:])
            if not followers:
                break
            found.append(followers.most_common(1)[0][0])
            last = (*last, found[-1])[-2:]
        return found
