"""The walker: programs written out in one line compute the same; layouts are followed to the element."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustcore.graph import View, bind, called, inline, run, through

X, W = jnp.arange(12.0).reshape(3, 4), jnp.linspace(-1, 1, 5 * 4 * 4).reshape(5, 4, 4)


def scanned(reverse):
    def fn(w, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, w, reverse=reverse)

    return fn


FUNCTIONS = {
    "scan": scanned(False),
    "scan backwards": scanned(True),
    "jit and checkpoint": lambda w, x: jax.checkpoint(jax.jit(lambda x: jnp.sin(x @ w[0])))(x),
    "loops and branches": lambda w, x: jax.lax.cond(
        x.sum() > 0, lambda x: jax.lax.while_loop(lambda c: c.sum() < 1e3, lambda c: 2 * c, x), lambda x: x, x
    ),
    "relu": lambda w, x: jax.nn.relu(x @ w[1]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_straight_line_computes_the_same(name):
    jaxpr = jax.make_jaxpr(FUNCTIONS[name])(W, X)
    line = inline(jaxpr, [True, False])
    names = {eqn.primitive.name for eqn in line.jaxpr.eqns}
    assert not names & {"scan", "jit", "pjit", "remat2", "checkpoint", "custom_jvp_call"}
    flat = jax.core.eval_jaxpr(line.jaxpr, line.consts, W, X)
    for found, expected in zip(flat, jax.tree.leaves(FUNCTIONS[name](W, X)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_scan_over_something_else_stays():
    jaxpr = jax.make_jaxpr(scanned(False))(W, X)
    assert "scan" in {eqn.primitive.name for eqn in inline(jaxpr, [False, False]).jaxpr.eqns}


def test_steps_see_every_equation_in_order():
    seen = []

    def step(eqn, inputs):
        seen.append(eqn.primitive.name)
        body = called(eqn)
        return run(body, inputs, step) if body is not None else bind(eqn, inputs)

    jaxpr = jax.make_jaxpr(lambda x: jnp.sin(jax.jit(jnp.cos)(x)) + 1)(X)
    (found,) = run(jaxpr, [X], step)
    assert [name for name in seen if name not in ("jit", "pjit")] == ["cos", "sin", "add"]
    np.testing.assert_allclose(found, np.sin(np.cos(X)) + 1, rtol=1e-6)


LAYOUTS = {
    "transpose": lambda w: w.transpose(2, 0, 1),
    "joined axes": lambda w: w.reshape(5, 24),
    "split axes": lambda w: w.reshape(5, 2, 2, 3, 2),
    "joined and split": lambda w: w.reshape(10, 2, 6),
    "joined after a transpose": lambda w: w.transpose(0, 2, 1).reshape(5, 24).T,
    "slices": lambda w: w[1:4, ::2, 3:],
    "one of them": lambda w: w[3],
    "cast": lambda w: w.astype(jnp.bfloat16)[2].T,
    "axes of one": lambda w: jnp.squeeze(w[:, None], 1)[None, 0],
    "expanded": lambda w: jax.lax.broadcast_in_dim(w, (5, 1, 4, 6), (0, 2, 3)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_views_know_where_every_element_lies(name):
    w = jnp.arange(120.0).reshape(5, 4, 6)
    jaxpr = jax.make_jaxpr(LAYOUTS[name])(w)
    jaxpr = inline(jaxpr, [True])
    views = {jaxpr.jaxpr.invars[0]: View.of("w", w.shape)}
    for eqn in jaxpr.jaxpr.eqns:
        view = through(eqn, views[eqn.invars[0]])
        assert view is not None, eqn
        views[eqn.outvars[0]] = view
    view, expected = views[jaxpr.jaxpr.outvars[0]], np.asarray(LAYOUTS[name](w).astype(jnp.float32))
    place = np.full((), view.start)
    for factors in view.axes:
        along = np.zeros(1, int)
        for size, stride in factors:
            along = (along[:, None] + np.arange(size)[None] * stride).reshape(-1)
        place = place[..., None] + along
    assert place.shape == expected.shape
    np.testing.assert_array_equal(place, expected)


@pytest.mark.parametrize(
    "change", [lambda w: w * 2, lambda w: w[:, ::-1], lambda w: jnp.stack([w, w]), lambda w: w[jnp.array([0, 1])]]
)
def test_what_is_more_than_a_move_is_no_view(change):
    jaxpr = inline(jax.make_jaxpr(change)(jnp.ones((2, 3))), [True])
    view = View.of("w", (2, 3))
    for eqn in jaxpr.jaxpr.eqns:
        if eqn.invars[0] is jaxpr.jaxpr.invars[0] and eqn.outvars[0] is jaxpr.jaxpr.outvars[0]:
            assert through(eqn, view) is None
            return
    views = {jaxpr.jaxpr.invars[0]: view}
    for eqn in jaxpr.jaxpr.eqns:
        if eqn.invars and eqn.invars[0] in views and views[eqn.invars[0]] is not None:
            views[eqn.outvars[0]] = through(eqn, views[eqn.invars[0]])
    assert views.get(jaxpr.jaxpr.outvars[0]) is None
