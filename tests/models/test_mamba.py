"""Mamba and Mamba-2 against transformers, step by step, and over 32,768 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.models import families
from trustcore.errors import ModelError
from trustcore.ops.state_space import causal_conv, selective_scan, ssd


@jax.jit
def call(model: Any, tokens: Any, states: Any, mask: Any) -> Any:
    return model(tokens, states, mask)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_logits_whole_and_step_by_step(name: str, tmp_path: Path) -> None:
    case = families.read(name)
    model = case.open(tmp_path)
    tokens, mask = jnp.asarray(case.inputs["input_ids"], jnp.int32), case.inputs["attention_mask"]
    whole, _ = call(model, tokens, None, jnp.asarray(mask))
    assert families.apart(whole, case.outputs["logits"], mask != 0) < families.TOLERANCE
    first, state = call(model, tokens[:1, :70], None, None)
    assert families.apart(first, case.outputs["logits"][:1, :70]) < families.TOLERANCE
    for t in range(70, 75):
        logits, state = call(model, tokens[:1, t : t + 1], state, None)
        assert families.apart(logits, case.outputs["logits"][:1, t : t + 1]) < families.TOLERANCE


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("mamba", {"time_step_rank": "many"}, "time_step_rank is 'many'"),
        ("mamba", {"state_size": 0}, "state_size is 0"),
        ("mamba2", {"head_dim": 8}, "4 heads of 8 channels do not make 64"),
        ("mamba2", {"n_groups": 3}, "64 channels, 4 heads and 3 groups"),
        ("mamba2", {"time_step_limit": [2, 1]}, "time_step_limit is [2, 1]"),
    ],
)
def test_impossible_values_are_refused(name: str, changes: dict, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        families.read(name).open(tmp_path, config=changes)
    assert complaint in str(error.value)


def drawn(kind: str, length: int, dtype: Any = np.float32, seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    if kind == "scan":
        shapes = ((2, length, 3), (2, length, 3), (3, 4), (2, length, 4), (2, length, 4))
    else:
        shapes = ((2, length, 4, 3), (2, length, 4), (4,), (2, length, 2, 5), (2, length, 2, 5))
    x, dt, decay, b, c = (rng.normal(size=shape) for shape in shapes)
    return [jnp.asarray(part, dtype) for part in (x, np.log1p(np.exp(dt - 2)), -np.exp(decay), b, c)]


def recurrence(kind: str, x: Any, dt: Any, decay: Any, b: Any, c: Any) -> tuple[np.ndarray, np.ndarray]:
    """The definition, token by token, in float64."""
    x, dt, decay, b, c = (np.asarray(part, np.float64) for part in (x, dt, decay, b, c))
    if kind == "ssd":
        b, c = (np.repeat(part, 2, axis=2) for part in (b, c))
    state, ys = 0.0, []
    for t in range(x.shape[1]):
        if kind == "scan":
            state = np.exp(dt[:, t, :, None] * decay) * state + (dt * x)[:, t, :, None] * b[:, t, None]
            ys.append((state * c[:, t, None]).sum(-1))
        else:
            keep = np.exp(dt[:, t] * decay)[..., None, None]
            state = keep * state + dt[:, t, :, None, None] * x[:, t, ..., None] * b[:, t, :, None]
            ys.append((state * c[:, t, :, None]).sum(-1))
    return np.stack(ys, axis=1), np.asarray(state)


OPS = {"scan": selective_scan, "ssd": ssd}


@pytest.mark.parametrize("kind", OPS)
def test_chunks_are_the_recurrence(kind: str) -> None:
    parts = drawn(kind, 23)
    expected, last = recurrence(kind, *parts)
    for chunk in (8, 64):
        y, state = jax.jit(OPS[kind], static_argnames="chunk")(*parts, chunk=chunk)
        np.testing.assert_allclose(y, expected, atol=2e-5)
        np.testing.assert_allclose(state, last, atol=2e-5)
    head = [part if i == 2 else part[:, :9] for i, part in enumerate(parts)]
    tail = [part if i == 2 else part[:, 9:] for i, part in enumerate(parts)]
    run = jax.jit(OPS[kind])
    _, state = run(*head)
    np.testing.assert_allclose(run(*tail, state)[0], expected[:, 9:], atol=2e-5)


@pytest.mark.parametrize("kind", OPS)
def test_gradients(kind: str) -> None:
    with jax.enable_x64(True):
        parts = drawn(kind, 5, np.float64)
        check_grads(
            jax.jit(lambda *parts: OPS[kind](*parts, chunk=3)), parts, order=1, modes=["rev"], atol=1e-6, rtol=1e-6
        )
        x, kernel, bias = parts[0].reshape(2, 5, -1), jnp.ones((4, 1, parts[0].size // 10)), parts[2].reshape(-1)
        bias = jnp.resize(bias, kernel.shape[2:])
        check_grads(
            jax.jit(lambda *a: causal_conv(*a)[0]), (x, kernel, bias), order=1, modes=["rev"], atol=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize("length", [2048, pytest.param(32768, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", OPS)
def test_long_rows_are_stable(kind: str, length: int) -> None:
    """Steps from tiny to huge: as exact at the end as at the start, and so are the gradients."""
    parts = drawn(kind, length, seed=1)
    parts[1] = parts[1] * jnp.where(
        jnp.arange(length).reshape(1, -1, *[1] * (parts[1].ndim - 2)) % 1000 < 990, 1e-2, 1e2
    )
    expected, last = recurrence(kind, *parts)
    y, state = jax.jit(OPS[kind])(*parts)
    scale = np.abs(expected).max()
    assert float(np.max(np.abs(np.asarray(y) - expected))) < 2e-5 * scale
    np.testing.assert_allclose(state, last, atol=2e-5 * np.abs(last).max())
    gradients = jax.jit(jax.grad(lambda parts: jnp.mean(OPS[kind](*parts)[0] ** 2)))(parts)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in gradients)
