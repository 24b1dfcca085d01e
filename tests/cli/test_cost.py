"""`trustcore cost`: tables by module and operation, the roofline, and refusals."""

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


def test_by_module_and_by_operation(cli, model: Path) -> None:
    page = cli("cost", str(model), "--batch", "2", "--length", "16").out
    assert "mlp" in page and page.splitlines()[-1].endswith("in all")
    told = json.loads(cli("cost", str(model), "--batch", "2", "--length", "16", "--by", "operation", "--json").out)
    products = next(row for row in told["rows"] if row["operation"] == "dot_general")
    assert products["flops"] > 0.8 * told["flops"]
    twice = json.loads(cli("cost", str(model), "--batch", "4", "--length", "16", "--json").out)
    assert twice["flops"] == pytest.approx(2 * told["flops"], rel=0.01)


def test_training_and_the_roofline(cli, model: Path) -> None:
    words = ("cost", str(model), "--length", "16", "--train", "--by", "stage", "--json", "--roofline")
    told = json.loads(cli(*words).out)
    assert {"forward", "backward"} <= {row["stage"] for row in told["rows"]}
    assert 0 < told["seconds_compute"] <= told["seconds_unfused"]
    assert "both measured" in cli(*words[:-2], "--roofline").out


def test_refusals(cli, model: Path) -> None:
    done = cli("cost", str(model), "--length", "513")
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert "it reads 512 tokens" in done.err
