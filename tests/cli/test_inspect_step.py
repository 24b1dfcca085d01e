"""`trustcore inspect-step`: a healthy model, a poisoned one, watches, forms and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

WORDS = ("--length", "12")


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    """The model with one weight that is NaN."""
    folder = tmp_path_factory.mktemp("poisoned") / "model"
    shutil.copytree(small_model, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = {name: tensor.copy() for name, tensor in load_file(file).items()}
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    return folder


def test_a_healthy_model(cli, small_model: Path) -> None:
    done = cli("inspect-step", str(small_model), *WORDS, "--batch", "2")
    head, verdict, *_ = done.out.splitlines()
    assert done.status == 0 and head.startswith("a step of training on 2 x 12 tokens: loss 4.")
    assert verdict == "Nothing is wrong with the values that were watched."
    again = cli("inspect-step", str(small_model), *WORDS, "--batch", "2", "--seed", "1")
    assert again.out.splitlines()[0] != head


def test_a_poisoned_weight_is_found(cli, poisoned: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = cli("inspect-step", str(poisoned), *WORDS, "--json", "--html", str(page))
    issue = json.loads(done.out)["issues"][0]
    assert (
        done.status == 0 and issue["kind"] == "nan" and issue["where"] == "argument args[0].blocks[1].mlp.down.kernel"
    )
    assert page.read_text().startswith("<!doctype html>") and "blocks" in page.read_text()


def test_only_what_is_watched(cli, small_model: Path) -> None:
    words = ("--watch", "blocks/0/attention/*", "--watch", "blocks/1/mlp/*", "--forward", "--json")
    told = json.loads(cli("inspect-step", str(small_model), *WORDS, *words).out)
    paths = {value["path"].rsplit("/", 1)[0] for value in told["statistics"]}
    assert paths and all(path.startswith(("blocks/0/attention", "blocks/1/mlp")) for path in paths)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--watch", "layers/*"), "--watch: 'layers/*' fits none of"),
        (("--text", "good day"), "no tokenizer; leave --text out"),
        (("--length", "513"), "it reads 512 tokens"),
        (("--html", "."), "that is a folder; name a file"),
    ],
)
def test_refusals(cli, small_model: Path, words: tuple[str, ...], complaint: str) -> None:
    done = cli("inspect-step", str(small_model), *words)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert complaint in done.err
