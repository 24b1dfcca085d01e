"""The demo model against llama.cpp's recorded logits and greedy continuations.

`smollm2_f32_*` were recorded from the same weights decoded to float32: llama.cpp then computes in float32 throughout,
and ours must agree to rounding. `smollm2_*` were recorded from the packed file itself, where llama.cpp rounds every
activation to 8 bits before a product; that moves its logits by up to 0.94 and, where two tokens are close, its choice.
We round nothing, so there only clear choices are compared.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

DATA = Path(__file__).parents[1] / "data"
NEAR_TIE = 0.02  # log-probability gap under which two correct programs may choose differently
LARGEST_ROUNDING = 1.0  # what 8-bit activations move llama.cpp's own logits by, in its log-probability gaps


def recorded(name):
    return json.loads((DATA / f"{name}.json").read_text())["prompts"]


@pytest.fixture(scope="module")
def logits_of(smollm2):
    """Returns logits of a list of ids, through one compiled program."""
    program = jax.jit(lambda model, tokens: model(tokens))

    def run(ids):
        padded = jnp.asarray([ids + [0] * (448 - len(ids))], jnp.int32)
        return np.asarray(program(smollm2, padded))[0, : len(ids)]

    return run


def choices(logits_of, prompt):
    """Our greedy choice after every recorded token, given the recorded ones before it."""
    ids = prompt["prompt_ids"] + prompt["ids"]
    return logits_of(ids)[len(prompt["prompt_ids"]) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("prompt", recorded("smollm2_f32_logits"), ids=lambda p: p["name"])
def test_logits_equal_llama_cpp_in_float32(logits_of, prompt):
    ours = logits_of(prompt["prompt_ids"])
    for place in prompt["positions"]:
        # The issue of this test allows 0.15; measured is below 0.001.
        np.testing.assert_allclose(ours[place["position"], place["ids"]], place["logits"], atol=5e-3)


@pytest.mark.parametrize("prompt", recorded("smollm2_f32_greedy"), ids=lambda p: p["name"])
def test_greedy_choices_equal_llama_cpp_in_float32(logits_of, prompt):
    ours = choices(logits_of, prompt)
    clear = [i for i, gap in enumerate(prompt["gaps"]) if gap >= NEAR_TIE]
    assert [ours[i] for i in clear] == [prompt["ids"][i] for i in clear]
    assert len(clear) > 60


@pytest.mark.parametrize("prompt", recorded("smollm2_greedy"), ids=lambda p: p["name"])
def test_clear_choices_equal_llama_cpp_with_its_rounded_activations(logits_of, prompt):
    ours = choices(logits_of, prompt)
    clear = [i for i, gap in enumerate(prompt["gaps"]) if gap >= LARGEST_ROUNDING]
    assert [ours[i] for i in clear] == [prompt["ids"][i] for i in clear]
    same = sum(a == b for a, b in zip(ours, prompt["ids"], strict=True))
    assert same >= 60  # of 64, given the same tokens before


def test_loading_keeps_the_weights_packed(smollm2, smollm2_path):
    assert smollm2.parameters == 134_515_008
    assert smollm2.nbytes < smollm2_path.stat().st_size  # without tokenizer and metadata
    assert "135M parameters" in repr(smollm2)
