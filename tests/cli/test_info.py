"""`trustcore info`: counts and sizes add up, metadata is shortened, hostile text stays text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trustcore.cli.info import describe


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A safetensors file with a configuration beside it."""
    from safetensors.numpy import save_file

    tensors = {"a.weight": np.zeros((4, 8), np.float32), "b.weight": np.zeros((2, 3), np.float16)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"note": "[red]\x1b[2Jhello"})
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    return tmp_path / "model.safetensors"


def test_the_table(cli, model: Path) -> None:
    done = cli("info", str(model), "--tensors")
    assert (done.status, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert ["architecture", "abacus"] in lines
    assert ["parameters", "38", "(38)"] in lines
    assert ["f32", "1", "32", "128", "128", "B", "91.4", "%"] in lines
    assert ["f16", "1", "6", "12", "12", "B", "8.6", "%"] in lines
    assert ["a.weight", "4", "x", "8", "f32", "128"] in lines
    assert "[red]\\x1b[2Jhello" in done.out and "\x1b" not in done.out
    assert all(line == line.rstrip() for line in done.out.splitlines())


def test_json(cli, model: Path) -> None:
    found = json.loads(cli("info", str(model.parent), "--json").out)
    assert found["files"] == [{"path": str(model), "bytes": model.stat().st_size}]
    assert found["parameters"] == 38 and found["tensors"] == 2 and found["tensor_bytes"] == 140
    assert found["encodings"] == {
        "f32": {"tensors": 1, "parameters": 32, "bytes": 128},
        "f16": {"tensors": 1, "parameters": 6, "bytes": 12},
    }
    assert found["metadata"]["note"] == "[red]\x1b[2Jhello"
    assert "tensor_list" not in found


def test_the_real_model(cli, smollm2_path: Path) -> None:
    found = json.loads(cli("info", str(smollm2_path), "--json", "--tensors").out)
    assert found["architecture"] == "llama" and found["format"] == "gguf"
    assert found["parameters"] == 134_515_008
    assert {name: row["tensors"] for name, row in found["encodings"].items()} == {"q4_1": 210, "q8_0": 1, "f32": 61}
    assert len(found["tensor_list"]) == found["tensors"] == 272
    assert sum(tensor["bytes"] for tensor in found["tensor_list"]) == found["tensor_bytes"]
    tokens = found["metadata"]["tokenizer.ggml.tokens"]
    assert tokens["length"] == 49152 and tokens["first"][0] == "<|endoftext|>"


def fake(metadata: Mapping[str, Any], path: Path) -> Any:
    class Fake(dict):
        pass

    checkpoint = Fake(x=SimpleNamespace(shape=(2,), encoding="f32", nbytes=8, path=path))
    checkpoint.metadata, checkpoint.path, checkpoint.format = MappingProxyType(dict(metadata)), path, "gguf"
    return checkpoint


def test_every_kind_of_metadata_becomes_json(model: Path) -> None:
    metadata = {"n": float("nan"), "b": b"\xff!", "deep": [[1] * 9, {"k": (1, 2)}], "none": None, "t": True}
    found = describe(fake(metadata, model), tensors=False)["metadata"]
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "n": "nan",
        "b": "\\xff!",
        "deep": [{"length": 9, "first": [1] * 6}, {"k": [1, 2]}],
        "none": None,
        "t": True,
    }
