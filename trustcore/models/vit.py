"""The vision transformer: an image as a row of patches, norms before each sum.

    x = [class token, registers, patches(image)] + positions
    x += a * attention(norm(x)), x += b * mlp(norm(x))  for each block

ViT (Dosovitskiy et al., arXiv 2010.11929), DINOv2 (Oquab et al., arXiv 2304.07193: a and b are learned scales, the
feed-forward layer may be gated; with registers: Darcet et al., arXiv 2309.16588), and the image towers of CLIP (Radford
et al., arXiv 2103.00020: a norm before the first block) and SigLIP (Zhai et al., arXiv 2303.15343: no class token, an
attention pools the patches). Images are `[B, height, width, channels]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from trustcore.errors import ModelError
from trustcore.models.image import labels, make_patches
from trustcore.models.model import Model, run, sample_images
from trustcore.models.name_map import Rule, conv, fused, joined, linear, norm, numbered, plain
from trustcore.models.names import Names, under
from trustcore.models.registry import Family
from trustcore.models.values import Values
from trustcore.nn.encoder_attention import EncoderAttention
from trustcore.nn.linear import Linear
from trustcore.nn.mlp import MLP
from trustcore.nn.norm import LayerNorm
from trustcore.nn.parameter import parameter
from trustcore.nn.stack import Stack, run_blocks
from trustcore.ops.activate import activation

_CLIP = ("clip_vision_model", "siglip_vision_model")
_DINO = ("dinov2", "dinov2_with_registers")


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Shape of a vision transformer.

    Attributes:
        features: D.
        layers: L.
        heads: N, a divisor of D.
        hidden: F.
        image: (height, width) it was trained with, in pixels.
        patch: (height, width) of a patch.
        channels: of an image.
        class_token: whether one stands before the patches.
        registers: further tokens behind it.
        early_norm: whether there is a norm before the first block.
        patch_bias, qkv_bias: which products have one.
        scaled: whether what a layer adds has a learned scale.
        gated: whether the feed-forward layer has a gate.
        pooler: "" none, "dense" behind the class token, "attention".
        labels: of a classifier; 0: there is none.
        activation: of the feed-forward layer.
        norm_eps: epsilon of the norms.
        family: config.json's `model_type`.
    """

    features: int
    layers: int
    heads: int
    hidden: int
    image: tuple[int, int]
    patch: tuple[int, int]
    channels: int = 3
    class_token: bool = True
    registers: int = 0
    early_norm: bool = False
    patch_bias: bool = True
    qkv_bias: bool = True
    scaled: bool = False
    gated: bool = False
    pooler: str = ""
    labels: int = 0
    activation: str = "gelu"
    norm_eps: float = 1e-12
    family: str = "vit"

    def __post_init__(self) -> None:
        if self.features % self.heads:
            raise ModelError(f"config: {self.heads} heads do not divide a width of {self.features}.")
        if self.image[0] < self.patch[0] or self.image[1] < self.patch[1]:
            raise ModelError(f"config: an image of {self.image} pixels has no patch of {self.patch}.")
        activation(self.activation)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of an image, down and across."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> VitConfig:
        """Returns the configuration that a config.json describes; `names` of tensors tell what is there.

        Raises:
            ModelError: a value is missing, impossible, or asks for what is not supported.
        """
        values = Values(config, "config.json")
        family = values.text("model_type", "vit")
        dino, clip, siglip = family in _DINO, family == _CLIP[0], family == _CLIP[1]
        features = values.integer("hidden_size", 768)
        gated = values.flag("use_swiglu_ffn", False) if dino else False
        hidden = 4 * features
        if dino:
            hidden = int(features * values.number("mlp_ratio", 4))
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden
        elif values.get("intermediate_size") is not None:
            hidden = values.integer("intermediate_size")
        pooler = "dense" if family == "vit" and any(n.endswith("pooler.dense.weight") for n in names) else ""
        if siglip and values.flag("vision_use_head", True):
            pooler = "attention"
        return cls(
            features=features,
            layers=values.integer("num_hidden_layers", 12),
            heads=values.integer("num_attention_heads", 12),
            hidden=hidden,
            image=_pair(values, "image_size", 224),
            patch=_pair(values, "patch_size", {_CLIP[0]: 32, **dict.fromkeys(_DINO, 14)}.get(family, 16)),
            channels=values.integer("num_channels", 3),
            class_token=not siglip,
            registers=values.integer("num_register_tokens", 4, least=0) if family == _DINO[1] else 0,
            early_norm=clip,
            patch_bias=not clip,
            qkv_bias=True if clip or siglip else values.flag("qkv_bias", True),
            scaled=dino,
            gated=gated,
            pooler=pooler,
            labels=labels(config, names),
            activation="silu" if gated else values.text("hidden_act", _ACTIVATIONS.get(family, "gelu")),
            norm_eps=values.number("layer_norm_eps", {"vit": 1e-12, _CLIP[0]: 1e-5}.get(family, 1e-6)),
            family=family,
        )


