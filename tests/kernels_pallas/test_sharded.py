"""Operands split over explicit axes of a mesh, or over axes that are named: computed by parts, nothing gathered."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from kernels_pallas.attention import attention

START = """
    import functools, jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from kernels_pallas.attention import BlockMask, attention, attention_oracle
    from kernels_pallas.cross_entropy import cross_entropy, cross_entropy_oracle
    from kernels_pallas.decode import decode_attention
    from kernels_pallas.glu import glu, glu_oracle, bias_activation, bias_activation_oracle
    from kernels_pallas.norm import layer_norm, layer_norm_oracle, rms_norm, rms_norm_oracle
    from kernels_pallas.softmax import softmax, softmax_oracle
    jax.config.update("jax_numpy_dtype_promotion", "strict")

    def mesh_of(kind):
        return jax.make_mesh((2, 2), ("b", "n"), axis_types=(kind,) * 2)

    def arrays(*shapes):
        keys = jax.random.split(jax.random.key(0), len(shapes))
        return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]

    def same(ours, oracle, given, specs, mesh):
        '''Gradients and results are the oracle's, and the program gathers nothing.'''
        def step(f):
            def total(*a):
                out = f(*a)
                return jnp.sum(jnp.sin(out)), out
            return jax.jit(jax.grad(total, tuple(range(len(given))), has_aux=True))
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(given, specs)]
        found = step(ours)(*placed)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(step(oracle)(*given))):
            a, b = jax.device_get(a), jax.device_get(b)
            assert np.max(np.abs(a - b)) < 3e-5 * max(1, np.max(np.abs(b))), np.max(np.abs(a - b))
        text = jax.jit(ours).lower(*placed).compile().as_text()
        assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute")), text
        return found
"""


def test_attention_on_explicit_axes(fresh_python: Any) -> None:
    """Batch and heads of the operands' types; one key head is whole; eagerly, under jit and with its gradient."""
    printed = fresh_python(
        START
        + """
    mesh, split = mesh_of(AxisType.Explicit), P("b", None, "n")
    qkv = arrays((4, 40, 4, 16), (4, 40, 2, 16), (4, 40, 2, 16))
    slopes = jnp.linspace(0.1, 1.0, 4)
    mask = BlockMask.from_dense(np.random.default_rng(0).random((4, 4, 3, 3)) < 0.6, 16, 16)
    with jax.set_mesh(mesh):
        found = same(
            lambda q, k, v: attention(q, k, v, slopes=slopes, block_mask=mask),
            lambda q, k, v: attention_oracle(q, k, v, slopes=slopes, block_mask=mask), qkv, [split] * 3, mesh,
        )
        assert jax.typeof(found[0][0]).sharding.spec == P("b", None, "n", None)
        placed = [jax.device_put(x, NamedSharding(mesh, split)) for x in qkv]
        out, lse = attention(*placed, return_lse=True)
        assert jax.typeof(lse).sharding.spec == P("b", "n", None)
        one = [x[:, :, :1] for x in qkv[1:]]
        same(attention, attention_oracle, [qkv[0], *one], [split, P("b"), P("b")], mesh)
        dropped = [attention(*placed, dropout=0.5, dropout_key=jax.random.key(i)) for i in (0, 0, 1)]
        assert (dropped[0] == dropped[1]).all() and (dropped[0] != dropped[2]).any()
        halves = attention(*[jax.device_put(jnp.ones_like(x), NamedSharding(mesh, split)) for x in qkv[:1] * 3],
                           causal=False, dropout=0.5, dropout_key=jax.random.key(0))
        assert (jax.device_get(halves)[:2] != jax.device_get(halves)[2:]).any()  # each device drops its own
        for place, words in ((P("b", "n"), "batch and heads alone can be"), (P("n", None, "b"), "alike in query, key")):
            try:
                attention(placed[0], jax.device_put(qkv[1], NamedSharding(mesh, place)), placed[2])
            except ValueError as error:
                assert words in str(error), error
                assert "jax.sharding.reshard(key, jax.P('b', None, 'n', None))" in str(error), error
            else:
                raise AssertionError(place)
        try:
            attention(jnp.zeros((4, 8, 6, 16), out_sharding=P(None, None, "b")), *[jnp.zeros((4, 8, 3, 16))] * 2)
        except ValueError as error:
            assert "3 key heads cannot be split over 2 devices" in str(error), error
        else:
            raise AssertionError
    print("same")
    """,
        devices=4,
    )
    assert printed.split() == ["same"]


