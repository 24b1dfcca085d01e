"""Trees in the host's memory, steps over them, activations that go there: the same numbers, whatever lies where."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.memory.test_fit import WS, X, mean_square, scanned
from trustcore.errors import ProgramError
from trustcore.memory import account, activation_policy, fit, memory_kinds, offload, offloaded, onload, remat_blocks
from trustcore.memory.fit import REMAT, _from_host, _hosted, _updated, step_of

ROOT = Path(__file__).parents[2]
PLACE = os.environ.get("TRUSTCORE_LIBTPU", "")
OPTIMIZER = optax.sgd(1e-3, momentum=0.9)


def train(params, state, x):
    loss, gradient = jax.value_and_grad(scanned)(params, x)
    updates, state = OPTIMIZER.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def where(tree) -> set:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("kind", ["pinned_host", "unpinned_host"])
def test_trees_go_to_the_host_and_come_back(kind: str) -> None:
    tree = {"w": WS, "n": jnp.arange(3), "name": "w"}
    there = offload(tree, kind=kind)
    assert where([there["w"], there["n"]]) == {kind} and there["name"] == "w"
    back = onload(there)
    assert where([back["w"], back["n"]]) == {memory_kinds()[0]}
    same([back["w"], back["n"]], [WS, jnp.arange(3)])


def test_a_step_over_offloaded_parameters_and_optimizer_is_the_same() -> None:
    plain, step = jax.jit(train), offloaded(train, argnums=(0, 1), results=(0, 1))
    params, state = WS, OPTIMIZER.init(WS)
    hosted, hosted_state = offload((params, state))
    for _ in range(3):
        params, state, loss = plain(params, state, X)
        before = hosted
        hosted, hosted_state, told = step(hosted, hosted_state, X)
        assert where((hosted, hosted_state)) == {"pinned_host"} and where(told) == {"device"}
        assert before.is_deleted()
    same((hosted, hosted_state, told), (params, state, loss))


def test_without_memory_kinds_arrays_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["trustcore.memory.offload"]
    monkeypatch.setattr(module, "memory_kinds", lambda device=None: ("device",))
    params, state = offload((WS, OPTIMIZER.init(WS)))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((params, state)))
    expected = jax.jit(train)(WS, OPTIMIZER.init(WS), X)
    found = offloaded(train, argnums=(0, 1), results=(0, 1))(params, state, X)
    assert isinstance(found[0], np.ndarray) and isinstance(found[2], jax.Array)
    same(found, expected)


@pytest.mark.parametrize("fn", [mean_square, scanned])
def test_activations_that_go_to_the_host_give_the_same_gradient(fn) -> None:
    kept = remat_blocks(fn, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    gone = remat_blocks(fn, policy=activation_policy())
    same(jax.jit(jax.grad(gone))(WS, X), jax.jit(jax.grad(kept))(WS, X))
    assert "<host>" in str(jax.make_jaxpr(jax.grad(gone))(WS, X)) and "<host>" not in str(jax.make_jaxpr(kept)(WS, X))


def test_named_activations_go_to_the_host() -> None:
    from jax.ad_checkpoint import checkpoint_name

    def loss(w, x):
        return jnp.sum(jnp.sin(checkpoint_name(jnp.tanh(x @ w), "hidden")) ** 2)

    gone = jax.checkpoint(loss, policy=activation_policy("hidden"))
    np.testing.assert_allclose(jax.jit(jax.grad(gone))(WS[0], X), jax.jit(jax.grad(loss))(WS[0], X), rtol=1e-5)


def test_on_a_cpu_fit_offloads_only_when_told() -> None:
    plain = account(jax.value_and_grad(scanned), WS, X).peak
    found = fit(scanned, int(0.7 * plain), WS, X)
    assert "products offloaded" not in {plan.remat for plan in found.tried}
    assert not any(plan.offloaded for plan in found.tried)
    least = account(jax.value_and_grad(remat_blocks(scanned)), WS, X).peak
    told = fit(scanned, least, WS, X, offload="activations")
    assert [plan.remat for plan in told.tried] == list(REMAT) and told.plan.remat == "nothing saved"


@pytest.mark.parametrize("split", [1, 4])
def test_a_fitted_step_over_offloaded_parameters_and_state_is_the_same(split: int) -> None:
    step = _updated(step_of(scanned, "none", split, (1,), 0), OPTIMIZER, 0)
    hosted = _from_host(jax.jit(_hosted(step, (0, 2), 0, True)), (0, 2))
    ws, state, other, beside = WS, OPTIMIZER.init(WS), WS, OPTIMIZER.init(WS)
    for _ in range(2):
        loss, ws, state = hosted(ws, X, state)
        wanted, other, beside = jax.jit(step)(other, X, beside)
        assert loss == wanted and ws.sharding.memory_kind == "pinned_host"
    for a, b in zip(jax.tree.leaves((ws, state)), jax.tree.leaves((other, beside)), strict=True):
        np.testing.assert_array_equal(onload(a), b)


def test_a_step_with_its_optimizer_fits_a_budget() -> None:
    whole = fit(scanned, 10**12, WS, X, batch=(1,), optimizer=OPTIMIZER, donate=True)
    assert whole.plan == whole.plain and whole.plan.peak > 2 * WS.nbytes
    found = fit(scanned, int(0.6 * whole.plan.peak), WS, X, batch=(1,), optimizer=OPTIMIZER)
    assert found.plan.microbatches > 1 and found.plan.offloaded == ()
    value, ws, state = found.step(WS, X, OPTIMIZER.init(WS))
    change, after = OPTIMIZER.update(jax.grad(scanned)(WS, X), OPTIMIZER.init(WS), WS)
    np.testing.assert_allclose(value, scanned(WS, X), rtol=1e-5)
    np.testing.assert_allclose(ws, WS + change, atol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    with pytest.raises(ProgramError, match="'weights' cannot be offloaded; there are activations, optimizer"):
        fit(scanned, 10**12, WS, X, offload=["weights"])


def test_what_cannot_be_done_is_said() -> None:
    for call, text in (
        (lambda: offload(WS, kind="disk"), "'disk' is none of pinned_host, unpinned_host"),
        (lambda: offloaded(train, argnums=5)(WS, X), "there are 2 arguments"),
        (lambda: offloaded(lambda w: w, results=1, donate=False)(offload(WS)), r"results \[1\] are named"),
        (lambda: offloaded(lambda w: (w,), results=1, donate=False)(np.ones(2)), "returns a tuple of 1"),
    ):
        with pytest.raises(ProgramError, match=text):
            call()


TPU = """
import json
import jax, jax.numpy as jnp
from jax.experimental import topologies
from tests.memory.test_fit import scanned
from trustcore.memory import fit, has_host_memory
device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
put = jax.sharding.SingleDeviceSharding(device)
shapes = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=put) for s in ((8, 512, 512), (4096, 4, 512))]
free = fit(scanned, 10**10, *shapes)
plans = {}
for share in (0.55, 0.35):
    found = fit(scanned, int(share * free.plain.peak), *shapes, offload="activations")
    plans[found.plan.remat] = [found.plan.peak, found.plan.host, str(found.plan)]
