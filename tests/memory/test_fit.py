"""Gradients within a budget: the same numbers, less memory, and a process that proves it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustcore.errors import ProgramError
from trustcore.memory import account, fit, remat_blocks, savings

ROOT = Path(__file__).parents[2]
WS = 0.1 * jax.random.normal(jax.random.key(0), (6, 128, 128))
X = jax.random.normal(jax.random.key(1), (32, 64, 128))


@jax.jit
def block(x, w):
    return x + jnp.sin(jnp.cos(jnp.tanh(x @ w)))


def mean_square(ws, x):
    for i in range(ws.shape[0]):
        x = block(x, ws[i])
    return jnp.mean(x * x)


def scanned(ws, x):
    body = lambda x, w: (x + jnp.sin(jnp.cos(jnp.tanh(x @ w))), None)  # noqa: E731
    return jnp.mean(jax.lax.scan(body, x, ws)[0] ** 2)


def test_a_budget_that_the_plain_step_meets_changes_nothing() -> None:
    plain = account(jax.value_and_grad(mean_square), WS, X).peak
    found = fit(mean_square, plain, WS, X, batch=(1,))
    assert (found.plan.remat, found.plan.microbatches, found.plan.peak) == ("none", 1, plain)
    assert found.tried == (found.plain,)


@pytest.mark.parametrize("share", [0.6, 0.3])
def test_microbatches_come_first_for_they_cost_no_flops(share: float) -> None:
    plain = account(jax.value_and_grad(mean_square), WS, X).peak
    found = fit(mean_square, int(share * plain), WS, X, batch=(1,))
    assert found.plan.remat == "none" and found.plan.microbatches > 1 and found.plan.peak <= share * plain
    fewer = [plan for plan in found.tried if 1 <= plan.microbatches < found.plan.microbatches and plan.remat == "none"]
    assert fewer and all(plan.peak > share * plain for plan in fewer)
    value, gradient = found.step(WS, X)
    expected = jax.value_and_grad(mean_square)(WS, X)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], atol=1e-6)
    assert found.plan.flops == pytest.approx(found.plain.flops, rel=0.05)


def test_where_the_batch_is_whole_blocks_are_computed_again() -> None:
    plain = account(jax.value_and_grad(scanned), WS, X).peak
    found = fit(scanned, int(0.7 * plain), WS, X)
    assert found.plan.remat != "none" and found.plan.microbatches == 1 and found.plan.peak <= 0.7 * plain
    assert found.plan.flops > found.plain.flops
    np.testing.assert_allclose(found.step(WS, X)[1], jax.grad(scanned)(WS, X), atol=1e-6)
    assert "times the FLOPs" in str(found)


@pytest.mark.parametrize("fn", [mean_square, scanned])
def test_remat_is_the_same_function(fn) -> None:
    again = remat_blocks(fn)
    np.testing.assert_allclose(again(WS, X), fn(WS, X), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(again))(WS, X), jax.grad(fn)(WS, X), atol=1e-6)
    assert "checkpoint" in str(jax.make_jaxpr(again)(WS, X)) or "remat" in str(jax.make_jaxpr(again)(WS, X))


def test_integers_among_the_parameters_have_no_gradient() -> None:
    tree = {"w": WS, "steps": jnp.arange(3)}
    plain = account(jax.value_and_grad(lambda t, x: mean_square(t["w"], x), allow_int=True), tree, X).peak
    found = fit(lambda t, x: mean_square(t["w"], x), plain // 3, tree, X, batch=(1,))
    gradient = found.step(tree, X)[1]
    assert found.plan.microbatches > 1 and gradient["steps"].dtype == jax.dtypes.float0


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(ProgramError, match=r"nothing fits 1\.0 kB; the least found is .*batch="):
        fit(mean_square, 1000, WS, X)
    with pytest.raises(ProgramError, match="budget is 0"):
        fit(mean_square, 0, WS, X)
    with pytest.raises(ProgramError, match="argument 5 is named"):
        fit(mean_square, 10**9, WS, X, batch=(5,))
    with pytest.raises(ProgramError, match=r"first axes of \[6, 32\]"):
        fit(mean_square, 10**9, WS, X, batch=(0, 1))


def test_what_each_change_would_save() -> None:
    found = savings(scanned, WS, X, batch=(1,))
    assert found.plain == account(jax.value_and_grad(scanned), WS, X).peak
    saved = [each.saved for each in found.found]
    assert saved == sorted(saved, reverse=True) and all(found.plain - e.peak == e.saved for e in found.found)
    donated = account(jax.value_and_grad(scanned), WS, X, donate_argnums=0).peak
    assert found["donation"].peak == donated <= found.plain
    assert found["remat, nothing saved"].saved > found.plain / 4 and found["remat, nothing saved"].flops > 1.1
    assert found["2 microbatches"].saved > found.plain / 4 and found["2 microbatches"].flops == pytest.approx(1, 0.1)
    halved = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (WS, X)]
    assert found["bfloat16"].peak == account(jax.value_and_grad(scanned), *halved).peak
    assert "as it is" in str(found) and "times the FLOPs" in str(found)
    assert "2 microbatches" not in [each.name for each in savings(scanned, WS, X).found]
    with pytest.raises(ProgramError, match="int8 holds no floats"):
        savings(scanned, WS, X, dtype="int8")


CHILD = """
import resource, sys
import jax, jax.numpy as jnp
from tests.memory.test_fit import WS, mean_square
from trustcore.memory import account, fit

