"""The selective scan for TPUs by Pallas-Mosaic, forward and backward. Oracle: `oracle.py`.

    grid (B, chunks, blocks of channels), the last two in turn: states of all channels, `[blocks, S, channels]`, stay
    in VMEM from chunk to chunk

A step has a chunk of tokens of some channels: x and dt `[chunk, channels]`, b and c `[chunk, S]`, which stay for all
blocks of channels. So each operand is read once. Channels lie along lanes, the numbers of a state along sublanes; a
token's b and c become columns by turning 8 tokens at a time. In the backward pass, whose grid goes through the chunks
from the last to the first, the states before each token of a chunk are computed again into VMEM, and the gradients of b
and c are summed over blocks of channels where they lie. What lies beyond T and I is zeroed: a token of dt = 0 changes
no state. All arithmetic is float32.

VMEM: two arrays `[S, I]` of float32 (states or their gradients), of a step `chunk * channels` numbers of each operand
and, backward, `chunk * S * channels` of states. Compiled by libtpu; not measured on a TPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.dispatch import Target, no_mosaic_tpu
from kernels_pallas.selective_scan.facts import direction_of, refusal_of_shapes, tuned

LARGEST = 256  # S
TOKENS = 8  # that are turned at once: the rows of a tile
HELD = 2**21  # bytes of a chunk's states, in the backward pass
STATES = 2**23  # bytes of the states of all channels, and their gradients


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Channels of a step: a multiple of 128, or all."""

    channels: int


def refusal(target: Target, call: Any) -> str:
    """Returns why these kernels cannot compute a call there; "" where they can."""
    if reason := no_mosaic_tpu(target):
        return reason
    if reason := refusal_of_shapes(call, ("float32", "bfloat16"), LARGEST):
        return reason
    if call.chunk % TOKENS:
        return f"chunks of {call.chunk} tokens are no multiple of {TOKENS}."
    inner, size = call.arrays["decay"].shape
    if 8 * size * (inner + 1024) > STATES:
        return f"states of {inner} channels of {size} numbers take more than {STATES >> 20} MB."
    if direction_of(call) == "backward" and 4 * call.chunk * size * 128 > HELD:
        return f"the states of {call.chunk} tokens of {size} numbers take more than {HELD >> 20} MB."
    return ""