print(json.dumps([has_host_memory(device), free.plain.peak, plans]))
"""


def on_a_tpu(source: str):
    """What source prints last, in a process that compiles for TPUs."""
    paths = os.pathsep.join([str(ROOT), *([PLACE] if PLACE else [])])
    settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                "TPU_ACCELERATOR_TYPE": "v5litepod-4", "PYTHONPATH": paths}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=600, cwd=ROOT,
                          env={**os.environ, **settings}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(not PLACE and importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make aot")
def test_on_a_tpu_activations_go_to_the_host() -> None:
    has, plain, plans = on_a_tpu(TPU)
    assert has
    peak, host, told = plans["products offloaded"]
    assert peak < 0.55 * plain and host >= 8 * 4096 * 4 * 512 * 4 and "of the host's" in told


STEP = """
import json
import jax, jax.numpy as jnp, optax
from jax.experimental import topologies
from trustcore.memory import account, fit
device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
put = jax.sharding.SingleDeviceSharding(device)

def layers(ws, x):
    for w in ws:
        x = x + jnp.tanh(x @ w)
    return jnp.mean(x * x)

*ws, x = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=put) for s in (*[(2048, 2048)] * 8, (8, 2048))]
adam = optax.adam(1e-3)
kept = fit(layers, 10**10, ws, x, optimizer=adam).plain.peak
seen = account(jax.grad(layers), ws, x)
assert seen.by == "jaxpr" and seen.arguments < seen.peak < 1.5 * kept, str(seen)
found = fit(layers, int(0.65 * kept), ws, x, optimizer=adam)
print(json.dumps([found.plan.offloaded, found.plan.peak / kept, found.plan.host, str(found.plan)]))
"""


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(not PLACE and importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make aot")
def test_on_a_tpu_a_step_fits_with_its_state_at_the_host() -> None:
    offloaded, share, host, told = on_a_tpu(STEP)
    assert offloaded == ["optimizer", "parameters"] and "with the host" in told
    assert share < 0.65 and host >= 3 * 8 * 2048 * 2048 * 4
