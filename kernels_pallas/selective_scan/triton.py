"""The selective scan for NVIDIA and AMD GPUs by Pallas-Triton, forward and backward. Oracle: `oracle.py`.

    grid (blocks of channels, B): a program goes through the tokens of a row, its state `[S, channels]` in registers

    forward    x, dt, b and c are read once, each a token ahead of the one that is computed; with `keep` the state
               before each chunk is stored
    backward   chunk by chunk, last first. The states before every 8 tokens of a chunk (4 where S is large) are computed
               again from the one that was stored, and stay in registers; then, 8 tokens at a time, those before each
               token, and the gradients back through them. A chunk's operands are read from memory once, and twice more
               from the nearest cache

What a program sums over its channels, the gradients of b and c, goes to memory by block of channels,
`[B, blocks, T, S]`, and XLA sums the blocks. Numbers beyond T, I and S are masked where they are loaded and stored: a
token of dt = 0 changes no state. All arithmetic is float32.

Not measured on a GPU; the blocks of `blocks_of` are assembled for A100, A10, H100 and B200 without spills (`make aot`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import _compat
from kernels_pallas.dispatch import Target, no_triton
from kernels_pallas.selective_scan.facts import direction_of, refusal_of_shapes, tuned

LARGEST = 256  # S
SMALL = 32  # S: beyond, what is summed over S goes through shared memory, and fewer tokens fit the registers
CHUNK = 64  # tokens, at most: the states before every 4 or 8 of them are in registers


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Channels of a program, a power of two, and its warps."""

    channels: int
    warps: int


def refusal(target: Target, call: Any) -> str:
    """Returns why these kernels cannot compute a call there; "" where they can."""
    if reason := no_triton(target):
        return reason
    if reason := refusal_of_shapes(call, ("float32", "bfloat16", "float16"), LARGEST):
        return reason
    if direction_of(call) == "backward" and call.chunk > CHUNK:
        return f"chunks of {call.chunk} tokens are longer than {CHUNK} in the backward pass."
    return ""


