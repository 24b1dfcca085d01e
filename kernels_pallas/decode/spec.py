"""What a call of decode attention is made of, and the arithmetic of one tile that every implementation shares.

The G = N / K query heads that share a key head, and the T queries, are rows of one product: row r = t * G + g. A tile
is R rows by C slots of the cache. Codes are multiplied as small numbers, exact in bfloat16, and scales join the scores
and the weights instead of the tile:

    float            score = q . k
    int8, float8     score = scale_s * (q . code)                      out = sum_s (w_s * scale_s) code
    int4             score = scale_s * (q . code) + minimum_s * sum(q)
                     out = sum_s (w_s * scale_s) code + sum_s w_s * minimum_s

Codes of int4 lie two a byte, channel h in the low half and h + H / 2 in the high one: queries and outputs come in two
parts along H, so nothing is put together in a kernel. All else comes in one part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.spec import HIDDEN
from kernels_pallas.codes import float8_e4m3, unsigned
from kernels_pallas.dispatch import no_sizes

Dot = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static part of a call; `kind` is "float", "int8", "float8" or "int4"."""

    scale: float
    kind: str
    window: int | None = None
    chunk: int | None = None
    soft_cap: float | None = None

    @property
    def parts(self) -> int:
        """Parts of queries and outputs along H."""
        return 2 if self.kind == "int4" else 1


class Operands(NamedTuple):
    """The arrays of a call. With `pages` the first axis of the cache counts pages, P of them, and S is a page's."""

    query: Any  # [B, T, N, H]
    keys: Any  # [B, K, H, S], int4: [B, K, H / 2, S]
    values: Any  # [B, K, S, Hv], int4: [B, K, S, Hv / 2]
    lengths: Any  # int32 [B]
    key_scale: Any = None  # [B, K, S], int4: [B, K, 2, S]
    value_scale: Any = None
    pages: Any = None  # int32 [B, M]
    slopes: Any = None  # [N]
    sinks: Any = None  # [N]


class Results(NamedTuple):
    """What a call gave, and the cotangents of it, for the backward pass."""

    out: Any  # [B, T, N, Hv]
    lse: Any  # [B, N, T]
    of_out: Any
    of_lse: Any


class Call(NamedTuple):
    """A call as implementations see it: arrays or their types, and for the backward pass whose gradients are wanted."""

    spec: Spec
    ops: Operands
    results: Results | None = None
    wanted: tuple[str, ...] = ()

    @property
    def batch(self) -> Any:
        """B."""
        return self.ops.query.shape[0]

    @property
    def length(self) -> Any:
        """T."""
        return self.ops.query.shape[1]

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.ops.keys.shape[1]

    @property
    def groups(self) -> int:
        """G, query heads of a key head."""
        return self.ops.query.shape[2] // self.kv_heads

    @property
    def rows(self) -> Any:
        """R, rows of the product of one key head: T * G."""
        return self.length * self.groups

    @property
    def sizes(self) -> tuple[int, int]:
        """Channels of keys and of values in memory: H and Hv, half of them for int4."""
        return self.ops.keys.shape[2], self.ops.values.shape[3]

    @property
    def page(self) -> Any:
        """Slots of a page; those of a row's whole cache where there are no pages."""
        return self.ops.keys.shape[3]

    @property
    def slots(self) -> Any:
        """S, slots a row can have."""
        return self.page if self.ops.pages is None else self.page * self.ops.pages.shape[1]

    def __str__(self) -> str:
        shapes = {n: x for n, x in self.ops._asdict().items() if x is not None}
        return "(" + ", ".join(f"{n} {x.dtype}[{','.join(map(str, x.shape))}]" for n, x in shapes.items()) + ")"


def split_rows(call: Call, x: jax.Array, size: Any) -> jax.Array:
    """Returns `[B, T, N, H]` as rows of their key head in parts, `[B, K, parts, R, size]`; H is parts * size."""
    x = x.reshape(call.batch, call.length, call.kv_heads, call.groups, call.spec.parts, size)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(call.batch, call.kv_heads, call.spec.parts, call.rows, size)


def joined_rows(call: Call, rows: jax.Array) -> jax.Array:
    """Returns `[B, T, N, H]` of `[B, K, parts, R, H / parts]`."""
    parts, size = rows.shape[2], rows.shape[4]
    x = rows.reshape(call.batch, call.kv_heads, parts, call.length, call.groups, size)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(*call.ops.query.shape[:3], parts * size)


def joined_numbers(call: Call, rows: jax.Array) -> jax.Array:
    """Returns `[B, N, T]` of one number a row, `[B, K, R]`."""
    x = rows.reshape(call.batch, call.kv_heads, call.length, call.groups)
    return x.transpose(0, 1, 3, 2).reshape(call.batch, call.kv_heads * call.groups, call.length)


def by_row(call: Call, heads: jax.Array) -> jax.Array:
    """Returns one number a head, `[N]`, for each row, `[K, R]`."""
    x = heads.reshape(call.kv_heads, 1, call.groups)
    return jnp.broadcast_to(x, (call.kv_heads, call.length, call.groups)).reshape(call.kv_heads, call.rows)


