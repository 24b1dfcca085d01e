"""EfficientNet: inverted bottlenecks with squeeze and excitation, scaled in width and depth by two numbers.

    y = depthwise(act(expand(x)));  y = y * gate(mean(y));  x' = project(y) (+ x, where nothing changes its shape)

Each of expand, depthwise and project is a convolution and a batch norm. Tan and Le, arXiv 1905.11946. Images are
`[B, height, width, channels]`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from trustcore.errors import ModelError
from trustcore.models.image import ImageModel, check_channels, labels
from trustcore.models.name_map import Rule, batch_norm, conv, linear, window
from trustcore.models.names import Names, under
from trustcore.models.registry import Family
from trustcore.models.resnet import NormedConv
from trustcore.models.values import LARGEST, Values, integers
from trustcore.nn.conv import Conv
from trustcore.nn.linear import Linear
from trustcore.nn.module import made_module
from trustcore.ops.activate import activation


class BlockShape(NamedTuple):
    """One block.

    Attributes:
        inputs, outputs: channels.
        window: of the depthwise convolution.
        stride: of it.
        expand: by how much the channels grow inside; 1: there is no expansion.
        even: whether a stride pads one pixel less on the left and top than on the right and bottom.
        residual: whether x is added.
    """

    inputs: int
    outputs: int
    window: int
    stride: int
    expand: int
    even: bool
    residual: bool


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig:
    """Shape of an EfficientNet.

    Attributes:
        stem: channels behind the first convolution.
        blocks: all of them.
        top: channels of the last convolution.
        squeeze: channels inside the gate, as a share of the block's inputs.
        channels: of an image.
        pooling: "mean" or "max".
        labels: of a classifier; 0: there is none.
        activation: of all parts.
        norm_eps: epsilon of the batch norms.
        family: config.json's `model_type`.
    """

    stem: int
    blocks: tuple[BlockShape, ...]
    top: int
    squeeze: float = 0.25
    channels: int = 3
    pooling: str = "mean"
    labels: int = 0
    activation: str = "swish"
    norm_eps: float = 1e-3
    family: str = "efficientnet"

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "max"):
            raise ModelError(f"config: pooling_type is {self.pooling!r}; expected 'mean' or 'max'.")
        if self.squeeze <= 0:
            raise ModelError(f"config: squeeze_expansion_ratio is {self.squeeze}; expected a positive number.")
        activation(self.activation)

    @property
    def layers(self) -> int:
        """Blocks in all."""
        return len(self.blocks)

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> EfficientNetConfig:
        """Returns the configuration that a config.json describes; `names` of tensors tell what is there.

        Raises:
            ModelError: a value is missing, impossible, or asks for what is not supported.
        """
        values = Values(config, "config.json")
        width, depth = values.number("width_coefficient", 2.0), values.number("depth_coefficient", 3.1)
        divisor = values.integer("depth_divisor", 8)
        if not 0 < width < 1e4 or not 0 < depth < 1e4:
            raise ModelError(
                f"config.json: width_coefficient is {width}, depth_coefficient {depth}; expected up to 1e4."
            )

        def rounded(count: int) -> int:
            wide = count * width
            found = max(divisor, int(wide + divisor / 2) // divisor * divisor)
            found += divisor if found < 0.9 * wide else 0
            if found >= LARGEST:
                raise ModelError(f"config.json: {count} channels scaled by {width} are too many.")
            return found

        lists = {key: integers(values, key, default) for key, default in _DEFAULTS.items()}
        if len({len(found) for found in lists.values()}) > 1:
            counts = ", ".join(f"{key} {len(found)}" for key, found in lists.items())
            raise ModelError(f"config.json: stages differ in number: {counts}.")
        symmetric = values.get("depthwise_padding")
        symmetric = [] if symmetric is None else symmetric
        if not isinstance(symmetric, list):
            raise ModelError(f"config.json: depthwise_padding is {symmetric!r}; expected a list of numbers of blocks.")
        repeats = [math.ceil(depth * count) for count in lists["num_block_repeats"]]
        if sum(repeats) > 4096:
            raise ModelError(f"config.json: num_block_repeats make {sum(repeats)} blocks; expected at most 4096.")
        blocks: list[BlockShape] = []
        for i, count in enumerate(repeats):
            inputs, outputs = rounded(lists["in_channels"][i]), rounded(lists["out_channels"][i])
            window, expand = lists["kernel_sizes"][i], lists["expand_ratios"][i]
            for j in range(count):
                stride = lists["strides"][i] if j == 0 else 1
                even = len(blocks) not in symmetric
                wide = outputs if j else inputs
                blocks.append(BlockShape(wide, outputs, window, stride, expand, even, j > 0))
        top = rounded(1280)
        if values.integer("hidden_dim", top) != top:
            raise ModelError(
                f"config.json: hidden_dim is {config['hidden_dim']}; width_coefficient {width} makes {top}."
            )
        return cls(
            stem=rounded(32),
            blocks=tuple(blocks),
            top=top,
            squeeze=values.number("squeeze_expansion_ratio", 0.25),
            channels=values.integer("num_channels", 3),
            pooling=values.text("pooling_type", "mean"),
            labels=labels(config, names),
            activation=values.text("hidden_act", "swish"),
            norm_eps=values.number("batch_norm_eps", 1e-3),
        )


_DEFAULTS = {
    "kernel_sizes": (3, 3, 5, 3, 5, 5, 3),
    "in_channels": (32, 16, 24, 40, 80, 112, 192),
    "out_channels": (16, 24, 40, 80, 112, 192, 320),
    "strides": (1, 2, 2, 2, 1, 2, 1),
    "num_block_repeats": (1, 2, 2, 3, 3, 4, 1),
    "expand_ratios": (1, 6, 6, 6, 6, 6, 6),
}


class Gate(nnx.Module):
    """Squeeze and excitation: each channel times a number from 0 to 1 that the means of all say. arXiv 1709.01507."""

    def __init__(
        self, features: int, inner: int, activation: str, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None
    ):
        options = {"kernel_size": (1, 1), "dtype": dtype, "param_dtype": dtype}
        self.reduce = made_module(lambda r: Conv(features, inner, rngs=r, **options), rngs)
        self.expand = made_module(lambda r: Conv(inner, features, rngs=r, **options), rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Returns the gated channels."""
        mean = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * jax.nn.sigmoid(self.expand(activation(self.activation)(self.reduce(mean))))


