"""Attention of float8 codes with scales, forward: beside the oracle of the same codes and that of the numbers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import ImplementationError
from kernels_pallas.attention import BlockMask, attention, attention_oracle, explain
from tests.kernels_pallas.attention_cases import close, operands, small_tiles

TOP = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
# Norm of the difference over that of the numbers' output: of the codes' rounding alone, 2**-4 and 2**-3 of each number
# at most, as the oracle has it.
ROUNDING = {"float8_e4m3fn": 0.06, "float8_e5m2": 0.12}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)


def encoded(x: jax.Array, dtype: str, by: str) -> tuple[jax.Array, jax.Array]:
    """Codes `[B, T, N, H]` and scales: one, one by head, or one by row and head."""
    axes = {"tensor": (0, 1, 2, 3), "head": (0, 1, 3), "row and head": (1, 3)}[by]
    top = jnp.max(jnp.abs(x), axes, keepdims=True) / TOP[dtype]
    return (x / top).astype(dtype), top.reshape(()) if by == "tensor" else top[:, 0, :, 0]


def distance(a: jax.Array, b: jax.Array) -> float:
    return float(jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel()))


def case(dtype: str, by: str, shape: tuple[int, ...], options: dict[str, Any]) -> tuple[Any, Any, Any]:
    arrays, static = operands(shape, options)
    codes, scales = dict(arrays), {}
    for name in ("query", "key", "value"):
        codes[name], scales[f"{name}_scale"] = encoded(arrays[name], dtype, by)
    return arrays, {**codes, **scales}, static


@pytest.mark.parametrize("implementation", ["xla", "triton", "mosaic_tpu"])
@pytest.mark.parametrize(
    ("dtype", "by", "options"),
    [
        ("float8_e4m3fn", "row and head", {}),
        ("float8_e5m2", "tensor", {"window": 20, "soft_cap": 5.0, "sinks": (4,)}),
        ("float8_e4m3fn", "head", {"blocks": (2, 4, 32, 32), "causal": False, "value_size": 24}),
    ],
)
def test_outputs_are_those_of_the_codes(dtype: str, by: str, options: dict[str, Any], implementation: str) -> None:
    """Within the rounding of weights and outputs to bfloat16, 2**-8 a number; the log-sum-exp is float32's."""
    arrays, codes, static = case(dtype, by, (2, 50, 4, 2, 32, 50), options)
    ours = functools.partial(attention, implementation=implementation, interpret=implementation != "xla")
    out, lse = jax.jit(functools.partial(ours, **static, return_lse=True))(**codes)
    expected, of_codes = attention_oracle(**codes, **static, return_lse=True)
    assert out.dtype == jnp.bfloat16
    close(lse, of_codes, 3e-6)
    assert distance(out, expected) < 4e-3
    assert distance(expected, attention_oracle(**arrays, **static)) < ROUNDING[dtype]


def test_vmap_over_codes_and_scales() -> None:
    _, codes, _ = case("float8_e4m3fn", "row and head", (2, 20, 2, 1, 32, 33), {"causal": False})
    stacked = {n: jnp.stack([x, x]) for n, x in codes.items()}
    stacked["key_scale"] = stacked["key_scale"] * jnp.asarray([1.0, 0.5], jnp.float32)[:, None, None]
    found = jax.jit(jax.vmap(functools.partial(attention, causal=False)))(**stacked)
    for i in range(2):
        one = attention_oracle(**{n: x[i] for n, x in stacked.items()}, causal=False)
        assert distance(found[i], one) < 4e-3
    assert distance(found[1], attention_oracle(**codes, causal=False)) > 1e-2


def test_a_gradient_is_refused() -> None:
    _, codes, _ = case("float8_e4m3fn", "tensor", (1, 8, 1, 1, 32, 8), {})
    for name in ("query", "key_scale"):
        with pytest.raises(ImplementationError, match="float8 operands have a forward pass alone and no gradient"):
            jax.grad(lambda x, name=name: jnp.sum(attention(**{**codes, name: x}).astype(jnp.float32)))(codes[name])


def test_errors_and_refusals() -> None:
    _, codes, _ = case("float8_e4m3fn", "tensor", (1, 8, 4, 2, 32, 8), {})
    with pytest.raises(ValueError, match=r"key_scale is float32\[1, 4\] and must be float32, \[\] or \[1, 2\]"):
        attention(**{**codes, "key_scale": jnp.ones((1, 4))})
    x = jnp.ones((1, 8, 4, 32))
    with pytest.raises(ValueError, match="value_scale goes with float8 codes, and query, key and value are float32"):
        attention(x, x, x, value_scale=jnp.ones(()))
    qkv = codes["query"], codes["key"], codes["value"]
    told = {chip: str(explain(*qkv, platform="cuda", architecture=chip)) for chip in ("8.0", "8.9", "9.0")}
    assert "products of float8 need compute capability 8.9 and the chip has 8.0" in told["8.0"]
    assert "triton: taken" in told["8.9"] and "triton: taken" in told["9.0"]
    assert "has no products of float8_e4m3fn on AMD's chips" in str(
        explain(*qkv, platform="rocm", architecture="gfx942")
    )
    assert explain(*qkv, platform="tpu", architecture="TPU v5e").taken == "mosaic_tpu"
    small = jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.float8_e5m2)
    assert "head size 16 is below the 17" in str(explain(small, small, small, platform="cuda", architecture="9.0"))
    mask = BlockMask.from_dense(np.ones((4, 4), bool), 16, 128)
    long = (
        jax.ShapeDtypeStruct((1, 64, 2, 32), jnp.float8_e5m2),
        *(jax.ShapeDtypeStruct((1, 512, 2, 32), jnp.float8_e5m2),) * 2,
    )
    assert "blocks of 16 queries in the block mask are no multiple of 32" in str(
        explain(*long, block_mask=mask, platform="tpu")
    )
