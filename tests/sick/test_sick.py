"""Every fault of the zoo is found where it is, and healthy programs raise nothing."""

import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import trustcore as tc
from trustcore.errors import DebugError

_PATH = Path(__file__).with_name("programs.py")
_spec = importlib.util.spec_from_file_location("sick_programs", _PATH)
zoo = importlib.util.module_from_spec(_spec)
sys.modules["sick_programs"] = zoo
_spec.loader.exec_module(zoo)


def found_in(case):
    """The issues of a sick program, after its outputs were compared with those of the plain function."""
    inspected = tc.debug.inspect(case.fn)
    outputs, report = inspected.run(*case.args)
    plain = case.fn(*case.args)
    for a, b in zip(jax.tree.leaves(outputs), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-3, atol=1e-6)
    return report


@pytest.mark.parametrize("name", zoo.SICK)
def test_a_fault_is_found_with_its_line_path_and_turn(name):
    case = zoo.SICK[name]
    report = found_in(case)
    matching = [i for i in report.issues if i.kind == case.kind]
    if not case.primitive:
        assert matching[0].argument.startswith(case.says)
        assert f"programs.py:{zoo.line_of(case.marked)}" in matching[0].cause
        return
    at = [i for i in matching if i.address is not None and i.address.primitive == case.primitive]
    assert at, [str(i.where) for i in report.all_issues]
    issue = at[0]
    address = issue.address
    if any(line.rstrip().endswith("# here") for line in _source(case.marked)):
        assert Path(address.frame.file).name == "programs.py"
        assert address.frame.line == zoo.line_of(case.marked), issue.message
    assert address.at(issue.turns).rpartition("/")[0] == _expected_path(case), issue.message
    assert (issue.turns, address.stage, issue.shard) == (case.turns, case.stage, case.shard)
    assert case.says in f"{issue.message} {issue.cause}"


def _source(fn):
    import inspect

    return inspect.getsourcelines(fn)[0]


def _expected_path(case):
    parts, turns = [], list(case.turns)
    for part in case.path.split("/") if case.path else []:
        parts.append(f"{part}[{turns.pop(0)}]" if part in ("scan", "while") else part)
    return "/".join(parts)


def test_the_zoo_is_large_enough():
    assert len(zoo.SICK) >= 25 and len(zoo.HEALTHY) >= 25


# What is true of healthy programs, and no more than information.
TOLD = {"logsumexp_of_a_masked_entry": [("inf", "args[0]")]}


@pytest.mark.parametrize("name", zoo.HEALTHY)
def test_a_healthy_program_raises_nothing(name):
    fn, args = zoo.HEALTHY[name]
    _, report = tc.debug.inspect(fn).run(*args)
    assert [issue.message for issue in report.issues] == []
    told = [(issue.kind, issue.argument or issue.where) for issue in report.all_issues]
    assert told == TOLD.get(name, [])


def test_a_large_value_that_leaves_its_module_is_information():
    def stream(x):
        with jax.named_scope("embedding"):
            x = x * 1e8 * (1 + x)
        for i in range(3):
            with jax.named_scope(f"layers/{i}"):
                x = x + jax.numpy.sin(x)
        with jax.named_scope("norm"):
            return x * jax.lax.rsqrt(jax.numpy.mean(x * x, -1, keepdims=True) + 1e-6)

    _, report = tc.debug.inspect(stream).run(zoo.X)
    assert report.issues == () and [i.kind for i in report.all_issues] == ["exploding"]
    assert report.all_issues[0].address.path == ("embedding",)


def test_a_donated_buffer_that_is_used_again_is_named():
    step = jax.jit(lambda state, x: {"w": state["w"] + x}, donate_argnums=0)
    state, x = {"w": np.float32(1) + jax.numpy.zeros(4)}, jax.numpy.ones(4)
    step(state, x)
    with pytest.raises(DebugError, match=r"args\[0\]\['w'\]: deleted; it was donated"):
        tc.debug.nan_hunt(step, show=None)(state, x)


def test_a_nan_on_one_shard_only(fresh_python):
    source = f"""
        import importlib.util, sys
        import jax.numpy as jnp
        import trustcore as tc
        spec = importlib.util.spec_from_file_location("sick_programs", {str(_PATH)!r})
        zoo = importlib.util.module_from_spec(spec)
        sys.modules["sick_programs"] = zoo
        spec.loader.exec_module(zoo)
        x = jnp.ones((4, 6)).at[2, 3].set(-1.0)
        answer = tc.debug.nan_hunt(zoo.a_nan_on_one_shard)(x)
        issue = answer.issue
        assert issue.shard == (2,) and issue.address.primitive == "sqrt", answer
        assert issue.address.path == ("shard_map",), answer
        assert issue.address.frame.line == zoo.line_of(zoo.a_nan_on_one_shard), answer
        assert answer.snapshot.first_bad() == (0, (0, 3)) and answer.snapshot.inputs[0].shape == (1, 6), answer
    """
    assert "on shard 2" in fresh_python(source, devices=4)