class Block(nnx.Module):
    """One inverted bottleneck."""

    def __init__(
        self,
        config: EfficientNetConfig,
        shape: BlockShape,
        *,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        made = {"eps": config.norm_eps, "dtype": dtype, "rngs": rngs}
        wide = shape.inputs * shape.expand
        self.expand = NormedConv(shape.inputs, wide, 1, **made) if shape.expand != 1 else None
        half = shape.window // 2
        padding: Any = "SAME" if shape.stride != 2 else ((half - shape.even, half),) * 2
        options = {"stride": shape.stride, "groups": wide, "padding": padding, **made}
        self.depthwise = NormedConv(wide, wide, shape.window, **options)
        inner = max(1, int(shape.inputs * config.squeeze))
        self.gate = Gate(wide, inner, config.activation, dtype=dtype, rngs=rngs)
        self.project = NormedConv(wide, shape.outputs, 1, **made)
        self.residual, self.activation = shape.residual, config.activation

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B _ _ o"]:
        """Returns the stream after this block."""
        act = activation(self.activation)
        y = x if self.expand is None else act(self.expand(x))
        y = self.project(self.gate(act(self.depthwise(y))))
        return y + x if self.residual else y


class EfficientNet(ImageModel):
    """An EfficientNet.

    Args:
        config: its shape.
        dtype: of activations, and of the parameters that `rngs` draws.
        rngs: None leaves the parameters abstract, for a loader to fill.
    """

    def __init__(self, config: EfficientNetConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        super().__init__(config, dtype)
        made = {"eps": config.norm_eps, "dtype": dtype, "rngs": rngs}
        self.stem = NormedConv(config.channels, config.stem, 3, stride=2, padding=((0, 1), (0, 1)), **made)
        self.blocks = nnx.List([Block(config, shape, dtype=dtype, rngs=rngs) for shape in config.blocks])
        self.top = NormedConv(config.blocks[-1].outputs, config.top, 1, **made)
        options = {"bias": True, "dtype": dtype, "rngs": rngs}
        self.classifier = Linear(config.top, config.labels, **options) if config.labels else None

    def __call__(self, images: Float[Array, "B h w c"]) -> Float[Array, "B rows columns D"]:
        """Returns the last convolution's features, the image 32 times smaller.

        Args:
            images: normalized as the model was trained with.

        Differentiable in the float weights and the images.

        Raises:
            ModelError: the images have other channels.
        """
        check_channels(images, self.config.channels)
        act = activation(self.config.activation)
        x = act(self.stem(images.astype(self.dtype)))
        for block in self.blocks:
            x = block(x)
        return act(self.top(x))

    def pool(self, features: Float[Array, "B rows columns D"]) -> Float[Array, "B D"]:
        """Returns one vector an image."""
        return (jnp.mean if self.config.pooling == "mean" else jnp.max)(features, axis=(1, 2))


def _normed(path: str, window_name: str, norm_name: str) -> tuple[Rule, ...]:
    return window(f"{path}.conv.kernel", f"{window_name}.weight"), *batch_norm(f"{path}.norm", norm_name)


_BLOCK = under(
    "blocks.{}.",
    "encoder.blocks.{}.",
    (
        *_normed("expand", "expansion.expand_conv", "expansion.expand_bn"),
        *_normed("depthwise", "depthwise_conv.depthwise_conv", "depthwise_conv.depthwise_norm"),
        *conv("gate.reduce", "squeeze_excite.reduce"),
        *conv("gate.expand", "squeeze_excite.expand"),
        *_normed("project", "projection.project_conv", "projection.project_bn"),
    ),
)


def names(config: EfficientNetConfig) -> Names:
    """Returns the names of the weights in checkpoints."""
    del config
    return Names(
        (
            *_normed("stem", "embeddings.convolution", "embeddings.batchnorm"),
            *_normed("top", "encoder.top_conv", "encoder.top_bn"),
        ),
        _BLOCK,
        linear("classifier", "classifier"),
        prefix="efficientnet.",
        prefixes=("",),
        ignored=("*.num_batches_tracked",),
    )


FAMILY = Family(EfficientNetConfig.from_hugging_face, EfficientNet, names)
