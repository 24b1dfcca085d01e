"""The residual network of convolutions, batch norms and shortcuts.

    x = maxpool(act(bn(conv7x7(image))));  x = act(shortcut(x) + layers(x))  for each block;  features

Basic blocks have two 3x3 convolutions, bottlenecks 1x1, 3x3, 1x1. He et al., arXiv 1512.03385; the stride of a
bottleneck stands in its 3x3 convolution (ResNet 1.5) unless config.json says otherwise. Images are
`[B, height, width, channels]`. `model.train()` makes batch norms use, and collect, the statistics of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from trustcore.errors import ModelError
from trustcore.models.image import ImageModel, check_channels, labels
from trustcore.models.name_map import Rule, batch_norm, linear, window
from trustcore.models.names import Names
from trustcore.models.registry import Family
from trustcore.models.values import Values, integers
from trustcore.nn.conv import Conv
from trustcore.nn.linear import Linear
from trustcore.nn.module import made_module
from trustcore.ops.activate import activation


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Shape of a residual network.

    Attributes:
        stem: channels behind the first convolution.
        widths: channels of each stage.
        depths: blocks of each stage.
        bottleneck: which kind of block.
        early_stride: whether the first stage halves the image.
        stride_first: whether a bottleneck's stride stands in its first convolution.
        channels: of an image.
        labels: of a classifier; 0: there is none.
        activation: of every block.
        family: config.json's `model_type`.
    """

    stem: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    bottleneck: bool = True
    early_stride: bool = False
    stride_first: bool = False
    channels: int = 3
    labels: int = 0
    activation: str = "relu"
    family: str = "resnet"

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.depths):
            raise ModelError(f"config: {len(self.widths)} hidden_sizes and {len(self.depths)} depths; they must agree.")
        activation(self.activation)

    @property
    def layers(self) -> int:
        """Blocks in all."""
        return sum(self.depths)

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> ResNetConfig:
        """Returns the configuration that a config.json describes; `names` of tensors tell what is there.

        Raises:
            ModelError: a value is missing, impossible, or asks for what is not supported.
        """
        values = Values(config, "config.json")
        kind = values.text("layer_type", "bottleneck")
        if kind not in ("basic", "bottleneck"):
            raise ModelError(f"config.json: layer_type is {kind!r}; expected 'basic' or 'bottleneck'.")
        return cls(
            stem=values.integer("embedding_size", 64),
            widths=integers(values, "hidden_sizes", (256, 512, 1024, 2048)),
            depths=integers(values, "depths", (3, 4, 6, 3)),
            bottleneck=kind == "bottleneck",
            early_stride=values.flag("downsample_in_first_stage", False),
            stride_first=values.flag("downsample_in_bottleneck", False),
            channels=values.integer("num_channels", 3),
            labels=labels(config, names),
            activation=values.text("hidden_act", "relu"),
        )

    def blocks(self) -> list[tuple[int, int, int]]:
        """Returns (channels in, channels out, stride) of each block."""
        found, width = [], self.stem
        for i, (wide, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            stride = 2 if i or self.early_stride else 1
            found += [(width, wide, stride), *[(wide, wide, 1)] * (depth - 1)]
            width = wide
        return found


class NormedConv(nnx.Module):
    """A convolution without bias, and a batch norm."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        window: int,
        *,
        stride: int = 1,
        groups: int = 1,
        padding: Any = None,
        eps: float = 1e-5,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        options = {
            "strides": stride,
            "padding": window // 2 if padding is None else padding,
            "use_bias": False,
            "feature_group_count": groups,
            "dtype": dtype,
            "param_dtype": dtype,
        }
        self.conv = made_module(lambda r: Conv(inputs, outputs, (window, window), rngs=r, **options), rngs)
        normed = {"use_running_average": True, "momentum": 0.9, "epsilon": eps, "dtype": dtype}
        self.norm = made_module(lambda r: nnx.BatchNorm(outputs, rngs=r, **normed), rngs)

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B _ _ o"]:
        """Returns the normed channels."""
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """Convolutions, and a way around them."""

    def __init__(
        self,
        config: ResNetConfig,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        made = {"dtype": dtype, "rngs": rngs}
        if config.bottleneck:
            inner = outputs // 4
            first, second = (stride, 1) if config.stride_first else (1, stride)
            layers = [
                NormedConv(inputs, inner, 1, stride=first, **made),
                NormedConv(inner, inner, 3, stride=second, **made),
                NormedConv(inner, outputs, 1, **made),
            ]
        else:
            layers = [NormedConv(inputs, outputs, 3, stride=stride, **made), NormedConv(outputs, outputs, 3, **made)]
        self.layers = nnx.List(layers)
        around = inputs != outputs or stride != 1
        self.shortcut = NormedConv(inputs, outputs, 1, stride=stride, **made) if around else None
        self.activation = config.activation

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B _ _ o"]:
        """Returns the stream after this block."""
        y = x
        for i, layer in enumerate(self.layers):
            y = layer(y)
            if i < len(self.layers) - 1:  # between convolutions a ReLU, whatever config.json names for the end
                y = jax.nn.relu(y)
        return activation(self.activation)(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(ImageModel):
    """A residual network.

    Args:
        config: its shape.
        dtype: of activations, and of the parameters that `rngs` draws.
        rngs: None leaves the parameters abstract, for a loader to fill.
    """

    def __init__(self, config: ResNetConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        super().__init__(config, dtype)
        made = {"dtype": dtype, "rngs": rngs}
        self.stem = NormedConv(config.channels, config.stem, 7, stride=2, **made)
        self.blocks = nnx.List([Block(config, *shape, **made) for shape in config.blocks()])
        width = config.widths[-1]
        self.classifier = Linear(width, config.labels, bias=True, **made) if config.labels else None

    def __call__(self, images: Float[Array, "B h w c"]) -> Float[Array, "B rows columns D"]:
        """Returns the last stage's features, the image 32 times smaller.

        Args:
            images: normalized as the model was trained with.

        Differentiable in the float weights and the images.

        Raises:
            ModelError: the images have other channels.
        """
        check_channels(images, self.config.channels)
        x = activation(self.config.activation)(self.stem(images.astype(self.dtype)))
        edges: Any = ((1, 1), (1, 1))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=edges)
        for block in self.blocks:
            x = block(x)
        return x

    def pool(self, features: Float[Array, "B rows columns D"]) -> Float[Array, "B D"]:
        """Returns one vector an image: the mean."""
        return jnp.mean(features, axis=(1, 2))


def names(config: ResNetConfig) -> Names:
    """Returns the names of the weights in checkpoints."""

    def normed(path: str, stored: str) -> tuple[Rule, ...]:
        return window(f"{path}.conv.kernel", f"{stored}.convolution.weight"), *batch_norm(
            f"{path}.norm", f"{stored}.normalization"
        )

    rules = list(normed("stem", "embedder.embedder"))
    places = [(stage, i) for stage, depth in enumerate(config.depths) for i in range(depth)]
    for i, (stage, layer) in enumerate(places):
        at = f"encoder.stages.{stage}.layers.{layer}"
        for part in range(3 if config.bottleneck else 2):
            rules += normed(f"blocks.{i}.layers.{part}", f"{at}.layer.{part}")
        rules += normed(f"blocks.{i}.shortcut", f"{at}.shortcut")
    head = linear("classifier", "classifier.1")
    return Names(tuple(rules), head=head, prefix="resnet.", prefixes=("",), ignored=("*.num_batches_tracked",))


FAMILY = Family(ResNetConfig.from_hugging_face, ResNet, names)
