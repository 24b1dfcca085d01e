"""Checkpoints of the Flax models of transformers: what PyTorch files of the same weights hold, as Flax lays it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import serialization, traverse_util

import trustcore
from tests.models import families
from tests.models.test_families import recorded
from tests.models.test_saved_families import assert_same
from trustcore.convert import convert_checkpoint

TABLES = ("_embeddings", "wte", "wpe", "shared", "embed_tokens", "relative_attention_bias", "embed_positions")
NORMS = (
    "LayerNorm",
    "layernorm",
    "layernorm_before",
    "layernorm_after",
    "ln_1",
    "ln_2",
    "ln_f",
    "layer_norm",
    "sa_layer_norm",
    "output_layer_norm",
)


def in_flax(name: str, array: np.ndarray, norm: str) -> tuple[str, np.ndarray]:
    """A tensor as `modeling_flax_pytorch_utils.py` of transformers 4 renames and turns it.

    Embeddings are `embedding`, norms `scale` (T5's own: `weight`), convolutions [h, w, in, out] and all other matrices
    transposed, GPT-2's [in, out] among them.
    """
    module, _, last = name.rpartition(".")
    if last != "weight":
        return name, array
    if module.endswith(TABLES):
        return f"{module}.embedding", array
    if module.rpartition(".")[2] in NORMS or module.endswith("final_layer_norm"):
        return f"{module}.{norm}", array
    return f"{module}.kernel", array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def write(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    norm = "weight" if config["model_type"] == "t5" else "scale"
    named = dict(in_flax(name, array, norm) for name, array in weights.items())
    tree = traverse_util.unflatten_dict({tuple(name.split(".")): np.ascontiguousarray(a) for name, a in named.items()})
    (folder / "flax_model.msgpack").write_bytes(serialization.to_bytes(tree))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "electra", "distilbert", "t5", "t5-gated", "vit", "vit-classifier"]
)
def test_the_same_model_as_of_pytorchs_file(name: str, tmp_path: Path) -> None:
    case = families.read(name)
    (tmp_path / "pt").mkdir()
    expected = trustcore.load(case.write(tmp_path / "pt"))
    found = trustcore.load(write(tmp_path / "flax", case.config, case.weights))
    assert found.config == expected.config
    assert_same(found, expected)
    trustcore.save(found, tmp_path / "saved")
    trustcore.save(expected, tmp_path / "other")
    assert (tmp_path / "saved/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()


def test_gpt2_and_its_conv1d(tmp_path: Path) -> None:
    case = recorded("gpt2")
    weights = {name.removeprefix("weights/"): array for name, array in case.items() if name.startswith("weights/")}
    found = trustcore.load(write(tmp_path / "flax", json.loads(str(case["config"])), weights), dtype="float32")
    kernel = found.blocks[0].mlp.up.kernel.get_value()
    np.testing.assert_array_equal(kernel, weights["transformer.h.0.mlp.c_fc.weight"])  # [in, out] in PyTorch's file
    np.testing.assert_array_equal(found.embedding.table.get_value(), weights["transformer.wte.weight"])


@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_another_kind_of_file_with_flax_names(kind: str, tmp_path: Path) -> None:
    if kind == "orbax":
        pytest.importorskip("orbax.checkpoint")
    case = families.read("bert")
    source = write(tmp_path / "flax", case.config, case.weights)
    report = convert_checkpoint(source, tmp_path / "out", kind=kind, verify=True)
    assert report.verification is not None and report.verification.max_difference == 0
    assert_same(trustcore.load(tmp_path / "out"), trustcore.load(source))
