"""Encoder-decoders against transformers: T5 and BART's kind, whole and token by token; Whisper and its frames."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import families
from trustcore.errors import ModelError
from trustcore.ops.log_mel import log_mel, padded

CASES = ("t5", "t5-gated", "umt5", "bart", "mbart", "marian", "pegasus", "whisper")


STEPS = ("t5", "umt5", "bart", "marian", "whisper")  # each way of counting positions


@jax.jit
def encode(model: Any, given: Any, mask: Any) -> Any:
    return model.encode(given, mask)


@functools.partial(jax.jit, static_argnums=3)
def start(model: Any, memory: Any, mask: Any, slots: int) -> Any:
    return model.start(memory, mask, slots=slots)


@jax.jit
def decode(model: Any, tokens: Any, state: Any) -> Any:
    return model.decode(tokens, state)


@pytest.mark.parametrize("name", CASES)
def test_whole_and_step_by_step(name: str, tmp_path: Path) -> None:
    case = families.read(name)
    model = case.open(tmp_path)
    mask = case.inputs.get("attention_mask")
    if mask is None:
        mask, given = None, jnp.asarray(case.inputs["frames"].transpose(0, 2, 1))
        real = np.ones(case.outputs["memory"].shape[:2], bool)
    else:
        given, real = jnp.asarray(case.inputs["input_ids"], jnp.int32), mask != 0
        mask = jnp.asarray(mask)
    memory = encode(model, given, mask)
    assert families.apart(memory, case.outputs["memory"], real) < families.TOLERANCE
    written = jnp.asarray(case.inputs["decoder_input_ids"], jnp.int32)
    called = families.jitted(model, *((given, mask, written) if "t5" in name else (given, written, mask)))
    assert families.apart(called, case.outputs["logits"]) < families.TOLERANCE
    if name not in STEPS:
        return
    state = start(model, memory, mask, written.shape[1] + 2)  # empty slots are not seen
    steps = []
    for t in range(written.shape[1]):
        logits, state = decode(model, written[:, t : t + 1], state)
        steps.append(logits)
    assert families.apart(jnp.concatenate(steps, axis=1), np.asarray(called)) < 1e-5


def test_frames_are_those_of_the_librarys_extractor() -> None:
    case = families.read("whisper")
    sound = case.inputs["sound"]
    rows = jnp.asarray(np.concatenate([padded(sound, 1), padded(sound[:3000], 1)]))
    for bins in (80, 128):
        frames = jax.jit(log_mel, static_argnums=1)(rows, bins)
        assert frames.shape == (2, 100, bins)
        assert families.apart(frames[:, :40], case.outputs[f"frames{bins}"].transpose(0, 2, 1)) < 1e-4
    assert padded(np.ones(40000), 1).shape == (1, 16000)


def test_an_output_layer_of_its_own(tmp_path: Path) -> None:
    """T5 1.1: config.json says that the table is not the output layer, and the file has one."""
    case = families.read("t5-gated")
    own = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    weights = {**case.weights, "lm_head.weight": own}
    config = {key: value for key, value in case.config.items() if key != "scale_decoder_outputs"}
    model = families.Case({**config, "tie_word_embeddings": False}, weights, {}, {}).open(tmp_path)
    same = np.asarray(model.words.table.get_value())
    memory = jnp.asarray(case.outputs["memory"])
    tokens = jnp.asarray(case.inputs["decoder_input_ids"], jnp.int32)
    state = start(model, memory, jnp.asarray(case.inputs["attention_mask"]), tokens.shape[1])
    logits, _ = decode(model, tokens, state)
    hidden = case.outputs["logits"] @ np.linalg.pinv(same.T)
    np.testing.assert_allclose(logits, hidden @ own.T, atol=2e-3)


def test_an_encoder_alone(tmp_path: Path) -> None:
    case = families.read("t5")
    weights = {key: array for key, array in case.weights.items() if not key.startswith("decoder.")}
    model = families.Case(case.config, weights, {}, {}).open(tmp_path)
    hidden = families.jitted(model, jnp.asarray(case.inputs["input_ids"], jnp.int32), case.inputs["attention_mask"])
    assert families.apart(hidden, case.outputs["memory"], case.inputs["attention_mask"] != 0) < families.TOLERANCE
    with pytest.raises(ModelError, match="an encoder alone"):
        model.start(hidden, slots=4)


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("t5", {"feed_forward_proj": "a-b-c"}, "feed_forward_proj is 'a-b-c'"),
        ("t5", {"feed_forward_proj": "gated-cube"}, "activation 'cube' is not known"),
        ("t5", {"relative_attention_num_buckets": 6}, "6 relative_attention_num_buckets"),
        ("t5", {"d_kv": -1}, "d_kv is -1"),
        ("t5", {"num_decoder_layers": 1.5}, "num_decoder_layers is 1.5"),
        ("bart", {"encoder_attention_heads": 3}, "3 heads do not divide a width of 32"),
        ("bart", {"d_model": None, "decoder_layers": 10**9}, "the configuration has 1000000002 layers"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings is false"),
        ("whisper", {"num_mel_bins": 0}, "num_mel_bins is 0"),
    ],
)
def test_impossible_values_are_refused(name: str, changes: dict, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        families.read(name).open(tmp_path, config=changes)
    assert complaint in str(error.value)


def test_too_long_inputs_are_refused(tmp_path: Path) -> None:
    model = families.read("bart").open(tmp_path)
    with pytest.raises(ModelError, match="21 positions are more than the 20"):
        model.encode(jnp.ones((1, 21), jnp.int32))
    with pytest.raises(ModelError, match="21 tokens are more than the 20"):
        model.start(jnp.zeros((1, 4, 32)), slots=21)