def together(call: Any) -> int:
    """Returns the tokens whose states are in registers at once, in the backward pass."""
    return 8 if call.arrays["decay"].shape[1] <= SMALL else 4


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def blocks_of(call: Any) -> Blocks:
    """Returns the block sizes for a call: 16 numbers of the state a thread, in the backward pass 4."""
    size = _power(call.arrays["decay"].shape[1])
    warps, numbers = (8, 4) if direction_of(call) == "backward" else (2, 16)
    channels = max(4, 32 * warps * numbers // size)
    return Blocks(min(channels, _power(call.arrays["x"].shape[2])), warps)


def tuned_blocks(target: Target, call: Any) -> Blocks | None:
    """Returns the block sizes that were found for a call; None where none were."""
    found = tuned(target, call, "triton")
    return fitting_blocks(call, found) if "channels" in found else None


def fitting_blocks(call: Any, found: Mapping[str, Any]) -> Blocks:
    """Returns blocks of that many channels and warps, cut to the call."""
    return Blocks(min(found["channels"], _power(call.arrays["x"].shape[2])), found["warps"])


class _Part:
    """What a program has of the operands: its channels of its row."""

    def __init__(self, blocks: Blocks, refs: Mapping[str, Any], inner: int, size: int) -> None:
        self.refs, self.width, self.deep = refs, blocks.channels, _power(size)
        self.block, self.row = pl.program_id(0), pl.program_id(1)
        first = self.block * blocks.channels
        # A start that is not static: a static slice beyond the end is refused, masked or not.
        self.channels, self.numbers = pl.ds(first, blocks.channels), pl.ds(self.block * 0, self.deep)
        self.own = first + jnp.arange(blocks.channels, dtype=jnp.int32) < inner
        self.inside = jnp.arange(self.deep, dtype=jnp.int32) < size
        self.both = self.inside[:, None] & self.own[None, :]

    def load(self, at: Any, keep: Any) -> jax.Array:
        return _compat.triton().load(at, mask=keep, other=0.0).astype(jnp.float32)

    def store(self, at: Any, x: jax.Array, keep: Any) -> None:
        _compat.triton().store(at, x.astype(at.dtype), mask=keep)

    def state(self, name: str, *place: Any) -> jax.Array:
        """An array of states `[..., S, I]`."""
        return self.load(self.refs[name].at[(*place, self.numbers, self.channels)], self.both)

    def put_state(self, name: str, x: jax.Array, *place: Any) -> None:
        self.store(self.refs[name].at[(*place, self.numbers, self.channels)], x, self.both)

    def by_channel(self, name: str, t: Any, there: Any) -> jax.Array:
        """A token's numbers of `[B, T, I]`, `[channels]`."""
        return self.load(self.refs[name].at[self.row, t, self.channels], self.own & there)

    def by_number(self, name: str, t: Any, there: Any) -> jax.Array:
        """A token's numbers of `[B, T, S]`, `[S]`."""
        return self.load(self.refs[name].at[self.row, t, self.numbers], self.inside & there)

    def token(self, t: Any, end: Any) -> tuple[jax.Array, ...]:
        """x, dt and b of a token; zeros from `end` on."""
        there = t < end
        return self.by_channel("x", t, there), self.by_channel("dt", t, there), self.by_number("b", t, there)


def _moved(h: jax.Array, decay: jax.Array, x: jax.Array, dt: jax.Array, b: jax.Array) -> jax.Array:
    """The state after a token."""
    return jnp.exp(dt[None, :] * decay) * h + (dt * x)[None, :] * b[:, None]


def forward(target: Target, call: Any, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns y, the last state and, where they are to be kept, the states before each chunk `[B, chunks, S, I]`."""
    blocks = blocks or tuned_blocks(target, call) or blocks_of(call)
    given = _laid(call.arrays)
    (batch, length, inner), size = given["x"].shape, given["decay"].shape[0]
    chunk = call.chunk if call.keep else length
    chunks = pl.cdiv(length, chunk)

    def kernel(*refs: Any) -> None:
        part = _Part(blocks, dict(zip((*given, "y", "last", "states"), refs, strict=False)), inner, size)
        decay = part.state("decay")

        def ahead(t: Any) -> tuple[jax.Array, ...]:
            return *part.token(t, length), part.by_number("c", t, t < length)

        def step(t: Any, carry: Any) -> Any:
            h, (x, dt, b, c) = carry
            following = ahead(t + 1)
            h = _moved(h, decay, x, dt, b)
            y = jnp.sum(h * c[:, None], axis=0)
            part.store(part.refs["y"].at[part.row, t, part.channels], y, part.own & (t < length))
            return h, following

        def whole(k: Any, carry: Any) -> Any:
            if call.keep:
                part.put_state("states", carry[0], part.row, k)
            return jax.lax.fori_loop(k * chunk, (k + 1) * chunk, step, carry)

        h, _ = jax.lax.fori_loop(0, chunks, whole, (part.state("state", part.row), ahead(jnp.int32(0))))
        part.put_state("last", h, part.row)

    shapes = [
        jax.ShapeDtypeStruct((batch, length, inner), given["x"].dtype),
        jax.ShapeDtypeStruct((batch, size, inner), jnp.float32),
    ]
    shapes += [jax.ShapeDtypeStruct((batch, chunks, size, inner), jnp.float32)] if call.keep else []
    y, last, *states = _run(kernel, "forward", given, shapes, blocks, interpret)
    return [y, last.swapaxes(1, 2), *states]


def backward(target: Target, call: Any, interpret: bool, blocks: Blocks | None = None) -> list[jax.Array]:
    """Returns the gradients of x, dt, decay (of each row of the batch), b, c and the first state."""
    blocks = blocks or tuned_blocks(target, call) or blocks_of(call)
    given = {n: z for n, z in _laid(call.arrays).items() if n != "state"}
    (batch, length, inner), size, chunk = given["x"].shape, given["decay"].shape[0], call.chunk
    tokens = together(call)
    chunks, pieces = pl.cdiv(length, chunk), pl.cdiv(chunk, tokens)
    results = ("dx", "ddt", "da", "db", "dc", "dstate")

    def kernel(*refs: Any) -> None:
        part = _Part(blocks, dict(zip((*given, *results), refs, strict=True)), inner, size)
        decay = part.state("decay")

        def back(t: Any, end: Any, carry: Any, before: jax.Array) -> Any:
            g, da = carry
            x, dt, b = part.token(t, end)
            there = t < end
            c, dy = part.by_number("c", t, there), part.by_channel("of_y", t, there)
            keep = jnp.exp(dt[None, :] * decay)
            decayed = keep * before
            g = g + dy[None, :] * c[:, None]
            of_rate = g * decayed
            of_take = jnp.sum(g * b[:, None], axis=0)
            after = decayed + (dt * x)[None, :] * b[:, None]
            for name, found in (("dx", of_take * dt), ("ddt", jnp.sum(of_rate * decay, axis=0) + of_take * x)):
                part.store(part.refs[name].at[part.row, t, part.channels], found, part.own & there)
            for name, found in (("db", g * (dt * x)[None, :]), ("dc", after * dy[None, :])):
                place = part.refs[name].at[part.row, part.block, t, part.numbers]
                part.store(place, jnp.sum(found, axis=1), part.inside & there)
            return g * keep, da + of_rate * dt[None, :]

        def one(r: Any, carry: Any) -> Any:
            k = chunks - 1 - r
            end = jnp.minimum((k + 1) * chunk, length)
            firsts = [part.state("states", part.row, k)]
            for piece in range(1, pieces):
                start = k * chunk + (piece - 1) * tokens
                advance = lambda i, h, start=start: _moved(h, decay, *part.token(start + i, end))  # noqa: E731
                firsts.append(jax.lax.fori_loop(0, tokens, advance, firsts[-1]))

            def some(m: Any, carry: Any) -> Any:
                piece = pieces - 1 - m
                h = firsts[0]
                for i, other in enumerate(firsts[1:], 1):
                    h = jnp.where(piece == i, other, h)
                start, states = k * chunk + piece * tokens, [h]
                for i in range(tokens - 1):
                    states.append(_moved(states[-1], decay, *part.token(start + i, end)))
                for i in reversed(range(tokens)):
                    carry = back(start + i, end, carry, states[i])
                return carry

            return jax.lax.fori_loop(0, pieces, some, carry)

        start = part.state("of_last", part.row), jnp.zeros((part.deep, part.width), jnp.float32)
        g, da = jax.lax.fori_loop(0, chunks, one, start)
        part.put_state("da", da, part.row)
        part.put_state("dstate", g, part.row)

    by_block = (batch, pl.cdiv(inner, blocks.channels), length, size)
    all_tokens, states = (batch, length, inner), (batch, size, inner)
    shapes = [
        jax.ShapeDtypeStruct(s, jnp.float32) for s in (all_tokens, all_tokens, states, by_block, by_block, states)
    ]
    dx, ddt, da, db, dc, dstate = _run(kernel, "backward", given, shapes, blocks, interpret)
    return [dx, ddt, da.swapaxes(1, 2), jnp.sum(db, axis=1), jnp.sum(dc, axis=1), dstate.swapaxes(1, 2)]


def _laid(arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The operands with channels innermost everywhere: decay `[S, I]`, states `[B, S, I]`."""
    turned = ("decay", "state", "of_last")
    return {n: jnp.swapaxes(z, -1, -2).astype(jnp.float32) if n in turned else z for n, z in arrays.items()}


def _run(kernel: Any, name: str, given: Mapping[str, jax.Array], shapes: Any, blocks: Blocks, interpret: bool) -> Any:
    batch, _, inner = given["x"].shape
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(inner, blocks.channels), batch),
        out_shape=shapes,
        compiler_params=_compat.triton().CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=interpret,
        name=f"selective_scan_{name}",
    )(*given.values())
