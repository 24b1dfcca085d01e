"""One table of packed formats, every implementation, few rows and many, against the formats' own decoding.

Pallas kernels run in the interpreter. The weights come from `trustcore.quant`, whose decoding is tested against other
projects' (`tests/quant`).
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
from kernels_pallas.packed import PACKED, Layout, Plane, packed_matmul, packed_oracle, triton
from kernels_pallas.packed.layout import decoded
from trustcore.errors import ImplementationError
from trustcore.ops.linear import linear
from trustcore.quant import QuantizedArray
from trustcore.quant.layouts import from_kernel, kernel_layout
from trustcore.quant.matmul import choose

KERNELS = ("triton", "mosaic_tpu")
FORMATS = (
    "q4_0", "q8_0", "q4_k", "q6_k", "int8:g64", "int8", "int4:g64:asym", "fp8_e4m3:128x128", "mxfp4", "nf4:g64:double",
)  # fmt: skip
OTHERS = ("q4_1", "q5_k", "int4:g32", "int4:channel", "fp8_e4m3", "fp8_e5m2", "mxfp8_e4m3", "mxfp8_e5m2", "nf4", "fp4")
CHIPS = [("cuda", "NVIDIA H200", "triton"), ("rocm", "gfx942", "triton"), ("tpu", "TPU v5 lite", "mosaic_tpu")]
MARKS = {"triton": "__gpu$xla.gpu.triton", "mosaic_tpu": "tpu_custom_call"}
K, N = 768, 40


@functools.cache
def packed(format: str, k: int = K, n: int = N) -> QuantizedArray:
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((k, n)), jnp.float32)
    return jax.jit(lambda m: QuantizedArray.quantize(m, format, search=False))(matrix)


def layout_of(w: QuantizedArray) -> tuple[Layout, dict[str, jax.Array]]:
    found = kernel_layout(w)
    assert not isinstance(found, str), found
    return found


def matrix_of(w: QuantizedArray) -> np.ndarray:
    return np.asarray(jax.jit(QuantizedArray.dequantize)(w))


def rows(count: int, k: int = K, dtype: Any = jnp.float32, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, k)), dtype)


def close(found: Any, x: jax.Array, w: QuantizedArray, tolerance: float = 2e-6) -> None:
    """Within `tolerance` of the sum of magnitudes."""
    x, matrix = np.asarray(x, np.float64), matrix_of(w).astype(np.float64)
    expected, size = x @ matrix, np.abs(x) @ np.abs(matrix)
    assert np.max(np.abs(np.asarray(found, np.float64) - expected) / size) < tolerance


@pytest.mark.parametrize("format", (*FORMATS, *OTHERS))
def test_layouts_decode_as_the_formats_do(format: str) -> None:
    """Bit for bit, and so does the matrix that is put together of a kernel's arrays."""
    w = packed(format)
    layout, fields = layout_of(w)
    assert set(fields) == set(layout.fields)
    np.testing.assert_array_equal(jax.jit(functools.partial(decoded, layout))(fields), matrix_of(w))
    np.testing.assert_array_equal(matrix_of(from_kernel(w.format, layout, fields)), matrix_of(w))


def calls() -> Any:
    for format in (*FORMATS, *OTHERS):
        for implementation in KERNELS:
            for count in (2, 20):
                quick = format in FORMATS and (count == 20) == (implementation == "mosaic_tpu")
                quick = quick or format in ("q4_0", "int8")
                yield pytest.param(format, implementation, count, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("format", "implementation", "count"), list(calls()))
def test_products(format: str, implementation: str, count: int) -> None:
    w, x = packed(format), rows(count)
    layout, fields = layout_of(w)
    run = functools.partial(packed_matmul, layout=layout, implementation=implementation, interpret=True)
    close(jax.jit(run)(x, fields), x, w)


@pytest.mark.parametrize("implementation", KERNELS)
def test_narrow_rows(implementation: str) -> None:
    """x of bfloat16: weights are rounded to it before they meet, and so is the oracle's x."""
    w, x = packed("q4_k"), rows(6, dtype=jnp.bfloat16)
    layout, fields = layout_of(w)
    found = packed_matmul(x, fields, layout=layout, implementation=implementation, interpret=True)
    assert found.dtype == jnp.float32
    close(found, x, w, 2**-8)


