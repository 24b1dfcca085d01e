"""The tile engine of Hopper: TMA, wgmma, and warpgroups that specialize. What runs on it: `mosaic_kernels.py`.

A block of threads is three warpgroups. One moves: it copies blocks by TMA into a ring of `stages` buffers and waits
until they were read. Two compute, each 64 rows of the tile, by wgmma with float32 sums in registers. In the forward
pass they take turns: while one computes exponentials, the other's products keep the tensor cores busy (Shah et al.,
arXiv 2407.08608, section 3.1).

TMA fills what lies beyond T and S with zeros and drops what is written there, so operands are padded in memory only to
whole rows of 8 tokens, which its tiles want, and log-sum-exp and delta to whole blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import _compat
from kernels_pallas.attention.blocks import padded
from kernels_pallas.attention.mosaic_kernels import Blocks, Engine, Made


def workers(kernel: str, more: bool) -> int:
    """Returns how many warpgroups compute."""
    del kernel, more
    return 2


def blocks_of(size: int, kernel: str, more: bool) -> Blocks:
    """Returns the blocks of `kernel` ("forward", "dq" or "dkv") for a head size: the largest that do not spill."""
    del more  # what spills with a window or a soft cap is refused
    if kernel == "forward":
        return Blocks(128, 3 if size == 64 else 2) if size <= 128 else Blocks(64, 2)
    return Blocks(64, 3 if size == 64 else 2)


def operand(made: Made, x: jax.Array, *, queries: bool) -> jax.Array:
    """`[B, T, N, H]`, or numbers `[B, N, T]` or `[B, S]`, with T filled up as far as TMA wants it."""
    return padded(x, 1, pl.cdiv(x.shape[1], 8) * 8)


def numbers(made: Made, x: jax.Array, other: float) -> jax.Array:
    """A number of each query, `[B, N, T]`, filled up to whole tiles and blocks."""
    return padded(x, 2, _both(made), constant_values=other)


def result(made: Made, x: jax.Array, rows: int) -> jax.ShapeDtypeStruct:
    """The type of an output like x, `[B, T, N, H]`, of that many rows."""
    return jax.ShapeDtypeStruct((x.shape[0], rows, *x.shape[2:]), x.dtype)


def extents(made: Made) -> tuple[int, int]:
    """Lengths of an output by row of the tile, and of the numbers that go with it."""
    return pl.cdiv(made.extent, 8) * 8, made.tiles * made.tile


def _both(made: Made) -> int:
    rows = pl.cdiv(made.length, made.tile) * made.tile
    return pl.cdiv(rows, made.blocks.length) * made.blocks.length


def scratch(made: Made, kernel: str) -> dict[str, Any]:
    """Shared memory and barriers of a kernel by name."""
    turns = {"turns": _barriers(1, arrivals=made.workers)} if kernel == "forward" else {}
    return buffers(made, kernel) | turns


def buffers(made: Made, kernel: str) -> dict[str, Any]:
    """The workers' own parts, and the ring of streamed blocks."""
    workers, rows, size, value_size = made.workers, made.blocks.rows, made.size, made.value_size
    if kernel == "dkv":
        own = {"key": size, "value": value_size}
        ring = {"query": size, "cotangent": value_size, "lse": 0, "delta": 0}
        ready = 2
    else:
        own = {"query": size, "lse": 0} if kernel == "forward" else {"query": size, "cotangent": value_size, "lse": 0}
        own |= {"delta": 0} if kernel == "dq" else {"out": value_size} if value_size != size else {}
        ring = {"key": size, "value": value_size}
        ready = 1 if kernel == "forward" else 4
    found = {n: tiles(made, workers, rows, c) if c else _numbers(workers, rows) for n, c in own.items()}
    return found | {"ready": _barriers(workers, arrivals=ready)} | _ring(made, ring)


def threads(made: Made) -> dict[str, Any]:
    """How many warpgroups a kernel has."""
    return {"num_threads": made.workers + 1, "thread_name": "warpgroup"}


def tiles(made: Made, count: int, rows: int, size: int) -> Any:
    """Matrices in shared memory, as TMA writes and wgmma reads them."""
    plgpu = _compat.mosaic_gpu()
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((count, rows, size), made.dtype, transforms=transforms)


def _numbers(count: int, rows: int) -> Any:
    return _compat.mosaic_gpu().SMEM((count, rows), jnp.float32)


def _barriers(count: int, arrivals: int = 1) -> Any:
    return _compat.mosaic_gpu().Barrier(num_barriers=count, num_arrivals=arrivals)


def _ring(made: Made, sizes: dict[str, int]) -> dict[str, Any]:
    """Buffers of `stages` blocks: matrices of that many columns, 0 one number a row; each with its barriers."""
    stages, length = made.blocks.stages, made.blocks.length
    found: dict[str, Any] = {}
    for name, size in sizes.items():
        found[f"ring {name}"] = tiles(made, stages, length, size) if size else _numbers(stages, length)
        found[f"full {name}"] = _barriers(stages)
        found[f"free {name}"] = _barriers(stages, arrivals=made.workers)
    return found


