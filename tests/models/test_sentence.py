"""Sentence vectors: pooling by its definition, descriptions in files, all-MiniLM-L6-v2 against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import trustcore
from tests.models import families
from trustcore.errors import ModelError
from trustcore.models.sentence import SentencePooling, pool, read_pooling
from trustcore.models.sentence_vectors import embed

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "minilm.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def minilm(minilm_path: Path) -> Any:
    return trustcore.load(minilm_path)


def test_minilm_is_that_of_transformers(minilm: Any) -> None:
    assert [minilm.tokenizer.encode(text) for text in RECORDED["sentences"]] == RECORDED["tokens"]
    assert minilm.pooling == SentencePooling(("mean",), normalize=True, max_length=256)
    vectors = embed(minilm, RECORDED["sentences"], batch=5)
    assert vectors.dtype == np.float32
    assert families.apart(vectors @ vectors.T, np.array(RECORDED["similarities"])) < 1e-5
    assert families.apart(vectors[:, :8], np.array(RECORDED["first"])) < 1e-5


def test_long_texts_are_cut_before_the_last_special_token(minilm: Any) -> None:
    text = RECORDED["sentences"][-1]
    cut = minilm.tokenizer.encode(text)[:9]
    short = minilm.tokenizer.decode(cut[1:])
    np.testing.assert_allclose(embed(minilm, [text], max_length=10), embed(minilm, [short]), atol=1e-6)


class Letters:
    """A tokenizer of characters with a special token at either end."""

    pad_id = 0

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        inner = [5 + ord(char) % 50 for char in text]
        return [1, *inner, 2] if add_special else inner


def test_embedding_is_the_pooled_states(tmp_path: Path) -> None:
    model = families.read("bert").open(tmp_path)
    model.tokenizer = Letters()
    texts = ["abc", "a longer text", "", "b"]
    vectors = embed(model, texts, batch=3, normalize=False)
    for text, vector in zip(texts, vectors, strict=True):
        hidden = families.jitted(model, jnp.asarray([Letters().encode(text)], jnp.int32))
        np.testing.assert_allclose(vector, np.mean(np.asarray(hidden[0]), axis=0), atol=1e-5)
    lengths = np.linalg.norm(embed(model, texts), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)
    assert embed(model, []).shape == (0, 32)
    with pytest.raises(ModelError, match="max_length 2"):
        embed(model, texts, max_length=2)
    model.tokenizer = None
    with pytest.raises(ModelError, match="no encoder of text with a tokenizer"):
        embed(model, texts)


def test_pooling_by_its_definition() -> None:
    rng = np.random.default_rng(0)
    hidden, mask = rng.normal(size=(2, 5, 3)).astype(np.float32), np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    rows = [hidden[0, :3], hidden[1, 2:]]
    expected = {
        "cls": [row[0] for row in rows],
        "last": [row[-1] for row in rows],
        "max": [row.max(0) for row in rows],
        "mean": [row.mean(0) for row in rows],
        "mean_sqrt_len": [row.sum(0) / np.sqrt(3) for row in rows],
        "weighted_mean": [
            np.average(rows[0], axis=0, weights=[1, 2, 3]),
            np.average(rows[1], axis=0, weights=[3, 4, 5]),
        ],
    }
    for mode, value in expected.items():
        found = pool(jnp.asarray(hidden), jnp.asarray(mask), SentencePooling((mode,), normalize=False))
        np.testing.assert_allclose(found, np.stack(value), atol=1e-6)
    both = pool(jnp.asarray(hidden), jnp.asarray(mask), SentencePooling(("cls", "mean"), normalize=False))
    np.testing.assert_allclose(both, np.concatenate([expected["cls"], expected["mean"]], axis=1), atol=1e-6)


@pytest.mark.parametrize(
    ("modules", "pooling", "expected"),
    [
        (["Pooling"], {"pooling_mode_cls_token": True}, SentencePooling(("cls",), normalize=False)),
        (["Pooling", "Normalize"], {"pooling_mode": "lasttoken"}, SentencePooling(("last",))),
        (["Pooling", "Dense"], {"pooling_mode": ["mean"]}, SentencePooling(("mean",), False, refused="Dense")),
        (["Pooling"], {}, "no way of pooling is chosen"),
        (["Pooling"], {"pooling_mode": "median"}, "median"),
        (["Pooling"], {"pooling_mode_mean_tokens": 1}, "pooling_mode_mean_tokens is 1"),
    ],
)
def test_descriptions(modules: list, pooling: dict, expected: Any, tmp_path: Path) -> None:
    assert read_pooling(tmp_path) is None
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    described = [{"type": f"sentence_transformers.models.{kind}", "path": "1_Pooling"} for kind in modules]
    (tmp_path / "modules.json").write_text(json.dumps(described))
    if isinstance(expected, str):
        with pytest.raises(ModelError, match=expected):
            read_pooling(tmp_path)
    else:
        assert read_pooling(tmp_path) == expected


@pytest.mark.parametrize("text", ["{", "{}", '["x"]', '[{"type": "a.Pooling", "path": "../x"}]', '[{"type": 3}]'])
def test_broken_descriptions_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(ModelError, match=r"modules\.json"):
        read_pooling(tmp_path)
