"""Two towers that put images and texts into one space: CLIP and SigLIP.

    logits[image, text] = exp(scale) * cosine(image vector, text vector)  (+ bias: SigLIP)

CLIP's text tower looks back only, and its vector is the state of the text's end, through a product; SigLIP's looks in
both directions, and its vector is the last state, padding or not. Radford et al., arXiv 2103.00020; Zhai et al., arXiv
2303.15343.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from trustcore.errors import ModelError
from trustcore.models.model import Model, key_mask, run, sample_images, sample_tokens
from trustcore.models.name_map import linear, norm, numbered, plain
from trustcore.models.names import Names, under
from trustcore.models.registry import Family
from trustcore.models.values import Values
from trustcore.models.vit import CLIP_BLOCK, Block, Vit, VitConfig, tower_rules
from trustcore.nn.decoder_state import causal_mask
from trustcore.nn.embedding import Embedding
from trustcore.nn.linear import Linear
from trustcore.nn.norm import LayerNorm
from trustcore.nn.parameter import parameter
from trustcore.nn.stack import Stack, run_blocks
from trustcore.ops.activate import activation


@dataclasses.dataclass(frozen=True)
class TextTowerConfig:
    """Shape of the tower of texts.

    Attributes:
        vocab_size: V.
        features: D.
        layers: L.
        heads: N, a divisor of D.
        hidden: F.
        context: tokens it reads.
        end_token: CLIP: whose state is the text's; 2: the largest token of a row, as models from before
            transformers 4.31 have it.
        activation: of the feed-forward layer.
        norm_eps: epsilon of the norms.
        projected: SigLIP: width of the text's vector.
    """

    vocab_size: int
    features: int
    layers: int
    heads: int
    hidden: int
    context: int
    end_token: int
    activation: str
    norm_eps: float
    projected: int

    def __post_init__(self) -> None:
        if self.features % self.heads:
            raise ModelError(f"config: {self.heads} heads do not divide a width of {self.features}.")
        activation(self.activation)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Shape of a pair of towers.

    Attributes:
        text, image: the towers.
        projected: width of the common space.
        family: "clip" or "siglip".
    """

    text: TextTowerConfig
    image: VitConfig
    projected: int
    family: str = "clip"

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> ClipConfig:
        """Returns the configuration that a config.json describes.

        Raises:
            ModelError: a value is missing, impossible, or asks for what is not supported.
        """
        del names
        values = Values(config, "config.json")
        family = values.text("model_type", "clip")
        siglip = family == "siglip"
        parts = {}
        for part in ("text_config", "vision_config"):
            given = values.get(part)
            if given is not None and not isinstance(given, Mapping):
                raise ModelError(f"config.json: {part} is {given!r}; expected an object.")
            parts[part] = given or {}
        inner = Values(parts["text_config"], "config.json: text_config")
        features = inner.integer("hidden_size", 768 if siglip else 512)
        text = TextTowerConfig(
            vocab_size=inner.integer("vocab_size", 32000 if siglip else 49408),
            features=features,
            layers=inner.integer("num_hidden_layers", 12),
            heads=inner.integer("num_attention_heads", 12 if siglip else 8),
            hidden=inner.integer("intermediate_size", 3072 if siglip else 2048),
            context=inner.integer("max_position_embeddings", 64 if siglip else 77),
            end_token=inner.integer("eos_token_id", 49407, least=0),
            activation=inner.text("hidden_act", "gelu_pytorch_tanh" if siglip else "quick_gelu"),
            norm_eps=inner.number("layer_norm_eps", 1e-6 if siglip else 1e-5),
            projected=inner.integer("projection_size", features),
        )
        image = VitConfig.from_hugging_face({**parts["vision_config"], "model_type": f"{family}_vision_model"})
        if siglip and text.projected != image.features:
            raise ModelError(
                f"config.json: vectors of texts have {text.projected} channels, of images {image.features}; they must "
                "agree."
            )
        projected = image.features if siglip else values.integer("projection_dim", 512)
        return cls(text, image, projected, family)


