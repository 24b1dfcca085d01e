"""Attention: over keys and values as they come, and over a key-value cache that grows in place.

`attention` is for training and for any call without a cache; `cached_attention` for generation. Which program runs is
chosen while tracing: `kernels_pallas` holds the forms for every platform, `ops/cpu/attention.cc` the CPU's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

import kernels_pallas
import kernels_pallas.attention as kernels
from kernels_pallas import decode
from trustcore.errors import ImplementationError
from trustcore.ops import cpu


class LayerCache(NamedTuple):
    """Keys and values of one layer; slot s of a row holds the token at position s.

    What a vector of a token takes, H channels of one head:

        float32, bfloat16       4 H or 2 H bytes
        int8, float8_e4m3fn     H + 4 bytes        channel ~ code * scale
        int4                    H / 2 + 4 bytes    channel ~ Hadamard(code * scale + minimum)

    Four bits are few for vectors of which some channels are far larger than the rest, as those of keys are. A Hadamard
    transform spreads each channel over all others first (Ashkboos et al., QuaRot, arXiv 2404.00456); queries turn with
    the keys, so scores stay what they are, and the output is turned back.

    Attributes:
        keys: `[B, K, H, S]`: positions innermost, see `kernels_pallas.decode`. int4: uint8 `[B, K, H / 2, S]`,
            channels h and h + H / 2 in the low and the high half of a byte.
        values: `[B, K, S, H]`, int4: `[B, K, S, H / 2]`.
        key_scale: float32 `[B, K, S]` with int8 and float8 codes; bfloat16 `[B, K, 2, S]` with int4, scale and minimum;
            else None.
        value_scale: the same for values.
    """

    keys: jax.Array
    values: jax.Array
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None

    @staticmethod
    def zeros(
        batch: int, kv_heads: int, slots: int, size: int, dtype: Any, *, value_size: int | None = None
    ) -> LayerCache:
        """Returns an empty cache, with scales where codes have them; `value_size`: H of the values, None: as the keys'.

        Raises:
            ImplementationError: int4 codes lie two a byte and the head size is odd.
        """
        dtype, value_size = jnp.dtype(dtype), value_size or size
        if dtype == jnp.int4:
            if size % 2 or value_size % 2:
                odd = size if size % 2 else value_size
                raise ImplementationError(f"a cache of int4 packs channels in pairs and the head size is {odd}.")
            dtype, size, value_size = jnp.dtype(jnp.uint8), size // 2, value_size // 2
        keys = jnp.zeros((batch, kv_heads, size, slots), dtype)
        values = jnp.zeros((batch, kv_heads, slots, value_size), dtype)
        if dtype == jnp.uint8:
            scales = (jnp.zeros((batch, kv_heads, 2, slots), jnp.bfloat16) for _ in range(2))
        elif dtype in _TOP:
            scales = (jnp.zeros((batch, kv_heads, slots), jnp.float32) for _ in range(2))
        else:
            return LayerCache(keys, values)
        return LayerCache(keys, values, *scales)

    @property
    def packed(self) -> bool:
        """Whether codes are of 4 bits, two a byte."""
        return self.keys.dtype == jnp.uint8


# Dtypes of codes that a scale multiplies, and the code of the largest magnitude.
_TOP = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H_v"],
    *,
    query_positions: Int[Array, "B T"] | None = None,
    key_positions: Int[Array, "B S"] | None = None,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    block_mask: kernels.BlockMask | None = None,
    bias: Float[Array, "_ _ _ _"] | None = None,
    slopes: Float[Array, " N"] | None = None,
    relative: Float[Array, "N W"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    causal: bool = True,
    window: int | tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    split: jax.sharding.PartitionSpec | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H_v"]:
    """Returns `softmax(scale * q k^T + bias + mask) v` with grouped heads; see `kernels_pallas.attention`.

    Differentiable in query, key, value, bias, slopes, relative and sinks. Scores and sums are float32; O(T) memory.

    Raises:
        ImplementationError: the named implementation cannot compute this call.
    """
    try:
        return kernels.attention(
            query,
            key,
            value,
            query_positions=query_positions,
            key_positions=key_positions,
            query_segments=query_segments,
            key_segments=key_segments,
            block_mask=block_mask,
            bias=bias,
            slopes=slopes,
            relative=relative,
            sinks=sinks,
            causal=causal,
            window=window,
            scale=scale,
            soft_cap=soft_cap,
            dropout=dropout,
            dropout_key=dropout_key,
            split=split,
            implementation=implementation,
        )
    except kernels_pallas.ImplementationError as error:
        raise ImplementationError(str(error)) from error


def alibi_slopes(heads: int) -> np.ndarray:
    """Returns float32 `[N]`: the slope of each head, `2 ** (-8 i / N)` for i = 1 .. N where N is a power of two.

    Otherwise the heads beyond the power of two P below N take every other slope of 2 P heads. Press et al., arXiv
    2108.12409, section 3, and their code.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - power), 2) / power)
    return np.concatenate([slopes, between]).astype(np.float32)


