"""Cross-entropy by chunks: losses and gradients of the oracle, packed tables, memory that does not grow with R * V."""

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
from kernels_pallas.cross_entropy import cross_entropy, cross_entropy_oracle
from trustcore.errors import ImplementationError
from trustcore.ops.loss import cross_entropy as front
from trustcore.quant import quantize

ALL = {"soft_cap": 3.0, "label_smoothing": 0.1, "z_loss": 1e-2, "scale": 0.7}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "soft cap": {"soft_cap": 2.0, "scale": 1.5},
    "z-loss": {"z_loss": 1e-2},
    "everything": ALL,
}


def operands(
    rows: tuple[int, ...] = (3, 7), size: int = 16, vocabulary: int = 300, dtype: str = "float32", seed: int = 0
) -> Any:
    """Hidden rows, a table [D, V], a bias, labels of which one is ignored, and weights of the losses."""
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(rng.standard_normal(s), dtype) for s in ((*rows, size), (size, vocabulary), (vocabulary,))]
    labels = rng.integers(0, vocabulary, rows)
    labels.reshape(-1)[:1] = -100
    return *arrays, jnp.asarray(labels, jnp.int32), jnp.asarray(rng.standard_normal(rows), jnp.float32)


def total(
    function: Any, labels: Any, weights: Any, smooth: dict[str, Any], fixed: dict[str, Any], **options: Any
) -> Any:
    given = {**smooth, **fixed}
    losses, lse = function(given["hidden"], given["table"], labels, bias=given.get("bias"), return_lse=True, **options)
    return jnp.sum(losses.astype(jnp.float32) * weights) + jnp.sum(jnp.sin(lse)).astype(jnp.float32), losses


def close(found: Any, expected: Any, atol: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * max(1.0, float(np.max(np.abs(b), initial=0))))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        *((name, "hidden table bias") for name in CASES),
        *((name, "hidden") for name in list(CASES)[1:]),
        ("everything", "table"),
    ],
)
def test_losses_and_gradients(name: str, wanted: str) -> None:
    """In chunks that do not divide V, of either layout; with a frozen table or a frozen body."""
    hidden, table, bias, labels, weights = operands()
    for transposed in (False, True) if name == "everything" else (False,):
        arrays = {"hidden": hidden, "table": table.T if transposed else table, "bias": bias}
        smooth = {n: arrays[n] for n in wanted.split()}
        fixed = {n: x for n, x in arrays.items() if n not in smooth}
        (found, expected) = (
            jax.jit(
                jax.grad(
                    functools.partial(total, f, labels, weights, transposed=transposed, **o, **CASES[name]),
                    has_aux=True,
                )
            )(smooth, fixed)
            for f, o in ((cross_entropy, {"chunk": 128 if transposed else 70}), (cross_entropy_oracle, {}))
        )
        close(found, expected, 3e-6)


