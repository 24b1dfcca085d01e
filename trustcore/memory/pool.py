"""`Pool`: buffers on devices that are used again in place of being freed and allocated anew.

    get(shape, dtype)  ->  array        a free buffer of that kind, cleared in place; a fresh one where there is none
    give_back(arrays)                   the pool takes the buffers over

A buffer changes hands by donation. What is given back is donated to a program that hands it on, so that the pool has an
array that nobody else knows, and every earlier reference raises "Array has been deleted" instead of reading what a
later owner wrote. What somebody still looks at from outside of jax (a NumPy view, DLPack) cannot be donated: such
memory stays the onlooker's, and the pool takes nothing. Arrays that came of a lent one by donation may be given back in
its place; so may any other array.

What a pool saves is told in docs/memory.md: little where the platform's allocator keeps freed memory by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustcore import units
from trustcore.errors import PoolError
from trustcore.memory.access import Pattern
from trustcore.memory.eviction import Policy, policy_named
from trustcore.memory.limits import Fixed, Limit, Usage

LIMIT = 1 << 30  # bytes of free buffers, where no limit is given
AHEAD = 8  # requests that a limit is told the size of


class Kind(NamedTuple):
    """What makes two buffers the same. `sharding` is None where an array is on the default device uncommitted."""

    shape: tuple[int, ...]
    dtype: Any
    sharding: Any

    @property
    def nbytes(self) -> int:
        """Of all shards together."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class PoolStats:
    """What a pool has done so far.

    Attributes:
        hits, misses: requests that found a free buffer, and that did not.
        returned: buffers that came back.
        viewed: buffers that came back while somebody outside of jax looked at them, and were not kept.
        evictions: free buffers that were let go, by policy.
        prefetched, foreseen: buffers that were made ahead, and how many of them were asked for.
        lent, free: bytes that are out, and that wait.
        peak: the most of both together.
        limit: bytes that may wait, now.
    """

    hits: int
    misses: int
    returned: int
    viewed: int
    evictions: Mapping[str, int]
    prefetched: int
    foreseen: int
    lent: int
    free: int
    peak: int
    limit: int

    @property
    def hit_rate(self) -> float:
        """Share of requests that found a free buffer."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def utilization(self) -> float:
        """Share of the pool's bytes that are out."""
        return self.lent / max(self.lent + self.free, 1)

    def as_json(self) -> dict[str, Any]:
        """Returns all of it as plain data."""
        told = {**dataclasses.asdict(self), "evictions": dict(self.evictions)}
        return {**told, "hit_rate": self.hit_rate, "utilization": self.utilization}

    def __str__(self) -> str:
        gone = ", ".join(f"{n} by {name}" for name, n in self.evictions.items()) or "none"
        return (
            f"{self.hits + self.misses} requests, {self.hit_rate:.0%} found a buffer; {units.size(self.lent)} out, "
            f"{units.size(self.free)} free of {units.size(self.limit)}, peak {units.size(self.peak)}; "
            f"evictions: {gone}"
        )


