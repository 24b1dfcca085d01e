"""Patterns found wherever they may be, left alone where they must not be taken out, proven, and counted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustcore.errors import ProgramError
from trustcore.graph.program import Program
from trustcore.graph.rewriting import Rule, Static, rewrite
from trustcore.graph.rewriting.algebra import APPROXIMATE, EXACT

SHAPE = jax.ShapeDtypeStruct
ROWS, GAIN = SHAPE((2, 8), "float32"), SHAPE((8,), "float32")


def bent(x, w, eps):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps) * jnp.broadcast_to(w, x.shape)


@jax.jit
def marked(x, w, eps):
    """The same, by other operations: what is left of a pattern shows as no `rsqrt`."""
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * jnp.broadcast_to(w, x.shape)


NORM = Rule("norm", bent, marked, (ROWS, GAIN, Static(1e-6)))
X = jax.random.normal(jax.random.key(0), (3, 2, 8))
W = jax.random.normal(jax.random.key(1), (8,))


def operations(fn, *args) -> list[str]:
    return [node.eqn.primitive.name for node in Program(jax.make_jaxpr(fn)(*args)).nodes]


def shuffled(x, w):
    return jnp.broadcast_to(w, x.shape) * (jax.lax.rsqrt(1e-3 + jnp.mean(x * x, axis=-1, keepdims=True)) * x)


PLACES = {
    "plain": shuffled,
    "jit": jax.jit(shuffled),
    "half in a jit": lambda x, w: (
        jax.jit(lambda r: r * x)(jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-3)) * jnp.broadcast_to(w, x.shape)
    ),
    "scan": lambda x, w: jax.lax.scan(lambda c, _: (shuffled(c, w), None), x, length=2)[0],
    "while": lambda x, w: jax.lax.while_loop(lambda c: jnp.sum(c) < -1e9, lambda c: shuffled(c, w), x),
    "cond": lambda x, w: jax.lax.cond(jnp.sum(x) > 0, shuffled, lambda x, w: x, x, w),
    "checkpoint": jax.checkpoint(shuffled),
    "vmap": jax.vmap(shuffled, (0, None)),
    "scan in a jit in a checkpoint": jax.checkpoint(
        jax.jit(lambda x, w: jax.lax.scan(lambda c, _: (shuffled(c, w), None), x, length=2)[0])
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_pattern_is_found_wherever_it_stands(name: str) -> None:
    plain = PLACES[name]
    fast = rewrite(plain, NORM)
    np.testing.assert_allclose(fast(X, W), plain(X, W), rtol=2e-5, atol=1e-6)
    assert fast.report is not None and fast.report.count("norm") == 1 and not fast.report.refused
    assert "rsqrt" not in operations(fast, X, W) and "rsqrt" in operations(plain, X, W)
    (applied,) = fast.report.applied
    assert applied.static == (pytest.approx(1e-3),) and applied.error is not None and applied.error < 1e-5
    assert applied.frame is not None and applied.frame.file == __file__
    assert ("scan" in name) == ("scan" in applied.where)


def test_gradients_go_through_what_was_rewritten() -> None:
    loss = lambda x, w: jnp.sum(jnp.sin(PLACES["scan in a jit in a checkpoint"](x, w)))  # noqa: E731
    fast = rewrite(loss, NORM)
    for found, wanted in zip(jax.grad(fast, (0, 1))(X, W), jax.grad(loss, (0, 1))(X, W), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert fast.report is not None and fast.report.count("norm") == 1


@pytest.mark.parametrize("kind", ["custom_jvp", "custom_vjp"])
def test_the_body_of_a_function_with_a_derivative_of_its_own(kind: str) -> None:
    fn = getattr(jax, kind)(shuffled)
    if kind == "custom_jvp":
        fn.defjvp(lambda primals, tangents: (fn(*primals), 7.0 * tangents[0]))
    else:
        fn.defvjp(lambda x, w: (fn(x, w), None), lambda _, g: (7.0 * g, jnp.zeros_like(W)))
    fast = rewrite(fn, NORM)
    np.testing.assert_allclose(fast(X, W), fn(X, W), rtol=2e-5, atol=1e-6)
    assert fast.report is not None and fast.report.count("norm") == 1
    slope = jax.grad(lambda x: jnp.sum(fast(x, W)))(X)
    np.testing.assert_array_equal(slope, jnp.full_like(X, 7.0))  # its rule is as it was


def test_on_several_devices(fresh_python) -> None:
    fresh_python(
        """
        import jax, jax.numpy as jnp, numpy as np
        from trustcore.graph import Rule, rewrite
        mesh = jax.make_mesh((2,), ("d",))
        rule = Rule("twice", lambda x: x + x, lambda x: 2 * x, (jax.ShapeDtypeStruct((4,), "float32"),))
        body = lambda x: jax.lax.psum(x + x, "d")
        plain = jax.shard_map(body, mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P())
        fast = rewrite(plain, rule)
        x = jax.device_put(jnp.arange(8.0), jax.NamedSharding(mesh, jax.P("d")))
        np.testing.assert_array_equal(fast(x), plain(x))
        assert fast.report.count("twice") == 1 and "shard_map" in fast.report.applied[0].where, fast.report
        """,
        devices=2,
    )


def both(x):
    y = jnp.sin(x)
    return jnp.exp(y) + y


def test_what_is_used_elsewhere_is_not_taken_out() -> None:
    def leaks(x, w):
        scale = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-3)
        return x * scale * jnp.broadcast_to(w, x.shape), scale

    fast = rewrite(leaks, NORM)
    for found, wanted in zip(fast(X, W), leaks(X, W), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert fast.report is not None and not fast.report.applied
    (refused,) = fast.report.refused
    assert "rsqrt" in refused.reason and "used elsewhere, as a result" in refused.reason
    assert "test_rewriting.py:" in str(refused) and "not applied" in str(fast.report)
    rule = Rule("exp-sin", lambda x: jnp.exp(jnp.sin(x)), jnp.cos, (GAIN,))
    assert "used elsewhere, by add" in rewrite(both, rule).explain(W).refused[0].reason


def test_a_rule_that_lies_is_refused() -> None:
    wrong = Rule("wrong", bent, lambda x, w, eps: 1.001 * marked(x, w, eps), (ROWS, GAIN, Static(1e-6)))
    fast = rewrite(shuffled, wrong)
    np.testing.assert_array_equal(fast(X, W), jax.jit(shuffled)(X, W))
    assert fast.report is not None and "results differ by" in fast.report.refused[0].reason
    slope = lambda x, w, eps: jax.lax.stop_gradient(marked(x, w, eps))  # noqa: E731
    flat = rewrite(shuffled, Rule("flat", bent, slope, (ROWS, GAIN, Static(1e-6)))).explain(X, W)
    assert not flat.applied and "gradients differ by" in flat.refused[0].reason
    unproven = rewrite(shuffled, wrong, prove=False)
    assert unproven.explain(X, W).applied[0].error is None
    scale = Rule("scale", lambda x: x * 3.0, lambda x: x * np.float32(3.0000002), (GAIN,), exact=True)
    assert "bit by bit" in rewrite(lambda x: x * 3.0, scale).explain(W).refused[0].reason
    small = rewrite(shuffled, NORM, proof_budget=100)
    assert "proof_budget=" in small.explain(X, W).refused[0].reason
    shape = Rule("shape", lambda x: x + x, jnp.sum, (GAIN,))
    assert "gives float32[] where float32[8] is wanted" in rewrite(lambda x: x + x, shape).explain(W).refused[0].reason


def test_conditions_numbers_and_dtypes() -> None:
    rule = Rule("norm", bent, marked, (ROWS, GAIN, Static(1e-6)), condition=lambda x, w, eps: eps < 1e-4 or "large")
    assert rewrite(shuffled, rule).explain(X, W).refused[0].reason == "large"
    half = X.astype(jnp.bfloat16)
    again = rewrite(lambda x, w: bent(x, w, jnp.bfloat16(0.5)), NORM).explain(half, W.astype(jnp.bfloat16))
    assert again.applied[0].operands[0] == "bfloat16[3,2,8]" and again.applied[0].static == (0.5,)
    moving = rewrite(bent, NORM).explain(X, W, jnp.float32(0.1))
    assert not moving.applied and not moving.refused  # it is no number of the program


def test_several_results() -> None:
    def pattern(x, y):
        total = x + y
        return jnp.tanh(total), total

    def fused(x, y):
        total = y + x
        return jnp.sinh(total) / jnp.cosh(total), total

    rule = Rule("add-tanh", pattern, fused, (GAIN, GAIN))

    def plain(x, y):
        total = x + y
        return jnp.tanh(total) * 2 + jnp.exp(total)

    fast = rewrite(plain, rule)
    np.testing.assert_allclose(fast(W, W), plain(W, W), rtol=1e-5)
    assert fast.report is not None and fast.report.count("add-tanh") == 1 and "tanh" not in operations(fast, W, W)


def half(x):
    return x.astype(jnp.float16)


SIMPLER = {
    "identity": (lambda x: jnp.where(True, x * 1 / 1 - 0.0, 0.0), []),
    "add-zero": (lambda x: x + -0.0, []),
    "double-negation": (lambda x: jnp.negative(jnp.negative(x)), []),
    "transpose-of-transpose": (lambda x: x.transpose(1, 2, 0).transpose(2, 0, 1), []),
    "reshape-of-reshape": (lambda x: x.reshape(6, 8).reshape(48), ["reshape"]),
    "widen-and-narrow": (lambda x: half(half(x).astype(jnp.float32)), ["convert_element_type"]),
    "divide-by-power-of-two": (lambda x: x / 4.0, ["mul"]),
    "common-subexpression": (lambda x: jnp.exp(x) * jnp.exp(x), ["exp", "mul"]),
    "fold-constant": (lambda x: x[0] + jnp.tril(jnp.ones((2, 8))), ["slice", "squeeze", "add"]),
    "abs-of-negation": (lambda x: jnp.abs(-x), ["abs"]),
}  # fmt: skip


@pytest.mark.parametrize("rule", SIMPLER)
def test_rules_of_arithmetic_change_no_bit(rule: str) -> None:
    plain, left = SIMPLER[rule]
    fast = rewrite(plain, EXACT)
    np.testing.assert_array_equal(np.asarray(fast(X)), np.asarray(jax.jit(plain)(X)))
    assert fast.report is not None and fast.report.count(rule) >= 1, str(fast.report)
    assert [name for name in operations(fast, X) if name not in ("jit", "pjit")] == left, operations(fast, X)


def test_what_is_not_exact_is_off_by_default_and_says_so() -> None:
    exact = {rule.name for rule in EXACT}
    assert all(rule.exact for rule in EXACT) and not any(rule.exact for rule in APPROXIMATE)
    assert not exact & {rule.name for rule in APPROXIMATE}
    assert not rewrite(lambda x: x + 0.0, EXACT).explain(X).applied  # -0.0 + 0.0 is 0.0
    assert rewrite(lambda x: x + 0.0, APPROXIMATE).explain(X).count("add-zero-of-any-sign") == 1
    scaled = rewrite(lambda x: (x * 3.0) * 7.0, APPROXIMATE)
    np.testing.assert_allclose(scaled(X), 21.0 * X, rtol=1e-6)
    assert scaled.report is not None and scaled.report.count("scale-of-scale") == 1
    assert rewrite(lambda x, y: x * y + jnp.sin(x) * x, APPROXIMATE).explain(X, X).count("common-factor") == 1


def test_what_nobody_uses_is_gone_and_effects_stay_in_order() -> None:
    seen: list[int] = []

    def plain(x):
        jnp.exp(jnp.sin(x))
        for i in range(3):
            jax.debug.callback(lambda v, i=i: seen.append(i), x[0, 0, 0] * 1, ordered=True)
        return x * 1

    fast = rewrite(plain, EXACT)
    fast(X)
    jax.effects_barrier()
    assert seen == [0, 1, 2] and fast.report is not None and fast.report.dead == 2
    assert "exp" not in operations(fast, X)


def test_strategies() -> None:
    up = Rule("up", jnp.sin, lambda x: jnp.cos(x - np.float32(np.pi / 2)), (GAIN,), priority=1)
    two = Rule("two", lambda x: jnp.exp(jnp.sin(x)), lambda x: jnp.exp(jnp.sin(x)) * 1.0, (GAIN,), priority=2)
    plain = lambda x: jnp.exp(jnp.sin(x)) + jnp.sin(x)  # noqa: E731
    counts = {}
    for strategy in ("once", "exhaustive", "fixpoint", "prioritized"):
        fast = rewrite(plain, [up], strategy=strategy)
        np.testing.assert_allclose(fast(W), plain(W), rtol=1e-5, atol=1e-6)
        assert fast.report is not None
        counts[strategy] = (fast.report.count("up"), fast.report.rounds)
    assert {count for count, _ in counts.values()} == {2} and counts["once"][1] == 1 and counts["fixpoint"][1] == 2
    first = rewrite(
        plain, [up, Rule("two", two.pattern, jnp.tan, (GAIN,), priority=2)], strategy="prioritized", prove=False
    )
    assert first.explain(W).applied[0].rule == "two"
    with pytest.raises(ProgramError, match="the rules two undo each other or grow without end"):
        rewrite(plain, [two]).explain(W)
    assert rewrite(plain, [two], strategy="once").explain(W).count("two") == 1
    with pytest.raises(ProgramError, match="strategy 'all' is not known; choose of once"):
        rewrite(plain, [up], strategy="all")  # type: ignore[arg-type]


def test_calls_in_which_nothing_was_replaced_stay() -> None:
    block = jax.jit(lambda x: jnp.tanh(jnp.sin(x) * 2))
    block.__wrapped__.__name__ = "block"
    plain = lambda x: block(block(x)) + jax.jit(shuffled)(x, W)  # noqa: E731
    fast = rewrite(plain, NORM)
    np.testing.assert_allclose(fast(X), plain(X), rtol=1e-5, atol=1e-6)
    program = Program(jax.make_jaxpr(fast)(X))
    outer = program.nodes[0].bodies[0]
    assert [n.eqn.primitive.name for n in outer.nodes].count("jit") == 3  # two blocks, and `marked`
    lines = [node for node in program.nodes if node.eqn.primitive.name == "sin"]
    assert len(lines) == 2 and all("test_rewriting.py" in node.address.place for node in lines)


def test_it_is_traced_once_for_each_kind_of_arguments() -> None:
    count = 0

    def plain(x, flag):
        nonlocal count
        count += 1
        return x * 1 if flag else x

    fast = rewrite(plain, EXACT)
    for _ in range(3):
        fast(X, True)
    assert count == 1
    fast(X, False)
    fast(X[0], True)
    assert count == 3
    outer = jax.jit(lambda x, y: rewrite(lambda z: z * y * 1, EXACT)(x))
    np.testing.assert_array_equal(outer(X, X), X * X)  # what it closes over belongs to the trace around


def test_a_pattern_must_compute_something() -> None:
    with pytest.raises(ProgramError, match="returns an operand or a constant"):
        Rule("none", lambda x: x, lambda x: x, (GAIN,))
    with pytest.raises(ProgramError, match="cannot be traced with"):
        Rule("none", lambda x, y: x @ y, lambda x, y: x, (GAIN, ROWS))