@pytest.mark.parametrize("implementation", (*KERNELS, "xla"))
def test_vmap_and_gradient(implementation: str) -> None:
    w = packed("int4:g64:asym")
    layout, fields = layout_of(w)
    run = functools.partial(
        packed_matmul, layout=layout, implementation=implementation, interpret=implementation != "xla"
    )
    x = rows(6).reshape(3, 2, K)
    mapped = jax.vmap(lambda x: run(x, fields))(x)
    assert mapped.shape == (3, 2, N)
    close(mapped.reshape(6, N), x.reshape(6, K), w)

    weights = jnp.cos(jnp.arange(2 * N, dtype=jnp.float32)).reshape(2, N)
    ours, theirs = (
        jax.grad(lambda x, f=f: jnp.sum(f(x, fields) * weights))(x[0])
        for f in (run, functools.partial(packed_oracle, layout=layout))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_vmap_over_weights() -> None:
    one, two = packed("q4_0"), packed("q4_0", K, N)
    layout, fields = layout_of(one)
    other = layout_of(two)[1] | {"scale": 2 * fields["scale"]}
    stacked = {n: jnp.stack([fields[n], other[n]]) for n in fields}
    found = jax.vmap(lambda f: packed_matmul(rows(2), f, layout=layout))(stacked)
    close(found[0], rows(2), one)
    np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-6)


@settings(max_examples=5, deadline=None)
@given(
    format=st.sampled_from(("q4_0", "q8_0", "int4:g32:asym", "int8:g32")), blocks=st.integers(1, 9),
    n=st.integers(1, 70), count=st.integers(1, 18), implementation=st.sampled_from(KERNELS), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(format, blocks, n, count, implementation, seed) -> None:
    """Tails of rows, columns and blocks; one block alone."""
    w, x = packed(format, 32 * blocks, n), rows(count, 32 * blocks, seed=seed)
    layout, fields = layout_of(w)
    run = functools.partial(packed_matmul, layout=layout, implementation=implementation, interpret=True)
    close(jax.jit(run)(x, fields), x, w)


def test_splits_of_k_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "blocks_of", lambda target, call: triton.Blocks(call.x.shape[0], 16, 2, 5))
    w, x = packed("q8_0"), rows(3)
    layout, fields = layout_of(w)
    close(packed_matmul(x, fields, layout=layout, implementation="triton", interpret=True), x, w)


@pytest.mark.parametrize(("platform", "kind", "name"), CHIPS)
def test_lowers_for_chips_that_are_not_here(platform: str, kind: str, name: str) -> None:
    with kernels_pallas.abstract_device(kind, "tpu" if platform == "tpu" else "gpu"):
        for format, count, dtype in (
            ("q4_0", 1, "bfloat16"), ("q4_k", 40, "bfloat16"), ("q6_k", 3, "float32"), ("int8", 300, "bfloat16"),
            ("int4:g64:asym", 1, "float32"), ("fp8_e4m3:128x128", 8, "bfloat16"), ("mxfp4", 1, "bfloat16"),
            ("nf4", 300, "float32"),
        ):  # fmt: skip
            layout, fields = layout_of(packed(format))
            run = jax.jit(functools.partial(packed_matmul, layout=layout, implementation=name))
            traced = run.trace(jax.ShapeDtypeStruct((count, K), dtype), fields)
            assert traced.lower(lowering_platforms=(platform,)).as_text().count(MARKS[name]) == 1, format


# ---- the door: trustcore.ops.linear ----


@pytest.mark.parametrize("format", ["q4_0", "int8", "fp8_e4m3:128x128", "mxfp8_e4m3"])
def test_one_program_for_every_platform(format: str) -> None:
    """`linear` traced once: kernels on GPUs and TPUs, and on the CPU the tiles, bit for bit."""
    w, x = packed(format), rows(3)
    function = jax.jit(lambda x, w: linear(x, w, implementation="platform"))
    checks = [export.DisabledSafetyCheck.custom_call(c) for c in MARKS.values()]
    with kernels_pallas.abstract_device("NVIDIA H200", "gpu"):
        exported = export.export(function, platforms=("cpu", "cuda", "rocm", "tpu"), disabled_checks=checks)(x, w)
    assert all(mark in exported.mlir_module() for mark in MARKS.values())
    close(exported.call(x, w), x, w)
    tiles = jax.jit(lambda x, w: linear(x, w, implementation="tiles"))
    np.testing.assert_array_equal(function(x, w), tiles(x, w))


