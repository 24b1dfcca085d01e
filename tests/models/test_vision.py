"""Models of images against transformers: vision transformers, pairs of towers, convolutional networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import families
from trustcore.errors import ModelError

TRANSFORMERS = ("vit", "dinov2", "dinov2-other")
CLASSIFIERS = ("vit-classifier", "dinov2-registers")
TOWERS = ("clip", "clip-old", "siglip")
CONVOLUTIONS = ("resnet", "convnext", "efficientnet")


def images(array: np.ndarray) -> jax.Array:
    """Channels last, as our models take them."""
    return jnp.asarray(array.transpose(0, 2, 3, 1))


@jax.jit
def classify(model: Any, pixels: jax.Array) -> jax.Array:
    return model.classify(pixels)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_states_and_vectors(name: str, tmp_path: Path) -> None:
    case = families.read(name)
    model = case.open(tmp_path)
    hidden = families.jitted(model, images(case.inputs["pixels"]))
    assert families.apart(hidden, case.outputs["hidden"]) < families.TOLERANCE
    assert families.apart(model.pool(hidden), case.outputs["pooled"]) < families.TOLERANCE
    if "other" in case.inputs:
        other = families.jitted(model, images(case.inputs["other"]))
        assert families.apart(other, case.outputs["other"]) < families.TOLERANCE
    with pytest.raises(ModelError, match="this model has no classifier"):
        model.classify(images(case.inputs["pixels"]))
    with pytest.raises(ModelError, match="3 x 16 pixels and 3 channels; expected at least 4 x 4"):
        model(jnp.zeros((1, 3, 16, 3)))


@pytest.mark.parametrize("name", [*CLASSIFIERS, *CONVOLUTIONS])
def test_logits_of_labels(name: str, tmp_path: Path) -> None:
    case = families.read(name)
    found = classify(case.open(tmp_path), images(case.inputs["pixels"]))
    assert families.apart(found, case.outputs["logits"]) < families.TOLERANCE


def test_features_of_basic_blocks(tmp_path: Path) -> None:
    case = families.read("resnet-basic")
    model = case.open(tmp_path)
    features = families.jitted(model, images(case.inputs["pixels"]))
    assert families.apart(features, case.outputs["hidden"].transpose(0, 2, 3, 1)) < families.TOLERANCE
    assert families.apart(model.pool(features), case.outputs["pooled"][:, :, 0, 0]) < families.TOLERANCE
    with pytest.raises(ModelError, match=r"images are \[1, 3, 32, 32\]; expected \[B, height, width, 3\]"):
        model(jnp.zeros((1, 3, 32, 32)))


@pytest.mark.parametrize("name", TOWERS)
def test_towers(name: str, tmp_path: Path) -> None:
    case = families.read(name)
    model = case.open(tmp_path)
    pixels, tokens = images(case.inputs["pixels"]), jnp.asarray(case.inputs["input_ids"], jnp.int32)
    mask = jnp.asarray(case.inputs["attention_mask"])
    logits = families.jitted(model, pixels, tokens, mask)
    assert families.apart(logits, case.outputs["logits"]) < families.TOLERANCE * 10  # exp(scale) times a cosine
    vectors = jax.jit(lambda model: (model.images(pixels), model.texts(tokens, mask)))(model)
    assert families.apart(vectors[0], case.outputs["images"]) < 1e-5
    assert families.apart(vectors[1], case.outputs["texts"]) < 1e-5
    with pytest.raises(ModelError, match="13 tokens are more than the 12"):
        model.texts(jnp.ones((1, 13), jnp.int32))


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("vit", {"patch_size": 32}, "an image of (16, 16) pixels has no patch of (32, 32)"),
        ("vit", {"image_size": [16, 16, 16]}, "image_size is [16, 16, 16]"),
        ("vit", {"image_size": [16, 0]}, "width is 0"),
        ("vit", {"num_attention_heads": 5}, "5 heads do not divide"),
        ("dinov2", {"mlp_ratio": "x"}, "mlp_ratio is 'x'"),
        ("resnet", {"layer_type": "wide"}, "layer_type is 'wide'"),
        ("resnet", {"depths": [1]}, "2 hidden_sizes and 1 depths"),
        ("resnet", {"depths": [2, 10**9]}, "the configuration has 1000000002 layers"),
        ("resnet", {"hidden_sizes": [16, True]}, "hidden_sizes is [16, True]"),
        ("convnext", {"depths": "x"}, "depths is 'x'"),
        ("efficientnet", {"width_coefficient": 1e300}, "width_coefficient is 1e+300"),
        ("efficientnet", {"depth_coefficient": 1e3}, "the configuration has 3000 layers"),
        ("efficientnet", {"strides": [1]}, "stages differ in number"),
        ("efficientnet", {"hidden_dim": 64}, "hidden_dim is 64"),
        ("efficientnet", {"pooling_type": "sum"}, "pooling_type is 'sum'"),
        ("clip", {"text_config": []}, "text_config is []"),
        ("clip", {"projection_dim": 0}, "projection_dim is 0"),
        ("clip", {"text_config": {"num_hidden_layers": 10**8}}, "the configuration has 100000002 layers"),
    ],
)
def test_impossible_values_are_refused(name: str, changes: dict, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        families.read(name).open(tmp_path, config=changes)
    assert complaint in str(error.value)
