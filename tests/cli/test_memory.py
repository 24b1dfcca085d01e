"""`trustcore memory`: the account of a model, its budget, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import trustcore
from trustcore.models import random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = {"model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 2, **sizes}
    path = tmp_path_factory.mktemp("model")
    trustcore.save(random_model({**config, "max_position_embeddings": 512}), path)
    return path


def test_the_account_of_a_forward_pass(cli, model: Path) -> None:
    done = cli("memory", str(model), "--batch", "4", "--length", "64", "--json")
    told = json.loads(done.out)
    assert done.status == 0 and told["results"] >= 4 * 64 * 64 * 4 and told["peak"] == max(told["curve"])
    page = cli("memory", str(model), "--length", "64").out
    assert page.startswith("peak ") and "argument" in page


def test_a_budget_for_training(cli, model: Path) -> None:
    words = ("memory", str(model), "--batch", "8", "--length", "128", "--train")
    plain = json.loads(cli(*words, "--json").out)["peak"]
    told = json.loads(cli(*words, "--budget", str(plain // 2), "--json").out)
    assert told["plan"]["peak"] <= plain // 2 < told["plain"]["peak"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--budget", "4GB"), "add --train"),
        (("--train", "--budget", "much"), "no size"),
        (("--length", "513"), "it reads 512 tokens"),
        (("--train", "--budget", "1kB", "--length", "8"), "nothing fits"),
    ],
)
def test_refusals(cli, model: Path, words: tuple[str, ...], complaint: str) -> None:
    done = cli("memory", str(model), *words)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert complaint in done.err