def test_what_is_chosen_without_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats that kernels know go through the primitive, the others by tiles; on the CPU neither is chosen."""
    known, unknown = packed("q4_k"), packed("q5_0")
    here = choose(1, known)
    assert here in ("native", "stream")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose(1, known) == choose(100, known) == "platform"
    assert choose(1, unknown) == choose(1, known.T) == "tiles"


@pytest.mark.parametrize("implementation", [None, "platform"])
def test_rows_in_order_gradients_and_narrow_x(implementation: str | None) -> None:
    """Rows that are stored in another order; gradients with regard to x; x of bfloat16."""
    plain = packed("int4:g64:asym")
    order = jnp.asarray(np.random.default_rng(3).permutation(K), jnp.int32)
    w = QuantizedArray("int4", {**plain.fields, "order": order})
    x = rows(2)
    close(linear(x, w, implementation=implementation), x, w)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(linear(x, w, implementation=implementation))))(x)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(jnp.matmul(x, w.dequantize(), precision="highest"))))(x)
    np.testing.assert_allclose(gradient, expected, rtol=2e-4, atol=2e-3)
    narrow = linear(x.astype(jnp.bfloat16), w, implementation=implementation)
    assert narrow.dtype == jnp.bfloat16
    close(narrow, x.astype(jnp.bfloat16), w, 2**-8)
    narrow = jax.grad(lambda x: jnp.sum(linear(x, w, implementation=implementation).astype(jnp.float32)))
    assert narrow(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_columns_under_shard_map(fresh_python: Any) -> None:
    """Columns of the weight over four devices: no collective is added."""
    printed = fresh_python(
        """
        import jax, jax.numpy as jnp
        from jax.sharding import AxisType, PartitionSpec as P
        from trustcore.ops.linear import linear
        from trustcore.quant import QuantizedArray
        mesh = jax.make_mesh((4,), ("n",), axis_types=(AxisType.Auto,))
        w = QuantizedArray.quantize(jax.random.normal(jax.random.key(0), (256, 64)), "q4_k", search=False)
        x = jax.random.normal(jax.random.key(1), (3, 256))
        def run(x, w):
            return linear(x, w, implementation="platform")
        split = jax.tree.map(lambda f: P(*[None] * (f.ndim - 1), "n"), w)
        sharded = jax.shard_map(run, mesh=mesh, in_specs=(P(), split), out_specs=P(None, "n"))
        assert jnp.max(jnp.abs(jax.jit(sharded)(x, w) - run(x, w))) < 1e-4
        places = jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), (P(), split))
        text = jax.jit(sharded, in_shardings=places).lower(x, w).compile().as_text()
        assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all")), text
        print("same")
        """,
        devices=4,
    )
    assert printed.split() == ["same"]


@pytest.mark.parametrize(
    ("platform", "architecture", "taken"),
    [("cpu", None, "xla"), ("cuda", "9.0", "triton"), ("cuda", "7.5", "xla"), ("tpu", "TPU v5e", "mosaic_tpu")],
)
def test_explain_says_what_is_taken(platform: str, architecture: str | None, taken: str) -> None:
    layout, fields = layout_of(packed("nf4"))
    explain = functools.partial(trustcore.kernels.explain, "packed_matmul", rows(1), fields, layout=layout)
    found = explain(platform=platform, architecture=architecture)
    assert found.taken == taken and f"{taken}: taken" in str(found)
    assert [v.implementation for v in found.verdicts] == [i.name for i in PACKED.implementations]


def test_refusals_say_why() -> None:
    w, x = packed("q4_0"), rows(1)
    with pytest.raises(ImplementationError, match=r"'triton' cannot compute .* on cpu: it runs on cuda and rocm"):
        linear(x, w, implementation="triton")
    with pytest.raises(
        ImplementationError, match=r"'platform' cannot multiply .* it does not know q5_0; it knows q4_0, "
    ):
        linear(x, packed("q5_0"), implementation="platform")
    with pytest.raises(ImplementationError, match="its blocks run along the output axis"):
        linear(rows(1, N), w.T, implementation="mosaic_tpu")
    odd = Layout("odd", 24, (Plane("codes", 8),), "signed", sub=12)
    fields = {"codes": jnp.zeros((1, 24, 8), jnp.int8), "scale": jnp.ones((1, 8))}
    found = trustcore.kernels.explain("packed_matmul", rows(1, 24), fields, layout=odd, platform="tpu")
    assert found.taken == "xla" and "units of odd have 4 weights, no multiple of 8" in str(found)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": jnp.ones((2, 64))}, r"x \[R, K\] \[2, 64\] does not fit 1 blocks of 32 weights, which are K=32"),
        ({"x": jnp.ones((32,))}, r"x is float32\[32\] and must be floats \[R, K\]"),
        ({"fields": {"codes": jnp.zeros((1, 16, 8), jnp.uint8)}}, "scale missing among codes; q4_0 has codes, scale"),
        (
            {"fields": {"codes": jnp.zeros((1, 16, 8), jnp.uint8), "scale": jnp.ones((2, 8))}},
            r"scale of q4_0 has the shape \[2, 8\] and must have \[1, 8\]",
        ),
    ],
)
def test_errors_name_what_is_wrong(changed: dict[str, Any], message: str) -> None:
    layout, fields = layout_of(packed("q4_0", 32, 8))
    given = {"x": jnp.ones((2, 32)), "fields": fields, **changed}
    with pytest.raises(ValueError, match=message):
        packed_matmul(**given, layout=layout)
