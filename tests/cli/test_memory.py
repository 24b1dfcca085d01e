"""`trustcore memory`: the account of a model, its budget, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_the_account_of_a_forward_pass(cli, small_model: Path) -> None:
    done = cli("memory", str(small_model), "--batch", "4", "--length", "64", "--json")
    told = json.loads(done.out)
    assert done.status == 0 and told["results"] >= 4 * 64 * 64 * 4 and told["peak"] == max(told["curve"])
    page = cli("memory", str(small_model), "--length", "64").out
    assert page.startswith("peak ") and "argument" in page


def test_a_budget_for_training(cli, small_model: Path) -> None:
    words = ("memory", str(small_model), "--batch", "8", "--length", "128", "--train")
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
def test_refusals(cli, small_model: Path, words: tuple[str, ...], complaint: str) -> None:
    done = cli("memory", str(small_model), *words)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert complaint in done.err
