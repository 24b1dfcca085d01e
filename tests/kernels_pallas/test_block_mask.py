"""Attention over lists of blocks: how lists are made, that cost falls with them, vmap, shard_map, any shape, errors."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.attention import BlockMask, attention, attention_oracle, explain
from tests.kernels_pallas.attention_cases import close, loss, operands, small_tiles, weights_for
from trustcore.ops.attention import attention as front


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)


def test_lists_are_those_of_a_dense_mask_and_of_a_function() -> None:
    pairs = np.array([[True, False, True], [False, False, False]])
    made = BlockMask.from_dense(pairs, 4, 5)
    assert made.counts.tolist() == [[[2, 0]]] and made.indices.tolist() == [[[[0, 2], [0, 0]]]]
    assert made.dense(13).tolist() == [[pairs.tolist()]] and made.elementwise(7, 13).shape == (1, 1, 7, 13)
    assert jax.jit(lambda p: BlockMask.from_dense(p, 4, 5))(pairs).indices.shape == (1, 1, 2, 3)
    assert jax.jit(lambda p: BlockMask.from_dense(p, 4, 5, most=2))(pairs).indices.shape == (1, 1, 2, 2)
    again = BlockMask.from_function(lambda q, k: (q < 4) & ((k < 2) | (k == 12)), 7, 13, 4, 5)
    assert again.dense(13).tolist() == [[pairs.tolist()]]
    with pytest.raises(ValueError, match="most is 1, and a row visits 2 blocks"):
        BlockMask.from_dense(pairs, 4, 5, most=1)


def test_what_is_listed_twice_counts_once_and_what_lies_beyond_not_at_all() -> None:
    arrays, _ = operands((1, 64, 2, 1, 16, 64), {})
    lists = [
        BlockMask(32, 32, jnp.asarray(counts, jnp.int32)[None, None], jnp.asarray(indices, jnp.int32)[None, None])
        for counts, indices in (([3, 3], [[0, 0, 7], [1, 1, -1]]), ([1, 1], [[0], [1]]))
    ]
    ours = jax.jit(lambda mask: attention(**arrays, block_mask=mask, causal=False))
    expected = attention_oracle(**arrays, block_mask=lists[1], causal=False)
    close([ours(mask) for mask in lists], [expected, expected], 3e-6)


def test_the_time_falls_with_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of queries sees its own block of keys alone: an eighth of the tiles, forward and backward."""
    monkeypatch.undo()
    x = jax.random.normal(jax.random.key(0), (1, 2048, 2, 64))
    step = jax.jit(jax.value_and_grad(lambda x, mask: jnp.sum(attention(x, x, x, causal=False, block_mask=mask) ** 2)))
    own = np.eye(8, dtype=bool)
    masks = [BlockMask.from_dense(pairs, 256, 256, most=8) for pairs in (own, np.ones_like(own))]
    times = []
    for mask in masks:
        jax.block_until_ready(step(x, mask))
        rounds = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(step(x, mask))
            rounds.append(time.perf_counter() - start)
        times.append(min(rounds))
    assert times[0] < 0.5 * times[1], times


