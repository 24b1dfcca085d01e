"""The tile engine of Blackwell: TMA, tcgen05 and tensor memory. What runs on it: `mosaic_kernels.py`.

Blocks move as on Hopper (`mosaic_hopper.py`). A warpgroup that computes holds 128 rows. Products are tcgen05's, of
matrices in shared memory; their results, and all sums, lie in tensor memory (512 columns of 128 rows), from which a
block of scores comes into registers. Weights go back through shared memory as the left matrix of the next product.
While one warpgroup computes exponentials, the other's products keep the tensor cores busy.

Columns: of each worker its sums, and `length` for each of up to two blocks of products. In dk and dv that leaves room
for one worker.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import _compat
from kernels_pallas.attention import mosaic_hopper
from kernels_pallas.attention.mosaic_hopper import Hopper, extents, numbers, operand, result, threads
from kernels_pallas.attention.mosaic_kernels import Blocks, Made

__all__ = ["Blackwell", "blocks_of", "extents", "numbers", "operand", "result", "scratch", "threads", "workers"]
ROWS = 128  # of a product of one block of threads
PIECE = 32  # columns of a sum that are in registers at once while it is scaled


def workers(kernel: str, more: bool) -> int:
    """Returns how many warpgroups compute: with a window or a soft cap two spill in the forward pass."""
    return 1 if kernel == "dkv" or (more and kernel == "forward") else 2


def blocks_of(size: int, kernel: str, more: bool) -> Blocks:
    """Returns the blocks of `kernel` ("forward", "dq" or "dkv") for a head size: those that fit, and do not spill."""
    del more
    return Blocks(64, 3 if size == 64 else 2, ROWS)


def scratch(made: Made, kernel: str) -> dict[str, Any]:
    """Shared and tensor memory and barriers of a kernel by name."""
    plgpu = _compat.mosaic_gpu()
    length, count = made.blocks.length, made.workers
    sums = {"forward": {"out": made.value_size}, "dq": {"dq": made.size}}
    sums["dkv"] = {"dk": made.size, "dv": made.value_size}
    found = mosaic_hopper.buffers(made, kernel)
    found["left"] = mosaic_hopper.tiles(made, count, made.blocks.rows, length)
    found["product"] = plgpu.TMEM((ROWS, count * length), jnp.float32)
    for name, size in sums[kernel].items():
        found[f"sum {name}"] = plgpu.TMEM((ROWS, count * size), jnp.float32)
    found["done"] = plgpu.Barrier(num_barriers=count, num_arrivals=1, orders_tensor_core=True)
    return found


class Blackwell(Hopper):
    """Hopper's roles and ring; products and sums in tensor memory."""

    @property
    def layout(self) -> Any:
        """That of tensor memory's 128 rows, 32 a warp."""
        return self.plgpu.Layout.TCGEN05

    def _columns(self, name: str, first: int = 0, count: int | None = None) -> Any:
        """This worker's part of tensor memory, or some of its columns."""
        ref = self.place[name]
        width = ref.shape[1] // self.made.workers
        return ref.at[:, pl.ds(self.worker * width + first, width if count is None else count)]

    def _multiply(self, into: Any, a: Any, b: Any, accumulate: bool) -> None:
        done = self.place["done"].at[self.worker]
        self.plgpu.tcgen05_mma(into, a, b, done, accumulate=accumulate)
        self.plgpu.barrier_wait(done)

    def _load(self, columns: Any) -> jax.Array:
        x = self.plgpu.async_load_tmem(columns, layout=self.layout)
        self.plgpu.wait_load_tmem()
        return x

    def _write(self, columns: Any, x: jax.Array) -> None:
        self.plgpu.async_store_tmem(columns, x)
        self.plgpu.commit_tmem()

    def product(self, a: Any, b: Any) -> jax.Array:
        """The float32 product `a b^T`, from tensor memory."""
        self._multiply(self._columns("product"), a, _compat.transposed(b), accumulate=False)
        return self._load(self._columns("product"))

    def started(self, start: jax.Array, a: Any, b: Any, axis: int) -> jax.Array:
        """`a b^T`, and then numbers of rows or columns."""
        product = self.product(a, b)
        return product + self.spread(start, product, axis)

    def zeros(self, name: str, size: int) -> Any:
        """Begins a sum in tensor memory; what loops carry is nothing."""
        self._write(self._columns(f"sum {name}"), self.full((self.rows, size), 0.0))
        return ()

    def added(self, name: str, sums: Any, a: jax.Array, b: Any) -> Any:
        """Adds `a b` to a sum in tensor memory; a goes through shared memory."""
        left = self.own("left")
        left[...] = a
        self.plgpu.commit_smem()
        self._multiply(self._columns(f"sum {name}"), left, b, accumulate=True)
        return sums

    def shrunk(self, name: str, sums: Any, by: jax.Array) -> Any:
        """Scales the rows of a sum, some columns at a time."""
        width = self.place[f"sum {name}"].shape[1] // self.made.workers
        for first in range(0, width, PIECE):
            piece = self._columns(f"sum {name}", first, PIECE)
            x = self._load(piece)
            self._write(piece, x * self.spread(by, x))
        return sums

    def summed(self, name: str, sums: Any) -> jax.Array:
        """A sum from tensor memory."""
        return self._load(self._columns(f"sum {name}"))
