"""Convolutions beside XLA's own: values, gradients, vmap, and which calls take which program."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from trustcore.ops.conv import convolve

IMAGES, SEQUENCES = ("NHWC", "HWIO", "NHWC"), ("NHC", "HIO", "NHC")
# image, window, strides, padding, groups
CASES = {
    "3 x 3": ((2, 9, 8, 6), (3, 3, 1, 6), (1, 1), ((1, 1), (1, 1)), 6),
    "strided": ((2, 9, 8, 6), (3, 3, 1, 6), (2, 2), ((1, 1), (1, 1)), 6),
    "uneven": ((1, 11, 7, 4), (5, 3, 1, 4), (3, 2), ((0, 3), (2, 0)), 4),
    "named padding": ((2, 7, 7, 4), (5, 5, 1, 4), (2, 2), "SAME", 4),
    "valid": ((2, 7, 7, 4), (3, 3, 1, 4), (1, 1), "VALID", 4),
    "of one place": ((2, 7, 6, 4), (1, 1, 4, 5), (1, 1), "VALID", 1),
    "of one place, strided": ((2, 7, 6, 4), (1, 1, 4, 5), (2, 3), ((0, 0), (0, 0)), 1),
    "of one place, padded": ((2, 7, 6, 4), (1, 1, 4, 5), (2, 2), ((1, 0), (0, 2)), 1),
    "sequence": ((2, 12, 4), (4, 1, 4), (1,), ((3, 0),), 4),
    "sequence of one place": ((2, 12, 4), (1, 4, 3), (2,), "VALID", 1),
    "general": ((2, 7, 6, 4), (3, 3, 4, 5), (1, 1), "SAME", 1),
    "grouped": ((2, 7, 6, 4), (3, 3, 2, 6), (1, 1), "SAME", 2),
}


def made(name: str, dtype: Any = np.float32):
    image, window, strides, padding, groups = CASES[name]
    rng = np.random.default_rng(0)
    numbers = IMAGES if len(image) == 4 else SEQUENCES
    x, k = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in (image, window))
    options = {"dimension_numbers": numbers, "feature_group_count": groups}
    ours = lambda x, k: convolve(x, k, strides, padding, **options)  # noqa: E731
    theirs = lambda x, k: lax.conv_general_dilated(x, k, strides, padding, **options)  # noqa: E731
    return x, k, ours, theirs


@pytest.mark.parametrize("name", CASES)
def test_equals_the_convolution_of_xla(name: str) -> None:
    x, k, ours, theirs = made(name)
    value, expected = jax.jit(ours)(x, k), theirs(x, k)
    assert value.dtype == expected.dtype
    np.testing.assert_allclose(value, expected, atol=1e-5)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(expected.shape), jnp.float32)
    grads, wanted = (
        jax.jit(jax.grad(lambda x, k, f=f: jnp.sum(f(x, k) * weight), (0, 1)))(x, k) for f in (ours, theirs)
    )
    for mine, other in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


@pytest.mark.parametrize("name", ["uneven", "of one place, padded"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    with jax.enable_x64(True):
        x, k, ours, _ = made(name, np.float64)
        check_grads(ours, (x, k), order=2, modes=["rev"])


def test_under_vmap_and_in_half_precision() -> None:
    x, k, ours, theirs = made("strided")
    many = jnp.stack([x, 2 * x])
    np.testing.assert_allclose(jax.vmap(ours, (0, None))(many, k)[1], 2 * ours(x, k), atol=1e-5)
    np.testing.assert_allclose(jax.vmap(ours, (None, 0))(x, jnp.stack([k, -k]))[1], -ours(x, k), atol=1e-5)
    half = ours(x.astype(jnp.bfloat16), k.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), theirs(x, k), atol=0.15)


def test_which_program_is_taken() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("other platforms take XLA's convolution")
    for name, (*_, groups) in CASES.items():
        x, k, ours, _ = made(name)
        is_xla = "conv_general_dilated" in str(jax.make_jaxpr(ours)(x, k))
        assert is_xla == (name in ("general", "grouped")), (name, groups)
    channels_first = jnp.moveaxis(made("3 x 3")[0], -1, 1)
    window = jnp.ones((6, 1, 3, 3))
    program = jax.make_jaxpr(lambda x, k: convolve(x, k, (1, 1), "SAME", feature_group_count=6))(channels_first, window)
    assert "conv_general_dilated" in str(program)
