"""Rotary positions for NVIDIA and AMD GPUs by Pallas-Triton, in place. Oracle: `oracle.py`.

    grid (blocks of heads, blocks of tokens, B): pairs [tokens, heads, R / 2] are read, turned in float32, written back

The result lies where x does (`input_output_aliases`), so channels that pass are neither read nor written. Interleaved
pairs are a view `[..., H / 2, 2]`. Cosines and sines are read once for all heads of a block.

Bytes moved: those of R of H channels of x, twice, and of cosines and sines. Not measured on a GPU.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import _compat
from kernels_pallas.dispatch import Target, no_sizes, no_triton

PAIRS = 2048  # of a program: 16 a thread of four warps
HEADS = 8  # of a program, at most
WIDEST = 1024  # pairs of a head


def refusal(target: Target, call: Any) -> str:
    """Returns why this kernel cannot compute a call there; "" where it can."""
    if reason := no_triton(target):
        return reason
    if reason := no_sizes((*call.x.shape, *call.cos.shape)):
        return reason
    if call.x.dtype.name not in ("float32", "bfloat16", "float16"):
        return f"it takes float32, bfloat16 and float16, not {call.x.dtype}."
    if call.interleaved and call.x.shape[3] % 2:
        return f"heads of {call.x.shape[3]} channels are no pairs of neighbours."
    return "" if call.pairs <= WIDEST else f"{call.pairs} pairs are more than {WIDEST}."


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def forward(target: Target, call: Any, interpret: bool) -> list[jax.Array]:
    """Returns x, turned."""
    x, triton = call.x, _compat.triton()
    batch, length, heads, size = x.shape
    deep = _power(call.pairs)
    wide = min(_power(heads), HEADS, max(1, PAIRS // deep))
    tokens = min(_power(length), max(1, PAIRS // (deep * wide)))
    of_all = call.cos.shape[0] == 1
    given = x.reshape(batch, length, heads, size // 2, 2) if call.interleaved else x

    def kernel(x_ref: Any, cos_ref: Any, sin_ref: Any, y_ref: Any) -> None:
        head, token, row = pl.program_id(0) * wide, pl.program_id(1) * tokens, pl.program_id(2)
        own = token + jnp.arange(tokens, dtype=jnp.int32) < length
        there = head + jnp.arange(wide, dtype=jnp.int32) < heads
        pair = jnp.arange(deep, dtype=jnp.int32) < call.pairs
        angle = own[:, None] & pair[None, :]
        keep = angle[:, None, :] & there[None, :, None]
        zero = row * 0  # a start that is not static: a static slice beyond the end is refused, masked or not
        at = row, pl.ds(token, tokens), pl.ds(head, wide)
        if call.interleaved:
            places = [(*at, pl.ds(zero, deep), jnp.int32(i)) for i in range(2)]
        else:
            places = [(*at, pl.ds(zero + start, deep)) for start in (0, call.pairs)]
        a, b = (triton.load(x_ref.at[p], mask=keep, other=0.0).astype(jnp.float32) for p in places)
        turn = (*([] if of_all else [row]), pl.ds(token, tokens), pl.ds(zero, deep))
        cos, sin = (
            triton.load(ref.at[turn], mask=angle, other=0.0).astype(jnp.float32)[:, None, :]
            for ref in (cos_ref, sin_ref)
        )
        sin = 0.0 - sin if call.inverse else sin
        for place, turned in zip(places, (a * cos - b * sin, a * sin + b * cos), strict=True):
            triton.store(y_ref.at[place], turned.astype(y_ref.dtype), mask=keep)

    y = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(heads, wide), pl.cdiv(length, tokens), batch),
        out_shape=jax.ShapeDtypeStruct(given.shape, given.dtype),
        input_output_aliases={0: 0},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="rope",
    )(given, *(z[0] if of_all else z for z in (call.cos, call.sin)))
    return [y.reshape(x.shape)]