_ACTIVATIONS = {"clip_vision_model": "quick_gelu", "siglip_vision_model": "gelu_pytorch_tanh"}


def _pair(values: Values, key: str, default: int) -> tuple[int, int]:
    given = values.get(key)
    if isinstance(given, list):
        if len(given) != 2:
            raise ModelError(f"config.json: {key} is {given!r}; expected a number of pixels, or two of them.")
        inner = Values({"height": given[0], "width": given[1]}, f"config.json: {key}")
        return inner.integer("height"), inner.integer("width")
    size = values.integer(key, default)
    return size, size


class Block(nnx.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(
        self,
        features: int,
        heads: int,
        hidden: int,
        *,
        activation: str,
        norm_eps: float,
        gated: bool = False,
        qkv_bias: bool = True,
        scaled: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        made = {"dtype": dtype, "rngs": rngs}
        self.attention_norm = LayerNorm(features, eps=norm_eps, **made)
        self.attention = EncoderAttention(features, heads, features // heads, bias=qkv_bias, out_bias=True, **made)
        self.mlp_norm = LayerNorm(features, eps=norm_eps, **made)
        self.mlp = MLP(features, hidden, activation=activation, gated=gated, **made)
        ones = jax.nn.initializers.ones
        self.attention_scale = parameter(ones, (features,), dtype, rngs) if scaled else None
        self.mlp_scale = parameter(ones, (features,), dtype, rngs) if scaled else None

    def __call__(self, x: Float[Array, "B T D"], mask: jax.Array | None = None) -> Float[Array, "B T D"]:
        """Returns the stream after this layer."""
        x = x + _scaled(self.attention(self.attention_norm(x), mask=mask), self.attention_scale)
        return x + _scaled(self.mlp(self.mlp_norm(x)), self.mlp_scale)


def _scaled(x: jax.Array, scale: nnx.Param[Any] | None) -> jax.Array:
    return x if scale is None else x * jnp.broadcast_to(scale.get_value().astype(x.dtype), x.shape)


class AttentionPool(nnx.Module):
    """One learned query looks at all patches: SigLIP's image vector."""

    def __init__(self, config: VitConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        made = {"dtype": dtype, "rngs": rngs}
        features, heads = config.features, config.heads
        self.probe = parameter(jax.nn.initializers.normal(1.0), (1, 1, features), dtype, rngs)
        self.attention = EncoderAttention(features, heads, features // heads, **made)
        self.norm = LayerNorm(features, eps=config.norm_eps, **made)
        self.mlp = MLP(features, config.hidden, activation=config.activation, **made)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """Returns one vector an image."""
        probe = self.probe.get_value().astype(x.dtype)
        y = self.attention(jnp.broadcast_to(probe, (x.shape[0], 1, x.shape[2])), x)
        return (y + self.mlp(self.norm(y)))[:, 0]


class Vit(Model):
    """A vision transformer.

    Args:
        config: its shape.
        dtype: of activations, and of the parameters that `rngs` draws.
        rngs: None leaves the parameters abstract, for a loader to fill.
    """

    stacks = ("blocks",)

    def __init__(self, config: VitConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        super().__init__(config, dtype)
        made = {"dtype": dtype, "rngs": rngs}
        features, clip = config.features, config.family in _CLIP
        self.patches = make_patches(config.channels, features, config.patch, config.patch_bias, dtype, rngs)
        small = jax.nn.initializers.normal(0.02)
        single = (features,) if clip else (1, 1, features)
        self.class_token = parameter(small, single, dtype, rngs) if config.class_token else None
        registers = (1, config.registers, features)
        self.registers = parameter(small, registers, dtype, rngs) if config.registers else None
        places = config.grid[0] * config.grid[1] + config.class_token
        self.positions = parameter(small, (places, features) if clip else (1, places, features), dtype, rngs)
        eps = config.norm_eps
        self.early_norm = LayerNorm(features, eps=eps, **made) if config.early_norm else None
        options = {
            "activation": config.activation,
            "norm_eps": eps,
            "gated": config.gated,
            "qkv_bias": config.qkv_bias,
            "scaled": config.scaled,
            **made,
        }
        shape = (features, config.heads, config.hidden)
        self.blocks: nnx.List[Any] | Stack = nnx.List([Block(*shape, **options) for _ in range(config.layers)])
        self.norm = LayerNorm(features, eps=eps, **made)
        self.pooler = Linear(features, features, bias=True, **made) if config.pooler == "dense" else None
        self.attention_pool = AttentionPool(config, **made) if config.pooler == "attention" else None
        width = features * (2 if config.family in _DINO else 1)
        self.classifier = Linear(width, config.labels, bias=True, **made) if config.labels else None

    def __call__(self, images: Float[Array, "B h w c"]) -> Float[Array, "B T D"]:
        """Returns the states of class token, registers and patches.

        Args:
            images: normalized as the model was trained with. For sizes other than `config.image`, positions are
                interpolated (bicubic).

        The last norm is part of it, except for CLIP, which norms the class token alone (`pool`). Differentiable in the
        float weights and the images.

        Raises:
            ModelError: an image is smaller than a patch, or has other channels.
        """
        config = self.config
        height, width = images.shape[1] // config.patch[0], images.shape[2] // config.patch[1]
        if not height or not width or images.shape[3] != config.channels:
            raise ModelError(
                f"images of {images.shape[1]} x {images.shape[2]} pixels and {images.shape[3]} channels; expected at "
                f"least {config.patch[0]} x {config.patch[1]}, and {config.channels} channels in the last axis."
            )
        x = self.patches(images.astype(self.dtype))
        x = x.reshape(x.shape[0], -1, config.features)
        heads = self._tokens(self.class_token, x)
        x = jnp.concatenate([*heads, x], axis=1) + self._places(height, width).astype(self.dtype)
        x = jnp.concatenate([x[:, : len(heads)], *self._tokens(self.registers, x), x[:, len(heads) :]], axis=1)
        x = x if self.early_norm is None else self.early_norm(x)
        x, _ = run_blocks(self.blocks, lambda block, x, _: (run(block, x), None), x)
        return x if config.family == _CLIP[0] else self.norm(x)

    def example(self) -> tuple[Any, ...]:
        """See `Model.example`."""
        return (sample_images(self.config.image, self.config.channels),)

    def pool(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """Returns one vector an image: the class token's state, through the pooler where there is one."""
        if self.attention_pool is not None:
            return self.attention_pool(hidden)
        first = hidden[:, 0]
        first = self.norm(first) if self.config.family == _CLIP[0] else first
        return first if self.pooler is None else jnp.tanh(self.pooler(first))

    def classify(self, images: Float[Array, "B h w c"]) -> Float[Array, "B labels"]:
        """Returns float32 logits of the labels.

        Raises:
            ModelError: the checkpoint had no classifier.
        """
        if self.classifier is None:
            raise ModelError("this model has no classifier; its states are model(images).")
        hidden = self(images)
        first = hidden[:, 0]
        if self.config.family in _DINO:
            patches = jnp.mean(hidden[:, 1 + self.config.registers :], axis=1)
            first = jnp.concatenate([first, patches], axis=-1)
        return self.classifier(first).astype(jnp.float32)

    def _tokens(self, token: nnx.Param[Any] | None, x: jax.Array) -> list[jax.Array]:
        if token is None:
            return []
        rows = token.get_value().astype(x.dtype).reshape(1, -1, x.shape[2])
        return [jnp.broadcast_to(rows, (x.shape[0], *rows.shape[1:]))]

    def _places(self, height: int, width: int) -> jax.Array:
        table = self.positions.get_value().reshape(1, -1, self.config.features)
        if (height, width) == self.config.grid:
            return table
        first, grid = jnp.split(table.astype(jnp.float32), [int(self.config.class_token)], axis=1)
        down, across = (bicubic(old, new) for old, new in zip(self.config.grid, (height, width), strict=True))
        grid = grid.reshape(*self.config.grid, -1)
        grid = jnp.einsum("ih,jw,hwd->ijd", jnp.asarray(down), jnp.asarray(across), grid, precision="highest")
        return jnp.concatenate([first, grid.reshape(1, height * width, -1)], axis=1)


def bicubic(old: int, new: int) -> np.ndarray:
    """Returns float32 `[new, old]`, the matrix that interpolates `old` samples at `new` places, centres in the middle.

    Keys' kernel with a = -0.75, borders repeated: PyTorch's, with which these models were made to other sizes.
    """
    places = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(places).astype(int)
    matrix = np.zeros((new, old))
    a = -0.75
    for tap in range(-1, 3):
        t = np.abs(places - (first + tap))
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        far = a * (t**3 - 5 * t**2 + 8 * t - 4)
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(t <= 1, near, far))
    return matrix.astype(np.float32)


CLIP_BLOCK = (
    *norm("attention_norm", "layer_norm1"),
    *linear("attention.query", "self_attn.q_proj"),
    *linear("attention.key", "self_attn.k_proj"),
    *linear("attention.value", "self_attn.v_proj"),
    *linear("attention.out", "self_attn.out_proj"),
    *norm("mlp_norm", "layer_norm2"),
    *linear("mlp.up", "mlp.fc1"),
    *linear("mlp.down", "mlp.fc2"),
)


def tower_rules(config: VitConfig) -> tuple[Rule, ...]:
    """Returns the rules of CLIP's or SigLIP's image tower."""
    parts = ("query", "key", "value")
    pool = (
        plain("probe", "probe"),
        fused([f"attention.{part}.kernel" for part in parts], "attention.in_proj_weight"),
        fused([f"attention.{part}.bias" for part in parts], "attention.in_proj_bias"),
        *linear("attention.out", "attention.out_proj"),
        *norm("norm", "layernorm"),
        *linear("mlp.up", "mlp.fc1"),
        *linear("mlp.down", "mlp.fc2"),
    )
    return (
        *conv("patches", "embeddings.patch_embedding"),
        plain("class_token", "embeddings.class_embedding"),
        plain("positions", "embeddings.position_embedding.weight"),
        *norm("early_norm", "pre_layrnorm"),
        *numbered(config.layers, under("blocks.{}.", "encoder.layers.{}.", CLIP_BLOCK)),
        *norm("norm", "post_layernorm"),
        *under("attention_pool.", "head.", pool),
    )


def names(config: VitConfig) -> Names:
    """Returns the names of the weights in checkpoints."""
    if config.family in _CLIP:
        ignored = ("*.position_ids", "visual_projection.*")
        return Names(tower_rules(config), prefixes=("vision_model.",), ignored=ignored)
    dino = config.family in _DINO
    norms = ("norm1", "norm2") if dino else ("layernorm_before", "layernorm_after")
    if config.gated:
        mlp = (*joined(("mlp.gate", "mlp.up"), "mlp.weights_in"), *linear("mlp.down", "mlp.weights_out"))
    elif dino:
        mlp = (*linear("mlp.up", "mlp.fc1"), *linear("mlp.down", "mlp.fc2"))
    else:
        mlp = (*linear("mlp.up", "intermediate.dense"), *linear("mlp.down", "output.dense"))
    block = (
        *norm("attention_norm", norms[0]),
        *linear("attention.query", "attention.attention.query"),
        *linear("attention.key", "attention.attention.key"),
        *linear("attention.value", "attention.attention.value"),
        *linear("attention.out", "attention.output.dense"),
        plain("attention_scale", "layer_scale1.lambda1"),
        *norm("mlp_norm", norms[1]),
        *mlp,
        plain("mlp_scale", "layer_scale2.lambda1"),
    )
    return Names(
        (
            *conv("patches", "embeddings.patch_embeddings.projection"),
            plain("class_token", "embeddings.cls_token"),
            plain("registers", "embeddings.register_tokens"),
            plain("positions", "embeddings.position_embeddings"),
            *norm("norm", "layernorm"),
            *linear("pooler", "pooler.dense"),
        ),
        under("blocks.{}.", "encoder.layer.{}.", block),
        linear("classifier", "classifier"),
        prefixes=("vit.", "dinov2.", "dinov2_with_registers."),
        ignored=("embeddings.mask_token", "decoder.*"),
    )


FAMILY = Family(VitConfig.from_hugging_face, Vit, names)
