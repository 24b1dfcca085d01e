"""Rotary positions for TPUs by Pallas-Mosaic, in place. Oracle: `oracle.py`.

    grid (B, blocks of tokens): [tokens, N, H] are read, turned in float32 and written back

With C and S the cosines and signed sines of every channel, `[T, H]`, and p the channel that makes a pair with another,

    y[i] = x[i] C[i] + x[p(i)] S[i]           channels that pass have C = 1 and S = 0

x[p] is x rolled along its lanes, one way for the first of a pair and the other way for the second. The result lies
where x does (`input_output_aliases`). C and S are made by XLA; they are N / 4 times smaller than x of 16 bits.

Bytes moved: those of x, twice, and of C and S. Compiled by libtpu; not measured on a TPU.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.dispatch import Target, no_mosaic_tpu, no_sizes

BLOCK = 2**19  # bytes of a block in float32
LANES = 128


def refusal(target: Target, call: Any) -> str:
    """Returns why this kernel cannot compute a call there; "" where it can."""
    if reason := no_mosaic_tpu(target):
        return reason
    if reason := no_sizes((*call.x.shape, *call.cos.shape)):
        return reason
    if call.x.dtype.name not in ("float32", "bfloat16"):
        return f"it takes float32 and bfloat16, not {call.x.dtype}."
    if call.x.shape[3] % LANES:
        return f"heads of {call.x.shape[3]} channels are no multiple of {LANES}."
    if 4 * 8 * max(8, call.x.shape[2]) * call.x.shape[3] > 4 * BLOCK:
        return f"8 tokens of {call.x.shape[2]} heads take more than {4 * BLOCK >> 20} MB."
    return ""


def forward(target: Target, call: Any, interpret: bool) -> list[jax.Array]:
    """Returns x, turned."""
    x, pairs = call.x, call.pairs
    batch, length, heads, size = x.shape
    shift = 1 if call.interleaved else pairs
    cos, sin = (_of_channels(call, z.astype(jnp.float32)) for z in (call.cos, call.sin))
    channel = jnp.arange(size)
    first = channel % 2 == 0 if call.interleaved else channel < pairs
    within = channel < 2 * pairs
    cos = jnp.where(within, cos, 1.0)
    sin = jnp.where(within, jnp.where(first != call.inverse, -sin, sin), 0.0)
    tokens = max(8, BLOCK // (4 * max(8, heads) * size) // 8 * 8)
    tokens = min(tokens, length)
    of_all = call.cos.shape[0] == 1

    def kernel(x_ref: Any, cos_ref: Any, sin_ref: Any, y_ref: Any) -> None:
        x = x_ref[...].astype(jnp.float32)
        ahead = pltpu.roll(x, size - shift, 2)
        if 2 * shift != size:
            lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 2)
            one = jax.lax.rem(lane, jnp.int32(2)) == 0 if call.interleaved else lane < pairs
            ahead = jnp.where(one, ahead, pltpu.roll(x, shift, 2))
        y = x * cos_ref[...][:, None, :] + ahead * sin_ref[...][:, None, :]
        y_ref[...] = y.astype(y_ref.dtype)

    block = pl.BlockSpec((None, tokens, heads, size), lambda b, t: (b, t, 0, 0))
    angle = pl.BlockSpec((None, tokens, size), lambda b, t: (0 if of_all else b, t, 0))
    y = pl.pallas_call(
        kernel,
        grid=(batch, pl.cdiv(length, tokens)),
        in_specs=[block, angle, angle],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        input_output_aliases={0: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="rope",
    )(x, cos, sin)
    return [y]


def _of_channels(call: Any, z: jax.Array) -> jax.Array:
    """A number of each pair for each of its channels, `[B or 1, T, H]`."""
    both = jnp.repeat(z, 2, axis=-1) if call.interleaved else jnp.concatenate([z, z], axis=-1)
    return jnp.pad(both, ((0, 0), (0, 0), (0, call.x.shape[3] - 2 * call.pairs)))