@settings(max_examples=5, deadline=None)
@given(
    rows=st.integers(1, 20), size=st.integers(1, 20), vocabulary=st.integers(1, 400), chunk=st.integers(1, 300),
    smoothing=st.sampled_from((0.0, 0.3)), frozen=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(rows, size, vocabulary, chunk, smoothing, frozen, seed) -> None:
    hidden, table, _, labels, weights = operands((rows,), size, vocabulary, seed=seed)
    smooth, fixed = ({"hidden": hidden}, {"table": table}) if frozen else ({"hidden": hidden, "table": table}, {})
    found, expected = (
        jax.jit(jax.grad(functools.partial(total, f, labels, weights, label_smoothing=smoothing, **o), has_aux=True))(
            smooth, fixed
        )
        for f, o in ((cross_entropy, {"chunk": chunk}), (cross_entropy_oracle, {}))
    )
    close(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(dtype: str) -> None:
    """Logits and sums are float32 (float64): losses of narrow operands are those of the operands widened."""
    with jax.enable_x64(dtype == "float64"):
        hidden, table, _, labels, weights = operands(dtype=dtype)
        smooth = {"hidden": hidden, "table": table}
        wide = {n: x.astype("float64" if dtype == "float64" else "float32") for n, x in smooth.items()}
        (found, losses), (expected, truth) = (
            jax.jit(jax.grad(functools.partial(total, f, labels, weights, **o), has_aux=True))(x, {})
            for f, x, o in ((cross_entropy, smooth, {"chunk": 100}), (cross_entropy_oracle, wide, {}))
        )
        close(losses, truth, 1e-13 if dtype == "float64" else 3e-6)
        close(found, expected, {"bfloat16": 8e-3, "float16": 1e-3, "float64": 1e-7}[dtype])  # cotangents are float32
        assert {x.dtype.name for x in found.values()} == {dtype}


def test_rows_that_are_ignored_and_labels_that_do_not_exist() -> None:
    hidden, table, *_ = operands((4,))
    labels = jnp.asarray([5, 7, -1, 300], jnp.int32)
    for frozen in (False, True):
        wanted = (0,) if frozen else (0, 1)
        losses = cross_entropy(hidden, table, labels, ignore_index=7, chunk=100)
        assert losses[1] == 0 and np.isnan(losses[2:]).all() and losses[0] > 0
        found = jax.grad(lambda h, t: jnp.sum(cross_entropy(h, t, labels[:2], ignore_index=7, chunk=100)), wanted)(
            hidden[:2], table
        )
        assert (found[0][1] == 0).all() and np.isfinite(found[0]).all() and (found[0][0] != 0).all()
        nothing = jax.grad(lambda h, t: jnp.sum(cross_entropy(h, t, jnp.full(4, -100), z_loss=1.0)), wanted)(
            hidden, table
        )
        assert all((g == 0).all() for g in nothing)
        lost = jax.grad(lambda h, t: jnp.sum(cross_entropy(h, t, labels)), wanted)(hidden, table)
        assert np.isnan(lost[0][2:]).all() and np.isfinite(lost[0][:2]).all()


@pytest.mark.parametrize("mapped", ["hidden", "table"])
def test_vmap(mapped: str) -> None:
    """As one call after the other; a mapped hidden folds into the rows, and a shared table keeps its gradient."""
    hidden, table, bias, labels, weights = operands((3, 7))
    tables = jnp.stack([table, 2 * table, -table]) if mapped == "table" else table
    axes = (0, 0 if mapped == "table" else None, None)

    def lifted(f: Any, h: Any, t: Any, b: Any) -> Any:
        def one(h: Any, t: Any, b: Any, y: Any) -> Any:
            return f(h, t, y, bias=b, z_loss=1e-3, **({"chunk": 90} if f is cross_entropy else {}))

        return jnp.sum(jax.vmap(one, (*axes, 0))(h, t, b, labels) * weights)

    for wanted in ((0, 1, 2), (0,)):
        found, expected = (
            jax.jit(jax.value_and_grad(functools.partial(lifted, f), wanted))(hidden, tables, bias)
            for f in (cross_entropy, cross_entropy_oracle)
        )
        close(found, expected, 1e-5)


def test_memory_is_a_chunk_of_logits() -> None:
    """Temporaries of the compiled gradient: the plain form's hold R * V numbers, these R * C and what R * D takes."""
    rows, size, vocabulary, chunk = 1024, 64, 65536, 1024
    types = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((rows, size), "float32"), ((size, vocabulary), "float32"), ((rows,), "int32"))
    ]

    def temporary(function: Any, wanted: Any, **options: Any) -> int:
        gradient = jax.grad(lambda h, t, y: jnp.mean(function(h, t, y, **options)), wanted)
        return jax.jit(gradient).lower(*types).compile().memory_analysis().temp_size_in_bytes

    for wanted in (0, (0, 1)):
        assert temporary(cross_entropy, wanted, chunk=chunk) < 3 * 4 * rows * chunk + 8 * 4 * rows * size
        assert temporary(cross_entropy_oracle, wanted) >= 4 * rows * vocabulary
    assert temporary(cross_entropy, (0, 1)) < 4 * rows * vocabulary / 8


