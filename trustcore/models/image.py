"""What models of images share: patches, labels, and what images they take, `[B, height, width, channels]`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from trustcore.errors import ModelError
from trustcore.models.model import Model, sample_images
from trustcore.models.values import Values
from trustcore.nn.conv import Conv
from trustcore.nn.module import made_module


class ImageModel(Model):
    """A network of images whose features are pooled, and may be classified."""

    classifier: Any

    def example(self) -> tuple[Any, ...]:
        """See `Model.example`."""
        return (sample_images((64, 64), self.config.channels),)

    def pool(self, features: Float[Array, "B rows columns D"]) -> Float[Array, "B D"]:
        """Returns one vector an image."""
        raise NotImplementedError

    def classify(self, images: Float[Array, "B h w c"]) -> Float[Array, "B labels"]:
        """Returns float32 logits of the labels.

        Raises:
            ModelError: the checkpoint had no classifier.
        """
        if self.classifier is None:
            raise ModelError("this model has no classifier; its features are model(images).")
        return self.classifier(self.pool(self(images))).astype(jnp.float32)


def labels(config: Mapping[str, Any], names: Collection[str]) -> int:
    """Returns how many labels the classifier of a checkpoint tells apart; 0 where it has none.

    Raises:
        ModelError: config.json does not say how many.
    """
    if not any(name.startswith("classifier.") and name.endswith("weight") for name in names):
        return 0
    named = config.get("id2label")
    if isinstance(named, Mapping) and named:
        return len(named)
    return Values(config, "config.json").integer("num_labels", 2)


def make_patches(
    channels: int, features: int, patch: tuple[int, int], bias: bool, dtype: Any, rngs: nnx.Rngs | None
) -> Conv:
    """Returns the convolution that makes one vector of each patch, `[B, h, w, c]` to `[B, rows, columns, D]`."""
    options = {"strides": patch, "padding": "VALID", "use_bias": bias, "dtype": dtype, "param_dtype": dtype}
    return made_module(lambda r: Conv(channels, features, patch, rngs=r, **options), rngs)


def check_channels(images: jax.Array, channels: int) -> None:
    """Raises the ModelError that tells how images are laid out."""
    if images.ndim != 4 or images.shape[3] != channels:
        raise ModelError(f"images are {list(images.shape)}; expected [B, height, width, {channels}].")