class Pool:
    """Reusable buffers; see the head of this file. It may be used by threads side by side.

    Args:
        policy: which free buffer goes when there are too many: "lru", "lfu", "size", "arc", "hybrid", or a `Policy`.
        limit: bytes of free buffers that are kept, or a `Limit` (`Fixed`, `HitRate`, `Pressure`, `Predictive`).
        prefetch: buffers that are made ahead after each request, as the order of earlier requests lets expect.

    Raises:
        PoolError: no such policy; a number out of range.

    Example:
        >>> pool = Pool()
        >>> first = pool.get((4, 2), jnp.float32)
        >>> grown = jax.jit(lambda x: x + 1, donate_argnums=0)(first)
        >>> pool.give_back(grown)
        >>> pool.get((4, 2), jnp.float32).sum(), pool.stats.hits
        (Array(0., dtype=float32), 1)
    """

    def __init__(self, *, policy: str | Policy = "lru", limit: int | Limit = LIMIT, prefetch: int = 0):
        if prefetch < 0:
            raise PoolError(f"Pool: prefetch is {prefetch}; it must not be negative.")
        self._policy = policy_named(policy)
        self._limit: Limit = Fixed(limit) if isinstance(limit, int) else limit
        self._ahead = prefetch
        self._pattern: Pattern[Kind] = Pattern()
        self._lock = threading.RLock()
        self._free: dict[Kind, deque[tuple[jax.Array, bool]]] = {}  # and whether it was made ahead
        self._lent: Counter[Kind] = Counter()
        self._scopes = threading.local()
        self._evictions: Counter[str] = Counter()
        self._hits = self._misses = self._returned = self._viewed = self._prefetched = self._foreseen = 0
        self._free_bytes = self._lent_bytes = self._peak = 0

    def get(self, shape: Sequence[int], dtype: Any, sharding: Any = None, *, clear: bool = True) -> jax.Array:
        """Returns an array of zeros in a buffer of this pool.

        Args:
            shape, dtype: of it.
            sharding: where it lies; None: on the default device.
            clear: False leaves what its last owner wrote: for programs that write all of it.

        Raises:
            PoolError: no array has such a shape or dtype.
        """
        kind = _kind(shape, dtype, sharding)
        with self._lock:
            array, fresh = self._take(kind), False
            if array is None:
                array, fresh = _fresh(kind), True
            self._lent[kind] += 1
            self._lent_bytes += kind.nbytes
            self._note_peak()
            scope = self._scope()
            if clear and not fresh:
                array = _clearing(kind.sharding)(array)
            if scope is not None:
                scope.append((kind, array))
            self._keep_within()
            if self._ahead:
                self.prefetch(self._ahead)
        return array

    def take(self, shapes: Any, *, clear: bool = True) -> Any:
        """Returns `get` of every leaf of a tree of `jax.ShapeDtypeStruct`s or arrays."""
        return jax.tree.map(lambda s: self.get(s.shape, s.dtype, _placed(s), clear=clear), shapes)

    def give_back(self, tree: Any) -> None:
        """Takes over the buffers of all arrays in a tree; every other reference to them raises from now on.

        Raises:
            PoolError: an array is gone already: it was given back before, or donated to a program, whose result is to
                be given back in its place. Nothing is taken then.
        """
        arrays = {id(leaf): leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)}
        gone = [f"{a.dtype}{list(a.shape)}" for a in arrays.values() if a.is_deleted()]
        if gone:
            raise PoolError(
                f"give_back: {', '.join(gone[:3])}{' and more' if len(gone) > 3 else ''}: gone already. It was given "
                "back before, or donated to a program: give back what that program returned."
            )
        with self._lock:
            for array in arrays.values():
                self._add(array)
            self._keep_within()

    @contextlib.contextmanager
    def scope(self) -> Iterator[Pool]:
        """A context after which everything that this thread got within it is given back.

        Arrays that a program took over by donation are not followed: give back its result, or it is the program's.
        """
        scope: list[tuple[Kind, jax.Array]] = []
        stack = self._stack()
        stack.append(scope)
        try:
            yield self
        finally:
            stack.remove(scope)
            with self._lock:
                for kind, array in scope:
                    if array.is_deleted():
                        self._forget(kind)
                    else:
                        self._add(array)
                self._keep_within()

    def stage(self, tree: Any) -> Any:
        """Returns host arrays on the default device, copied into buffers of this pool; give them back when done.

        The host arrays may be written to again at once. On a CPU they are copied into free buffers in place. Elsewhere
        `jax.device_put` copies them: its buffers come of an allocator that keeps freed memory itself.
        """
        if jax.default_backend() != "cpu":
            return jax.block_until_ready(jax.device_put(tree))

        def staged(host: Any) -> jax.Array:
            host = np.asarray(host)
            host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
            return _written(self.get(host.shape, host.dtype, clear=False), host)

        return jax.block_until_ready(jax.tree.map(staged, tree))

    def prefetch(self, count: int) -> int:
        """Makes the buffers ahead that the next `count` requests are expected to want; returns how many it made.

        Nothing is evicted for them: what does not fit beside the free buffers is not made.
        """
        with self._lock:
            wanted: Counter[Kind] = Counter()
            made = 0
            for kind in self._pattern.predicted(count):
                wanted[kind] += 1
                if len(self._free.get(kind, ())) >= wanted[kind]:
                    continue
                if self._free_bytes + kind.nbytes > self._room():
                    break
                self._insert(kind, _fresh(kind), ahead=True)
                made += 1
            self._prefetched += made
            return made

    def predicted(self, count: int = 1) -> list[Kind]:
        """Returns the kinds that the next requests are expected to ask for."""
        with self._lock:
            return self._pattern.predicted(count)

    @property
    def stats(self) -> PoolStats:
        """What the pool has done so far."""
        with self._lock:
            return PoolStats(
                self._hits, self._misses, self._returned, self._viewed, dict(self._evictions), self._prefetched,
                self._foreseen, self._lent_bytes, self._free_bytes, self._peak, self._room(),
            )  # fmt: skip

    def clear(self) -> None:
        """Lets all free buffers go."""
        with self._lock:
            for waiting in self._free.values():
                for array, _ in waiting:
                    array.delete()
            self._free.clear()
            self._free_bytes = 0

    def __repr__(self) -> str:
        return f"<Pool: {self.stats}>"

    def _take(self, kind: Kind) -> jax.Array | None:
        """Notes a request; returns a free buffer of that kind, if there is one."""
        self._policy.requested(kind, kind.nbytes)
        self._pattern.requested(kind)
        waiting = self._free.get(kind)
        if not waiting:
            self._misses += 1
            return None
        self._hits += 1
        array, ahead = waiting.pop()  # the one that came last: caches still hold some of it
        self._foreseen += ahead
        if not waiting:
            del self._free[kind]
        self._free_bytes -= kind.nbytes
        return array

    def _add(self, array: jax.Array) -> None:
        kind = Kind(array.shape, array.dtype, _placed(array))
        scope = self._scope()
        if scope is not None:  # what was lent within this scope came back before its end, donated on the way or not
            at = next((i for i, (k, lent) in enumerate(scope) if lent is array), None)
            if at is None:
                at = next((i for i, (k, lent) in enumerate(scope) if k == kind and lent.is_deleted()), None)
            if at is not None:
                del scope[at]
        self._forget(kind)
        own = _hand_over(array)
        if not array.is_deleted():
            self._viewed += 1
            return
        self._returned += 1
        self._insert(kind, own, ahead=False)

    def _insert(self, kind: Kind, array: jax.Array, *, ahead: bool) -> None:
        self._free.setdefault(kind, deque()).append((array, ahead))
        self._free_bytes += kind.nbytes
        self._note_peak()

    def _forget(self, kind: Kind) -> None:
        if self._lent[kind] > 0:
            self._lent[kind] -= 1
            self._lent_bytes -= kind.nbytes

    def _keep_within(self) -> None:
        room = self._room()
        while self._free_bytes > room and self._free:
            kind = self._policy.victim({kind: kind.nbytes for kind in self._free})
            assert isinstance(kind, Kind)
            self._free[kind].popleft()[0].delete()
            self._free_bytes -= kind.nbytes
            if not self._free[kind]:
                del self._free[kind]
            self._evictions[self._policy.name] += 1

    def _room(self) -> int:
        """Bytes that free buffers may take now."""
        limit = self._limit
        return limit.nbytes if isinstance(limit, Fixed) else limit(self._usage())

    def _usage(self) -> Usage:
        predicted = sum(kind.nbytes for kind in self._pattern.predicted(AHEAD))
        return Usage(
            self._hits, self._misses, sum(self._evictions.values()), self._free_bytes, self._lent_bytes, predicted
        )

    def _note_peak(self) -> None:
        self._peak = max(self._peak, self._free_bytes + self._lent_bytes)

    def _stack(self) -> list[list[tuple[Kind, jax.Array]]]:
        if not hasattr(self._scopes, "stack"):
            self._scopes.stack = []
        return self._scopes.stack

    def _scope(self) -> list[tuple[Kind, jax.Array]] | None:
        stack = self._stack()
        return stack[-1] if stack else None


