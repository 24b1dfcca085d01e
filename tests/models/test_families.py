"""Every family against transformers: the same logits from the files it saves, padded on either side, step by step."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trustcore.models import DecoderConfig, decoder_from_checkpoint
from trustcore.saving import save
from trustcore.weights import open_checkpoint

DATA = Path(__file__).parents[1] / "data" / "decoders"
CASES = sorted(path.stem for path in DATA.glob("*.npz"))
TOLERANCE = 2e-4  # logits are up to 12
QUICK = {"xla_backend_optimization_level": 0}  # the time of these tests is that of compiling


def recorded(name):
    with np.load(DATA / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def write(folder, case):
    """Writes the folder that the other library saved, and returns the path of its weights."""
    weights = {key.removeprefix("weights/"): value for key, value in case.items() if key.startswith("weights/")}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(str(case["config"]))
    return folder / "model.safetensors"


def load(path, **options):
    with open_checkpoint(path) as checkpoint:
        return decoder_from_checkpoint(checkpoint, **options)


def logits(model, tokens, mask=None):
    """Returns the logits by a program that is compiled fast; jax keeps it for models of one structure."""
    mask = np.ones(tokens.shape, bool) if mask is None else mask
    return _logits(model, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask))


@functools.partial(jax.jit, compiler_options=QUICK)
def _logits(model, tokens, mask):
    return model(tokens, mask=mask)


@functools.partial(jax.jit, compiler_options=QUICK, donate_argnums=1)
def step(model, cache, tokens, mask):
    return model(tokens, cache=cache, mask=mask)


# Of two cases of a family, the one that has more.
TWINS = ("phi3", "gpt_neox_serial", "stablelm", "cohere", "falcon", "bloom", "gemma", "llama", "mistral")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in TWINS else n for n in CASES])
def test_logits_of_the_original_library(tmp_path, name):
    case = recorded(name)
    model = load(write(tmp_path, case), dtype="float32")
    tokens = jnp.asarray(case["tokens"], jnp.int32)
    for kind in ("plain", "left", "right"):
        mask = case.get(f"{kind}_mask", np.ones(tokens.shape, bool))
        found = logits(model, tokens, mask)
        np.testing.assert_allclose(found[mask], case[kind][mask], atol=TOLERANCE, err_msg=kind)

    # A prompt that is padded on the left goes in first, then the rows grow token by token: by one program, for which
    # all other tokens are padding.
    mask, column, cache = case["left_mask"], np.arange(tokens.shape[1]), model.new_cache(2, 24)
    for begin, end in ((0, 10), (10, 11), (11, 12)):
        here = mask & (begin <= column) & (column < end)
        found, cache = step(model, cache, tokens, jnp.asarray(here))
        np.testing.assert_allclose(found[here], case["left"][here], atol=TOLERANCE, err_msg=f"to {end}")
    assert cache.length.tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize("name", CASES)
def test_a_saved_model_holds_the_tensors_it_was_read_from(tmp_path, name):
    """The name map in both directions: names, shapes and numbers, but for the last bit of norms stored less one."""
    case = recorded(name)
    path = write(tmp_path, case)
    save(load(path), tmp_path / "saved")
    kept, written = load_file(path), load_file(tmp_path / "saved" / "model.safetensors")
    assert set(written) == set(kept)
    for key, array in kept.items():
        np.testing.assert_allclose(written[key], array, rtol=0, atol=1.2e-7 if name.startswith("gemma") else 0)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert DecoderConfig.from_hugging_face(config) == DecoderConfig.from_hugging_face(json.loads(str(case["config"])))


def test_the_text_model_of_a_file_that_holds_one_that_sees(tmp_path):
    """Llama 4's and Gemma 3's files: everything lies below `language_model`, beside an image's encoder."""
    case = recorded("llama4_text")
    weights = {f"language_model.{key[8:]}": case[key] for key in case if key.startswith("weights/")}
    others = {
        name: np.zeros((2, 3), np.float32) for name in ("vision_model.a.weight", "multi_modal_projector.b.weight")
    }
    save_file({**weights, **others}, tmp_path / "model.safetensors")
    config = {"model_type": "llama4", "text_config": json.loads(str(case["config"])), "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path / "model.safetensors", dtype="float32")
    np.testing.assert_allclose(logits(model, case["tokens"]), case["plain"], atol=TOLERANCE)