@pytest.mark.parametrize("transposed", [False, True])
def test_packed_tables_are_decoded_by_chunks(transposed: bool) -> None:
    hidden, table, bias, labels, weights = operands((3, 7), 64, 320)
    packed = quantize({"w": table}, "q8_0")["w"]
    plain = packed.dequantize()
    given = (packed.T, plain.T) if transposed else (packed, plain)
    found, expected = (
        jax.jit(
            jax.value_and_grad(
                lambda h, b, f=f, t=t, o=o: jnp.sum(f(h, t, labels, bias=b, transposed=transposed, **o) * weights),
                (0, 1),
            )
        )(hidden, bias)
        for f, t, o in ((front, given[0], {"chunk": 100}), (cross_entropy_oracle, given[1], {}))
    )
    close(found, expected, 3e-6)
    frozen, truth = (
        jax.grad(lambda h, f=f, t=t: jnp.sum(f(h, t, labels, transposed=transposed) * weights))(hidden)
        for f, t in ((front, given[0]), (cross_entropy_oracle, given[1]))
    )
    close(frozen, truth, 3e-6)


def test_one_program_for_every_platform_and_any_number_of_rows() -> None:
    (n,) = export.symbolic_shape("n")
    types = [jax.ShapeDtypeStruct(s, d) for s, d in (((n, 16), "float32"), ((16, 3000), "float32"), ((n,), "int32"))]
    gradient = jax.jit(jax.grad(lambda h, t, y: jnp.sum(cross_entropy(h, t, y)), (0, 1)))
    exported = export.export(gradient, platforms=("cpu", "cuda", "rocm", "tpu"))(*types)
    hidden, table, _, labels, _ = operands((9,), 16, 3000)
    close(exported.call(hidden, table, labels), gradient(hidden, table, labels), 1e-6)


def test_shard_map_over_rows(fresh_python: Any) -> None:
    """On two devices, with the check of what varies: the gradient of a shared table is summed over them."""
    printed = fresh_python(
        """
        import jax, jax.numpy as jnp
        from jax.sharding import AxisType, PartitionSpec as P
        from kernels_pallas.cross_entropy import cross_entropy, cross_entropy_oracle
        mesh = jax.make_mesh((2,), ("b",), axis_types=(AxisType.Auto,))
        keys = jax.random.split(jax.random.key(0), 3)
        hidden, table = jax.random.normal(keys[0], (8, 16)), jax.random.normal(keys[1], (16, 300))
        labels = jax.random.randint(keys[2], (8,), 0, 300)
        for wanted in ((0, 1), (0,)):
            def loss(f):
                return jax.jit(jax.grad(lambda h, t, y: jnp.sum(jnp.sin(f(h, t, y))), wanted))
            specs = {"in_specs": (P("b"), P(), P("b")), "out_specs": P("b")}
            sharded = jax.shard_map(lambda *a: cross_entropy(*a, chunk=100), mesh=mesh, **specs)
            for a, b in zip(loss(sharded)(hidden, table, labels), loss(cross_entropy_oracle)(hidden, table, labels)):
                assert jnp.max(jnp.abs(a - b)) < 1e-5, jnp.max(jnp.abs(a - b))
        print("same")
        """,
        devices=2,
    )
    assert printed.split() == ["same"]