def cached_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H_v"],
    cache: LayerCache,
    start: Int[Array, " B"],
    *,
    window: int | None = None,
    chunk: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    slopes: Float[Array, " N"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H_v"], LayerCache]:
    """Returns causal attention over the cache extended by these T tokens, and that cache.

    Args:
        query: of the tokens, which stand at positions `start[b] .. start[b] + T - 1` of row b.
        key, value: of the tokens; written to the slots of those positions. What would lie beyond the last slot is lost.
        cache: what came before.
        start: tokens each row holds already, int32.
        window: keys a query sees, itself included; None: all before it.
        chunk: positions fall into chunks of so many, and a query sees its own one alone; None: it sees all.
        scale: None is `H ** -0.5`.
        soft_cap: `soft_cap * tanh(score / soft_cap)`; None applies none.
        slopes, sinks: see `kernels_pallas.attention`; "native" has none.
        implementation: None, "native" (the CPU handler), or one of `kernels_pallas.decode`: "triton", "mosaic_tpu",
            "xla".

    Raises:
        ImplementationError: the named implementation cannot compute this call.

    Differentiable (in reverse, once, through the "xla" form, whatever ran forward), except through codes.
    """
    known = [i.name for i in decode.DECODE.implementations]
    if implementation not in (None, "native", *known):
        raise ImplementationError(
            f"cached_attention: implementation {implementation!r} is not known; choose of native, {', '.join(known)}, "
            "or pass None."
        )
    refusal = _native_refusal(query, value, cache, slopes, sinks) if implementation in (None, "native") else "-"
    if implementation == "native" and refusal:
        raise ImplementationError(f"cached_attention: 'native' cannot compute this call: {refusal}")
    options = (window, chunk, query.shape[-1] ** -0.5 if scale is None else scale, soft_cap)
    more = functools.partial(_decode, slopes=slopes, sinks=sinks, implementation=implementation)
    run = cast("Callable[..., tuple[jax.Array, LayerCache]]", more if refusal else _native)
    if cache.packed:
        query, key, value = (_hadamard(x) for x in (query, key, value))
    try:
        out, extended = run(options, query, key, value, cache, start)
    except kernels_pallas.ImplementationError as error:
        raise ImplementationError(str(error)) from error
    return _hadamard(out) if cache.packed else out, extended


def _native_refusal(query: jax.Array, value: jax.Array, cache: LayerCache, slopes: Any, sinks: Any) -> str:
    if jax.default_backend() != "cpu":
        return f"it runs on the CPU and the default backend is {jax.default_backend()}."
    if cache.keys.dtype not in (jnp.float32, jnp.bfloat16, jnp.uint8, *_TOP):
        return f"a cache of {cache.keys.dtype} is not float32, bfloat16, int8, float8_e4m3fn or int4."
    if cpu.why_not():
        return cpu.why_not()
    if slopes is not None or sinks is not None:
        return f"it has no {'slopes' if sinks is None else 'sinks'}."
    if value.shape[-1] != query.shape[-1]:
        return f"values of size {value.shape[-1]} beside keys of size {query.shape[-1]}."
    if query.dtype == jnp.float64:
        return "it computes in float32 and the query is float64."
    lanes = cpu.vector_lanes() * (2 if cache.packed else 1)
    if query.shape[-1] % lanes:
        return f"head size {query.shape[-1]} is not a multiple of {lanes}{', as int4 needs' if cache.packed else ''}."
    return ""


def _decode(
    options: Any,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: LayerCache,
    start: jax.Array,
    slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    implementation: str | None = "xla",
) -> tuple[jax.Array, LayerCache]:
    window, chunk, scale, soft_cap = options
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)  # [B, K, H, T], [B, K, T, H]
    kind = cache.keys.dtype
    key_scale, value_scale = cache.key_scale, cache.value_scale
    if key_scale is not None and value_scale is not None:
        encode, slots = (_encode_half, 3) if cache.packed else (_encode, 2)
        (key, of_key), (value, of_value) = encode(key, kind, axis=2), encode(value, kind, axis=3)
        key_scale = decode.extend_cache(key_scale, of_key, start, axis=slots)
        value_scale = decode.extend_cache(value_scale, of_value, start, axis=slots)
    keys = decode.extend_cache(cache.keys, key, start, axis=3)
    cache = LayerCache(keys, decode.extend_cache(cache.values, value, start, axis=2), key_scale, value_scale)
    out = decode.decode_attention(
        query,
        cache.keys,
        cache.values,
        start + query.shape[1],
        key_scale=cache.key_scale,
        value_scale=cache.value_scale,
        window=window,
        chunk=chunk,
        scale=scale,
        soft_cap=soft_cap,
        slopes=slopes,
        sinks=sinks,
        implementation=implementation,
    )
    return out, cache


