"""ConvNeXt: depthwise convolutions, and a feed-forward layer at each place, in stages that halve the image.

    x = x + scale * mlp(norm(depthwise7x7(x)))

Liu et al., arXiv 2201.03545. Images are `[B, height, width, channels]`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from trustcore.errors import ModelError
from trustcore.models.image import ImageModel, check_channels, labels, make_patches
from trustcore.models.model import run
from trustcore.models.name_map import conv, linear, norm, numbered, plain
from trustcore.models.names import Names, under
from trustcore.models.registry import Family
from trustcore.models.values import Values, integers
from trustcore.nn.conv import Conv
from trustcore.nn.linear import Linear
from trustcore.nn.mlp import MLP
from trustcore.nn.module import made_module
from trustcore.nn.norm import LayerNorm
from trustcore.nn.parameter import parameter
from trustcore.ops.activate import activation

_EPS = 1e-6  # of all norms but the last


@dataclasses.dataclass(frozen=True)
class ConvNextConfig:
    """Shape of a ConvNeXt.

    Attributes:
        widths: channels of each stage.
        depths: blocks of each stage.
        patch: pixels of the first convolution's window, which is its stride too.
        scaled: whether what a block adds has a learned scale.
        channels: of an image.
        labels: of a classifier; 0: there is none.
        activation: of the feed-forward layer.
        norm_eps: epsilon of the last norm.
        family: config.json's `model_type`.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    patch: int = 4
    scaled: bool = True
    channels: int = 3
    labels: int = 0
    activation: str = "gelu"
    norm_eps: float = 1e-12
    family: str = "convnext"

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.depths):
            raise ModelError(f"config: {len(self.widths)} hidden_sizes and {len(self.depths)} depths; they must agree.")
        activation(self.activation)

    @property
    def layers(self) -> int:
        """Blocks in all."""
        return sum(self.depths)

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> ConvNextConfig:
        """Returns the configuration that a config.json describes; `names` of tensors tell what is there.

        Raises:
            ModelError: a value is missing, impossible, or asks for what is not supported.
        """
        values = Values(config, "config.json")
        return cls(
            widths=integers(values, "hidden_sizes", (96, 192, 384, 768)),
            depths=integers(values, "depths", (3, 3, 9, 3)),
            patch=values.integer("patch_size", 4),
            scaled=values.number("layer_scale_init_value", 1e-6) > 0,
            channels=values.integer("num_channels", 3),
            labels=labels(config, names),
            activation=values.text("hidden_act", "gelu"),
            norm_eps=values.number("layer_norm_eps", 1e-12),
        )


class Block(nnx.Module):
    """One layer of a stage."""

    def __init__(self, config: ConvNextConfig, width: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        made = {"dtype": dtype, "rngs": rngs}
        options = {"padding": 3, "feature_group_count": width, "dtype": dtype, "param_dtype": dtype}
        self.conv = made_module(lambda r: Conv(width, width, (7, 7), rngs=r, **options), rngs)
        self.norm = LayerNorm(width, eps=_EPS, **made)
        self.mlp = MLP(width, 4 * width, activation=config.activation, **made)
        small = jax.nn.initializers.constant(1e-6)
        self.scale = parameter(small, (width,), dtype, rngs) if config.scaled else None

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Returns the stream after this block."""
        y = self.mlp(self.norm(self.conv(x)))
        return x + (y if self.scale is None else y * jnp.broadcast_to(self.scale.get_value().astype(y.dtype), y.shape))


class Downsample(nnx.Module):
    """A norm, and a convolution that halves the image."""

    def __init__(self, inputs: int, outputs: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        self.norm = LayerNorm(inputs, eps=_EPS, dtype=dtype, rngs=rngs)
        self.conv = make_patches(inputs, outputs, (2, 2), True, dtype, rngs)

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B _ _ o"]:
        """Returns the smaller image."""
        return self.conv(self.norm(x))


class ConvNext(ImageModel):
    """A ConvNeXt.

    Args:
        config: its shape.
        dtype: of activations, and of the parameters that `rngs` draws.
        rngs: None leaves the parameters abstract, for a loader to fill.
    """

    def __init__(self, config: ConvNextConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        super().__init__(config, dtype)
        made = {"dtype": dtype, "rngs": rngs}
        widths, patch = config.widths, (config.patch, config.patch)
        self.patches = make_patches(config.channels, widths[0], patch, True, dtype, rngs)
        self.patch_norm = LayerNorm(widths[0], eps=_EPS, **made)
        pairs = itertools.pairwise(widths)
        self.downsamples = nnx.List([Downsample(narrow, wide, **made) for narrow, wide in pairs])
        sizes = zip(widths, config.depths, strict=True)
        stages = [nnx.List([Block(config, width, **made) for _ in range(depth)]) for width, depth in sizes]
        self.stages = nnx.List(stages)
        self.norm = LayerNorm(widths[-1], eps=config.norm_eps, **made)
        self.classifier = Linear(widths[-1], config.labels, bias=True, **made) if config.labels else None

    def __call__(self, images: Float[Array, "B h w c"]) -> Float[Array, "B rows columns D"]:
        """Returns the last stage's features.

        Args:
            images: normalized as the model was trained with.

        Differentiable in the float weights and the images.

        Raises:
            ModelError: the images have other channels.
        """
        check_channels(images, self.config.channels)
        x = self.patch_norm(self.patches(images.astype(self.dtype)))
        for i, stage in enumerate(self.stages):
            x = x if i == 0 else self.downsamples[i - 1](x)
            for block in stage:
                x = run(block, x)
        return x

    def pool(self, features: Float[Array, "B rows columns D"]) -> Float[Array, "B D"]:
        """Returns one vector an image: the normed mean."""
        return self.norm(jnp.mean(features, axis=(1, 2)))


_BLOCK = (
    *conv("conv", "dwconv"),
    *norm("norm", "layernorm"),
    *linear("mlp.up", "pwconv1"),
    *linear("mlp.down", "pwconv2"),
    plain("scale", "layer_scale_parameter"),
)


def names(config: ConvNextConfig) -> Names:
    """Returns the names of the weights in checkpoints."""
    rules = [*conv("patches", "embeddings.patch_embeddings"), *norm("patch_norm", "embeddings.layernorm")]
    for stage, depth in enumerate(config.depths):
        at = f"encoder.stages.{stage}"
        if stage:
            rules += norm(f"downsamples.{stage - 1}.norm", f"{at}.downsampling_layer.0")
            rules += conv(f"downsamples.{stage - 1}.conv", f"{at}.downsampling_layer.1")
        rules += numbered(depth, under(f"stages.{stage}.{{}}.", f"{at}.layers.{{}}.", _BLOCK))
    rules += norm("norm", "layernorm")
    return Names(tuple(rules), head=linear("classifier", "classifier"), prefix="convnext.", prefixes=("",))


FAMILY = Family(ConvNextConfig.from_hugging_face, ConvNext, names)