def test_attention_on_automatic_axes_that_are_named(fresh_python: Any) -> None:
    printed = fresh_python(
        START
        + """
    mesh, split = mesh_of(AxisType.Auto), P("b", None, "n")
    qkv = arrays((4, 40, 4, 16), (4, 40, 2, 16), (4, 40, 2, 16))
    with jax.set_mesh(mesh):
        same(functools.partial(attention, split=P("b", "n")), attention_oracle, qkv, [split] * 3, mesh)
        placed = [jax.device_put(x, NamedSharding(mesh, split)) for x in qkv]
        assert jnp.max(jnp.abs(jax.jit(attention)(*placed) - attention_oracle(*qkv))) < 3e-6  # gathered, and right
    try:
        attention(*qkv, split=P("b", "n"))
    except ValueError as error:
        assert "jax.P(axes of the batch, axes of the heads), and the mesh that of jax.set_mesh" in str(error), error
    else:
        raise AssertionError
    print("same")
    """,
        devices=4,
    )
    assert printed.split() == ["same"]


@pytest.mark.parametrize("implementation", ["xla", pytest.param("triton", marks=pytest.mark.slow), "mosaic_tpu"])
def test_rows_of_the_case_table(fresh_python: Any, implementation: str) -> None:
    """Cases by batch and heads on four devices, with gradients of everything, by each implementation."""
    printed = fresh_python(
        START
        + f"""
    from tests.kernels_pallas import attention_cases as cases
    import pytest
    name = "{implementation}"
    patch = pytest.MonkeyPatch()
    cases.small_tiles(patch)
    mesh, shape = mesh_of(AxisType.Auto), (2, 36, 4, 2, 16, 40)
    with jax.set_mesh(mesh):
        for options in (
            {{"sinks": (4,), "slopes": (4,), "bias": (1, 4, 36, 40), "causal": False}},
            {{"mask": (2, 1, 36, 40), "blocks": (1, 4, 16, 32), "window": 30, "soft_cap": 5.0, "offset": 4}},
        ):
            arrays, static = cases.operands(shape, options)
            smooth = {{n: arrays.pop(n) for n in cases.SMOOTH if n in arrays}}
            weights = cases.weights_for(shape, 16)
            ours = functools.partial(attention, split=P("b", "n"), implementation=name, interpret=name != "xla")
            found, expected = (
                jax.jit(jax.grad(functools.partial(cases.loss, functools.partial(f, **static), arrays, weights),
                                 has_aux=True))(smooth)
                for f in (ours, attention_oracle)
            )
            cases.close(found, expected, 3e-5)
    print("same")
    """,
        devices=4,
    )
    assert printed.split() == ["same"]


@pytest.mark.parametrize("implementation", [pytest.param("triton", marks=pytest.mark.slow), "mosaic_tpu"])
def test_kernels_over_rows_on_explicit_axes(fresh_python: Any, implementation: str) -> None:
    """The kernels, in the interpreter, as plain XLA below."""
    printed = fresh_python(
        START
        + f"""
    mesh, run = mesh_of(AxisType.Explicit), {{"implementation": "{implementation}", "interpret": True}}
    x, y, w = arrays((4, 6, 32), (4, 6, 32), (32,))
    rows = P("b", "n", None)
    with jax.set_mesh(mesh):
        same(lambda *a: rms_norm(*a, **run)[0], lambda *a: rms_norm_oracle(*a)[0], [x, w, y], [rows, P(), rows], mesh)
        same(functools.partial(glu, **run), glu_oracle, [x, y], [rows, rows], mesh)
        same(functools.partial(softmax, **run), softmax_oracle, [x], [rows], mesh)
    print("same")
    """,
        devices=4,
    )
    assert printed.split() == ["same"]


@pytest.mark.parametrize("implementation", ["xla", pytest.param("triton", marks=pytest.mark.slow), "mosaic_tpu"])
def test_grouped_products_under_shard_map(fresh_python: Any, implementation: str) -> None:
    """Each device has rows of its own, sorted by group, and all matrices, whose gradient is summed."""
    printed = fresh_python(
        START
        + f"""
    from kernels_pallas.grouped_matmul import grouped_matmul, grouped_matmul_oracle
    mesh, name = mesh_of(AxisType.Auto), "{implementation}"
    x, w = arrays((48, 20), (3, 20, 24))
    sizes = jnp.array([[5, 0, 17], [0, 24, 0]], jnp.int32)
    ours = lambda x, w, s: grouped_matmul(x, w, s[0], implementation=name, interpret=name != "xla")
    split = jax.shard_map(ours, mesh=mesh, in_specs=(P("b"), P(), P("b")), out_specs=P("b"))
    whole = lambda x, w, s: jnp.concatenate([grouped_matmul_oracle(x[24 * i:24 * i + 24], w, s[i]) for i in range(2)])
    same(lambda x, w: split(x, w, sizes), lambda x, w: whole(x, w, sizes), [x, w], [P("b"), P()], mesh)
    print("same")
    """,
        devices=4,
    )
    assert printed.split() == ["same"]