x = jax.random.normal(jax.random.key(1), (8192, 64, 128))  # 268 MB
plain = jax.jit(jax.value_and_grad(mean_square))
budget = account(plain, WS, x).peak // 4
found = fit(mean_square, budget, WS, x, batch=(1,)) if sys.argv[1] == "fit" else None
step = (found.step if found else plain).lower(WS, x).compile()
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + budget, taken + budget))
print(float(jax.block_until_ready(step(WS, x))[0]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sizes are read from /proc")
def test_a_process_under_the_budget_runs_the_fitted_step_alone() -> None:
    def child(which: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CHILD, which]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)

    fitted, plain = child("fit"), child("plain")
    assert fitted.returncode == 0, fitted.stderr
    assert float(fitted.stdout) > 0
    assert plain.returncode != 0 and "RESOURCE_EXHAUSTED" in plain.stderr


REAL = """
import resource, sys
import jax, jax.numpy as jnp
import trustcore as tc
from trustcore.cli.step import next_token_gradient, next_token_loss
from trustcore.memory import account_compiled, fit
from trustcore.models import scan_layers

def data():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData")) * 1024

model = scan_layers(tc.load(sys.argv[1], dtype="float32"))
tokens = (jnp.arange(8 * 257, dtype=jnp.int32) * 7919 % 49152).reshape(8, 257)
compiled = jax.jit(next_token_gradient).lower(model, tokens).compile()
plain = account_compiled(compiled)
budget = plain.arguments + (plain.peak - plain.arguments) // 2
if sys.argv[2] == "fit":
    found = fit(next_token_loss, budget, model, tokens, batch=(1,))
    print(found.plan, file=sys.stderr)
    compiled = found.step.lower(model, tokens).compile()
limit = data() + budget - plain.arguments  # the arguments are there already
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
loss, gradient = jax.block_until_ready(compiled(model, tokens))
print(float(loss), float(jnp.linalg.norm(gradient.norm.weight.get_value())))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sizes are read from /proc")
def test_the_real_model_trains_within_half_of_what_its_step_takes(smollm2_path: Path) -> None:
    def child(which: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", REAL, str(smollm2_path), which]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)

    fitted, plain = child("fit"), child("plain")
    assert fitted.returncode == 0, fitted.stderr
    loss, norm = (float(word) for word in fitted.stdout.split())
    assert 5 < loss < 20 and 0 < norm < 100  # of tokens at random
    assert plain.returncode != 0 and "RESOURCE_EXHAUSTED" in plain.stderr