def _encode(x: jax.Array, dtype: np.dtype, *, axis: int) -> tuple[jax.Array, jax.Array]:
    """Returns codes and float32 scales: the largest magnitude along `axis` becomes 127, or 448 in float8."""
    x, most = x.astype(jnp.float32), _TOP[dtype]
    top = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    inverse = jnp.where(top > 0, most / jnp.where(top > 0, top, 1.0), 0.0)
    codes = jnp.clip(jax.lax.stop_gradient(x * inverse), -most, most)
    codes = jnp.round(codes) if dtype == jnp.int8 else codes
    return codes.astype(dtype), jnp.squeeze(top / most, axis)


def _encode_half(x: jax.Array, dtype: np.dtype, *, axis: int) -> tuple[jax.Array, jax.Array]:
    """Returns codes of 4 bits in pairs, and their scale and minimum, bfloat16 `[B, K, 2, T]`.

    Codes are chosen for scale and minimum as they are stored.
    """
    x = jax.lax.stop_gradient(x.astype(jnp.float32))
    low, high = jnp.min(x, axis, keepdims=True), jnp.max(x, axis, keepdims=True)
    minimum = low.astype(jnp.bfloat16)
    scale = ((high - minimum.astype(jnp.float32)) / 15.0).astype(jnp.bfloat16)
    step = scale.astype(jnp.float32)
    inverse = jnp.where(step > 0, 1.0 / jnp.where(step > 0, step, 1.0), 0.0)
    codes = jnp.clip(jnp.round((x - minimum.astype(jnp.float32)) * inverse), 0.0, 15.0).astype(dtype)
    first, second = jnp.split(codes, 2, axis)
    pair = first | second << jnp.asarray(4, dtype)
    return pair, jnp.stack([jnp.squeeze(scale, axis), jnp.squeeze(minimum, axis)], axis=2)


def _hadamard(x: jax.Array) -> jax.Array:
    """Returns x turned by the orthogonal Hadamard matrix along its last axis; twice is x again.

    A size that is no power of two is turned in equal parts, each of the largest power of two that divides it.
    """
    size = x.shape[-1]
    part = size & -size
    places = np.arange(part)
    odd = np.bitwise_count(places[:, None] & places) % 2
    matrix = jnp.asarray((1.0 - 2.0 * odd) * part**-0.5, x.dtype)
    parts = x.reshape(*x.shape[:-1], size // part, part)
    return jnp.matmul(parts, matrix, precision="highest").reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _native(
    options: Any, query: jax.Array, key: jax.Array, value: jax.Array, cache: LayerCache, start: jax.Array
) -> tuple[jax.Array, LayerCache]:
    window, chunk, scale, soft_cap = options
    q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
    parts = [part for part in cache if part is not None]
    seen = {"window": window or 0, "chunk": chunk or 0}
    out, *parts = cpu.cached_attention(q, k, v, start, parts, scale=scale, soft_cap=soft_cap or 0.0, **seen)
    return out.astype(query.dtype), LayerCache(*parts)


def _native_forward(options: Any, *args: Any) -> Any:
    return _native(options, *args), args


def _native_backward(options: Any, args: Any, cotangents: Any) -> Any:
    return jax.vjp(functools.partial(_decode, options), *args)[1](cotangents)


_native.defvjp(_native_forward, _native_backward)