def test_the_selective_scan_under_shard_map(fresh_python: Any) -> None:
    """Rows of the batch over one axis, channels over the other."""
    printed = fresh_python(
        START
        + """
    from kernels_pallas.selective_scan import selective_scan, selective_scan_oracle
    mesh = mesh_of(AxisType.Auto)
    x, dt, decay, b, c = arrays((4, 11, 6), (4, 11, 6), (6, 5), (4, 11, 5), (4, 11, 5))
    given = [x, jnp.log1p(jnp.exp(dt)), -jnp.exp(decay), b, c]
    both, rows = P("b", None, "n"), P("b")
    specs = [both, both, P("n"), rows, rows]
    split = jax.shard_map(lambda *a: selective_scan(*a, chunk=4)[0], mesh=mesh, in_specs=tuple(specs), out_specs=both)
    same(split, lambda *a: selective_scan_oracle(*a)[0], given, specs, mesh)
    print("same")
    """,
        devices=4,
    )
    assert printed.split() == ["same"]


@pytest.mark.parametrize(
    ("kind", "family", "platform", "mark"),
    [
        ("NVIDIA H200", "gpu", "cuda", "__gpu$xla.gpu.triton"),
        ("gfx942", "gpu", "rocm", "__gpu$xla.gpu.triton"),
        ("TPU v5 lite", "tpu", "tpu", "tpu_custom_call"),
    ],
)
def test_parts_lower_to_kernels_for_chips_that_are_not_here(kind: str, family: str, platform: str, mark: str) -> None:
    """On a mesh of four such chips: three kernels of each device's rows and heads."""
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=family)
    mesh = AbstractMesh((2, 2), ("b", "n"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)
    x = jax.ShapeDtypeStruct((4, 300, 4, 80), jnp.bfloat16)

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attention(q, k, v, split=PartitionSpec("b", "n")).astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(jax.grad(total, (0, 1, 2))).trace(x, x, x).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(mark) >= 3 and "tensor<2x300x2x80xbf16>" in text


def test_ops_over_rows_on_explicit_axes(fresh_python: Any) -> None:
    """Rows are split as they come, and where an op goes number by number its last axis as well; others are refused."""
    printed = fresh_python(
        START
        + """
    mesh = mesh_of(AxisType.Explicit)
    x, y, w, b = arrays((4, 6, 32), (4, 6, 32), (32,), (32,))
    with jax.set_mesh(mesh):
        rows, both = P("b", None, None), P("b", None, "n")
        same(lambda *a: rms_norm(*a)[0], lambda *a: rms_norm_oracle(*a)[0], [x, w, y], [rows, P(), rows], mesh)
        same(layer_norm, layer_norm_oracle, [x, w, b], [P("b", "n"), P(), P()], mesh)
        same(glu, glu_oracle, [x, y], [both, both], mesh)
        same(bias_activation, bias_activation_oracle, [x, b], [both, P("n")], mesh)
        mask = jnp.arange(32)[None, None, :] < 20
        same(lambda x: softmax(x, mask), lambda x: softmax_oracle(x, mask), [x], [rows], mesh)
        split, other = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, both), (y, rows)))
        for f, words in (
            (lambda: rms_norm(split), "norm: the last axis is split over 'n', and the op needs rows that are whole"),
            (lambda: glu(split, other), "glu: up is split over ('b', None, None)"),
        ):
            try:
                f()
            except ValueError as error:
                assert words in str(error) and "jax.sharding.reshard" in str(error), error
            else:
                raise AssertionError(words)
        try:
            cache = jnp.zeros((4, 2, 16, 32)), jnp.zeros((4, 2, 32, 16))
            decode_attention(jnp.zeros((4, 1, 2, 16), out_sharding=P("b")), *cache, jnp.ones(4, jnp.int32))
        except ValueError as error:
            assert "call the op inside of jax.shard_map" in str(error), error
        else:
            raise AssertionError
    print("same")
    """,
        devices=4,
    )
    assert printed.split() == ["same"]


def test_cross_entropy_on_explicit_axes(fresh_python: Any) -> None:
    """Rows over one axis, the vocabulary over the other, as the operands' types say."""
    printed = fresh_python(
        START
        + """
    mesh = mesh_of(AxisType.Explicit)
    hidden, table, bias = arrays((8, 16), (16, 200), (200,))
    labels = jnp.array([-100, 0, 199, 100, 17, 99, 150, 50], jnp.int32)
    with jax.set_mesh(mesh):
        y = jax.device_put(labels, NamedSharding(mesh, P("b")))
        ours = lambda h, t, b: cross_entropy(h, t, y, bias=b, label_smoothing=0.1, chunk=30)
        oracle = lambda h, t, b: cross_entropy_oracle(h, t, labels, bias=b, label_smoothing=0.1)
        given = [hidden, table, bias]
        same(ours, oracle, given, [P("b"), P(None, "n"), P("n")], mesh)
        same(ours, oracle, given, [P("b"), P(), P()], mesh)
        try:
            ours(*(jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(given, (P("b", "n"), P("n"), P()))))
        except ValueError as error:
            assert "rows can be, alike in hidden and labels" in str(error), error
        else:
            raise AssertionError
    print("same")
    """,
        devices=4,
    )
    assert printed.split() == ["same"]
