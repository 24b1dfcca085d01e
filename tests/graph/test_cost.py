"""FLOPs and bytes beside XLA's own count and beside what can be counted by hand; loops, branches, rooflines."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from trustcore.graph.cost import Peaks, cost, peaks, roofline
from trustcore.models import random_model
from trustcore.ops import cpu
from trustcore.quant import QuantizedArray

X, W = jnp.ones((32, 64)), jnp.ones((64, 128))
PRODUCT = 2 * 32 * 64 * 128


def gradient(x, w):
    return jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w)


PROGRAMS = {
    "a product": (lambda x, w: x @ w, (X, W)),
    "a batch of products": (lambda a: jnp.einsum("bij,bkj->bik", a, a), (jnp.ones((4, 32, 64)),)),
    "its gradient": (gradient, (X, W)),
    "a convolution": (
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        (jnp.ones((2, 16, 16, 8)), jnp.ones((3, 3, 8, 16))),
    ),
    "a grouped convolution": (
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
        ),
        (jnp.ones((2, 16, 16, 8)), jnp.ones((3, 3, 2, 16))),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_flops_are_those_that_xla_counts(name: str) -> None:
    fn, args = PROGRAMS[name]
    told = jax.jit(fn).lower(*args).compile().cost_analysis()
    assert told is not None
    assert cost(fn, *args).flops == pytest.approx(told["flops"], rel=0.03)


def test_a_model_and_its_gradient() -> None:
    """2 FLOPs a token and weight of a matrix, and two products of queries with keys and values in each layer."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    model = random_model({"model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 2, **sizes})
    batch, length = 4, 32
    tokens = jnp.zeros((batch, length), jnp.int32)
    weights = 128 * 64 + 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
    forward = 2 * batch * length * weights + 2 * 4 * batch * length * length * 64
    loss = lambda model, tokens: jnp.mean(model(tokens) ** 2)  # noqa: E731
    found = cost(loss, model, tokens, compiled=True)
    assert found.flops == pytest.approx(forward, rel=0.05)
    assert found.fused_bytes is not None and found.fused_bytes < found.nbytes and not found.unknown
    stages = cost(jax.grad(loss, allow_int=True), model, tokens).by("stage")
    assert stages["forward"][0] + stages["backward"][0] == pytest.approx(3 * forward, rel=0.1)
    assert stages["backward"][0] > 1.5 * stages["forward"][0]
    assert any("mlp" in name for name in found.by("module"))


def test_loops_count_for_every_turn_and_branches_for_the_dearest() -> None:
    once = lambda x, w: jnp.sum((x @ w) @ w.T)  # noqa: E731
    scanned = lambda x, w: jax.lax.scan(lambda x, _: ((x @ w) @ w.T, None), x, length=7)[0]  # noqa: E731
    assert cost(scanned, X, W).by("operation")["dot_general"][0] == 14 * PRODUCT
    row = next(row for row in cost(scanned, X, W).rows if row.address.primitive == "dot_general")
    assert row.times == 7 and row.address.name.startswith("scan/")
    branch = lambda x, w: jax.lax.cond(x[0, 0] > 0, once, lambda x, w: jnp.sum(x), x, w)  # noqa: E731
    assert cost(branch, X, W).by("operation")["dot_general"][0] == 2 * PRODUCT
    loop = lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: (x @ w) @ w.T, x)  # noqa: E731
    found = cost(loop, X, W)
    assert found.unbounded and found.by("operation")["dot_general"][0] == 2 * PRODUCT
    assert not cost(once, X, W).unbounded


def test_bytes_are_what_is_read_and_written() -> None:
    assert cost(lambda x, w: x @ w, X, W).nbytes == X.nbytes + W.nbytes + 32 * 128 * 4
    assert cost(lambda x: x.reshape(64, 32), X).nbytes == 0
    table, rows = jnp.ones((10_000, 64)), jnp.arange(4)
    assert cost(lambda t, i: t.at[i].get(mode="promise_in_bounds"), table, rows).nbytes < table.nbytes / 10


def test_tables_and_rooflines() -> None:
    found = cost(gradient, X, W)
    page = found.table("operation")
    assert "dot_general" in page.splitlines()[1] and page.splitlines()[-1].endswith("in all")
    assert any(name.startswith("test_cost.py:") for name in found.by("line"))
    rows = roofline(found, Peaks(flops=1e9, bandwidth=1e15))
    assert rows[0][0].address.primitive == "dot_general" and rows[0][2] == "compute"
    assert rows[0][1] == pytest.approx(rows[0][0].flops / 1e9)
    assert all(limit == "memory" for row, _, limit in roofline(found, Peaks(1e15, 1e6)) if row.nbytes)


def test_peaks_are_measured() -> None:
    found = peaks(size=128, seconds=0.01)
    assert 1e8 < found.flops < 1e16 and 1e7 < found.bandwidth < 1e14


def test_foreign_code_is_named_as_unknown() -> None:
    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    found = cost(lambda x: jax.pure_callback(lambda x: x, shape, x), jnp.ones(4))
    assert [row.address.primitive for row in found.unknown] == ["pure_callback"]
    assert "do not tell" in str(found)


def test_our_own_handlers_tell_theirs() -> None:
    if reason := cpu.build.why_not():
        pytest.skip(reason)
    packed = QuantizedArray.quantize(jax.random.normal(jax.random.key(0), (256, 128)), "q4_0")
    found = cost(lambda x, w: x @ w, jnp.ones((1, 256)), packed)
    assert not found.unknown and found.flops == pytest.approx(2 * 256 * 128, rel=0.01)