class TextTower(nnx.Module):
    """The tower of texts."""

    def __init__(
        self, config: TextTowerConfig, *, causal: bool, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None
    ):
        made = {"dtype": dtype, "rngs": rngs}
        self.words = Embedding(config.vocab_size, config.features, **made)
        self.positions = Embedding(config.context, config.features, **made)
        shape = (config.features, config.heads, config.hidden)
        options = {"activation": config.activation, "norm_eps": config.norm_eps, **made}
        self.blocks: nnx.List[Any] | Stack = nnx.List([Block(*shape, **options) for _ in range(config.layers)])
        self.norm = LayerNorm(config.features, eps=config.norm_eps, **made)
        self.head = None if causal else Linear(config.features, config.projected, bias=True, **made)
        self.config, self.causal, self.dtype = config, causal, jnp.dtype(dtype)

    def __call__(self, tokens: Int[Array, "B T"], mask: Any = None) -> Float[Array, "B T D"]:
        """Returns the states of tokens; see `Clip.texts`."""
        length = tokens.shape[1]
        if length > self.config.context:
            raise ModelError(f"{length} tokens are more than the {self.config.context} this model reads.")
        place = jax.lax.broadcasted_iota(jnp.int32, (1, length), 1)
        x = (self.words(tokens) + self.positions(jnp.broadcast_to(place, tokens.shape))).astype(self.dtype)
        visible = key_mask(mask)
        if self.causal:
            past = causal_mask(jnp.zeros((), jnp.int32), length, length)
            visible = past if visible is None else past & visible
        return self.norm(run_blocks(self.blocks, lambda block, x, _: (run(block, x, visible), None), x)[0])

    def pool(self, hidden: Float[Array, "B T D"], tokens: Int[Array, "B T"]) -> Float[Array, "B _"]:
        """Returns one vector a text, before CLIP's projection."""
        if self.head is not None:
            return self.head(hidden[:, -1])
        end = self.config.end_token
        place = jnp.argmax(tokens if end == 2 else tokens == end, axis=-1)
        return jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]


class Clip(Model):
    """A pair of towers.

    Args:
        config: their shapes.
        dtype: of activations, and of the parameters that `rngs` draws.
        rngs: None leaves the parameters abstract, for a loader to fill.
    """

    stacks = ("text.blocks", "image.blocks")

    def __init__(self, config: ClipConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        super().__init__(config, dtype)
        made = {"dtype": dtype, "rngs": rngs}
        clip = config.family == "clip"
        self.text = TextTower(config.text, causal=clip, **made)
        self.image = Vit(config.image, **made)
        self.text_projection = Linear(config.text.features, config.projected, **made) if clip else None
        self.image_projection = Linear(config.image.features, config.projected, **made) if clip else None
        shape = () if clip else (1,)
        start = jax.nn.initializers.constant(2.6592)  # ln(1 / 0.07)
        self.scale = parameter(start, shape, jnp.float32, rngs)
        self.bias = None if clip else parameter(jax.nn.initializers.constant(-10.0), shape, jnp.float32, rngs)

    def __call__(
        self, images: Float[Array, "B h w c"], tokens: Int[Array, "C T"], mask: Any = None
    ) -> Float[Array, "B C"]:
        """Returns float32 logits of each image with each text: CLIP's for a softmax, SigLIP's for a sigmoid.

        Args:
            images: normalized as the model was trained with.
            tokens: of texts.
            mask: `[C, T]`, zero or False where a token is padding; None: all count, as SigLIP was trained.

        Differentiable in the float weights and the images.
        """
        image, text = self.images(images), self.texts(tokens, mask)
        logits = jnp.matmul(image, text.T, precision="highest") * jnp.exp(self._number(self.scale))
        return logits if self.bias is None else logits + self._number(self.bias)

    def example(self) -> tuple[Any, ...]:
        """See `Model.example`."""
        text, image = self.config.text, self.config.image
        return sample_images(image.image, image.channels), sample_tokens(text.vocab_size, text.context)

    def images(self, images: Float[Array, "B h w c"]) -> Float[Array, "B D"]:
        """Returns the vectors of images, float32, of length one."""
        vector = self.image.pool(self.image(images))
        return _unit(vector if self.image_projection is None else self.image_projection(vector))

    def texts(self, tokens: Int[Array, "B T"], mask: Any = None) -> Float[Array, "B D"]:
        """Returns the vectors of texts, float32, of length one; arguments as in a call."""
        vector = self.text.pool(self.text(tokens, mask), tokens)
        return _unit(vector if self.text_projection is None else self.text_projection(vector))

    def _number(self, parameter: nnx.Param[Any]) -> jax.Array:
        return parameter.get_value().astype(jnp.float32).reshape(1, 1)


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))


def names(config: ClipConfig) -> Names:
    """Returns the names of the weights in checkpoints."""
    text = (
        plain("words.table", "embeddings.token_embedding.weight"),
        plain("positions.table", "embeddings.position_embedding.weight"),
        *numbered(config.text.layers, under("blocks.{}.", "encoder.layers.{}.", CLIP_BLOCK)),
        *norm("norm", "final_layer_norm"),
        *linear("head", "head"),
    )
    rules = (
        *under("text.", "text_model.", text),
        *under("image.", "vision_model.", tower_rules(config.image)),
        *linear("text_projection", "text_projection"),
        *linear("image_projection", "visual_projection"),
        plain("scale", "logit_scale"),
        plain("bias", "logit_bias"),
    )
    return Names(rules, ignored=("*.position_ids",))


FAMILY = Family(ClipConfig.from_hugging_face, Clip, names)
