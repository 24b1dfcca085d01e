"""Norms and activations: one table of calls, every implementation; outputs, gradients, vmap, jit; against the oracles.

Pallas kernels run in the interpreter, with tiles so small that a matrix has several of them, ends included.
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
from jax import export

import kernels_pallas
import trustcore
from kernels_pallas import rows
from kernels_pallas.glu import (
    ACTIVATIONS,
    BIAS_ACTIVATION,
    GLU,
    bias_activation,
    bias_activation_oracle,
    glu,
    glu_oracle,
)
from kernels_pallas.norm import (
    NORM,
    layer_norm,
    layer_norm_oracle,
    norm_quantized,
    norm_quantized_oracle,
    quantized,
    rms_norm,
    rms_norm_oracle,
)
from kernels_pallas.norm import front as norm_front
from kernels_pallas.softmax import SOFTMAX, softmax, softmax_oracle

IMPLEMENTATIONS = ("xla", "triton", "mosaic_tpu")
# Op, its oracle, operands ("row" [.., D], "column" [D]) and options.
CASES: dict[str, tuple[Any, Any, dict[str, str], dict[str, Any]]] = {
    "rms norm": (rms_norm, rms_norm_oracle, {"x": "row", "weight": "column"}, {}),
    "rms norm, no weight": (rms_norm, rms_norm_oracle, {"x": "row"}, {"eps": 1e-5}),
    "rms norm, residual, shift": (
        rms_norm, rms_norm_oracle, {"x": "row", "weight": "column", "residual": "row"}, {"shift": 1.0}
    ),
    "layer norm": (layer_norm, layer_norm_oracle, {"x": "row", "weight": "column", "bias": "column"}, {}),
    "layer norm, residual": (
        layer_norm, layer_norm_oracle, {"x": "row", "weight": "column", "bias": "column", "residual": "row"}, {}
    ),
    "layer norm, no weight": (layer_norm, layer_norm_oracle, {"x": "row"}, {}),
    **{f"glu {a}": (glu, glu_oracle, {"gate": "row", "up": "row"}, {"activation": a}) for a in ACTIVATIONS},
    **{
        f"bias, {a}": (bias_activation, bias_activation_oracle, {"x": "row", "bias": "column"}, {"activation": a})
        for a in ACTIVATIONS
    },
    "silu": (bias_activation, bias_activation_oracle, {"x": "row"}, {"activation": "silu"}),
    "softmax": (softmax, softmax_oracle, {"x": "row"}, {"scale": 0.5}),
    "softmax, mask": (softmax, softmax_oracle, {"x": "row", "mask": "mask"}, {}),
}  # fmt: skip
QUICK = (
    "softmax, mask",
    "rms norm, residual, shift",
    "layer norm, residual",
    "glu silu",
    "glu gelu",
    "bias, gelu_tanh",
    "bias, relu",
)
CHIPS = [
    ("cuda", "NVIDIA H200", "gpu"),
    ("cuda", "NVIDIA A10", "gpu"),
    ("rocm", "gfx942", "gpu"),
    ("tpu", "TPU v5 lite", "tpu"),
]
MARKS = {"triton": "__gpu$xla.gpu.triton", "mosaic_tpu": "tpu_custom_call"}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows a tile, two tiles a program of Triton, and 32 columns where a tile need not hold whole rows."""
    triton, tpu = rows.triton_blocks, rows.tpu_blocks

    def blocks(call: Any, columns: int) -> rows.Blocks:
        return rows.Blocks(4, columns if call.program.whole else 32, 2)

    monkeypatch.setattr(rows, "triton_blocks", lambda call: blocks(call, triton(call).columns))
    monkeypatch.setattr(rows, "tpu_blocks", lambda call: blocks(call, tpu(call).columns))


def operands(
    kinds: dict[str, str], shape: tuple[int, ...], dtype: str = "float32", seed: int = 0
) -> dict[str, jax.Array]:
    """Of a mask, the first row is hidden as a whole."""
    rng = np.random.default_rng(seed)
    sizes = {"row": shape, "mask": shape, "column": shape[-1:]}
    drawn = {n: jnp.asarray(rng.standard_normal(sizes[k]), dtype) for n, k in kinds.items()}
    return {n: (x > 0).at[(0,) * (x.ndim - 1)].set(False) if kinds[n] == "mask" else x for n, x in drawn.items()}