def test_a_vocabulary_that_is_split_over_devices(fresh_python: Any) -> None:
    """Rows over two devices, columns over four: losses, gradients, and no table gathered.

    Among the labels are the ignored one, the first and the last, and one that by a device's own count is the ignored
    number; then one that no column has.
    """
    printed = fresh_python(
        """
        import functools, jax, jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from trustcore.ops.loss import cross_entropy
        from kernels_pallas.cross_entropy import cross_entropy_oracle
        jax.config.update("jax_numpy_dtype_promotion", "strict")
        jax.config.update("jax_numpy_rank_promotion", "raise")
        mesh = jax.make_mesh((2, 4), ("b", "v"), axis_types=(AxisType.Auto,) * 2)
        keys = jax.random.split(jax.random.key(0), 4)
        hidden, table, bias, w = (jax.random.normal(k, s) for k, s in zip(keys, ((8, 16), (16, 400), (400,), (8,))))
        labels = jnp.array([-100, 0, 399, 200, 17, 150, 310, 311], jnp.int32)
        everything = {"soft_cap": 3.0, "label_smoothing": 0.1, "z_loss": 1e-2, "scale": 0.7}

        def split(transposed, options, check):
            part = P("v", None) if transposed else P(None, "v")
            run = lambda h, t, y, b: cross_entropy(
                h, t, y, bias=b, transposed=transposed, axis="v", chunk=60, return_lse=True, **options
            )
            places = {"in_specs": (P("b"), part, P("b"), P("v")), "out_specs": P("b"), "check_vma": check}
            return jax.shard_map(run, mesh=mesh, **places)

        def total(f, transposed, h, t, b, y=labels):
            loss, lse = f(h, t.T if transposed else t, y, b)
            return jnp.sum(loss * w) + jnp.sum(jnp.sin(lse)), loss

        for transposed, options, wanted, check in (
            (False, {}, (0, 1, 2), True), (False, {}, (0, 1), False), (True, everything, (0, 1, 2), True),
            (False, {"label_smoothing": 0.2, "z_loss": 1e-2}, (0,), True), (True, {"soft_cap": 2.0}, (0,), False),
        ):
            whole = lambda h, t, y, b: cross_entropy_oracle(
                h, t, y, bias=b, transposed=transposed, return_lse=True, **options
            )
            steps = (functools.partial(total, f, transposed) for f in (split(transposed, options, check), whole))
            found, expected = (
                jax.jit(jax.value_and_grad(step, wanted, has_aux=True))(hidden, table, bias) for step in steps
            )
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
                assert jnp.max(jnp.abs(a - b)) < 2e-5, (options, wanted, check, jnp.max(jnp.abs(a - b)))

        run = split(False, {}, True)
        losses, _ = jax.jit(run)(hidden, table, labels.at[5].set(400), bias)
        assert jnp.isnan(losses).tolist() == [False] * 5 + [True] + [False] * 2

        def step(h, t, y, b):  # a gradient inside of the shard_map: that of hidden is summed over the columns' devices
            return jax.grad(lambda h: jnp.sum(cross_entropy(h, t, y, bias=b, axis="v")))(h)

        places = P("b"), P(None, "v"), P("b"), P("v")
        inside = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=places, out_specs=P("b")))
        given = [jax.device_put(x, NamedSharding(mesh, p)) for x, p in zip((hidden, table, labels, bias), places)]
        expected = jax.grad(lambda h: jnp.sum(cross_entropy_oracle(h, table, labels, bias=bias)))(hidden)
        assert jnp.max(jnp.abs(inside(*given) - expected)) < 2e-5
        assert "all-gather" not in inside.lower(*given).compile().as_text()
        print("same")
        """,
        devices=8,
    )
    assert printed.split() == ["same"]


def test_an_axis_that_no_shard_map_has_is_named() -> None:
    with pytest.raises(ValueError, match="axis is 'v', which is no axis of a shard_map around the call"):
        front(jnp.ones((3, 4)), jnp.ones((4, 9)), jnp.ones(3, jnp.int32), axis="v")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": jnp.ones((3, 5))}, r"hidden \[..., D\] \[3, 5\] does not fit table \[D, V\] \[4, 9\]"),
        ({"table": jnp.ones((9, 4))}, "an embedding's table, .*, wants transposed=True"),
        (
            {"table": jnp.ones((4, 9), jnp.bfloat16)},
            "hidden and table are float32 and bfloat16; they must be of one dtype",
        ),
        ({"labels": jnp.ones(2, jnp.int32)}, r"labels have the shape \[2\] and must have \[3\]"),
        ({"labels": jnp.ones(3)}, "labels are float32 and must be integers"),
        ({"bias": jnp.ones(4)}, r"bias has the shape \[4\] and must have \[9\]"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; it must lie within 0 and 1"),
        ({"soft_cap": 0.0}, "soft_cap is 0.0; it must be positive"),
        ({"chunk": 0}, "chunk is 0; it counts columns, at least 1"),
    ],
)
def test_errors_name_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    given = {"hidden": jnp.ones((3, 4)), "table": jnp.ones((4, 9)), "labels": jnp.ones(3, jnp.int32), **changes}
    with pytest.raises(ValueError, match=message):
        front(**given)


def test_an_implementation_that_does_not_exist_is_named() -> None:
    x, table, y = jnp.ones((3, 4)), jnp.ones((4, 9)), jnp.ones(3, jnp.int32)
    with pytest.raises(kernels_pallas.ImplementationError, match="implementation 'triton' is not known; choose of xla"):
        cross_entropy(x, table, y, implementation="triton")
    with pytest.raises(ImplementationError, match="'triton' is not known"):
        front(x, table, y, implementation="triton")
    assert trustcore.kernels.explain("cross_entropy", x, table, y, platform="cuda", architecture="9.0").taken == "xla"