def numbers(spec: Spec, codes: jax.Array, dtype: Any) -> tuple[jax.Array, ...]:
    """Returns a tile of the cache as numbers of `dtype`, in its parts."""
    if spec.kind == "float":
        return (codes.astype(dtype),)
    if spec.kind == "int8":
        return (codes.astype(jnp.int32).astype(jnp.float32).astype(dtype),)
    if spec.kind == "float8":
        return (float8_e4m3(unsigned(codes)).astype(dtype),)
    pair = unsigned(codes)
    return tuple(x.astype(jnp.float32).astype(dtype) for x in (pair & 15, pair >> 4))


def products(
    spec: Spec, dot: Dot, query: tuple[jax.Array, ...], codes: jax.Array, scale: tuple[jax.Array, ...]
) -> jax.Array:
    """Returns `q . k` of each row and slot, `[..., R, C]`, float32 (float64 of such).

    Args:
        spec: of the call.
        dot: the product `[..., R, h]` by `[..., h, C]`.
        query: its parts, `[..., R, h]`.
        codes: `[..., h, C]`.
        scale: nothing, the scale, or scale and minimum, each `[..., 1, C]`.
    """
    found: Any = None
    for q, k in zip(query, numbers(spec, codes, query[0].dtype), strict=True):
        found = dot(q, k) if found is None else found + dot(q, k)
    if scale:
        found = found * scale[0]
    if len(scale) > 1:
        sums = [jnp.sum(q.astype(found.dtype), axis=-1, keepdims=True) for q in query]
        found = found + (sums[0] + sums[1]) * scale[1]
    return found


def weighted(
    spec: Spec, dot: Dot, weights: jax.Array, codes: jax.Array, scale: tuple[jax.Array, ...], dtype: Any
) -> tuple[jax.Array, ...]:
    """Returns the sum of values under weights in its parts, `[..., R, h]`.

    Args:
        spec: of the call.
        dot: the product `[..., R, C]` by `[..., C, h]`.
        weights: `[..., R, C]`.
        codes: `[..., C, h]`.
        scale: as in `products`.
        dtype: of the products' operands.
    """
    scaled = (weights * scale[0] if scale else weights).astype(dtype)
    found = tuple(dot(scaled, v) for v in numbers(spec, codes, dtype))
    if len(scale) > 1:
        least = jnp.sum(weights * scale[1], axis=-1, keepdims=True)
        found = tuple(x + least for x in found)
    return found


def capped(spec: Spec, product: jax.Array) -> jax.Array:
    """Returns scores before anything is added: `scale * product`, bent by the soft cap."""
    scores = product * spec.scale
    return scores if spec.soft_cap is None else spec.soft_cap * jnp.tanh(scores / spec.soft_cap)


def hidden(spec: Spec, scores: jax.Array, positions: jax.Array, slots: jax.Array, slope: jax.Array | None) -> jax.Array:
    """Returns scores with the slopes' part, `HIDDEN` where a row does not see a slot.

    Args:
        spec: of the call.
        scores: `[..., R, C]`.
        positions: of the rows, `[..., R, 1]`.
        slots: `[..., 1, C]`, negative: nobody sees it.
        slope: `[..., R, 1]`.
    """
    if slope is not None:
        scores = scores + slope.astype(scores.dtype) * (slots - positions).astype(scores.dtype)
    visible = (slots <= positions) & (slots >= 0)
    first = first_seen(spec, positions)
    if first is not None:
        visible = visible & (slots >= first)
    return jnp.where(visible, scores, jnp.asarray(HIDDEN, scores.dtype))


def first_seen(spec: Spec, positions: jax.Array) -> jax.Array | None:
    """Returns the first slot that queries at these positions see, which never falls as they grow; None: all before."""
    first = None if spec.window is None else positions - (spec.window - 1)
    if spec.chunk is None:
        return first
    start = positions - jax.lax.rem(positions, jnp.full_like(positions, spec.chunk))
    return start if first is None else jnp.maximum(first, start)


def merged(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns outputs and log-sum-exp of all splits together.

        lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) out_i

    Args:
        outs: `[I, B, K, parts, R, h]`, float32.
        lses: `[I, B, K, 1, R]`, -inf where a split holds nothing that the row sees.
    """
    top = jnp.max(lses, axis=0, keepdims=True)
    floor = jnp.where(jnp.isneginf(top), 0.0, top)
    shares = jnp.exp(lses - floor)
    total = jnp.sum(shares, axis=0, keepdims=True)
    some = jnp.where(total > 0, total, 1.0)
    out = jnp.sum(outs * (shares / some)[..., None], axis=0)
    return out, jnp.where(total > 0, floor + jnp.log(some), -jnp.inf)[0]


def refusal_of_shapes(call: Call, dtypes: Sequence[str], largest: int) -> str:
    """Returns why a kernel cannot compute a call whatever the chip; "" where it can. `largest`: channels of a part."""
    ops = call.ops
    if reason := no_sizes((*ops.query.shape, *ops.keys.shape, *ops.values.shape, call.slots)):
        return reason
    for x in (ops.query, *((ops.keys,) if call.spec.kind == "float" else ())):
        if x.dtype.name not in dtypes:
            return f"it takes {', '.join(dtypes[:-1])} and {dtypes[-1]}, not {x.dtype}."
    if max(call.sizes) > largest:
        return f"head size {max(call.sizes) * call.spec.parts} is above {largest * call.spec.parts}."
    return ""
