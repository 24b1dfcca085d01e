"""`trustcore embed`: vectors and similarities of texts from words, a file and stdin; refusals are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trustcore
from tests.models import families
from tests.models.test_sentence import Letters
from trustcore import catalogue
from trustcore.models.sentence_vectors import embed

TEXTS = ["a cat", "a kitten", "quite another thing"]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    loaded = families.read("bert").open(tmp_path)
    loaded.tokenizer = Letters()
    monkeypatch.setattr(catalogue, "resolve", lambda name, **_: Path(name))
    monkeypatch.setattr(trustcore, "load", lambda path, **_: loaded)
    return loaded


def test_vectors_and_similarities(cli, model: Any, tmp_path: Path) -> None:
    expected = embed(model, TEXTS)
    done = cli("embed", "m", *TEXTS)
    assert (done.status, done.err) == (0, "")
    rows = [[float(number) for number in line.split()] for line in done.out.splitlines()]
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    (tmp_path / "texts").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    for words, stdin in (((), "\n".join(TEXTS)), (("--file", str(tmp_path / "texts")), "")):
        found = json.loads(cli("embed", "m", "--json", *words, stdin=stdin.encode()).out)
        assert found["texts"] == TEXTS
        np.testing.assert_allclose(found["vectors"], expected, atol=1e-6)
    found = json.loads(cli("embed", "m", "--json", "--similarity", *TEXTS).out)
    np.testing.assert_allclose(found["similarities"], expected @ expected.T, atol=1e-6)
    lines = cli("embed", "m", "--similarity", *TEXTS).out.splitlines()
    assert lines[3].split()[:4] == ["3", "quite", "another", "thing"] and lines[3].split()[-1] == "1.0000"
    raw = json.loads(cli("embed", "m", "--json", "--raw", *TEXTS).out)["vectors"]
    np.testing.assert_allclose(raw, embed(model, TEXTS, normalize=False), rtol=1e-5)


def test_refusals_are_one_line(cli, model: Any, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for words, complaint in (
        (("--file", str(tmp_path / "none")), "none: cannot be read"),
        (("--file", str(tmp_path / "latin")), "not UTF-8 at offset 3"),
        (("--file", str(tmp_path / "latin"), "text"), "give one of them"),
        ((), "stdin: there is no text"),
    ):
        done = cli("embed", "m", *words)
        assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
        assert complaint in done.err
    model.tokenizer = None
    assert "no encoder of text" in cli("embed", "m", "x").err
