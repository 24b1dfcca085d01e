"""Grouped products: one table of calls, every implementation; outputs, gradients, vmap, jit; against the oracle.

Pallas kernels run in the interpreter, with blocks so small that segments have several of them, ends included.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

import kernels_pallas
import trustcore
from kernels_pallas.grouped_matmul import grouped_matmul, grouped_matmul_oracle, tpu, triton, xla

IMPLEMENTATIONS = ("xla", "triton", "mosaic_tpu")
# R, K, N and the rows of each group.
CASES: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "some groups are empty": (40, 20, 24, (0, 17, 0, 0, 9, 14, 0)),
    "one has all": (37, 24, 20, (0, 37)),
    "rows of no group": (40, 20, 24, (11, 0, 13)),
    "no rows at all count": (20, 16, 16, (0, 0, 0)),
    "fewer rows than groups": (2, 16, 20, (0, 1, 0, 0, 1)),
}
CHIPS = [("cuda", "NVIDIA H200", "gpu"), ("rocm", "gfx942", "gpu"), ("tpu", "TPU v5 lite", "tpu")]
MARKS = {"triton": "__gpu$xla.gpu.triton", "mosaic_tpu": "tpu_custom_call"}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sixteen, eight and four rows."""
    monkeypatch.setattr(triton, "blocks_of", lambda call: triton.Blocks(16, 16, 16))
    monkeypatch.setattr(
        tpu, "blocks_of", lambda call: tpu.Blocks(8, 16 if call.direction == "sums" else call.x.shape[1], 16)
    )
    monkeypatch.setattr(xla, "_ROWS", 4)
    monkeypatch.setattr(xla, "_SUMS", 8)


def operands(name: str, dtype: str = "float32") -> tuple[Any, ...]:
    rows, depth, width, sizes = CASES[name]
    rng = np.random.default_rng(len(name))
    x, w = (rng.standard_normal(s) for s in ((rows, depth), (len(sizes), depth, width)))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(sizes, jnp.int32)


def total(function: Any, x: Any, w: Any, sizes: Any) -> Any:
    y = function(x, w, sizes)
    return jnp.sum(jnp.sin(y.astype(jnp.float32))), y


def named(implementation: str) -> Any:
    return functools.partial(grouped_matmul, implementation=implementation, interpret=implementation != "xla")


def close(found: Any, expected: Any, atol: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * max(1.0, float(np.max(np.abs(b), initial=0))))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str, implementation: str) -> None:
    arrays = operands(name)
    found, expected = (
        jax.jit(jax.grad(functools.partial(total, f), (0, 1), has_aux=True))(*arrays)
        for f in (named(implementation), grouped_matmul_oracle)
    )
    close(found, expected, 3e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation: str) -> None:
    """Sums are float32 and rounded once."""
    arrays = operands("rows of no group", "bfloat16")
    found, expected = (
        jax.jit(jax.grad(functools.partial(total, f), (0, 1), has_aux=True))(*arrays)
        for f in (named(implementation), grouped_matmul_oracle)
    )
    close(found, expected, 2e-2)


def test_float64() -> None:
    with jax.enable_x64(True):
        x, w, sizes = operands("some groups are empty", "float64")
        close(grouped_matmul(x, w, sizes), grouped_matmul_oracle(x, w, sizes), 1e-14)


@settings(max_examples=4, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(0, 5), st.integers(1, 9), st.integers(1, 9))
def test_any_shape(sizes: list[int], more: int, depth: int, width: int) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((sum(sizes) + more, depth)), rng.standard_normal((len(sizes), depth, width))
    arrays = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), jnp.asarray(sizes, jnp.int32)
    found, expected = (
        jax.jit(jax.grad(functools.partial(total, f), (0, 1), has_aux=True))(*arrays)
        for f in (grouped_matmul, grouped_matmul_oracle)
    )
    close(found, expected, 1e-5)


VMAPS = [(axes, "xla") for axes in ((0, None, 0), (1, 1, None), (None, 0, 0), (0, None, None))]


@pytest.mark.parametrize(("axes", "implementation"), [*VMAPS, ((0, None, 0), "triton"), ((1, 1, None), "mosaic_tpu")])
def test_vmap(axes: tuple[int | None, ...], implementation: str) -> None:
    """The mapped axis is folded into rows and segments, in the gradient, too: no loop over it is traced."""
    x, w, sizes = operands("rows of no group")
    many = [
        x if axes[0] is None else jnp.stack([x, 2 * x], axes[0]),
        w if axes[1] is None else jnp.stack([w, w + 1], axes[1]),
        sizes if axes[2] is None else jnp.stack([sizes, sizes[::-1]]),
    ]
    found, expected = (
        jax.jit(jax.grad(functools.partial(total, jax.vmap(f, axes)), (0, 1), has_aux=True))(*many)
        for f in (named(implementation), grouped_matmul_oracle)
    )
    close(found, expected, 3e-6)
    if implementation == "xla":
        text = str(jax.make_jaxpr(jax.vmap(grouped_matmul, axes))(*many))
        assert text.count("= grouped_matmul_rows") == 1
        assert "scan[" not in text and "while[" not in text


