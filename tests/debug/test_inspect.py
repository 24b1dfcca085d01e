"""`inspect`: the same outputs, statistics of every value, watches, reports in every form, and refusals."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trustcore as tc
from trustcore.debug import Breakpoint, Severity, Watch
from trustcore.debug.interactive import _Scope
from trustcore.debug.show import fragment
from trustcore.errors import DebugError

X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


def body(carry, i):
    with jax.named_scope("block"):
        return carry + jnp.exp(carry * i), carry.sum()


def fn(x, scale=2.0):
    carry, sums = jax.lax.scan(body, x * scale, jnp.arange(3.0))
    return {"carry": carry, "mean": sums.mean()}


@pytest.fixture(scope="module")
def ran():
    return tc.debug.inspect(fn).run(X)


def test_nothing_watched_gives_the_function_itself():
    assert tc.debug.inspect(fn, watch=None) is fn and tc.debug.inspect(fn, watch=()) is fn


def test_outputs_are_those_of_the_function(ran):
    outputs, report = ran
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), outputs, fn(X))
    assert list(report.results) == ["result['carry']", "result['mean']"]
    assert report.arguments["args[0]"].size == 12


def test_statistics_are_those_of_each_turn(ran):
    _, report = ran
    found = report.find("scan/block/exp")
    assert [reading.turns for reading in found] == [(0,), (1,), (2,)]
    carry = X * 2
    for reading, i in zip(found, range(3), strict=True):
        expected = np.asarray(jnp.exp(carry * i), np.float64)
        stats = reading.statistics
        for name, value in (("min", expected.min()), ("max", expected.max()), ("mean", expected.mean())):
            np.testing.assert_allclose(getattr(stats, name), value, rtol=1e-5)
        np.testing.assert_allclose(stats.std, expected.std(), rtol=1e-4, atol=1e-6)
        carry, _ = body(carry, jnp.float32(i))
    assert report.find("broadcast_in_dim") or report.find("mul")


def test_what_only_moves_is_read_off_its_input():
    _, report = tc.debug.inspect(lambda x: (x * 3).T.reshape(2, 6)[None]).run(X)
    by_name = {r.address.primitive: r.statistics for r in report.statistics}
    assert by_name["transpose"].shape == (4, 3) and by_name["transpose"].max == by_name["mul"].max == 3.0
    assert sum(by_name["reshape"].histogram) == 12


def test_a_program_is_traced_once_for_arguments_of_a_kind():
    calls = []

    def counted(x, flag):
        calls.append(flag)
        return x * 2 if flag else x

    inspected = tc.debug.inspect(counted)
    for flag in (True, True, False, True):
        inspected(X, flag)
    inspected(X.astype(jnp.bfloat16), True)
    assert calls == [True, False, True]
    assert inspected.report.find("mul")[0].statistics.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("condition", "count", "first"),
    [
        (tc.debug.exceeds(4.0), 4, "scan[1]/block/exp"),
        (tc.debug.below(1.5), 3, "scan[0]/block/exp"),
        (tc.debug.has_nan(), 0, ""),
        (tc.debug.has_inf(), 0, ""),
        (tc.debug.shape_equals(3, 4), 3, "scan[0]/block/exp"),
        (tc.debug.predicate(lambda x: jnp.mean(x) > 2, "large mean"), None, "scan"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_watches_count_their_hits(condition, count, first):
    watch = Watch("scan/block/exp", condition)
    _, report = tc.debug.inspect(fn, [watch]).run(X)
    (hit,) = report.hits
    carry, expected = X * 2, 0
    for i in range(3):
        expected += bool(condition(jnp.exp(carry * i)))
        carry, _ = body(carry, jnp.float32(i))
    assert hit.count == expected and hit.first.startswith(first)
    assert {r.address.primitive for r in report.statistics} == {"exp"}
    assert count is None or expected <= count


def test_hits_within_a_while_are_counted():
    def loop(x):
        return jax.lax.while_loop(lambda s: s[0] < 8, lambda s: (s[0] + 1, s[1] * 2.0), (0, x))[1]

    _, report = tc.debug.inspect(loop, [Watch("while/mul", tc.debug.exceeds(10.0))]).run(jnp.ones(2))
    (hit,) = report.hits
    assert (hit.count, hit.first.split(" ")[0]) == (5, "while[3]/mul")


def test_a_stop_hands_over_a_snapshot():
    watched = tc.debug.inspect(fn, ["*", Watch("*/exp", tc.debug.exceeds(4.0), stop=True)])
    with pytest.raises(Breakpoint, match=r"exceeds\(4\) at scan\[1\]/block/exp") as caught:
        watched(X)
    snapshot = caught.value.snapshot
    assert snapshot.turns == (1,) and snapshot.address.primitive == "exp"
    np.testing.assert_allclose(snapshot.outputs[0], np.exp(snapshot.inputs[0]), rtol=1e-6)
    assert watched.report is caught.value.report


def test_a_predicate_must_give_one_boolean():
    with pytest.raises(DebugError, match="it must give one boolean"):
        tc.debug.inspect(fn, [Watch("*", tc.debug.predicate(lambda x: x > 3))])(X)


def test_refusals_say_what_to_write():
    with pytest.raises(DebugError, match=r"fits none of the \d+ equations; addresses look like"):
        tc.debug.inspect(fn, "layers/*")(X)
    with pytest.raises(DebugError, match="neither a glob nor a Watch"):
        tc.debug.inspect(fn, [3])
    with pytest.raises(DebugError, match="names no condition"):
        Watch("*", stop=True)
    with pytest.raises(DebugError, match="none of False, True, 'times'"):
        tc.debug.inspect(fn, trace="all")
    with pytest.raises(DebugError, match=r"not jax\.jit"):
        jax.jit(tc.debug.inspect(fn))(X)


def test_history_lists_what_ran():
    _, report = tc.debug.inspect(fn, trace=True, limit=5).run(X)
    assert len(report.history) == 5 and report.history[0].inputs[0] == "float32[3,4]"
    timed = tc.debug.inspect(fn, watch=None, trace="times", limit=100)
    outputs, report = timed.run(X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), outputs, fn(X))
    assert all(op.seconds > 0 for op in report.history)
    assert [op.turns for op in report.history if op.address.primitive == "exp"] == [(0,), (1,), (2,)]


def test_what_was_not_watched_is_not_taken_for_healthy():
    def body(c, d):
        return jnp.tanh(c) + jnp.log(d), None

    decays = jnp.array([1.0, 0.5, -1.0])
    _, report = tc.debug.inspect(lambda x: jax.lax.scan(body, x, decays)[0], "*/log").run(jnp.ones(2))
    assert [(i.kind, i.severity.name, i.turns) for i in report.issues] == [("nan", "WARNING", (2,))]
    hidden = lambda x: jnp.where(x > 0, jnp.log(x), 0.0)  # noqa: E731
    assert tc.debug.inspect(hidden, "log").run(jnp.array([-1.0, 1.0]))[1].issues == ()


def test_watches_on_time_count_slow_operations():
    def fn(x):
        with jax.named_scope("large"):
            y = jax.lax.scan(lambda c, _: (jnp.sin(c @ c), None), x, None, length=3)[0]
        return jnp.tanh(y[0, 0])

    x = jnp.ones((256, 256))
    slow = [Watch("large/scan/dot_general", tc.debug.takes(1e-7)), Watch("*", tc.debug.takes(60.0), stop=True)]
    outputs, report = tc.debug.inspect(fn, slow, trace="times").run(x)
    np.testing.assert_allclose(outputs, fn(x), rtol=1e-4)
    assert [hit.count for hit in report.hits] == [3, 0]
    assert report.hits[0].first.startswith("large/scan[0]/dot_general") and report.hits[1].first == ""
    with pytest.raises(Breakpoint, match=r"takes\(1e-07 s\) at large/scan\[0\]/dot_general"):
        tc.debug.inspect(fn, Watch("*/dot_general", tc.debug.takes(1e-7), stop=True), trace="times")(x)
    with pytest.raises(DebugError, match='pass trace="times"'):
        tc.debug.inspect(fn, slow)
    with pytest.raises(DebugError, match="a number of seconds above 0"):
        tc.debug.takes(0)


def test_a_traced_call_is_replayed():
    _, report = tc.debug.inspect(fn, trace=True).run(X)
    powers = report.replay("*/exp")
    assert [p.turns for p in powers] == [(0,), (1,), (2,)]
    for snapshot in powers:
        np.testing.assert_allclose(snapshot.outputs[0], np.exp(snapshot.inputs[0]), rtol=1e-6)
        np.testing.assert_array_equal(snapshot.replay()[0], snapshot.outputs[0])
    assert len(report.replay(limit=4)) == 4
    with pytest.raises(DebugError, match="inspect\\(fn, trace=True\\)"):
        tc.debug.inspect(fn).run(X)[1].replay()


def test_a_value_far_from_the_baseline_is_an_issue():
    usual, small = tc.debug.inspect(fn), X / 8
    usual(small)
    baseline = json.loads(json.dumps(usual.report.baseline()))
    again = tc.debug.inspect(fn, baseline=baseline)
    again(small)
    assert again.report.issues == ()
    again(small * 20)
    issues = [issue for issue in again.report.issues if issue.kind == "unusual"]
    assert issues and issues[0].severity == Severity.WARNING and "in the baseline it is" in issues[0].message


def test_reports_in_every_form(tmp_path):
    inspected = tc.debug.inspect(jax.grad(lambda x: jnp.sum(jnp.where(x > 0, jnp.sqrt(x), 0.0))))
    inspected(jnp.array([0.0, 1.0]))
    report = inspected.report
    text = str(report)
    assert "critical" in text and "0 * Inf is NaN" in text and "1e-8 to 1e8" in text
    data = json.loads(report.to_json(tmp_path / "report.json"))
    assert data["issues"][0]["kind"] == "nan" and data["issues"][0]["line"] and data["statistics"]
    page = report.to_html(tmp_path / "report.html")
    assert page.count("<svg") == len(report.statistics) and "src=" not in page and "href=" not in page
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    assert fragment(report) in page and "mul" in "".join(report.tree())


def test_the_hunt_prints_one_sentence(capsys):
    answer = tc.debug.nan_hunt(lambda x: jnp.log(x - 1.0))(jnp.array([2.0, 0.5]))
    assert capsys.readouterr().out == f"{answer}\n"
    assert answer.found and "logarithm of a negative number (-0.5)" in str(answer) and "is [1]" in str(answer)
    assert answer.to_dict()["root"]["primitive"] == "log"
    fine = tc.debug.nan_hunt(jnp.sin, show=None)(X)
    assert (fine.found, str(fine)) == (False, "All results are finite.")


def test_the_hunt_goes_back_to_the_overflow():
    answer = tc.debug.nan_hunt(lambda x: jnp.exp(x) / jnp.sum(jnp.exp(x)), show=None)(jnp.array([100.0, 1.0]))
    assert (answer.issue.kind, answer.root.kind, answer.root.address.primitive) == ("nan", "inf", "exp")
    assert "Of it came this: NaN first appeared in div" in str(answer)


def test_statistics_of_a_program_on_several_devices(fresh_python):
    source = """
        import jax, jax.numpy as jnp
        import trustcore as tc
        mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        x = jax.device_put(jnp.arange(32.0).reshape(8, 4), jax.NamedSharding(mesh, jax.P("d")))
        loss = lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2)
        outputs, report = tc.debug.inspect(jax.jit(jax.grad(loss))).run(jnp.ones((4, 4)), x)
        assert jnp.allclose(outputs, jax.grad(loss)(jnp.ones((4, 4)), x), atol=1e-5)
        assert report.arguments["args[1]"].max == 31.0 and report.find("*dot_general")
        print("fine")
    """
    assert fresh_python(source, devices=4).strip() == "fine"


def test_what_a_function_changes_of_its_modules_is_kept():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
            self.dropout, self.calls = nnx.Dropout(0.5, rngs=rngs), nnx.Variable(jnp.zeros((), jnp.int32))

        def __call__(self, x):
            self.calls.set_value(self.calls.get_value() + 1)
            return self.dropout(self.norm(self.linear(x)))

    plain, seen, stepped = (Model(nnx.Rngs(0)) for _ in range(3))
    call = lambda model, x: model(x)  # noqa: E731
    inspected = tc.debug.inspect(nnx.jit(call))
    for i in range(3):
        x = X + i
        expected = nnx.jit(call)(plain, x)
        np.testing.assert_allclose(inspected(seen, x), expected, atol=1e-5)
        np.testing.assert_allclose(tc.debug.Session(call, stepped, x, commands=["c"]).run(), expected, atol=1e-5)
    for model in (seen, stepped):
        state = nnx.state(model, (nnx.Param, nnx.BatchStat)), nnx.state(plain, (nnx.Param, nnx.BatchStat))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *state)
    assert seen.calls.get_value() == 3 and not np.allclose(seen.norm.mean.get_value(), 0)
    assert "args[0].norm.mean afterwards" in inspected.report.results
    assert len(inspected._prepared) == 1  # and still one program


def test_in_a_notebook_the_report_is_a_tree(ran, monkeypatch):
    treescope = pytest.importorskip("treescope")
    _, report = ran
    page = report._repr_html_()
    assert "treescope" in page and 'role="img"' not in page
    text = treescope.render_to_text(_Scope("values", report.tree(), top=True))
    assert "scan[0]/ (" in text
    for reading in report.statistics:
        assert reading.statistics.short in text and reading.statistics.sparkline.strip() in text
    monkeypatch.setitem(sys.modules, "treescope", None)
    plain = report._repr_html_()
    assert "treescope" not in plain and plain.count("<svg") == len(report.statistics)
