"""Forms of a model's layers: what is measured counts compiling, agrees with the list, and is what a model then has."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

import trustcore
from trustcore import tune
from trustcore.errors import ModelError, TuningError
from trustcore.models import random_model, scan_layers, tuned_layers
from trustcore.models.layer_form import LAYERS
from trustcore.nn.stack import Stack
from trustcore.tune import table

SIZES = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16,
    "num_hidden_layers": 3, "max_position_embeddings": 64,
}  # fmt: skip
CALL = {"step": "token", "length": 16, "batch": 1}


@pytest.fixture(scope="module")
def model():
    return random_model(SIZES)


@pytest.mark.parametrize("step", ["token", *(pytest.param(s, marks=pytest.mark.slow) for s in ("forward", "gradient"))])
def test_forms_are_measured_with_their_compiling(own_tables: Path, model, step) -> None:
    result = tune.search("model_layers", model, step=step, length=8, seconds=0.02, most=1)
    trials = {(t.values.get("implementation", "list"), t.values.get("unroll", 1)): t for t in result.trials}
    assert {("list", 1), ("scan", 1)} <= set(trials)
    for trial in result.trials:
        assert trial.refused == "" and trial.error is not None and trial.error < 1e-5
        assert trial.compiling > 0 and trial.summary.seconds > trial.compiling / 1000  # its share counts
    assert "compiled in" in str(result)
    choice = tune.best("model_layers", model, step=step, length=8)
    assert choice.source == "cache" and "with its share of compiling: list " in choice.why


def entry(model, values, seconds: float = 1e-3) -> None:
    """Writes that these values were measured to be the fastest for a token of the model."""
    facts = LAYERS.complete(dict(LAYERS.facts(model, **CALL)))
    exact, sizes = table.split(LAYERS, facts)
    told = {n: {"values": {"implementation": n}, "seconds": 1e-3, "compile_seconds": 2.0} for n in LAYERS.grids}
    device = tune.this_device()
    source, jaxlib = tune.registry.source_hash(LAYERS), table.jaxlib_version()
    made = tune.Entry(
        LAYERS.op, source, 1, jaxlib, exact, sizes, values, seconds, 2e-3, told, [], "2026-11-22"
    )  # fmt: skip
    table.record(device, made)


def test_a_model_takes_the_form_that_was_found(own_tables: Path, model) -> None:
    assert tuned_layers(model, **CALL) is model  # nothing was measured
    entry(model, {"implementation": "scan", "unroll": 2})
    scanned = tuned_layers(model, **CALL)
    assert isinstance(scanned.blocks, Stack) and scanned.blocks.unroll == 2
    tokens = jnp.asarray([[1, 5, 7]])
    assert jnp.allclose(scanned(tokens), model(tokens), atol=1e-5)
    assert tuned_layers(scanned, **CALL).blocks.unroll == 2
    assert tuned_layers(model, **CALL | {"calls": 10**6}) is model  # far from what was measured
    assert "the defaults 2 ms (2.00)" in tune.best("model_layers", model, **CALL).why


def test_a_list_is_given_back_where_it_won(own_tables: Path, model) -> None:
    entry(model, {"implementation": "list"})
    assert tuned_layers(model, **CALL) is model
    assert not isinstance(tuned_layers(scan_layers(model), **CALL).blocks, Stack)


@pytest.mark.serial
def test_compiling_decides_for_few_calls(own_tables: Path) -> None:
    """Thirty layers compile in several times the time of one: with a single call, the scan wins."""
    deep = random_model({**SIZES, "num_hidden_layers": 30})
    result = tune.search("model_layers", deep, step="forward", length=4, calls=1, seconds=0.02, most=1)
    assert result.values["implementation"] == "scan"


def test_operands_of_facts_alone(own_tables: Path) -> None:
    result = tune.search("model_layers", "B=1,T=4,L=2,D=16", seconds=0.01, most=1)
    assert result.trials[0].refused == ""
    with pytest.raises(TuningError, match=r"a llama of q4_0 is to be given: search\('model_layers', model"):
        tune.search("model_layers", "B=1,T=4,L=2,D=16,format=q4_0", seconds=0.01)
    with pytest.raises(TuningError, match="step is 'leap'; choose of token, forward, gradient"):
        tune.best("model_layers", "B=1,T=4,L=2,D=16,step=leap")


def test_what_has_no_layers_to_choose(model) -> None:
    with pytest.raises(ModelError, match="forms of layers are measured of decoders, and this is a int"):
        tuned_layers(3)
    one = random_model({**SIZES, "num_hidden_layers": 1})
    assert tuned_layers(one) is one
    with pytest.raises(TuningError, match="nothing is tuned"):
        tune.best("model_layers", one)


def test_packed_layers_have_facts_of_their_own(model) -> None:
    packed = trustcore.quantize(model, "int8:g8")
    assert LAYERS.facts(packed)["format"] == "int8:g8" and LAYERS.facts(model)["format"] == "float32"
    assert LAYERS.facts(scan_layers(packed)) == LAYERS.facts(packed)
    assert json.loads(json.dumps(LAYERS.facts(packed))) == LAYERS.facts(packed)