def test_second_gradients() -> None:
    arrays = operands("rows of no group")

    def second(f: Any) -> Any:
        def first(x: Any, w: Any) -> Any:
            return jnp.sum(jnp.square(jax.grad(lambda x: total(f, x, w, arrays[2])[0])(x))) + jnp.sum(
                jnp.sin(jax.grad(lambda w: total(f, x, w, arrays[2])[0])(w))
            )

        return jax.jit(jax.grad(first, (0, 1)))(*arrays[:2])

    close(second(grouped_matmul), second(grouped_matmul_oracle), 1e-5)


def test_the_work_does_not_grow_with_the_groups() -> None:
    """Sixty-four matrices and as many rows take no more memory than one block of rows and one matrix beyond them."""
    x, sizes = jax.ShapeDtypeStruct((256, 64), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
    w = jax.ShapeDtypeStruct((64, 64, 64), jnp.float32)
    memory = jax.jit(grouped_matmul).lower(x, w, sizes).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 6 * 256 * 64 * 4 < w.size * 4


@pytest.mark.parametrize(("platform", "kind", "family"), CHIPS)
def test_lowers_for_chips_that_are_not_here(
    platform: str, kind: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # blocks as they are
    implementation = "mosaic_tpu" if platform == "tpu" else "triton"
    x, w = (jax.ShapeDtypeStruct(s, "bfloat16") for s in ((1000, 200), (5, 200, 300)))
    gradient = jax.jit(jax.grad(lambda x, w, s: total(grouped_matmul, x, w, s)[0], (0, 1)))
    with kernels_pallas.abstract_device(kind, family):
        traced = gradient.trace(x, w, jax.ShapeDtypeStruct((5,), jnp.int32))
        assert traced.lower(lowering_platforms=(platform,)).as_text().count(MARKS[implementation]) == 3


def test_one_program_for_every_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    arrays = operands("rows of no group")
    gradient = jax.jit(jax.grad(lambda *a: total(grouped_matmul, *a)[0], (0, 1)))
    checks = [export.DisabledSafetyCheck.custom_call(c) for c in MARKS.values()]
    with kernels_pallas.abstract_device("NVIDIA H200", "gpu"):
        exported = export.export(gradient, platforms=("cpu", "cuda", "rocm", "tpu"), disabled_checks=checks)(*arrays)
    assert all(mark in exported.mlir_module() for mark in MARKS.values())
    close(exported.call(*arrays), gradient(*arrays), 1e-6)


def test_the_number_of_rows_may_be_a_symbol() -> None:
    (rows,) = export.symbolic_shape("r")
    _, w, sizes = operands("rows of no group")
    exported = export.export(jax.jit(grouped_matmul))(jax.ShapeDtypeStruct((rows, 20), jnp.float32), w, sizes)
    x = operands("rows of no group")[0]
    close(exported.call(x, w, sizes), grouped_matmul_oracle(x, w, sizes), 3e-6)


def test_explain_says_what_is_taken() -> None:
    x, w, s = (jax.ShapeDtypeStruct(*t) for t in (((8, 16), "bfloat16"), ((2, 16, 4), "bfloat16"), ((2,), "int32")))
    for platform, chip, taken in (
        ("cuda", "9.0", "triton"), ("cuda", "7.5", "xla"), ("tpu", "TPU v5e", "mosaic_tpu"), ("cpu", None, "xla"),
    ):  # fmt: skip
        found = trustcore.kernels.explain("grouped_matmul", x, w, s, platform=platform, architecture=chip)
        assert found.taken == taken


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, w, s: grouped_matmul(x[0], w, s), ValueError, "must have 2, 3 and 1 axes"),
        (lambda x, w, s: grouped_matmul(x, w, s[1:]), ValueError, "do not fit each other: K and E must agree"),
        (lambda x, w, s: grouped_matmul(x, w[:0], s[:0]), ValueError, "have no group, and there must be one"),
        (lambda x, w, s: grouped_matmul(x, w, s.astype(jnp.float32)), ValueError, "float32 and must be integers"),
        (lambda x, w, s: grouped_matmul(x, w.astype(jnp.bfloat16), s), ValueError, r"write w.astype\(x.dtype\)"),
        (
            lambda x, w, s: grouped_matmul(x, w, s, implementation="triton"),
            kernels_pallas.ImplementationError,
            "cannot compute .* on cpu: it runs on cuda and rocm",
        ),
    ],
)
def test_errors_name_what_is_wrong(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*operands("rows of no group"))
