"""One table of attention calls, every implementation: forward, gradients of everything, vmap, jit; against the oracle.

Pallas kernels run in the interpreter. Tiles are made small, so that short sequences have several.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.attention import BlockMask, attention, attention_oracle, dropout_weights
from tests.kernels_pallas.attention_cases import SMOOTH, close, loss, operands, small_tiles, weights_for

IMPLEMENTATIONS = ("xla", "triton", "mosaic_tpu")
# B, T, N, K, H, S; options, in which a tuple of an array's name is its shape.
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "causal": ((1, 70, 2, 2, 16, 70), {}),
    "grouped heads, T and S differ, other value size": ((2, 37, 4, 2, 24, 50), {"causal": False, "value_size": 16}),
    "one query": ((2, 1, 4, 1, 16, 45), {"causal": False}),
    "window, soft cap, queries behind": ((1, 50, 2, 1, 32, 90), {"window": 17, "soft_cap": 5.0, "offset": 40}),
    "window both ways": ((1, 60, 2, 2, 16, 60), {"causal": False, "window": (9, 20)}),
    "segments": ((2, 60, 2, 1, 16, 60), {"packed": True}),
    "padding": ((3, 40, 2, 2, 16, 40), {"padded": True, "causal": False}),
    "sinks and slopes": ((2, 40, 4, 2, 16, 40), {"sinks": (4,), "slopes": (4,)}),
    "bias": ((2, 33, 4, 2, 16, 40), {"bias": (1, 4, 33, 40), "causal": False}),
    "bias of keys": ((2, 33, 4, 2, 16, 40), {"bias": (2, 1, 1, 40), "causal": False}),
    "mask by batch": ((2, 33, 4, 2, 16, 33), {"mask": (2, 1, 33, 33)}),
    "mask and bias": ((2, 20, 2, 2, 16, 33), {"mask": (1, 2, 20, 33), "bias": (2, 2, 1, 33), "causal": False}),
    "relative positions": ((2, 40, 4, 2, 16, 36), {"relative": (4, 13), "causal": False}),
    "dropout": ((2, 33, 4, 2, 16, 40), {"dropout": 0.3, "causal": False}),
    "blocks": ((2, 70, 2, 2, 16, 90), {"blocks": (1, 1, 16, 32), "causal": False}),
    "blocks by row and head, causal, window": ((2, 90, 4, 2, 16, 90), {"blocks": (2, 4, 32, 32), "window": 50}),
    "blocks by head, bias, sinks": (
        (2, 50, 4, 2, 16, 70),
        {"blocks": (1, 4, 16, 32), "bias": (1, 4, 50, 70), "sinks": (4,), "causal": False},
    ),
    "blocks by row, segments": ((2, 70, 4, 1, 16, 70), {"blocks": (2, 1, 32, 64), "packed": True}),
    "one block": ((1, 20, 2, 1, 16, 30), {"blocks": (1, 2, 64, 64), "causal": False}),
}
ONLY_XLA = ("relative positions",)
QUICK = (
    "grouped heads, T and S differ, other value size", "window, soft cap, queries behind", "segments",
    "sinks and slopes", "mask and bias", "dropout", "blocks by row and head, causal, window",
    "blocks by head, bias, sinks",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)


def table() -> Iterator[Any]:
    for name in CASES:
        for implementation in IMPLEMENTATIONS:
            if name in ONLY_XLA and implementation != "xla":
                continue
            quick = implementation == "xla" or name in QUICK
            yield pytest.param(name, implementation, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "implementation"), list(table()))
def test_outputs_log_sum_exp_and_gradients(name: str, implementation: str) -> None:
    shape, options = CASES[name]
    arrays, static = operands(shape, options)
    smooth = {x: arrays.pop(x) for x in SMOOTH if x in arrays}
    weights = weights_for(shape, smooth["value"].shape[-1])
    ours = functools.partial(attention, **static, implementation=implementation, interpret=implementation != "xla")
    results = [
        jax.jit(jax.grad(functools.partial(loss, f, arrays, weights), has_aux=True))(smooth)
        for f in (ours, functools.partial(attention_oracle, **static))
    ]
    (gradients, outputs), (wanted, expected) = results
    close(outputs, expected, 3e-6)
    close(gradients, wanted, 3e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes(dtype: str, implementation: str) -> None:
    """Sums are float32: the error is that of rounding operands, weights and results."""
    if implementation == "mosaic_tpu" and dtype == "float16":
        pytest.skip("the kernels for TPUs take float32 and bfloat16")
    shape = (1, 50, 4, 2, 16, 50)
    arrays, _ = operands(shape, {})
    arrays = {n: x.astype(dtype) for n, x in arrays.items()}
    weights = tuple(w.astype(d) for w, d in zip(weights_for(shape, 16), (dtype, "float32"), strict=True))
    ours = functools.partial(attention, implementation=implementation, interpret=implementation != "xla")
    results = [
        jax.jit(jax.grad(lambda a, f=f, w=w: loss(f, {}, w, a)[0]))(arrays)
        for f, w in ((ours, weights), (attention_oracle, tuple(w.astype(jnp.float32) for w in weights)))
    ]
    close(*results, {"bfloat16": 6e-2, "float16": 8e-3}[dtype])
    assert all(x.dtype == dtype for x in results[0].values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mapped", ["query and bias", "slopes", "dropout"])
def test_vmap(mapped: str, implementation: str) -> None:
    """As one call after the other; what has no batch is mapped, too, and a bias that is shared keeps its gradient."""
    if mapped == "slopes" and implementation != "xla":
        pytest.skip("the rule is the same for all implementations")
    shape = (2, 20, 2, 1, 16, 33)
    arrays, static = operands(
        shape,
        {
            "query and bias": {"bias": (1, 2, 20, 33), "causal": False},
            "slopes": {"slopes": (2,)},
            "dropout": {"dropout": 0.4, "causal": False},
        }[mapped],
    )
    axes = {"query": 1, "key": None, "value": 0, "bias": None, "slopes": 0}
    axes = {n: axes[n] for n in arrays}

    def twice(n: str) -> jax.Array:
        return arrays[n] if axes[n] is None else jnp.stack([arrays[n], 2 * arrays[n]], axes[n])

    smooth, weights = {n: twice(n) for n in arrays}, weights_for(shape, 16)
    function = functools.partial(attention, **static, implementation=implementation, interpret=implementation != "xla")

    def part(arrays: dict[str, Any], i: int) -> dict[str, Any]:
        return {n: x if axes[n] is None else jnp.take(x, i, axis=axes[n]) for n, x in arrays.items()}

    def lifted(arrays: dict[str, Any]) -> Any:
        return jnp.sum(jax.vmap(lambda a: loss(function, {}, weights, a)[0], in_axes=(axes,))(arrays))

    def in_turn(arrays: dict[str, Any]) -> Any:
        oracle = functools.partial(attention_oracle, **static)
        return sum(loss(oracle, {}, weights, part(arrays, i))[0] for i in range(2))

    (a, found), (b, expected) = (jax.jit(jax.value_and_grad(f))(smooth) for f in (lifted, in_turn))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)
    close(found, expected, 1e-4)


@settings(max_examples=6, deadline=None)
@given(
    b=st.integers(1, 2), t=st.integers(1, 40), k=st.integers(1, 2), g=st.integers(1, 3), s=st.integers(1, 70),
    h=st.sampled_from((8, 20)), causal=st.booleans(), window=st.none() | st.integers(1, 12), sunk=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(b, t, k, g, s, h, causal, window, sunk, seed) -> None:
    """Any lengths, positions in any order, keys that nobody sees: outputs and gradients."""
    rng = np.random.default_rng(seed)
    arrays, _ = operands((b, t, k * g, k, h, s), {"sinks": (k * g,)} if sunk else {}, seed)
    places = {"query_positions": rng.integers(0, s + 5, (b, t)), "key_positions": rng.integers(-2, s + 5, (b, s))}
    places = {n: jnp.asarray(x, jnp.int32) for n, x in places.items()}
    weights = weights_for((b, t, k * g), h)
    results = [
        jax.jit(jax.grad(lambda a, p, f=f: loss(functools.partial(f, causal=causal, window=window), p, weights, a)[0]))(
            arrays, places
        )
        for f in (functools.partial(attention, implementation="xla"), attention_oracle)
    ]
    close(*results, 3e-5)


@settings(max_examples=3, deadline=None)
@given(
    b=st.integers(1, 2), t=st.sampled_from((1, 16, 21, 40)), k=st.integers(1, 2), g=st.integers(1, 2),
    s=st.integers(1, 70), h=st.sampled_from((16, 20)), causal=st.booleans(), window=st.none() | st.integers(1, 12),
    blocks=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@pytest.mark.parametrize("implementation", [pytest.param("triton", marks=pytest.mark.slow), "mosaic_tpu"])
def test_any_shape_by_kernels(implementation, b, t, k, g, s, h, causal, window, blocks, seed) -> None:
    """The kernels alike; positions in any order, so that rows may see nothing, and lists of blocks."""
    rng = np.random.default_rng(seed)
    arrays, _ = operands((b, t, k * g, k, h, s), {}, seed)
    fixed = {"query_positions": rng.integers(0, s + 5, (b, t)), "key_positions": rng.integers(-2, s + 5, (b, s))}
    fixed: dict[str, Any] = {n: jnp.asarray(x, jnp.int32) for n, x in fixed.items()}
    if blocks:
        fixed["block_mask"] = BlockMask.from_dense(rng.random((b, 1, -(-t // 16), -(-s // 32))) < 0.6, 16, 32)
    weights = weights_for((b, t, k * g), h)
    ours = functools.partial(attention, implementation=implementation, interpret=True)
    results = [
        jax.jit(jax.grad(lambda a, p, f=f: loss(functools.partial(f, causal=causal, window=window), p, weights, a)[0]))(
            arrays, fixed
        )
        for f in (ours, attention_oracle)
    ]
    close(*results, 3e-5)


@pytest.mark.parametrize(("t", "s"), [(1, 0), (5, 0), (0, 3), (0, 0)])
def test_empty_axes(t: int, s: int) -> None:
    """No keys: zeros, and the log-sum-exp of the sinks; no queries: zero gradients."""
    arrays, _ = operands((2, t, 4, 2, 8, s), {"bias": (1, 4, t, s)})
    mask = BlockMask.from_dense(np.ones((-(-t // 4), -(-s // 4)), bool), 4, 4)
    more = {"slopes": jnp.ones(4), "sinks": jnp.linspace(-1.0, 1.0, 4)}
    weights = weights_for((2, t, 4), 8)
    for others in (more, {"slopes": more["slopes"]}):
        found, expected = (
            jax.jit(jax.grad(functools.partial(loss, f, {}, weights), has_aux=True))({**arrays, **others})
            for f in (
                functools.partial(attention, block_mask=mask),
                functools.partial(attention_oracle, block_mask=mask),
            )
        )
        close(found, expected, 1e-6)
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_see_nothing_give_zeros_and_zero_gradients(implementation: str) -> None:
    arrays, _ = operands((1, 20, 2, 1, 16, 40), {})
    hidden = {"key_positions": jnp.full((1, 40), -1, jnp.int32)}
    function = functools.partial(attention, implementation=implementation, interpret=implementation != "xla")
    gradients, (out, lse) = jax.jit(jax.grad(functools.partial(loss, function, hidden, (1.0, 1.0)), has_aux=True))(
        arrays
    )
    assert (out == 0).all() and jnp.isneginf(lse).all()
    assert all((g == 0).all() for g in gradients.values())


def test_chunks_of_keys_merge_by_their_log_sum_exp() -> None:
    """As ring attention does: outputs of two halves of the keys, and their gradients, give those of the whole."""
    arrays, _ = operands((1, 30, 2, 1, 16, 60), {})

    def whole(a: dict[str, Any]) -> Any:
        return jnp.sum(jnp.sin(attention_oracle(**a, causal=False)))

    def merged(a: dict[str, Any]) -> Any:
        halves = [
            attention(a["query"], *(jnp.split(a[n], 2, 1)[i] for n in ("key", "value")), causal=False, return_lse=True)
            for i in range(2)
        ]
        total = jnp.logaddexp(*(lse for _, lse in halves))
        parts = (out * jnp.exp(lse - total).transpose(0, 2, 1)[..., None] for out, lse in halves)
        return jnp.sum(jnp.sin(sum(parts)))

    close(jax.jit(jax.grad(merged))(arrays), jax.jit(jax.grad(whole))(arrays), 1e-5)


def test_dropout_drops_its_share_and_keys_decide_which() -> None:
    first, again, other = (dropout_weights(0.25, jax.random.key(i), 4, 8, 64, 64) for i in (0, 0, 1))
    assert (first == again).all() and set(np.unique(first)) == {0.0, np.float32(1 / 0.75)}
    share = float(jnp.mean(first == 0))
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / first.size) ** 0.5
    both = float(jnp.mean((first == 0) & (other == 0)))
    assert abs(both - 0.0625) < 5 * (0.0625 / first.size) ** 0.5
    for axis in range(4):  # neighbours along any axis are dropped independently
        near = float(jnp.mean((first == 0) & (jnp.roll(first, 1, axis) == 0)))
        assert abs(near - 0.0625) < 5 * (0.0625 / first.size) ** 0.5


@pytest.mark.parametrize("span", [1024, 4096])
def test_memory_grows_with_the_length_alone(span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporaries of the compiled gradient: the plain form's grow with T * S."""
    monkeypatch.undo()
    x = jax.ShapeDtypeStruct((1, span, 4, 64), jnp.float32)

    def temporary(function: Any) -> int:
        gradient = jax.jit(jax.grad(lambda *a: jnp.sum(function(*a) ** 2), (0, 1, 2)))
        return gradient.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    operand = span * 4 * 64 * 4
    assert temporary(attention) < 10 * operand + 4 * 2**20
    if span == 4096:
        assert temporary(attention_oracle) > 4 * span * span * 4
