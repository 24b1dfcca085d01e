"""Heads of text encoders against transformers: scores, labels, files in both directions, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import trustcore
from tests.models import families
from trustcore.errors import ModelError

CASES = sorted(path.stem for path in families.FOLDER.glob("*-*.npz") if path.stem.split("-")[-1] in (
    "masked", "labels", "tokens", "spans",
))  # fmt: skip


@jax.jit
def scores(model, tokens, mask):
    return model.scores(tokens, mask)


def given(case):
    return jnp.asarray(case.inputs["input_ids"], jnp.int32), jnp.asarray(case.inputs["attention_mask"])


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_transformers(tmp_path, name):
    case = families.read(name)
    model = case.open(tmp_path)
    found, expected = scores(model, *given(case)), case.outputs["scores"]
    where = None if expected.ndim == 2 else case.inputs["attention_mask"] != 0
    assert families.apart(found, expected, where) < families.TOLERANCE
    labels = {"masked": (), "spans": ("start", "end")}.get(name.split("-")[-1])
    if labels is None:
        labels = tuple(case.config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"}).values())
    assert model.labels == labels
    # What is written has the head, too, under the names it had.
    trustcore.save(model, tmp_path / "saved")
    written = load_file(tmp_path / "saved" / "model.safetensors")
    assert written.keys() == case.weights.keys()
    for key, array in case.weights.items():
        np.testing.assert_array_equal(written[key], array)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == case.config["architectures"]


def test_a_body_is_read_without_its_head(tmp_path):
    """No class is named, another task is, or the weights are not there."""
    case = families.read("bert-labels")
    for folder, changes in {
        "none": {"architectures": None},
        "other": {"architectures": ["BertForMultipleChoice"]},
    }.items():
        (tmp_path / folder).mkdir()
        model = case.open(tmp_path / folder, config=changes)
        assert model.head is None and model.labels == ()
    (tmp_path / "bare").mkdir()
    model = case.open(tmp_path / "bare", **{"classifier.weight": None, "classifier.bias": None})
    with pytest.raises(ModelError, match="this bert checkpoint has no head for a task; call the model for its states"):
        model.scores(*given(case))


def test_a_head_whose_output_is_its_own(tmp_path):
    case = families.read("bert-masked")
    own = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    changes = {"cls.predictions.decoder.weight": own}
    model = case.open(tmp_path, config={"tie_word_embeddings": False}, **changes)
    tokens, mask = given(case)
    hidden = model(tokens, mask)
    inner = model.head.norm(jax.nn.gelu(model.head.dense(hidden), approximate=False))
    expected = inner @ own.T + np.asarray(model.head.bias.get_value())[None, None]
    np.testing.assert_allclose(model.scores(tokens, mask), expected, atol=1e-4)


def test_old_names_of_a_head(tmp_path):
    """Norms called gamma and beta, and the copy of the table that files of PyTorch have."""
    case = families.read("bert-masked")
    norm = "cls.predictions.transform.LayerNorm"
    changes = {
        f"{norm}.gamma": case.weights[f"{norm}.weight"],
        f"{norm}.beta": case.weights[f"{norm}.bias"],
        f"{norm}.weight": None,
        f"{norm}.bias": None,
        "cls.predictions.decoder.weight": case.weights["bert.embeddings.word_embeddings.weight"],
        "cls.seq_relationship.weight": np.zeros((2, 16), np.float32),
    }
    model = case.open(tmp_path, config={"architectures": ["BertForPreTraining"]}, **changes)
    where = case.inputs["attention_mask"] != 0
    assert families.apart(scores(model, *given(case)), case.outputs["scores"], where) < families.TOLERANCE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "id2label is .*; expected names of labels 0, 1, 2"),
        ({"id2label": {"0": 1}}, "expected names of labels"),
        ({"id2label": None, "num_labels": 0}, "num_labels is 0; expected 1 to 65536"),
        ({"id2label": None}, r"classifier.weight has shape \[3, 16\], expected \[2, 16\]"),
    ],
)
def test_what_is_refused(tmp_path, changes, message):
    with pytest.raises(ModelError, match=message):
        families.read("bert-labels").open(tmp_path, config=changes)