@settings(max_examples=4, deadline=None)
@given(
    b=st.integers(1, 2), t=st.integers(1, 60), k=st.integers(1, 2), g=st.integers(1, 2), s=st.integers(1, 70),
    block_q=st.sampled_from((1, 16, 24, 100)), block_k=st.sampled_from((7, 32, 100)), causal=st.booleans(),
    by=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(b, t, k, g, s, block_q, block_k, causal, by, seed) -> None:
    """Lengths and blocks that do not go with each other, rows without blocks: outputs and gradients."""
    arrays, _ = operands((b, t, k * g, k, 8, s), {}, seed)
    shape = (b, k * g) if by else (1, 1)
    pairs = np.random.default_rng(seed).random((*shape, -(-t // block_q), -(-s // block_k))) < 0.4
    mask = BlockMask.from_dense(pairs, block_q, block_k)
    weights = weights_for((b, t, k * g), 8)
    results = [
        jax.jit(jax.grad(lambda a, m, f=f: loss(functools.partial(f, causal=causal, block_mask=m), {}, weights, a)[0]))(
            arrays, mask
        )
        for f in (functools.partial(attention, implementation="xla"), attention_oracle)
    ]
    close(*results, 3e-5)


@pytest.mark.parametrize("implementation", ["xla", "triton", "mosaic_tpu"])
def test_no_block_at_all_gives_zeros(implementation: str) -> None:
    arrays, _ = operands((1, 40, 2, 1, 16, 64), {})
    mask = BlockMask.from_dense(np.zeros((3, 2), bool), 16, 32)
    function = functools.partial(attention, implementation=implementation, interpret=implementation != "xla")
    total = functools.partial(loss, function, {"block_mask": mask}, (1.0, 1.0))
    found, (out, lse) = jax.jit(jax.grad(total, has_aux=True))(arrays)
    assert (out == 0).all() and jnp.isneginf(lse).all()
    assert all((g == 0).all() for g in found.values())


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("implementation", ["xla", pytest.param("triton", marks=pytest.mark.slow)])
def test_vmap(implementation: str, mapped: bool) -> None:
    """Over queries and keys, with lists of their own or the same ones."""
    shape = (2, 40, 2, 1, 16, 64)
    arrays, _ = operands(shape, {})
    stacked = {n: jnp.stack([x, 2 * x]) for n, x in arrays.items()}
    pairs = np.random.default_rng(0).random((2, 1, 2, 3, 2)) < 0.6
    masks = [BlockMask.from_dense(p, 16, 32, most=2) for p in (pairs if mapped else pairs[[0, 0]])]
    weights = weights_for(shape, 16)
    function = functools.partial(
        attention, causal=False, implementation=implementation, interpret=implementation != "xla"
    )
    axis = 0 if mapped else None
    given_masks = jax.tree.map(lambda *x: jnp.stack(x), *masks) if mapped else masks[0]

    def lifted(a: Any) -> Any:
        one = lambda a, m: loss(function, {"block_mask": m}, weights, a)[0]  # noqa: E731
        return jnp.sum(jax.vmap(one, in_axes=(0, axis))(a, given_masks))

    def in_turn(a: Any) -> Any:
        oracle = functools.partial(attention_oracle, causal=False)
        return sum(
            loss(oracle, {"block_mask": masks[i]}, weights, {n: x[i] for n, x in a.items()})[0] for i in range(2)
        )

    close(*(jax.jit(jax.grad(f))(stacked) for f in (lifted, in_turn)), 1e-4)


def test_shard_map_over_batch_and_heads(fresh_python: Any) -> None:
    """Lists by row and head are split with them; each device's kernel reads its own."""
    printed = fresh_python(
        """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, PartitionSpec as P
        from kernels_pallas.attention import BlockMask, attention, attention_oracle
        mesh = jax.make_mesh((2, 2), ("b", "n"), axis_types=(AxisType.Auto,) * 2)
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (jax.random.normal(key, (2, 96, n, 16)) for key, n in zip(keys, (4, 2, 2)))
        mask = BlockMask.from_dense(np.random.default_rng(0).random((2, 4, 3, 3)) < 0.6, 32, 32)
        split = P("b", None, "n")
        sharded = jax.shard_map(
            lambda q, k, v, m: attention(q, k, v, block_mask=m), mesh=mesh,
            in_specs=(split, split, split, P("b", "n")), out_specs=split,
        )
        def gradients(f):
            return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a, mask))), (0, 1, 2)))(q, k, v)
        whole = gradients(lambda q, k, v, m: attention_oracle(q, k, v, block_mask=m))
        for a, b in zip(gradients(sharded), whole):
            assert jnp.max(jnp.abs(a - b)) < 2e-5, jnp.max(jnp.abs(a - b))
        print("same")
        """,
        devices=4,
    )
    assert printed.split() == ["same"]


def test_models_attention_takes_them() -> None:
    arrays, _ = operands((1, 64, 2, 1, 16, 64), {})
    mask = BlockMask.from_dense(np.eye(4, dtype=bool), 16, 16)
    close(jax.jit(front)(**arrays, block_mask=mask), attention_oracle(**arrays, block_mask=mask), 3e-6)


def test_errors_and_refusals_name_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x = jnp.ones((1, 300, 2, 16))
    mask = BlockMask.from_dense(np.ones((3, 3), bool), 128, 128)
    with pytest.raises(
        ValueError, match=r"have the shape \[1, 1, 2\] and must have \[1, 2, 3\].*300 queries in blocks of 128"
    ):
        attention(x, x, x, block_mask=BlockMask(128, 128, mask.counts[..., :2], mask.indices))
    with pytest.raises(
        ValueError, match=r"indices of block_mask have the shape \[1, 3, 3\] and must have \[1, 1, 3, 'M'\]"
    ):
        attention(x, x, x, block_mask=BlockMask(128, 128, mask.counts, mask.indices[0]))
    with pytest.raises(ValueError, match="float32 and int32; both must be integers"):
        attention(x, x, x, block_mask=BlockMask(128, 128, mask.counts.astype(jnp.float32), mask.indices))
    small = BlockMask.from_dense(np.ones((13, 13), bool), 24, 24)
    asked = functools.partial(explain, x, x, x, block_mask=small)
    assert "blocks of 24 queries in the block mask are no multiple of 16" in str(
        asked(platform="cuda", architecture="8.0")
    )
    assert "blocks of 24 queries in the block mask are no multiple of 16" in str(asked(platform="tpu"))
    many = BlockMask.from_dense(np.ones((1, 2, 256, 256), bool), 128, 128)
    long = jax.ShapeDtypeStruct((1, 2**15, 2, 128), jnp.bfloat16)
    assert "lists take 526336 bytes of SMEM, above 262144" in str(
        explain(long, long, long, block_mask=many, platform="tpu")
    )
