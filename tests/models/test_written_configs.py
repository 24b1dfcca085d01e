"""config.json made from a configuration alone: what transformers was seen to read, and what it cannot say."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.models import gguf_models as small
from tests.models.test_families import CASES, load, logits, recorded
from trustcore.convert import convert_checkpoint
from trustcore.errors import ModelError
from trustcore.models import DecoderConfig
from trustcore.models.hugging_face import hugging_face_config
from trustcore.ops.rope import RopeConfig
from trustcore.weights import open_checkpoint

KEPT = json.loads((Path(__file__).parents[1] / "data" / "written_configs.json").read_text())["configs"]


def config_of(name):
    return DecoderConfig.from_hugging_face(json.loads(str(recorded(name)["config"])))


@pytest.mark.parametrize("name", CASES)
def test_config_json_is_what_transformers_read(name):
    """The record says that its logits with this config.json are those of the model, to 1e-5."""
    written = hugging_face_config(config_of(name))
    assert json.loads(json.dumps(written)) == KEPT[name]["config"]
    assert KEPT[name]["difference"] < 1e-5
    back = DecoderConfig.from_hugging_face(written)
    assert hugging_face_config(back) == written
    assert dataclasses.replace(back, rope=config_of(name).rope) == config_of(name)


@pytest.mark.parametrize("name", small.CONFIGS)
def test_a_gguf_file_becomes_a_folder_and_a_file_again(tmp_path, name):
    """Stacks apart, matrices fused and turned, heads put together: the numbers are the same bit for bit both ways."""
    small.write(tmp_path / "m.gguf", small.random_model(name))
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "folder")
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "half", dtype="float16")
    tokens = small.TOKENS[None]
    theirs = load(tmp_path / "folder" / "model.safetensors")
    expected = logits(load(tmp_path / "m.gguf"), tokens)
    np.testing.assert_allclose(logits(theirs, tokens), expected, atol=2e-5)
    with open_checkpoint(tmp_path / "folder") as folder, open_checkpoint(tmp_path / "half") as half:
        assert {key: array.shape for key, array in folder.items()} == {key: array.shape for key, array in half.items()}
        assert {str(array.dtype) for array in half.values()} == {"float16"}


def test_a_llama_with_a_window_is_told_as_mistral():
    config = dataclasses.replace(config_of("llama"), window=5)
    assert hugging_face_config(config)["model_type"] == "mistral"


def test_tokens_are_told_where_they_are_known():
    written = hugging_face_config(config_of("gpt2"), {"eos_token_id": 7})
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (None, 7, None)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"score_cap": 3.0}, r"config\.json of llama cannot say all of .* \(score_cap\)"),
        ("bloom", {"activation": "relu"}, r"config\.json of bloom cannot say all of .* \(activation\)"),
        ("qwen2", {"attention_scale": 0.5}, r"config\.json of qwen2 cannot say all of .* \(attention_scale\)"),
        ("llama", {"rope": RopeConfig(8, divisors=(1.0, 5.0, 2.0, 1.0))}, "other than Llama 3's"),
        ("opt", {"norm_eps": 1e-3}, r"cannot say all of .* \(norm_eps\)"),
        ("gemma3", {"window_rope": RopeConfig(16, scaling="linear", factor=2.0)}, "knows no scaled positions"),
    ],
)
def test_what_config_json_cannot_say_is_refused(name, changes, message):
    with pytest.raises(ModelError, match=message):
        hugging_face_config(dataclasses.replace(config_of(name), **changes))