def total(function: Any, arrays: dict[str, Any], **options: Any) -> Any:
    """A number that depends on every result, with a cotangent of its own for each, and the results."""
    found = function(**arrays, **options)
    leaves = jax.tree.leaves(found)
    return sum(jnp.sum(jnp.sin((i + 1) * x.astype(jnp.float32))) for i, x in enumerate(leaves)), found


def both(name: str, arrays: dict[str, Any], **named: Any) -> tuple[Any, Any]:
    """Gradients of all operands and results: ours and the oracle's."""
    op, oracle, _, options = CASES[name]
    return tuple(
        jax.jit(jax.value_and_grad(functools.partial(total, f, **options, **o), has_aux=True, allow_int=True))(arrays)
        for f, o in ((op, named), (oracle, {}))
    )


def named(implementation: str) -> dict[str, Any]:
    return {"implementation": implementation, "interpret": implementation != "xla"}


def close(found: Any, expected: Any, atol: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if a.dtype == jax.dtypes.float0:  # of a mask
            continue
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * max(1.0, float(np.max(np.abs(b), initial=0))))


def table() -> Iterator[Any]:
    for name in CASES:
        for implementation in IMPLEMENTATIONS:
            quick = name in QUICK or (implementation == "xla" and name in ("layer norm, no weight", "silu"))
            yield pytest.param(name, implementation, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "implementation"), list(table()))
