"""Adapters in PEFT's files against the logits that PEFT computes; written and read back; files that do not fit."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import trustcore
from tests.models.families import read
from tests.models.small import random_decoder, some_tokens
from tests.models.test_families import DATA, TOLERANCE, load, logits, recorded, write
from tests.nn.adapters import moved
from trustcore.errors import CheckpointError, ModelError
from trustcore.models import load_adapters, save_adapters
from trustcore.nn import Adapter, adapters_of, add_adapters, merge_adapters, with_adapters, without_adapters

NAMES = ("lora", "dora", "fused", "grouped", "inputs_first")


@functools.cache
def cases():
    with np.load(DATA.parent / "adapters.npz") as file:
        return {key: file[key] for key in file.files}


def write_adapter(folder: Path, name="lora", **changes):
    """Writes the folder that PEFT saved, fields of its configuration changed."""
    folder.mkdir()
    prefix = f"{name}/weights/"
    weights = {key.removeprefix(prefix): value for key, value in cases().items() if key.startswith(prefix)}
    save_file(weights, folder / "adapter_model.safetensors")
    config = json.loads(str(cases()[f"{name}/config"])) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def base_of(folder, name, **options):
    return load(write(folder, recorded(str(cases()[f"{name}/base"]))), **options)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_peft(name, tmp_path):
    model = base_of(tmp_path, name)
    tokens = recorded(str(cases()[f"{name}/base"]))["tokens"]
    adapters = load_adapters(model, write_adapter(tmp_path / "adapter", name))
    adapted = with_adapters(model, adapters)
    expected = cases()[f"{name}/logits"]
    found = logits(adapted, tokens)
    assert np.max(np.abs(expected - logits(model, tokens))) > 0.05
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    np.testing.assert_allclose(logits(merge_adapters(adapted), tokens), expected, atol=TOLERANCE)
    # What is written is read back as the same function, and has the tensors that PEFT wrote.
    again = with_adapters(model, load_adapters(model, save_adapters(adapted, tmp_path / "again")))
    np.testing.assert_allclose(logits(again, tokens), found, atol=1e-5)
    ours, theirs = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("again", "adapter"))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


def test_hidden_states_of_an_encoder_are_those_of_peft(tmp_path):
    case = read("bert")
    model = case.open(tmp_path)
    tokens = jnp.asarray(case.inputs["input_ids"], jnp.int32)
    folder = write_adapter(tmp_path / "adapter", "encoder")
    adapted = with_adapters(model, load_adapters(model, folder))
    run = jax.jit(lambda model, tokens: model(tokens))
    expected = cases()["encoder/logits"]
    np.testing.assert_allclose(run(adapted, tokens), expected, atol=TOLERANCE)
    assert np.max(np.abs(run(model, tokens) - expected)) > 0.05
    ours = load_file(save_adapters(adapted, tmp_path / "again") / "adapter_model.safetensors")
    theirs = load_file(folder / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


def test_outputs_of_another_order(tmp_path):
    """The small model pairs rotary channels as GGUF files do, the folder it is saved to as PEFT's base does."""
    model = random_decoder()
    adapted = add_adapters(model, rank=2, magnitude=True, key=jax.random.key(0))
    adapters = moved(adapters_of(adapted))
    adapted = with_adapters(adapted, adapters)
    trustcore.save(model, tmp_path / "base")
    base = trustcore.load(tmp_path / "base")
    assert base.config.rope.interleaved != model.config.rope.interleaved
    found = with_adapters(base, load_adapters(base, save_adapters(adapted, tmp_path / "adapter")))
    np.testing.assert_allclose(found(some_tokens()), adapted(some_tokens()), atol=2e-5)
    back = load_adapters(model, tmp_path / "adapter")
    jax.tree.map(np.testing.assert_array_equal, back, adapters)


