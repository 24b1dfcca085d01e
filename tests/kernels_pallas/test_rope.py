"""Rotary positions against the plain rotation: both pairings, parts of a head, gradients, vmap, and no copy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
import trustcore
from kernels_pallas.dispatch import Target
from kernels_pallas.rope import ROPE, rope, rope_oracle
from kernels_pallas.rope.front import Call
from trustcore.ops.rope import RopeConfig, angles, rotate

# B, T, N, H, R, rows of cos
CASES = {
    "whole heads": (2, 5, 3, 128, 128, 1),
    "a part": (1, 19, 2, 128, 48, 1),
    "angles of each row": (2, 3, 9, 256, 64, 2),
    "odd sizes": (1, 7, 1, 80, 40, 1),
}
IMPLEMENTATIONS = ("xla", "triton", "mosaic_tpu")


def operands(name: str, dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    b, t, n, h, r, rows = CASES[name]
    rng = np.random.default_rng(t)
    turn = rng.uniform(-3, 3, (rows, t, r // 2))
    return jnp.asarray(rng.standard_normal((b, t, n, h)), dtype), *(
        jnp.asarray(f(turn) * 1.1, jnp.float32) for f in (np.cos, np.sin)
    )


def chosen(implementation: str, **options: Any) -> Any:
    return functools.partial(rope, implementation=implementation, interpret=implementation != "xla", **options)


def pulled(function: Any, x: jax.Array, *turn: jax.Array) -> Any:
    y, pull = jax.vjp(lambda x: function(x, *turn), x)
    return y, pull(jnp.cos(y.astype(jnp.float32)).astype(y.dtype))[0]


def close(found: Any, expected: Any, atol: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0, atol=atol)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradient(name: str, implementation: str, interleaved: bool) -> None:
    x, cos, sin = operands(name)
    if implementation == "mosaic_tpu" and x.shape[3] % 128:
        with pytest.raises(kernels_pallas.ImplementationError, match="80 channels are no multiple of 128"):
            chosen(implementation)(x, cos, sin)
        return
    found = pulled(chosen(implementation, interleaved=interleaved), x, cos, sin)
    close(found, pulled(functools.partial(rope_oracle, interleaved=interleaved), x, cos, sin), 3e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_floats_jit_and_vmap(implementation: str) -> None:
    run = chosen(implementation)
    x, cos, sin = operands("a part", "bfloat16")
    close(jax.jit(run)(x, cos, sin), rope_oracle(x, cos, sin), 4e-2)  # a rounding of numbers up to 4
    x, cos, sin = operands("whole heads")
    several = jnp.stack([x, 2 * x], 1)
    for axes, turn in (((1, None, None), (cos, sin)), ((1, 0, None), (jnp.stack([cos, cos * 0.5]), sin))):
        found, expected = (jax.vmap(f, axes)(several, *turn) for f in (run, rope_oracle))
        close(found, expected, 3e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_it_turns_as_the_layers_do(interleaved: bool) -> None:
    config = RopeConfig(48, interleaved=interleaved)
    x = operands("a part")[0]
    cos, sin = angles(jnp.arange(19)[None], config)
    close(rope(x, cos[:, :, 0], sin[:, :, 0], interleaved=interleaved), rotate(x, (cos, sin), config), 1e-6)


def test_derivatives_of_any_order() -> None:
    x, cos, sin = operands("a part")

    def cubed(function: Any, x: jax.Array) -> jax.Array:
        return jax.grad(lambda z: jnp.sum(jax.grad(lambda x: jnp.sum(function(x, cos, sin) ** 3))(z) ** 2))(x)

    close(cubed(rope, x), cubed(rope_oracle, x), 1e-2)  # numbers up to some thousands


@pytest.mark.parametrize(
    ("platform", "kind", "mark"),
    [
        ("cuda", "NVIDIA H200", "__gpu$xla.gpu.triton"),
        ("rocm", "gfx942", "__gpu$xla.gpu.triton"),
        ("tpu", "TPU v5 lite", "tpu_custom_call"),
    ],
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_it_lowers_in_place(platform: str, kind: str, mark: str, interleaved: bool) -> None:
    """The program says that the kernel's result lies where its operand was; a donated x then has no second array."""
    x, cos, sin = (jax.ShapeDtypeStruct(z.shape, z.dtype) for z in operands("whole heads", "bfloat16"))

    def both(x: Any, cos: Any, sin: Any) -> Any:
        return jax.vjp(lambda x: rope(x, cos, sin, interleaved=interleaved), x)[1](x)[0]

    for function, count in ((functools.partial(rope, interleaved=interleaved), 1), (both, 1)):
        with kernels_pallas.abstract_device(kind, platform if platform == "tpu" else "gpu"):
            traced = jax.jit(function, donate_argnums=0).trace(x, cos, sin)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count(mark) == count and "output_operand_alias" in text


def test_refusals_and_errors() -> None:
    x, cos, sin = operands("odd sizes")
    wide = Call(x.astype("float16"), cos, sin, False)
    assert "not float16" in ROPE.named("mosaic_tpu").refusal(Target("tpu", "TPU v5e"), wide)
    odd = Call(x[..., :79], cos, sin, True)
    assert "79 channels are no pairs" in ROPE.named("triton").refusal(Target("rocm", "gfx942"), odd)
    found = trustcore.kernels.explain("rope", x, cos, sin, platform="tpu", architecture="TPU v5e")
    assert found.taken == "xla" and "80 channels are no multiple of 128" in str(found)
    assert trustcore.kernels.explain("rope", x, cos, sin, platform="cuda", architecture="9.0").taken == "triton"
    with pytest.raises(ValueError, match=r"200 of 80 channels cannot be turned"):
        rope(x, jnp.ones((1, 7, 100)), jnp.ones((1, 7, 100)))
    with pytest.raises(ValueError, match="B and T must agree"):
        rope(x, cos[:, 1:], sin[:, 1:])
    with pytest.raises(ValueError, match="x is int32"):
        rope(x.astype(jnp.int32), cos, sin)
    with pytest.raises(kernels_pallas.ImplementationError, match="'fast' is not known; choose of triton, mosaic_tpu"):
        rope(x, cos, sin, implementation="fast")