def test_outputs_and_gradients(name: str, implementation: str, small_tiles: None) -> None:
    """Of 18 rows of 40: neither a multiple of a tile."""
    arrays = operands(CASES[name][2], (2, 9, 40))
    close(*both(name, arrays, **named(implementation)), 3e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes(dtype: str, implementation: str) -> None:
    """Computed in float32 and rounded once: as the oracle does, up to units in the last place."""
    if implementation == "mosaic_tpu" and dtype == "float16":
        pytest.skip("the kernels for TPUs take float32 and bfloat16")
    for name in ("layer norm, residual", "glu gelu"):
        arrays = operands(CASES[name][2], (5, 40), dtype)
        close(*both(name, arrays, **named(implementation)), {"bfloat16": 2e-2, "float16": 3e-3}[dtype])


def test_float64() -> None:
    with jax.enable_x64(True):
        for name in ("layer norm, residual", "glu gelu"):
            arrays = operands(CASES[name][2], (5, 40), "float64")
            close(*both(name, arrays), 1e-6)  # the sum of the test is float32


@settings(max_examples=5, deadline=None)
@given(
    r=st.integers(0, 30), d=st.integers(1, 70), seed=st.integers(0, 99),
    name=st.sampled_from(("rms norm, residual, shift", "layer norm", "bias, silu")),
)  # fmt: skip
def test_any_shape(r: int, d: int, name: str, seed: int) -> None:
    arrays = operands(CASES[name][2], (r, d), seed=seed)
    close(*both(name, arrays), 1e-5 if d > 2 else 1e-3)  # LayerNorm of two numbers is +-1: its gradient cancels


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("mapped", ["rows", "rows and columns"])
def test_vmap(mapped: str, implementation: str) -> None:
    """As one call after the other: rows fold together, and what sums over rows, or maps columns, runs in turn."""
    arrays = operands(CASES["layer norm, residual"][2], (3, 5, 24))
    axes = {"x": 1, "weight": None, "bias": None, "residual": None}
    if mapped != "rows":
        arrays["weight"], axes["weight"] = jnp.stack([arrays["weight"] * i for i in range(5)], 1), 1
        axes["residual"] = 0
        arrays["residual"] = jnp.swapaxes(arrays["residual"], 0, 1)
    else:
        arrays["residual"] = arrays["residual"][:, 0]

    def lifted(f: Any, arrays: dict[str, Any], **o: Any) -> Any:
        return jax.vmap(lambda a: f(**a, **o), in_axes=(axes,))(arrays)

    found, expected = (
        jax.jit(jax.grad(functools.partial(total, functools.partial(lifted, f, **o)), has_aux=True))({"arrays": arrays})
        for f, o in ((layer_norm, named(implementation)), (layer_norm_oracle, {}))
    )
    close(found, expected, 3e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_what_is_wanted_is_computed(implementation: str) -> None:
    """A frozen weight, a result that nobody uses, a row of zeros: gradients are the oracle's, and finite."""
    arrays = operands(CASES["rms norm, residual, shift"][2], (4, 24))
    arrays["x"], arrays["residual"] = (arrays[n].at[1].set(0) for n in ("x", "residual"))
    weight = arrays.pop("weight")
    for used in (0, 1):
        found, expected = (
            jax.jit(jax.grad(lambda a, f=f, o=o, used=used: jnp.sum(jnp.sin(f(**a, weight=weight, **o)[used]))))(arrays)
            for f, o in ((rms_norm, named(implementation)), (rms_norm_oracle, {}))
        )
        close(found, expected, 3e-5)  # 1 / sqrt(eps) = 1000 in the row of zeros
        assert all(np.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize(("platform", "kind", "family"), CHIPS)
def test_lowers_for_chips_that_are_not_here(platform: str, kind: str, family: str) -> None:
    """Forward and backward kernels of every op, in bfloat16 and odd shapes; chosen without a name."""
    implementation = "mosaic_tpu" if platform == "tpu" else "triton"
    with kernels_pallas.abstract_device(kind, family):
        for name, (op, _, kinds, options) in CASES.items():
            shapes = {
                n: jax.ShapeDtypeStruct((1000,) if k == "column" else (3000, 1000), bool if k == "mask" else "bfloat16")
                for n, k in kinds.items()
            }
            gradient = jax.jit(jax.grad(lambda a, op=op, options=options: total(op, a, **options)[0], allow_int=True))
            text = gradient.trace(shapes).lower(lowering_platforms=(platform,)).as_text()
            assert text.count(MARKS[implementation]) == 2, name


def test_one_program_for_every_platform() -> None:
    arrays = operands(CASES["layer norm, residual"][2], (5, 40))
    gradient = jax.jit(jax.grad(lambda a: total(layer_norm, a)[0]))
    checks = [export.DisabledSafetyCheck.custom_call(c) for c in MARKS.values()]
    with kernels_pallas.abstract_device("NVIDIA H200", "gpu"):
        exported = export.export(gradient, platforms=("cpu", "cuda", "rocm", "tpu"), disabled_checks=checks)(arrays)
    assert all(mark in exported.mlir_module() for mark in MARKS.values())
    close(exported.call(arrays), gradient(arrays), 1e-6)


def test_the_backward_pass_keeps_less_than_plain_autodiff() -> None:
    """Of SwiGLU its two operands; plain autodiff keeps what it computed on the way, too."""
    x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)

    def kept(function: Any) -> int:
        pulled = jax.eval_shape(lambda a, b: jax.vjp(function, a, b)[1], x, x)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pulled))

    operand = 64 * 256 * 2
    assert kept(glu) <= 2 * operand + 16
    assert kept(glu_oracle) > 4 * operand


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_norms_with_codes_for_output(dtype: str, implementation: str, small_tiles: None) -> None:
    """A row of zeros has codes of zero. A number at half a step may be rounded either way."""
    kinds = {"x": "row", "weight": "column", "bias": "column", "residual": "row"}
    arrays = operands(kinds, (2, 9, 40), "bfloat16")
    for centre in (False, True):
        given = {n: x for n, x in arrays.items() if centre or n not in ("bias",)}
        given |= {n: given[n].at[1, 3].set(0) for n in ("x", "residual")}
        expected = norm_quantized_oracle(**given, centre=centre, dtype=dtype)
        found = norm_quantized(**given, centre=centre, dtype=dtype, **named(implementation))
        assert [x.dtype for x in found] == [x.dtype for x in expected]
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)
        codes, truth = (np.asarray(x[0], np.float32) for x in (found, expected))
        step = 1.0 if dtype == "int8" else np.maximum(np.abs(truth) / 8, 2.0**-9)
        assert np.all(np.abs(codes - truth) <= step) and np.mean(codes != truth) < 0.01
        assert centre or not codes[1, 3].any()
        np.testing.assert_array_equal(found[2].astype(np.float32), expected[2].astype(np.float32))


def test_codes_of_8_bit_floats_are_refused_where_triton_cannot_convert() -> None:
    """Its compiler would end the process."""
    x = jax.ShapeDtypeStruct((8, 1000), "bfloat16")
    for dtype in ("int8", "float8_e4m3fn"):
        spec = quantized.Spec(norm_front.Spec(False, 1e-6, 0.0), dtype)
        for architecture in ("8.0", "8.6", "8.9", "9.0"):
            found = quantized.NORM_QUANTIZED.explain(spec, {"x": x}, "cuda", architecture)
            able = dtype == "int8" or architecture in ("8.9", "9.0")
            assert found.taken == ("triton" if able else "xla"), found
            assert able or "codes of 8-bit floats need compute capability 8.9" in str(found)


