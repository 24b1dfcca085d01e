"""The tile engine of Ampere and Ada: cp.async and mma.sync. What runs on it: `mosaic_kernels.py`.

A block of threads is one warpgroup, 4 warps that share the rows of a tile. It copies the blocks of the step that
comes `stages - 1` later, then computes its own; all copies of one step are waited for together, which is what cp.async
counts. Beyond the last block the last is copied again, so that the count stays the same in every step. Operands of
mma.sync come from shared memory by ldmatrix; sums are float32 in registers.

cp.async knows no bounds: operands are padded in memory to whole tiles and blocks where T or S are none. Its tiles are
the last two axes, so operands are seen as `[B, T, N H]`. Numbers of rows (log-sum-exp, delta) are read from global
memory where they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import _compat
from kernels_pallas.attention.blocks import padded
from kernels_pallas.attention.mosaic_kernels import Blocks, Engine, Made

NUMBERS = ("lse", "delta")
INNER = 16  # what one mma.sync sums up
SWIZZLE = 2 * INNER  # bytes of a row of a tile in shared memory: wider ones bring more operands into registers at once


def workers(kernel: str, more: bool) -> int:
    """Returns how many warpgroups compute."""
    del kernel, more
    return 1


def blocks_of(size: int, kernel: str, more: bool) -> Blocks:
    """Returns the blocks of `kernel` ("forward", "dq" or "dkv") for a head size.

    The largest tried that do not spill, of which two blocks of threads fit an A100's multiprocessor. `more` is a window
    or a soft cap.
    """
    if kernel == "forward" and not more:
        return Blocks(64, 2, 128) if size == 64 else Blocks(32, 2, 128)
    if size == 64 or kernel == "forward":
        return Blocks(64, 2, 64)
    return Blocks(16 if more and kernel == "dkv" else 32, 2, 64)


def operand(made: Made, x: jax.Array, *, queries: bool) -> jax.Array:
    """`[B, T, N, H]` as `[B, T, N H]`, with T filled up to whole tiles or blocks."""
    x = padded(x, 1, made.filled(x.shape[1], queries=queries))
    return x.reshape(*x.shape[:2], -1)


def numbers(made: Made, x: jax.Array, other: float) -> jax.Array:
    """A number of each query, `[B, N, T]`, filled up to whole tiles or blocks."""
    return padded(x, 2, made.filled(made.length, queries=True), constant_values=other)


def result(made: Made, x: jax.Array, rows: int) -> jax.ShapeDtypeStruct:
    """The type of an output like x, `[B, T, N, H]`, of that many rows."""
    return jax.ShapeDtypeStruct((x.shape[0], rows, x.shape[2] * x.shape[3]), x.dtype)


def extents(made: Made) -> tuple[int, int]:
    """Lengths of an output by row of the tile, and of the numbers that go with it."""
    return made.tiles * made.tile, made.tiles * made.tile


def scratch(made: Made, kernel: str) -> dict[str, Any]:
    """Shared memory of a kernel by name."""
    rows, size, value_size = made.blocks.rows, made.size, made.value_size
    own = {"forward": {"query": size}, "dq": {"query": size, "cotangent": value_size}}
    own["dkv"] = {"key": size, "value": value_size}
    if kernel == "forward" and value_size != size:
        own["forward"]["out"] = value_size
    ring = {"query": size, "cotangent": value_size} if kernel == "dkv" else {"key": size, "value": value_size}
    found = {name: _tiles(made, 1, rows, n) for name, n in own[kernel].items()}
    return found | {f"ring {name}": _tiles(made, made.blocks.stages, made.blocks.length, n) for name, n in ring.items()}


def threads(made: Made) -> dict[str, Any]:
    """One warpgroup: nothing to say."""
    return {}


def _tiles(made: Made, count: int, rows: int, size: int) -> Any:
    plgpu = _compat.mosaic_gpu()
    transforms = (plgpu.TilingTransform((8, INNER)), plgpu.SwizzleTransform(SWIZZLE))
    return plgpu.SMEM((count, rows, size), made.dtype, transforms=transforms)


class Ampere(Engine):
    """One warpgroup that moves and computes."""

    alone = True

    @property
    def layout(self) -> Any:
        """That of wgmma's sums, which equals `MMA_ACC` of four warps over the rows."""
        return self.plgpu.Layout.WGMMA

    def roles(self, move: Callable[[], None], work: Callable[[], None]) -> None:
        """One after the other: the first copies are under way when computing begins."""
        move()
        work()

    def query_rows(self, name: str, start: Any, count: int, head: Any) -> Any:
        """Rows of `[B, T, N H]`, or of numbers `[B, N, T]`."""
        if name in NUMBERS:
            return super().query_rows(name, start, count, head)
        return self._part(self.refs[name], start, count, head, self._size(name))

    def key_rows(self, name: str, start: Any, count: int, head: Any) -> Any:
        """Rows of `[B, S, K H]`."""
        return self._part(self.refs[name], start, count, head, self._size(name))

    def _size(self, name: str) -> int:
        return self.made.size if name in ("query", "key") else self.made.value_size

    def _part(self, ref: Any, start: Any, count: int, head: Any, size: int) -> Any:
        return ref.at[self.batch, pl.ds(start, count), pl.ds(head * size, size)]

    def stream(self, first: Any, steps: Any, sources: dict[str, Callable[[Any], Any]]) -> None:
        """Begins with the first steps; `wait` goes on."""
        self.first, self.steps, self.sources = first, steps, sources

        @pl.when(steps > 0)
        def _() -> None:
            for i in range(self.made.blocks.stages - 1):
                self._start(jnp.int32(i))

    def _start(self, step: Any) -> None:
        """Begins to copy the blocks of a step; those of the last once more where there is no such step."""
        slot, step = lax.rem(step, self.made.blocks.stages), lax.min(step, self.steps - 1)
        for name in self._streamed():
            self._copy(self.sources[name](self.first + step), self.place[f"ring {name}"].at[slot])

    def _streamed(self) -> list[str]:
        return [name for name in self.sources if name not in NUMBERS]

    def _copy(self, source: Any, buffer: Any) -> None:
        if self.made.interpret:  # the interpreter has no copy without a barrier
            buffer[...] = source[...]
            return
        inside = self.plgpu.OOBFillMode.PROMISE_IN_BOUNDS
        self.plgpu.copy_gmem_to_smem(source, buffer, oob_mode=inside)

    def _arrived(self, but: int) -> None:
        """Waits for all copies but that many of the last, and for all threads."""
        if not self.made.interpret:
            self.plgpu.wait_gmem_to_smem(but)

    def wait(self, name: str, step: Any) -> Any:
        """Returns the buffer of a step; the first source's waits for all of the step, and begins a later one."""
        if name in NUMBERS:
            return self.sources[name](self.first + step)
        streamed, stages = self._streamed(), self.made.blocks.stages
        if name == streamed[0]:
            self._arrived((stages - 2) * len(streamed))
            self._start(step + (stages - 1))  # into the buffers of the step before, which all threads have read
        return self.place[f"ring {name}"].at[lax.rem(step, stages)]

    def free(self, name: str, step: Any) -> None:
        """Nothing to say: the next step waits for all threads."""

    def fetch(self, sources: dict[str, Any]) -> None:
        """Copies this worker's own parts, and waits for all copies."""
        self.fetched = sources
        for name, source in sources.items():
            if name not in NUMBERS:
                self._copy(source, self.own(name))
        self._arrived(0)

    def numbers(self, name: str, axis: int, buffer: Any = None) -> jax.Array:
        """Reads numbers of rows or columns from global memory."""
        buffer = self.fetched[name] if buffer is None else buffer
        return self.plgpu.load(buffer, layout=self.layout.reduce(axis), optimized=False)

    def product(self, a: Any, b: Any) -> jax.Array:
        """The float32 product `a b^T`."""
        return self._multiplied(self.full((a.shape[0], b.shape[0]), 0.0), a, _compat.transposed(b))

    def started(self, start: jax.Array, a: Any, b: Any, axis: int) -> jax.Array:
        """`a b^T` upon numbers of rows or columns."""
        start = lax.broadcast_in_dim(start, (a.shape[0], b.shape[0]), [axis])
        return self._multiplied(start, a, _compat.transposed(b))

    def added(self, name: str, sums: Any, a: jax.Array, b: Any) -> jax.Array:
        """`sums + a b`."""
        return self._multiplied(sums, a, b)

    def _multiplied(self, sums: jax.Array, a: Any, b: Any) -> jax.Array:
        """`sums + a b`, step by step over what is summed up, so that few operands are in registers at once."""
        if self.made.interpret:  # the interpreter has no mma
            return sums + jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
        plgpu = self.plgpu
        left, right = plgpu.Layout.MMA_LHS(self.made.dtype), plgpu.Layout.MMA_RHS(self.made.dtype)
        if isinstance(a, jax.Array):
            a = _compat.left_operand(a)
            for k in range(0, a.shape[1], INNER):
                part = lax.slice(a, (0, k), (a.shape[0], k + INNER))
                sums = plgpu.mma(sums, part, plgpu.load(b.at[pl.ds(k, INNER), :], layout=right))
            return sums
        for k in range(0, a.shape[1], INNER):
            part = plgpu.load(a.at[:, pl.ds(k, INNER)], layout=left)
            sums = plgpu.mma(sums, part, plgpu.load(b.at[pl.ds(k, INNER), :], layout=right))
        return sums

    def store(self, x: jax.Array, buffer: Any, out: Any) -> None:
        """Through shared memory, so that a thread writes 16 neighbouring bytes."""
        self._arrived(0)
        buffer[...] = x.astype(self.made.dtype)  # all threads wait before and after; no fence is known here
        layout = self.plgpu.Layout.SMEM_GMEM_COPY(buffer.shape, self.made.dtype, SWIZZLE)
        rows = self._part(out, self.start, self.rows, self.head, x.shape[1])
        self.plgpu.store(rows, self.plgpu.load(buffer, layout=layout), optimized=False)

    def store_numbers(self, x: jax.Array, out: Any) -> None:
        """Writes a number of each row, straight from registers."""
        self.plgpu.store(out.at[self.batch, self.head, pl.ds(self.start, self.rows)], x, optimized=False)