def _kind(shape: Sequence[int], dtype: Any, sharding: Any) -> Kind:
    try:
        kind = Kind(tuple(int(size) for size in shape), jnp.dtype(dtype), sharding)
    except TypeError as error:
        raise PoolError(f"get: shape {shape!r} and dtype {dtype!r} are those of no array: {error}") from error
    if any(size < 0 for size in kind.shape):
        raise PoolError(f"get: shape {shape!r} has a negative size.")
    return kind


def _placed(array: Any) -> Any:
    """The sharding that makes a kind: None for an array that may move freely from the default device."""
    if isinstance(array, jax.Array) and not array.committed and len(array.devices()) == 1:
        return None
    return getattr(array, "sharding", None)


def _fresh(kind: Kind) -> jax.Array:
    return jnp.zeros(kind.shape, kind.dtype, device=kind.sharding)


@functools.lru_cache(maxsize=64)
def _clearing(sharding: Any) -> Any:
    zeros = lambda array: jnp.zeros(array.shape, array.dtype)  # noqa: E731
    return jax.jit(zeros, donate_argnums=0, keep_unused=True, out_shardings=sharding)


def _written(array: jax.Array, host: np.ndarray) -> jax.Array:
    """Returns the array with other content, in its place on the CPU. Only the pool may know the array."""
    if jnp.issubdtype(array.dtype, jnp.number) and array.nbytes == host.nbytes and host.dtype.itemsize > 1:
        array.block_until_ready()
        memory = (ctypes.c_byte * array.nbytes).from_address(array.unsafe_buffer_pointer())
        np.copyto(np.frombuffer(memoryview(memory), host.dtype).reshape(host.shape), host)
        return array
    return _fill(array, host)  # of bits and bytes, which a device may hold packed


_hand_over = jax.jit(lambda array: array, donate_argnums=0)
_fill = jax.jit(lambda array, content: content, donate_argnums=0, keep_unused=True)