def blocks_of(call: Any) -> Blocks:
    """Returns the block sizes for a call: in the backward pass as many channels as `HELD` lets a chunk have."""
    inner, size = call.arrays["decay"].shape
    most = 512
    if direction_of(call) == "backward":
        most = min(most, max(128, HELD // (4 * call.chunk * size) // 128 * 128))
    return Blocks(min(inner, most))


def tuned_blocks(target: Target, call: Any) -> Blocks | None:
    """Returns the block sizes that were found for a call; None where none were."""
    found = tuned(target, call, "mosaic_tpu")
    return fitting_blocks(call, found) if "channels" in found else None


def fitting_blocks(call: Any, found: Mapping[str, Any]) -> Blocks:
    """Returns blocks of that many channels, cut to the call."""
    return Blocks(min(found["channels"], call.arrays["decay"].shape[0]))


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Of a call: rows, tokens, channels, numbers of a state; tokens and channels of a step."""

    batch: int
    length: int
    inner: int
    size: int
    chunk: int
    channels: int

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, self.chunk)

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.inner, self.channels)

    def specs(self, chunk_of: Any) -> dict[str, pl.BlockSpec]:
        """Blocks of arrays by what they have: channels, numbers, a state, one state, states of chunks."""
        state = (self.size, self.channels)
        return {
            "channels": pl.BlockSpec((None, self.chunk, self.channels), lambda b, k, i: (b, chunk_of(k), i)),
            "numbers": pl.BlockSpec((None, self.chunk, self.size), lambda b, k, i: (b, chunk_of(k), 0)),
            "decay": pl.BlockSpec(state, lambda b, k, i: (0, i)),
            "state": pl.BlockSpec((None, *state), lambda b, k, i: (b, 0, i)),
            "states": pl.BlockSpec((None, None, *state), lambda b, k, i: (b, chunk_of(k), 0, i)),
        }

    def wide(self, ref: Any, k: Any, i: Any, *, by_channel: bool) -> jax.Array:
        """A block of tokens in float32, zeros beyond T and I."""
        x = ref[...].astype(jnp.float32)
        if self.length % self.chunk:
            token = k * self.chunk + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
            x = jnp.where(token < self.length, x, 0.0)
        if by_channel and self.inner % self.channels:
            channel = i * self.channels + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
            x = jnp.where(channel < self.inner, x, 0.0)
        return x

    def masked(self, state: jax.Array, i: Any) -> jax.Array:
        """A state `[S, channels]`, zeros beyond I."""
        if not self.inner % self.channels:
            return state
        channel = i * self.channels + jax.lax.broadcasted_iota(jnp.int32, state.shape, 1)
        return jnp.where(channel < self.inner, state, 0.0)


def _sizes(call: Any, blocks: Blocks) -> _Sizes:
    batch, length, inner = call.arrays["x"].shape
    return _Sizes(batch, length, inner, call.arrays["decay"].shape[1], call.chunk, blocks.channels)


def _rows(p: Any) -> Any:
    return pl.ds(pl.multiple_of(p * TOKENS, TOKENS), TOKENS)


def forward(target: Target, call: Any, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns y, the last state and, where they are to be kept, the states before each chunk `[B, chunks, S, I]`."""
    sizes = _sizes(call, blocks or tuned_blocks(target, call) or blocks_of(call))
    given = _laid(call.arrays, ("x", "dt", "decay", "b", "c", "state"))
    per_channel, per_number = (sizes.chunk, sizes.channels), (sizes.chunk, sizes.size)

    def kernel(x: Any, dt: Any, a: Any, b: Any, c: Any, state: Any, y: Any, last: Any, *rest: Any) -> None:
        *states, held, wide_x, wide_dt, wide_b, wide_c, wide_y = rest
        k, i = pl.program_id(1), pl.program_id(2)
        decay = sizes.masked(a[...], i)

        @pl.when(k == 0)
        def _start() -> None:
            held[i] = sizes.masked(state[...], i)

        h = held[i]
        if states:
            states[0][...] = h
        for wide, ref, by_channel in ((wide_x, x, True), (wide_dt, dt, True), (wide_b, b, False), (wide_c, c, False)):
            wide[...] = sizes.wide(ref, k, i, by_channel=by_channel)

        def eight(p: Any, h: jax.Array) -> jax.Array:
            rows = _rows(p)
            xs, dts, bs, cs = wide_x[rows, :], wide_dt[rows, :], wide_b[rows, :].T, wide_c[rows, :].T
            found = []
            for j in range(TOKENS):
                one = slice(j, j + 1)
                h = jnp.exp(dts[one] * decay) * h + (dts[one] * xs[one]) * bs[:, one]
                found.append(jnp.sum(h * cs[:, one], axis=0, keepdims=True))
            wide_y[rows, :] = jnp.concatenate(found, axis=0)
            return h

        h = jax.lax.fori_loop(0, sizes.chunk // TOKENS, eight, h)
        held[i] = h
        last[...] = h
        y[...] = wide_y[...].astype(y.dtype)

    specs = sizes.specs(lambda k: k)
    shape = (sizes.batch, sizes.size, sizes.inner)
    shapes = [jax.ShapeDtypeStruct(given["x"].shape, given["x"].dtype), jax.ShapeDtypeStruct(shape, jnp.float32)]
    outs = [specs["channels"], specs["state"]]
    if call.keep:
        shapes.append(jax.ShapeDtypeStruct((sizes.batch, sizes.chunks, *shape[1:]), jnp.float32))
        outs.append(specs["states"])
    channels, numbers = (pltpu.VMEM(s, jnp.float32) for s in (per_channel, per_number))
    y, last, *states = pl.pallas_call(
        kernel,
        grid=(sizes.batch, sizes.chunks, sizes.blocks),
        in_specs=[specs[n] for n in ("channels", "channels", "decay", "numbers", "numbers", "state")],
        out_specs=outs,
        out_shape=shapes,
        scratch_shapes=[_states(sizes), channels, channels, numbers, numbers, channels],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="selective_scan_forward",
    )(*given.values())
    return [y, last.swapaxes(1, 2), *states]


def backward(target: Target, call: Any, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns the gradients of x, dt, decay (of each row of the batch), b, c and the first state."""
    sizes = _sizes(call, blocks or tuned_blocks(target, call) or blocks_of(call))
    given = _laid(call.arrays, ("x", "dt", "decay", "b", "c", "states", "of_y", "of_last"))
    pieces = sizes.chunk // TOKENS
    width = sizes.channels

    def kernel(
        x: Any, dt: Any, a: Any, b: Any, c: Any, states: Any, of_y: Any, of_last: Any,
        dx: Any, ddt: Any, da: Any, db: Any, dc: Any, dstate: Any,
        held: Any, sums: Any, before: Any, wide_x: Any, wide_dt: Any, wide_dy: Any, wide_b: Any, wide_c: Any,
    ) -> None:  # fmt: skip
        step, i = pl.program_id(1), pl.program_id(2)
        k = sizes.chunks - 1 - step
        decay = sizes.masked(a[...], i)

        @pl.when(step == 0)
        def _start() -> None:
            held[i] = sizes.masked(of_last[...], i)
            sums[i] = jnp.zeros_like(decay)

        @pl.when(i == 0)
        def _clear() -> None:
            db[...] = jnp.zeros_like(db)
            dc[...] = jnp.zeros_like(dc)

        for wide, ref, by_channel in (
            (wide_x, x, True), (wide_dt, dt, True), (wide_dy, of_y, True), (wide_b, b, False), (wide_c, c, False)
        ):  # fmt: skip
            wide[...] = sizes.wide(ref, k, i, by_channel=by_channel)

        def again(p: Any, h: jax.Array) -> jax.Array:
            rows = _rows(p)
            xs, dts, bs = wide_x[rows, :], wide_dt[rows, :], wide_b[rows, :].T
            for j in range(TOKENS):
                one = slice(j, j + 1)
                before[p * TOKENS + j] = h
                h = jnp.exp(dts[one] * decay) * h + (dts[one] * xs[one]) * bs[:, one]
            return h

        jax.lax.fori_loop(0, pieces, again, sizes.masked(states[...], i))

        def eight(m: Any, carry: Any) -> Any:
            g, da = carry
            p = pieces - 1 - m
            rows = _rows(p)
            xs, dts, dys = wide_x[rows, :], wide_dt[rows, :], wide_dy[rows, :]
            bs, cs = wide_b[rows, :].T, wide_c[rows, :].T
            found: dict[str, list[jax.Array]] = {n: [] for n in ("dx", "ddt", "db", "dc")}
            for j in reversed(range(TOKENS)):
                one = slice(j, j + 1)
                scaled = dts[one] * xs[one]
                keep = jnp.exp(dts[one] * decay)
                decayed = keep * before[p * TOKENS + j]
                g = g + dys[one] * cs[:, one]
                of_rate = g * decayed
                of_take = jnp.sum(g * bs[:, one], axis=0, keepdims=True)
                found["dx"].append(of_take * dts[one])
                found["ddt"].append(jnp.sum(of_rate * decay, axis=0, keepdims=True) + of_take * xs[one])
                found["db"].append(jnp.sum(g * scaled, axis=1, keepdims=True))
                found["dc"].append(jnp.sum((decayed + scaled * bs[:, one]) * dys[one], axis=1, keepdims=True))
                g, da = g * keep, da + of_rate * dts[one]
            dx[rows, :] = jnp.concatenate(found["dx"][::-1], axis=0)
            ddt[rows, :] = jnp.concatenate(found["ddt"][::-1], axis=0)
            db[rows, :] += jnp.concatenate(found["db"][::-1], axis=1).T
            dc[rows, :] += jnp.concatenate(found["dc"][::-1], axis=1).T
            return g, da

        g, total = jax.lax.fori_loop(0, pieces, eight, (held[i], sums[i]))
        held[i], sums[i] = g, total
        da[...], dstate[...] = total, g

    specs = sizes.specs(lambda k: sizes.chunks - 1 - k)
    tokens, numbers = given["x"].shape, given["b"].shape
    states = (sizes.batch, sizes.size, sizes.inner)
    shapes = (tokens, tokens, states, numbers, numbers, states)
    per_channel, per_number = (
        pltpu.VMEM(s, jnp.float32) for s in ((sizes.chunk, width), (sizes.chunk, sizes.size))
    )  # fmt: skip
    by_token = pltpu.VMEM((sizes.chunk, sizes.size, width), jnp.float32)
    ins = ("channels", "channels", "decay", "numbers", "numbers", "states", "channels", "state")
    outs = ("channels", "channels", "state", "numbers", "numbers", "state")
    scratch = [_states(sizes), _states(sizes), by_token, *[per_channel] * 3, *[per_number] * 2]
    dx, ddt, da, db, dc, dstate = pl.pallas_call(
        kernel,
        grid=(sizes.batch, sizes.chunks, sizes.blocks),
        in_specs=[specs[n] for n in ins],
        out_specs=[specs[n] for n in outs],
        out_shape=[jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="selective_scan_backward",
    )(*given.values())
    return [dx, ddt, da.swapaxes(1, 2), db, dc, dstate.swapaxes(1, 2)]


def _states(sizes: _Sizes) -> Any:
    """Scratch for a state of every channel."""
    return pltpu.VMEM((sizes.blocks, sizes.size, sizes.channels), jnp.float32)


def _laid(arrays: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, jax.Array]:
    """Operands in that order, with channels innermost everywhere: decay `[S, I]`, states `[B, S, I]`."""
    turned = ("decay", "state", "of_last")
    laid = {n: arrays[n] for n in names}
    return {n: jnp.swapaxes(z, -1, -2).astype(jnp.float32) if n in turned else z for n, z in laid.items()}
