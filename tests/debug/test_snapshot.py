"""Snapshots run again alone, as files too; sessions step through programs."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trustcore as tc
from trustcore.debug.snapshot import snapshot_at
from trustcore.graph import trace

X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


def snapshot_of(fn, primitive, *args, turns=()):
    program = trace(fn, args).program
    (node,) = [n for n in program.nodes if n.address.primitive == primitive]
    return snapshot_at(program, jax.tree.leaves(args), node, turns)


CASES = {
    "dot_general": (lambda x: x @ x.T, (X,)),
    "div": (lambda x: 0.5 / x, (X[0],)),  # by a number without axes
    "gather": (lambda x, i: x[i], (X, jnp.array([2, 0]))),
    "reduce_max": (lambda x: x.max(0), (X,)),
    "conv_general_dilated": (lambda x: jnp.convolve(x, x[:2]), (X[0],)),
    "select_n": (lambda x, m: jax.lax.select(m, x, -x), (X, X > 0)),
    "convert_element_type": (lambda x: x.astype(jnp.bfloat16), (X,)),
    "cumsum": (lambda x: jax.lax.cumsum(x, 1), (X,)),
}


@pytest.mark.parametrize("primitive", CASES)
def test_an_equation_runs_again_alone(primitive):
    fn, args = CASES[primitive]
    snapshot = snapshot_of(fn, primitive, *args)
    for again, before in zip(snapshot.replay(), snapshot.outputs, strict=True):
        np.testing.assert_allclose(np.asarray(again, np.float32), np.asarray(before, np.float32), rtol=1e-5)


def test_inputs_can_be_replaced():
    snapshot = snapshot_of(jnp.log, "log", X[0])
    assert snapshot.first_bad() == (0, (0,))
    assert "out0: float32[4] with 4 NaN of 4" in str(snapshot)
    np.testing.assert_allclose(snapshot.replay(jnp.ones(4))[0], 0)


def test_random_keys_are_kept_as_numbers():
    snapshot = snapshot_of(lambda key: jax.random.bits(key, (3,)), "random_bits", jax.random.key(3))
    np.testing.assert_array_equal(snapshot.replay()[0], jax.random.bits(jax.random.key(3), (3,)))


@pytest.mark.parametrize("primitive", CASES)
def test_a_file_computes_the_same_with_jax_alone(primitive, tmp_path):
    fn, args = CASES[primitive]
    snapshot = snapshot_of(fn, primitive, *args)
    source = snapshot.save(tmp_path / "fault.py").read_text()
    assert "trustcore" not in source
    names = {}
    exec(compile(source, "fault.py", "exec"), names)
    inputs = names["load"]()
    assert [x.shape for x in inputs] == [np.shape(x) for x in snapshot.inputs]
    outputs = jax.tree.leaves(names["operation"](*inputs))
    for found, expected in zip(outputs, snapshot.outputs, strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(expected, np.float32), rtol=1e-5)


def test_a_file_shows_the_fault_in_a_process_of_its_own(tmp_path):
    answer = tc.debug.nan_hunt(lambda x: jnp.log(x).sum(), show=None)(X[0])
    path = answer.snapshot.save(tmp_path / "fault.py")
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "out0: float32[4] with 4 NaN and 0 Inf" in done.stdout
    assert "logarithm of a negative number" in path.read_text() and path.stat().st_size < 4000


def loops(x):
    def body(carry, i):
        y = jnp.sqrt(2.0 - i) * carry
        return y, y.sum()

    carry, sums = jax.lax.scan(body, x, jnp.arange(4.0))
    return jax.lax.cond(sums[0] > 0, jnp.sin, jnp.cos, carry), sums


def session(*commands):
    lines = []
    run = tc.debug.Session(loops, jnp.ones(2), commands=commands, write=lines.append)
    return run.run(), lines


def test_a_session_steps_and_gives_the_results():
    outputs, lines = session("s", "w", "p", "c")
    for found, expected in zip(outputs, loops(jnp.ones(2)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert lines[0].startswith("> iota") and any("in0" in line for line in lines)


def test_a_session_stops_at_breakpoints_with_their_turns():
    _, lines = session("b */sqrt", "c", "p in0", "c", "c", "l", "c", "c")
    stops = [line for line in lines if line.startswith("> ")]
    assert [line.split(" ")[1] for line in stops[1:]] == [f"scan[{i}]/sqrt" for i in range(4)]
    assert "2.0" in lines and "breakpoint: */sqrt" in lines


def test_a_session_finds_the_first_bad_value():
    _, lines = session("bad", "c")
    assert any(line.startswith("scan[3]/sqrt") and "NaN" in line for line in lines)


def test_a_session_leaves_scopes_and_ends():
    _, lines = session("b */sqrt", "c", "u", "n", "x", "p nothing", "c", "c", "c", "c", "c")
    stops = [line.split(" ")[1] for line in lines if line.startswith("> ")]
    assert stops[1] == "scan[0]/sqrt" and stops[2].startswith("scan[1]/")
    assert any("is no command" in line for line in lines) and any("there are in0" in line for line in lines)
    with pytest.raises(tc.debug.Quit):
        session("q")


def test_step_takes_the_place_of_a_call():
    found = tc.debug.step(jnp.sin, commands=["c"], write=lambda _: None)(X)
    np.testing.assert_allclose(found, jnp.sin(X), rtol=1e-6)