def test_norms_with_codes_lower_and_refuse_gradients() -> None:
    x, w = (jax.ShapeDtypeStruct(s, "bfloat16") for s in ((3000, 1000), (1000,)))
    for platform, kind, family in (CHIPS[0], CHIPS[3]):
        with kernels_pallas.abstract_device(kind, family):
            traced = jax.jit(lambda x, w: norm_quantized(x, w, residual=x)).trace(x, w)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert MARKS["mosaic_tpu" if platform == "tpu" else "triton"] in text
    with pytest.raises(NotImplementedError, match="norm_quantized has no derivative: rounding has none"):
        jax.grad(lambda x: jnp.sum(norm_quantized(x)[1]))(jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="codes of int4 are not known; choose of int8, float8_e4m3fn"):
        norm_quantized(jnp.ones((2, 4)), dtype="int4")


def test_the_softmax_keeps_its_output_alone() -> None:
    x, mask = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16), jax.ShapeDtypeStruct((64, 256), bool)
    pulled = jax.eval_shape(lambda x, m: jax.vjp(lambda x: softmax(x, m), x)[1], x, mask)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pulled)) <= 64 * 256 * 2 + 16


def test_explain_and_refusals() -> None:
    x, wide = jax.ShapeDtypeStruct((8, 64), "bfloat16"), jax.ShapeDtypeStruct((8, 20000), "bfloat16")
    for op, args in (("norm", (x,)), ("glu", (x, x)), ("softmax", (x, jax.ShapeDtypeStruct((8, 64), bool)))):
        for platform, chip, taken in (
            ("cuda", "9.0", "triton"),
            ("cuda", "7.5", "xla"),
            ("tpu", "TPU v5e", "mosaic_tpu"),
            ("cpu", None, "xla"),
        ):
            assert trustcore.kernels.explain(op, *args, platform=platform, architecture=chip).taken == taken
    found = trustcore.kernels.explain("norm", wide, platform="cuda", architecture="9.0")
    assert found.taken == "xla" and "rows of 20000 are longer than 16384" in str(found)
    half = jax.ShapeDtypeStruct((8, 64), "float16")
    assert "it takes float32 and bfloat16, not float16" in str(trustcore.kernels.explain("norm", half, platform="tpu"))
    assert trustcore.kernels.explain("glu", wide, wide, platform="cuda", architecture="9.0").taken == "triton"
    names = {op.op.name for op in (NORM, GLU, BIAS_ACTIVATION, SOFTMAX)}
    assert names == {"norm", "glu", "bias_activation", "softmax"}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: rms_norm(x, jnp.ones(3)), ValueError, r"weight has the shape \[3\] and must have \[4\]"),
        (
            lambda x: rms_norm(x, residual=x[:1]),
            ValueError,
            r"residual is float32\[1, 4\] and must be as x, float32\[2, 4\]",
        ),
        (lambda x: layer_norm(x.astype(jnp.int32)), ValueError, r"x is int32\[2, 4\]; it must be floats"),
        (lambda x: glu(x, x.astype(jnp.bfloat16)), ValueError, "up is bfloat16.* and must be as x, float32"),
        (lambda x: softmax(x, x), ValueError, "mask is float32 and must be bool"),
        (
            lambda x: softmax(x, x[:, :3] > 0),
            ValueError,
            r"mask has the shape \[2, 3\] and must broadcast to x, \[2, 4\]",
        ),
        (lambda x: glu(x, x, activation="mish"), ValueError, "activation 'mish' is not known; choose of relu, gelu"),
        (
            lambda x: bias_activation(x, jnp.ones((1, 4))),
            ValueError,
            r"bias has the shape \[1, 4\] and must have \[4\]",
        ),
        (lambda x: glu(x, x, implementation="triton"), kernels_pallas.ImplementationError, "cannot compute .* on cpu"),
        (
            lambda x: glu(x, x, implementation="xla", interpret=True),
            kernels_pallas.ImplementationError,
            "interpret=True needs one of",
        ),
        (
            lambda x: rms_norm(x, implementation="fast"),
            kernels_pallas.ImplementationError,
            "'fast' is not known; choose of triton",
        ),
    ],
)
def test_errors_name_what_is_wrong(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(jnp.ones((2, 4)))
