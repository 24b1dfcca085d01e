"""Files of SmolLM2 that trustcore writes, against llama.cpp's own files of the same weights.

`perplexity_rotated.json` and `perplexity.json` hold what llama.cpp computes from both, of the model with its residual
stream rotated (`benchmarks/rotated_smollm2.py`) and as it was published (`tests/oracles/record_perplexity.py`). The
published weights lie on 16 levels a block: there, over the 2295 tokens that count, two files of equal quality differ in
perplexity by a percent, and the KL divergence from the source tells them apart.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from trustcore.convert import quantize_checkpoint
from trustcore.evaluation import perplexity
from trustcore.loading import load

DATA = Path(__file__).parents[1] / "data"
RECORD = json.loads((DATA / "perplexity.json").read_text())
SMALL = json.loads((DATA / "perplexity_small.json").read_text())
ROTATED = json.loads((DATA / "perplexity_rotated.json").read_text())
FORMATS = list(RECORD["trustcore"])
TEXT = (DATA / "moby_dick.txt").read_text(encoding="utf-8").removesuffix("\n")


@pytest.mark.parametrize("format", FORMATS)
def test_llama_cpp_finds_our_files_no_worse_than_its_own(format):
    ours, theirs = RECORD["trustcore"][format], RECORD["llama_cpp"][format]
    assert ours["bytes"] == theirs["bytes"]
    assert ours["kl_divergence"] <= 1.005 * theirs["kl_divergence"]
    # Half a percent, and what the choice of the tokens accounts for.
    assert ours["log_ratio"] <= 0.005 + 2 * ours["log_ratio_error"]


@pytest.mark.parametrize("format", list(ROTATED["trustcore"]))
def test_llama_cpp_finds_our_files_of_spread_weights_no_worse_than_its_own(format):
    ours, theirs = ROTATED["trustcore"][format], ROTATED["llama_cpp"][format]
    assert ours["bytes"] == theirs["bytes"]
    assert ours["perplexity"] <= 1.005 * theirs["perplexity"]
    assert ours["kl_divergence"] <= 1.005 * theirs["kl_divergence"]


LOW = ("iq2_xxs", "iq2_xs", "iq2_s", "iq1_s", "iq1_m")


@pytest.mark.parametrize("format", list(SMALL["trustcore"]))
def test_llama_cpp_finds_our_files_with_an_importance_no_worse_than_its_own(format):
    """Of a model whose rows blocks of 256 divide; `perplexity_small.json` tells how it was made."""
    ours, theirs = SMALL["trustcore"][format], SMALL["llama_cpp"][format]
    assert ours["bytes"] == theirs["bytes"]
    assert ours["perplexity"] <= 1.005 * theirs["perplexity"]
    # Of 5 and 6 bits both lose less than a thousandth of a nat: no ratio there.
    assert ours["kl_divergence"] <= theirs["kl_divergence"] + 1.25e-4


OWN = {"F16": SMALL["source"], **SMALL["trustcore"]}


@pytest.mark.parametrize("name", [name for name, entry in OWN.items() if "own_perplexity" in entry])
def test_our_perplexity_of_our_files_is_llama_cpps(name):
    """llama.cpp rounds activations to 8 bits on the way."""
    assert OWN[name]["own_perplexity"] == pytest.approx(OWN[name]["perplexity"], rel=0.01)


def test_the_records_cover_the_common_formats():
    common = {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k"}
    assert common <= set(FORMATS) and common <= set(ROTATED["trustcore"])
    low = {"tq1_0", "tq2_0", "q1_0", "iq3_xxs", "iq3_s", "iq4_xs", "q2_k_s", "bf16", *LOW}
    assert all("own_perplexity" in SMALL["trustcore"][name] for name in LOW)
    assert low | common - {"q3_k_m"} <= set(SMALL["trustcore"]) and SMALL["about"]["importance"]


@pytest.fixture(scope="module")
def source(smollm2_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "F16.gguf"
    quantize_checkpoint(smollm2_path, path, "f16")
    return path


@pytest.mark.slow
def test_our_perplexity_is_llama_cpps(source):
    assert source.stat().st_size == RECORD["source"]["bytes"]
    found = perplexity(load(source), TEXT)
    assert found.perplexity == pytest.approx(RECORD["source"]["perplexity"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_the_whole_model_in_every_format(source, tmp_path, format):
    quantize_checkpoint(source, tmp_path / "m.gguf", format)
    recorded = RECORD["trustcore"][format]
    assert (tmp_path / "m.gguf").stat().st_size == recorded["bytes"]
    model = load(tmp_path / "m.gguf")
    assert perplexity(model, TEXT).perplexity == pytest.approx(recorded["perplexity"], rel=0.01)
    # Our choice after every token that llama.cpp chose; its products round activations to 8 bits.
    prompt, chosen = model.tokenizer.encode(RECORD["about"]["prompt"]), recorded["continuation"]
    logits = np.asarray(model(np.array([[*prompt, *chosen]])))[0, len(prompt) - 1 : -1]
    assert np.sum(logits.argmax(-1) == chosen) >= len(chosen) - 2
