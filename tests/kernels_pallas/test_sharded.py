"""Operands split over explicit axes of a mesh, or over axes that are named: computed by parts, nothing gathered."""

from __future__ import annotations

from typing import Any

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