def test_matrices_that_files_fuse_may_have_different_adapters(tmp_path):
    model = base_of(tmp_path, "fused")
    tokens = recorded("phi3")["tokens"]
    where = ["*.query.kernel", "*.key.kernel", "*.value.kernel"]
    adapted = add_adapters(model, rank=2, alpha=3, where=where, key=jax.random.key(0))
    adapters = moved(adapters_of(adapted))
    adapted = with_adapters(adapted, adapters)
    folder = save_adapters(adapted, tmp_path / "adapter", base="some/phi")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (6, 6, "some/phi")
    found = with_adapters(model, load_adapters(model, folder))
    np.testing.assert_allclose(logits(found, tokens), logits(adapted, tokens), atol=1e-5)
    path = "blocks.0.attention.query.kernel"
    alone = with_adapters(without_adapters(adapted), {path: adapters[path]})
    with pytest.raises(ModelError, match=r"qkv_proj is .*query.kernel and .* in one, and .*key.kernel has no adapter"):
        save_adapters(alone, tmp_path / "refused")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; supported: LORA"),
        ({"bias": "all"}, "bias is 'all'; trained biases are not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*lm_head"),
        ({"use_qalora": True}, "use_qalora is 'True'; supported: false"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; expected a number"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf; expected a number"),
        ({"alpha_pattern": {"(a+)+$": 3}}, r"alpha_pattern has '\(a\+\)\+\$'; names of modules"),
        ({"alpha_pattern": [1]}, "alpha_pattern is .*; expected names and numbers"),
        ({"use_rslora": 1}, "use_rslora is 1; expected true or false"),
    ],
)
def test_configurations_that_are_refused(changes, message, tmp_path):
    model = base_of(tmp_path, "lora")
    with pytest.raises(ModelError, match=message):
        load_adapters(model, write_adapter(tmp_path / "adapter", **changes))


def test_tensors_that_do_not_fit_are_named_together(tmp_path):
    model = base_of(tmp_path, "lora")
    folder = write_adapter(tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    at = "base_model.model.model.layers.{}.{}"
    weights[at.format(0, "self_attn.q_proj.lora_A.weight")] = np.zeros((2, 31), np.float32)
    weights[at.format(9, "self_attn.q_proj.lora_A.weight")] = np.zeros((2, 32), np.float32)
    weights[at.format(1, "mlp.down_proj.lora_B.weight")] = np.zeros((32, 3), np.int32)
    del weights[at.format(1, "self_attn.q_proj.lora_B.weight")]
    weights["base_model.model.lm_head.weight"] = np.zeros((2, 2), np.float32)
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError) as caught:
        load_adapters(model, folder)
    text = str(caught.value)
    for part in (
        "layers.0.self_attn.q_proj has lora_A.weight [2, 31], expected [r, 32]",
        "layers.9.self_attn.q_proj is no matrix of a qwen2 model that can have an adapter",
        "layers.1.mlp.down_proj has lora_B.weight as i32; expected floats",
        "layers.1.self_attn.q_proj has no lora_B.weight",
        "lm_head.weight is unexpected",
    ):
        assert part in text


def test_what_cannot_be_written(tmp_path):
    model = random_decoder()
    with pytest.raises(ModelError, match="the model has no adapters; add_adapters makes them"):
        save_adapters(model, tmp_path / "a")
    table = {"embedding.table": Adapter(jnp.zeros((96, 2)), jnp.zeros((2, 64)))}
    with pytest.raises(ModelError, match=r"embedding.table has no place in these files"):
        save_adapters(with_adapters(model, table), tmp_path / "b")
    half = add_adapters(model, rank=1, where=["blocks.0.mlp.up.kernel"], key=jax.random.key(0))
    with pytest.raises(ModelError, match=r"up.kernel is a AdaptedWeight, which has no place in a file: merge or dens"):
        trustcore.save(half, tmp_path / "model")
    half = add_adapters(half, rank=1, where=["blocks.0.mlp.down.kernel"], magnitude=True, key=jax.random.key(0))
    with pytest.raises(ModelError, match="some adapters have a magnitude and some have none"):
        save_adapters(half, tmp_path / "c")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(CheckpointError, match="the folder is not empty"):
        save_adapters(half, tmp_path / "full")
