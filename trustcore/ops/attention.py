"""Attention: over keys and values as they come, and over a key-value cache that grows in place.

`attention` is for training and for any call without a cache; `cached_attention` for generation. Which program runs is
chosen while tracing: `kernels_pallas` holds the forms for every platform, `ops/cpu/attention.cc` the CPU's own.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import kernels_pallas.attention as kernels
from trustcore.errors import ImplementationError
from trustcore.ops import cpu


class LayerCache(NamedTuple):
    """Keys and values of one layer; slot s of a row holds the token at position s.

    Attributes:
        keys: `[B, K, H, S]`, float32, bfloat16 or int8: positions innermost, see `kernels_pallas.attention`.
        values: `[B, K, S, H]`.
        key_scale: float32 `[B, K, S]` with int8 codes, else None: `key ~ code * scale`.
        value_scale: the same for values.
    """

    keys: jax.Array
    values: jax.Array
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None

    @staticmethod
    def zeros(batch: int, kv_heads: int, slots: int, size: int, dtype: Any) -> LayerCache:
        """Returns an empty cache. With int8, scales come with it."""
        dtype = jnp.dtype(dtype)
        keys = jnp.zeros((batch, kv_heads, size, slots), dtype)
        values = jnp.zeros((batch, kv_heads, slots, size), dtype)
        if dtype != jnp.int8:
            return LayerCache(keys, values)
        scales = (jnp.zeros((batch, kv_heads, slots), jnp.float32) for _ in range(2))
        return LayerCache(keys, values, *scales)


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    query_positions: Int[Array, "B T"] | None = None,
    key_positions: Int[Array, "B S"] | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Returns `softmax(scale * q k^T + mask) v` with grouped heads; see `kernels_pallas.attention`.

    Differentiable in query, key and value. Scores and sums are float32; O(512 * S) memory.
    """
    return kernels.attention(
        query,
        key,
        value,
        query_positions=query_positions,
        key_positions=key_positions,
        causal=causal,
        window=window,
        scale=scale,
        soft_cap=soft_cap,
    )


def cached_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    cache: LayerCache,
    start: Int[Array, " B"],
    *,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], LayerCache]:
    """Returns causal attention over the cache extended by these T tokens, and that cache.

    Args:
        query: of the tokens, which stand at positions `start[b] .. start[b] + T - 1` of row b.
        key, value: of the tokens; written to the slots of those positions. What would lie beyond the last slot is lost.
        cache: what came before.
        start: tokens each row holds already, int32.
        window: keys a query sees, itself included; None: all before it.
        scale: None is `H ** -0.5`.
        soft_cap: `soft_cap * tanh(score / soft_cap)`; None applies none.
        implementation: None, "native" (the CPU handler) or "xla".

    Raises:
        ImplementationError: the named implementation cannot compute this call.

    Differentiable (through the "xla" form, whatever ran forward), except through int8 codes.
    """
    if implementation not in (None, "native", "xla"):
        raise ImplementationError(
            f"cached_attention: implementation {implementation!r} is not known; choose native or xla, or pass None."
        )
    refusal = _native_refusal(query, cache) if implementation != "xla" else "-"
    if implementation == "native" and refusal:
        raise ImplementationError(f"cached_attention: 'native' cannot compute this call: {refusal}")
    options = (window, kernels.size_scale(query, scale), soft_cap)
    run = _xla if refusal else _native
    return run(options, query, key, value, cache, start)


def _native_refusal(query: jax.Array, cache: LayerCache) -> str:
    if jax.default_backend() != "cpu":
        return f"it runs on the CPU and the default backend is {jax.default_backend()}."
    if cache.keys.dtype not in (jnp.float32, jnp.bfloat16, jnp.int8):
        return f"a cache of {cache.keys.dtype} is not float32, bfloat16 or int8."
    if cpu.why_not():
        return cpu.why_not()
    if query.shape[-1] % cpu.vector_lanes():
        return f"head size {query.shape[-1]} is not a multiple of {cpu.vector_lanes()}."
    return ""


def _xla(
    options: Any, query: jax.Array, key: jax.Array, value: jax.Array, cache: LayerCache, start: jax.Array
) -> tuple[jax.Array, LayerCache]:
    window, scale, soft_cap = options
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)  # [B, K, H, T], [B, K, T, H]
    if cache.key_scale is None or cache.value_scale is None:
        cache = LayerCache(
            kernels.extend_cache(cache.keys, key, start, axis=3),
            kernels.extend_cache(cache.values, value, start, axis=2),
        )
        keys, values = cache.keys, cache.values
    else:
        key, key_scale = _encode(key, axis=2)
        value, value_scale = _encode(value, axis=3)
        cache = LayerCache(
            kernels.extend_cache(cache.keys, key, start, axis=3),
            kernels.extend_cache(cache.values, value, start, axis=2),
            kernels.extend_cache(cache.key_scale, key_scale, start, axis=2),
            kernels.extend_cache(cache.value_scale, value_scale, start, axis=2),
        )
        assert cache.key_scale is not None and cache.value_scale is not None
        keys = cache.keys.astype(jnp.float32) * cache.key_scale[:, :, None, :]
        values = cache.values.astype(jnp.float32) * cache.value_scale[..., None]
    out = kernels.cached_attention(query, keys, values, start, window=window, scale=scale, soft_cap=soft_cap)
    return out, cache


def _encode(x: jax.Array, *, axis: int) -> tuple[jax.Array, jax.Array]:
    """Returns int8 codes and float32 scales: the largest magnitude along `axis` becomes 127."""
    x = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    inverse = jnp.where(top > 0, 127.0 / jnp.where(top > 0, top, 1.0), 0.0)
    return jnp.round(x * inverse).astype(jnp.int8), jnp.squeeze(top / 127.0, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _native(
    options: Any, query: jax.Array, key: jax.Array, value: jax.Array, cache: LayerCache, start: jax.Array
) -> tuple[jax.Array, LayerCache]:
    window, scale, soft_cap = options
    q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
    parts = [part for part in cache if part is not None]
    out, *parts = cpu.cached_attention(q, k, v, start, parts, scale=scale, soft_cap=soft_cap or 0.0, window=window or 0)
    return out.astype(query.dtype), LayerCache(*parts)


def _native_forward(options: Any, *args: Any) -> Any:
    return _native(options, *args), args


def _native_backward(options: Any, args: Any, cotangents: Any) -> Any:
    return jax.vjp(functools.partial(_xla, options), *args)[1](cotangents)


_native.defvjp(_native_forward, _native_backward)
