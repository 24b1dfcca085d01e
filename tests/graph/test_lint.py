"""Each rule: a program that breaks it is told, with its line, and a healthy one is not."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.graph.lint import lint

X, W = jnp.ones((128, 128)), jnp.ones((128, 128))
LARGE = jnp.ones((1024, 512))


def rules(fn, *args, **options) -> list[str]:
    return [finding.rule for finding in lint(fn, *args, **options)]


def test_a_healthy_program_has_none() -> None:
    assert rules(jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w))), W, X) == []


def test_captured_constants() -> None:
    assert rules(lambda x: jnp.sum(LARGE) + x, X) == ["captured-constant"]
    assert rules(lambda x, large: jnp.sum(large) + x, X, LARGE) == []


@jax.jit
def block(x, w):
    for _ in range(3):
        x = jnp.tanh(x @ w) * 2 + 1
    return x


def deep(x, w, depth):
    for _ in range(depth):
        x = block(x, w)
    return x


def test_unrolled_layers() -> None:
    found = lint(lambda x, w: deep(x, w, 9), X, W)
    assert [f.rule for f in found] == ["unrolled-layers"] and "'block' stands 9 times" in found[0].message
    assert "test_lint.py:" in str(found[0])
    assert rules(lambda x, w: deep(x, w, 2), X, W) == []
    assert rules(lambda x, w: jax.lax.scan(lambda x, _: (block(x, w), None), x, length=9)[0], X, W) == []


def test_wide_numbers() -> None:
    with jax.enable_x64(True):
        leak = lambda x: jnp.sum(x.astype(jnp.float64) * np.float64(2))  # noqa: E731
        found = lint(leak, X)
        assert [f.rule for f in found] == ["float64"] and "convert_element_type" in found[0].message
        assert rules(leak, X.astype(jnp.float64)) == []


def test_products_of_widened_numbers() -> None:
    half = X.astype(jnp.bfloat16)
    assert rules(lambda a, b: a.astype(jnp.float32) @ b.astype(jnp.float32), half, half) == ["widened-product"]
    product = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32)  # noqa: E731
    assert rules(product, half, half) == []


def test_weak_types() -> None:
    found = lint(lambda x, rate: x * rate, X, 0.5)
    assert [f.rule for f in found] == ["weak-type"] and "args[1]" in found[0].message
    assert rules(lambda x, rate: x * rate, X, jnp.float32(0.5)) == []


def test_callbacks() -> None:
    def talks(x):
        jax.debug.callback(lambda v: None, x)
        return x

    assert rules(talks, X) == ["host-transfer"]
    looped = lint(lambda x: jax.lax.scan(lambda x, _: (talks(x), None), x, length=3)[0], X)
    assert [f.rule for f in looped] == ["host-transfer"] and "in a loop" in looped[0].message
    assert looped[0].weight > lint(talks, X)[0].weight


def test_products_that_fill_a_unit_badly() -> None:
    thin = jnp.ones((128, 3))
    found = lint(lambda x, w: x.T @ w, thin, W)
    assert [f.rule for f in found] == ["padded-product"] and "38%" in found[0].message
    assert rules(lambda x, w: x.T @ w, jnp.ones((128, 8)), W) == []
    assert rules(lambda x, w: x.T @ w, thin, W, unit=(1, 8)) == []


def test_in_a_branch_that_is_not_the_dearest() -> None:
    cheap = lambda x, w: jnp.sum(x[:, :3].T @ w[:, :3])  # noqa: E731
    dear = lambda x, w: jnp.sum((x @ w) @ w)  # noqa: E731
    assert rules(lambda x, w: jax.lax.cond(x[0, 0] > 0, dear, cheap, x, w), X, W) == []


def test_replicated_arguments(fresh_python) -> None:
    code = """
        import jax, jax.numpy as jnp
        from trustcore.graph.lint import lint
        mesh = jax.make_mesh((2,), ("d",))
        put = lambda x, *spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P(*spec)))
        whole, split = put(jnp.ones((1024, 512))), put(jnp.ones((128, 128)), "d")
        add = lambda a, b: jnp.sum(a) + jnp.sum(b)
        found = lint(add, whole, split)
        assert [f.rule for f in found] == ["replicated"] and "each of 2 devices" in found[0].message, found
        assert not lint(add, put(jnp.ones((1024, 512)), "d"), split)
    """
    fresh_python(code, devices=2)


def test_tensors_that_are_made_whole_to_be_resharded(fresh_python) -> None:
    code = """
        import jax, jax.numpy as jnp
        from trustcore.graph.lint import lint
        auto = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=auto)
        on = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))

        def bad(a):
            b = jax.lax.with_sharding_constraint(a * 2, on(("x", "y"), None, None))
            c = b.reshape(16, 4, 8, 16)
            return jax.lax.with_sharding_constraint(c + 1, on(None, "y", None, "x"))

        a = jax.ShapeDtypeStruct((16, 32, 16), "float32", sharding=on("y", None, "x"))
        for _ in range(2):  # the second time from no cache
            (found,) = lint(bad, a, compiled=True)
            assert found.rule == "rematerialized" and "reshape of f32[2,4,8,16]" in found.message, found
            assert "(<string>:10)" in found.message, found
        assert lint(bad, a) == [] == lint(lambda a: a * 2, a, compiled=True)
    """
    fresh_python(code, devices=8)


def test_the_costliest_comes_first() -> None:
    found = lint(lambda x, rate: jnp.sum(LARGE) * rate + x, X, 0.5)
    assert [f.rule for f in found] == ["captured-constant", "weak-type"]
    assert Path(__file__).name not in str(found[0])  # it has no line of its own
