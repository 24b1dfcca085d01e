"""`trustcore cost`: tables by module and operation, the roofline, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_by_module_and_by_operation(cli, small_model: Path) -> None:
    page = cli("cost", str(small_model), "--batch", "2", "--length", "16").out
    assert "mlp" in page and page.splitlines()[-1].endswith("in all")
    told = json.loads(
        cli("cost", str(small_model), "--batch", "2", "--length", "16", "--by", "operation", "--json").out
    )
    products = next(row for row in told["rows"] if row["operation"] == "dot_general")
    assert products["flops"] > 0.8 * told["flops"]
    twice = json.loads(cli("cost", str(small_model), "--batch", "4", "--length", "16", "--json").out)
    assert twice["flops"] == pytest.approx(2 * told["flops"], rel=0.01)


def test_training_and_the_roofline(cli, small_model: Path) -> None:
    words = ("cost", str(small_model), "--length", "16", "--train", "--by", "stage", "--json", "--roofline")
    told = json.loads(cli(*words).out)
    assert {"forward", "backward"} <= {row["stage"] for row in told["rows"]}
    assert 0 < told["seconds_compute"] <= told["seconds_unfused"]
    assert "both measured" in cli(*words[:-2], "--roofline").out


def test_kernels_and_measured_modules(cli, small_model: Path) -> None:
    words = ("cost", str(small_model), "--length", "16", "--fusions", "--measure")
    page = cli(*words).out
    assert "kept apart:" in page and "as one program" in page and "blocks/0" in page
    told = json.loads(cli(*words, "--json").out)
    assert told["kernels"] > 10 and told["kernel_bytes"] > told["avoidable_bytes"] and told["seconds"] > 0
    assert any(name.startswith("blocks/0") for name in told["modules"])


def test_refusals(cli, small_model: Path) -> None:
    done = cli("cost", str(small_model), "--length", "513")
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert "it reads 512 tokens" in done.err
