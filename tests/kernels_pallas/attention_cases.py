"""Operands of attention's cases, a loss over all that it returns, and comparisons; for the tests of its kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import BlockMask, tpu, triton, xla

SMOOTH = ("query", "key", "value", "bias", "slopes", "relative", "sinks")


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes tiles so small that short sequences have several."""
    monkeypatch.setattr(xla, "ONE_TILE", 0)
    monkeypatch.setattr(xla, "FEWEST_QUERIES", 16)
    monkeypatch.setitem(xla.BLOCK, "cpu", (16, 32))
    monkeypatch.setattr(triton, "blocks_of", lambda *_: triton.Blocks(16, 32))
    monkeypatch.setattr(tpu, "TILE", (16, 32))
    monkeypatch.setattr(
        tpu,
        "blocks_of",
        lambda call, direction: tpu.Blocks(*map(min, (16, 32), (call.ops.query.shape[1], call.ops.key.shape[1]))),
    )


def operands(shape: tuple[int, ...], options: dict[str, Any], seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and static options of a case."""
    b, t, n, k, h, s = shape
    rng = np.random.default_rng(seed)
    options = dict(options)
    hv = options.pop("value_size", h)
    shapes = {"query": (b, t, n, h), "key": (b, s, k, h), "value": (b, s, k, hv)}
    shapes |= {name: options.pop(name) for name in (*SMOOTH[3:], "mask") if name in options}
    arrays: dict[str, Any] = {name: jnp.asarray(rng.standard_normal(x), jnp.float32) for name, x in shapes.items()}
    if "mask" in arrays:
        arrays["mask"] = (arrays["mask"] > -0.5).at[:, :, 0].set(False)
    if "offset" in options:
        arrays["query_positions"] = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32) + options.pop("offset"), (b, t))
    if options.pop("packed", False):
        arrays["query_segments"] = arrays["key_segments"] = jnp.sort(jnp.asarray(rng.integers(0, 4, (b, t)), jnp.int32))
    if options.pop("padded", False):  # at the left, at the right, everything
        place = jnp.arange(s, dtype=jnp.int32)
        hidden = jnp.stack([place < 9, place > 20, place >= 0])
        arrays["key_positions"] = jnp.where(hidden, -1, place)
    if "blocks" in options:
        b0, n0, block_q, block_k = options.pop("blocks")
        pairs = rng.random((b0, n0, -(-t // block_q), -(-s // block_k))) < 0.5
        pairs[0, 0, 0] = False  # a row that sees nothing
        arrays["block_mask"] = BlockMask.from_dense(pairs, block_q, block_k)
    if options.get("dropout"):
        options["dropout_key"] = jax.random.key(7)
    return arrays, options


def loss(function: Any, arrays: dict[str, Any], weights: Any, smooth: dict[str, Any]) -> Any:
    """A weighted sum of outputs and log-sum-exp, and the two themselves."""
    given = {**arrays, **smooth}
    qkv = [given.pop(x) for x in ("query", "key", "value")]
    out, lse = function(*qkv, **given, return_lse=True)
    seen = jnp.where(jnp.isneginf(lse), 0.0, lse)
    return jnp.sum((out * weights[0]).astype(jnp.float32)) + jnp.sum(seen * weights[1]), (out, lse)


def weights_for(shape: tuple[int, ...], value_size: int) -> tuple[jax.Array, ...]:
    """Of outputs and of the log-sum-exp."""
    b, t, n, *_ = shape
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(rng.standard_normal(x), jnp.float32) for x in ((b, t, n, value_size), (b, n, t)))


def close(found: Any, expected: Any, atol: float) -> None:
    """Trees are equal within `atol` times their largest number, at least `atol`."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(
            a, b, rtol=0, atol=atol * max(1.0, float(np.max(np.abs(b), where=np.isfinite(b), initial=0)))
        )
