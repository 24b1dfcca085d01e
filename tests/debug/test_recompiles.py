"""Every retrace is explained by the argument that changed."""

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest

import trustcore as tc


@functools.partial(jax.jit, static_argnames="n")
def step(state, x, n=2):
    return {"w": state["w"] * n + x.sum().astype(jnp.float32)}


STATE, X = {"w": jnp.ones(3)}, jnp.ones(4)
ARGUMENTS = {
    "shape": (({"w": jnp.ones(3)}, jnp.ones(5)), {}, "shape of x: (4,) before, (5,) now"),
    "dtype": (({"w": jnp.ones(3)}, jnp.ones(4, jnp.bfloat16)), {}, "dtype of x: float32 before, bfloat16 now"),
    "weak type": (({"w": jnp.ones(3)}, 1.0), {}, "weak type of x: False before, True now"),
    "static value": ((STATE, X), {"n": 7}, "static value of n: 2 before, 7 now"),
    "structure": (
        ({"w": jnp.ones(3), "b": jnp.ones(2)}, X),
        {},
        "structure of state['b']: not there before, there now",
    ),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_a_retrace_names_what_changed(what):
    jax.clear_caches()
    args, kwargs, expected = ARGUMENTS[what]
    with tc.debug.recompiles() as log:
        step(STATE, X, n=2)
        step(STATE, X, n=2)
        step(*args, **({"n": 2} | kwargs)) if what != "weak type" else step(args[0], jnp.asarray(args[1]), n=2)
    assert len(log.calls) == 2 and log.calls[0].against is None
    (retrace,) = log.retraces
    assert retrace.function == "step" and retrace.defined.startswith("test_recompiles.py:")
    assert retrace.caller.startswith("test_recompiles.py:") and expected in str(retrace), str(log)
    assert list(log.counts.values()) == [2] and "first program" in str(log)


def test_the_closest_earlier_call_is_taken():
    jax.clear_caches()
    with tc.debug.recompiles() as log:
        for n, size in ((2, 4), (3, 5), (3, 6)):
            step(STATE, jnp.ones(size), n=n)
    assert log.retraces[1].against == 1
    assert [change.what for change in log.retraces[1].changes] == ["shape"]


def test_a_function_that_is_made_anew_is_told():
    with tc.debug.recompiles() as log:
        for _ in range(2):
            jax.jit(lambda x: x * 3 + 1)(X)
    (retrace,) = log.retraces
    assert [change.what for change in retrace.changes] == ["function"]


def test_growth_is_warned_of_once():
    jax.clear_caches()
    sizes = [jnp.ones(n) for n in range(1, 6)]
    with tc.debug.recompiles(warn_after=3), pytest.warns(tc.debug.RecompileWarning, match="traced 3 times") as caught:
        for x in sizes:
            step(STATE, x)
    assert len(caught) == 1


def test_nothing_is_noted_outside_or_when_nothing_is_traced():
    jax.clear_caches()
    step(STATE, X)
    with warnings.catch_warnings(), tc.debug.recompiles() as log:
        step(STATE, X)
        jnp.ones(17) * 2
    assert log.calls == [] and str(log) == "Nothing was traced or compiled."
    step(STATE, jnp.ones(9))
    assert log.calls == []


def test_shardings_are_compared(fresh_python):
    source = """
        import jax, jax.numpy as jnp
        import trustcore as tc
        mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        f = jax.jit(lambda x: x * 2)
        a, b = (jax.device_put(jnp.ones(4), jax.NamedSharding(mesh, jax.P(s))) for s in (None, "d"))
        with tc.debug.recompiles() as log:
            f(a)
            f(b)
        (retrace,) = log.retraces
        print([c.what for c in retrace.changes])
    """
    assert fresh_python(source, devices=2).strip() == "['sharding']"