class Hopper(Engine):
    """Two warpgroups that compute and one that moves."""

    @property
    def layout(self) -> Any:
        """That of wgmma's sums."""
        return self.plgpu.Layout.WGMMA

    def roles(self, move: Callable[[], None], work: Callable[[], None]) -> None:
        """Each role with the registers that it needs."""

        @pl.when(self.worker < self.made.workers)
        def _() -> None:
            if self.made.workers > 1:  # two warpgroups have 255 registers a thread from the start
                self.plgpu.set_max_registers(240, action="increase")
            work()

        @pl.when(self.worker == self.made.workers)
        def _() -> None:
            if self.made.workers > 1:
                self.plgpu.set_max_registers(24, action="decrease")
            move()

    def stream(self, first: Any, steps: Any, sources: dict[str, Callable[[Any], Any]]) -> None:
        """Copies blocks into the ring, each when its buffer was read."""
        stages = self.made.blocks.stages

        def turn(i: Any, _: None) -> None:
            slot = lax.rem(i, stages)
            for name, source in sources.items():
                pl.when(i >= stages)(functools.partial(self.plgpu.barrier_wait, self.place[f"free {name}"].at[slot]))
                full, buffer = self.place[f"full {name}"].at[slot], self.place[f"ring {name}"].at[slot]

                @pl.when(i < steps)
                def _(source: Any = source, buffer: Any = buffer, full: Any = full) -> None:
                    self.plgpu.copy_gmem_to_smem(source(first + i), buffer, full)

        lax.fori_loop(0, steps + stages, turn, None)  # the last turns wait until all was read

    def wait(self, name: str, step: Any) -> Any:
        """Returns the buffer of a step once TMA has filled it."""
        slot = lax.rem(step, self.made.blocks.stages)
        self.plgpu.barrier_wait(self.place[f"full {name}"].at[slot])
        return self.place[f"ring {name}"].at[slot]

    def free(self, name: str, step: Any) -> None:
        """Arrives at the barrier that the moving warpgroup waits for."""
        self.plgpu.barrier_arrive(self.place[f"free {name}"].at[lax.rem(step, self.made.blocks.stages)])

    def fetch(self, sources: dict[str, Any]) -> None:
        """Copies this worker's own parts by TMA, and waits for them."""
        ready = self.place["ready"].at[self.worker]
        for name, source in sources.items():
            self.plgpu.copy_gmem_to_smem(source, self.own(name), ready)
        self.plgpu.barrier_wait(ready)

    def numbers(self, name: str, axis: int, buffer: Any = None) -> jax.Array:
        """Reads numbers of rows or columns from shared memory."""
        buffer = self.own(name) if buffer is None else buffer
        return _compat.load_numbers(buffer, self.layout.reduce(axis))

    def product(self, a: Any, b: Any) -> jax.Array:
        """The float32 product `a b^T` by wgmma."""

        def compute(sums: Any) -> jax.Array:
            self.plgpu.wgmma(sums, a, _compat.transposed(b))
            self.turn()  # while the tensor core multiplies
            return sums[...]

        return pl.run_scoped(compute, self.plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))

    def started(self, start: jax.Array, a: Any, b: Any, axis: int) -> jax.Array:
        """`a b^T` by wgmma upon numbers of rows or columns."""
        start = lax.broadcast_in_dim(start, (a.shape[0], b.shape[0]), [axis])
        return self.added("", start, a, _compat.transposed(b))

    def added(self, name: str, sums: Any, a: Any, b: Any) -> jax.Array:
        """`sums + a b` by wgmma."""
        if not self.made.interpret:
            return pl.run_state(lambda ref: self.plgpu.wgmma(ref, a, b))(self.plgpu.ACC.init(sums))
        # The interpreter has no accumulators that start from a value, and no operand in registers.
        return sums + jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

    def store(self, x: jax.Array, buffer: Any, out: Any) -> None:
        """Writes a matrix of registers by TMA; the copy goes on."""
        buffer[...] = x.astype(self.made.dtype)
        self.plgpu.commit_smem()
        self.plgpu.copy_smem_to_gmem(buffer, out.at[self.batch, pl.ds(self.start, self.rows), self.head])

    def store_numbers(self, x: jax.Array, out: Any) -> None:
        """Writes a number of each row by TMA; the copy goes on."""
        buffer = self.own("lse")
        buffer[...] = x
        self.plgpu.commit_smem()
        self.plgpu.copy_smem_to_gmem(buffer, out.at[self.batch, self.head, pl.ds(self.start, self.rows)])

    def finish(self) -> None:
        """Waits until TMA has written all."""
        self.plgpu.wait_smem_to_gmem(0)

    def turn(self, at: str = "") -> None:
        """Waits for the other worker, where the kernel has turns."""
        if "turns" not in self.place:
            return
        turns = self.place["turns"].at[0]

        def over() -> None:
            self.plgpu.barrier_arrive(turns)
            self.plgpu.barrier_wait(turns)

        if at:
            pl.when(self.worker == {"begin": 1, "end": 0}[at])(over)
        else:
            over()
