"""`trustcore perplexity` and `trustcore compare`: figures, JSON, and refusals, on a model of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import trustcore
from tests.generation.characters import byte_model
from trustcore import catalogue
from trustcore.evaluation import compare, perplexity

TEXT = "It is a way I have of driving off the spleen, and regulating the circulation.\n"


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A file; the models are two of bytes, called 0 and 1."""
    models = {str(seed): byte_model(seed) for seed in range(2)}
    monkeypatch.setattr(catalogue, "resolve", lambda name, **_: Path(name))
    monkeypatch.setattr(trustcore, "load", lambda path, **_: models[str(path)])
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def test_perplexity(cli, text: str) -> None:
    expected = perplexity(byte_model(0), TEXT.removesuffix("\n"), context=32)
    done = cli("perplexity", "0", "--text", text, "--context", "32")
    assert (done.status, done.err) == (0, "")
    assert done.out == (
        f"perplexity {expected.perplexity:.4f} +/- {expected.error:.4f}, {expected.scored} of 78 tokens in 2 chunks\n"
    )
    assert json.loads(cli("perplexity", "0", "--text", text, "--context", "32", "--json").out) == expected.as_json()
    strided = json.loads(cli("perplexity", "0", "--text", text, "--context", "32", "--stride", "4", "--json").out)
    assert strided["scored"] == 4 * strided["chunks"] > expected.scored


def test_compare(cli, text: str) -> None:
    expected = compare(byte_model(0), byte_model(1), TEXT.removesuffix("\n"), context=32)
    done = cli("compare", "0", "1", "--text", text, "--context", "32")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].startswith(f"mean KL divergence     {expected.kl_divergence:.6f} +/- ")
    assert lines[1] == f"same likeliest token   {100 * expected.top1_agreement:.2f} %"
    assert lines[4].startswith(f"perplexity of B        {expected.second.perplexity:.4f}")
    assert lines[-1] == "30 of 78 tokens in 2 chunks of 32"
    found = json.loads(cli("compare", "0", "1", "--text", text, "--context", "32", "--json").out)
    assert found == expected.as_json()


@pytest.mark.parametrize("command", [["perplexity", "0"], ["compare", "0", "1"]])
def test_refusals_are_one_line(cli, text: str, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for file, complaint in (
        (text, "the text has 78 tokens; a context of 512 needs at least 1024"),
        (str(tmp_path / "none.txt"), "none.txt: cannot be read"),
        (str(tmp_path / "latin.txt"), "not UTF-8: byte 0xe9 at offset 3"),
    ):
        done = cli(*command, "--text", file)
        assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
        assert complaint in done.err
    assert "Missing option '--text'" in cli(*command).err
    assert cli(command[0], "--help").status == 0
