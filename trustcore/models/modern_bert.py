"""ModernBERT: norms before each sum, rotary positions, local and global attention in turn, gated feed-forward.

    h = norm(words[tokens]);  h += attention(norm(h)), h += mlp(norm(h))  for each block;  norm(h)

A local layer's token sees those at most `window` before and behind it. The first block's attention has no norm of its
own. Warner et al., arXiv 2412.13663.
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
from trustcore.models.heads import Head, HeadConfig, HeadedEncoder, HeadNames, Task, labels_of, task_of
from trustcore.models.model import key_mask, run
from trustcore.models.name_map import joined, linear, norm, plain
from trustcore.models.names import Names, under
from trustcore.models.registry import Family
from trustcore.models.values import Values
from trustcore.nn.embedding import Embedding
from trustcore.nn.encoder_attention import EncoderAttention
from trustcore.nn.mlp import MLP
from trustcore.nn.norm import LayerNorm
from trustcore.nn.stack import Stack, run_blocks
from trustcore.ops.activate import activation
from trustcore.ops.rope import RopeConfig, angles


@dataclasses.dataclass(frozen=True)
class ModernBertConfig:
    """Shape of a ModernBERT.

    Attributes:
        vocab_size: V.
        features: D.
        heads: N, a divisor of D.
        hidden: F.
        context: tokens the model was made for.
        local: for each layer, whether its attention is local.
        window: tokens that a local layer sees to either side.
        global_rope, local_rope: rotary positions of the two kinds of layer.
        norm_bias, attention_bias, mlp_bias: which parts have one.
        activation: of the gate.
        norm_eps: epsilon of the norms.
        family: config.json's `model_type`.
        head: for a task; None: there is none.
    """

    vocab_size: int
    features: int
    heads: int
    hidden: int
    context: int
    local: tuple[bool, ...]
    window: int
    global_rope: RopeConfig
    local_rope: RopeConfig
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    activation: str = "gelu"
    norm_eps: float = 1e-5
    family: str = "modernbert"
    head: HeadConfig | None = None

    def __post_init__(self) -> None:
        if self.features % self.heads:
            raise ModelError(f"config: {self.heads} heads do not divide a width of {self.features}.")
        activation(self.activation)

    @property
    def layers(self) -> int:
        """L."""
        return len(self.local)

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> ModernBertConfig:
        """Returns the configuration that a config.json describes.

        Raises:
            ModelError: a value is missing, impossible, or asks for what is not supported.
        """
        values = Values(config, "config.json")
        features, heads = values.integer("hidden_size", 768), values.integer("num_attention_heads", 12)
        layers = values.integer("num_hidden_layers", 22)
        if layers > 4096:
            raise ModelError(f"config.json: num_hidden_layers is {layers}; expected at most 4096.")
        size = features // heads
        return cls(
            vocab_size=values.integer("vocab_size", 50368),
            features=features,
            heads=heads,
            hidden=values.integer("intermediate_size", 1152),
            context=values.integer("max_position_embeddings", 8192),
            local=_local(values, layers),
            window=values.integer("local_attention", 128) // 2,
            global_rope=_rope(values, "full_attention", "global_rope_theta", 160000.0, size),
            local_rope=_rope(values, "sliding_attention", "local_rope_theta", 10000.0, size),
            norm_bias=values.flag("norm_bias", False),
            attention_bias=values.flag("attention_bias", False),
            mlp_bias=values.flag("mlp_bias", False),
            activation=values.text("hidden_activation", "gelu"),
            norm_eps=values.number("norm_eps", 1e-5),
            head=_head(values, config, names, features),
        )


def _head(values: Values, config: Mapping[str, Any], names: Collection[str], features: int) -> HeadConfig | None:
    task = task_of(config, names, _HEADS)
    if task is None:
        return None
    return HeadConfig(
        task,
        labels_of(config, task),
        dense=features,
        dense_bias=values.flag("classifier_bias", False),
        activation=values.text("classifier_activation", "gelu"),
        normed=True,
        norm_bias=values.flag("norm_bias", False),
        norm_eps=values.number("norm_eps", 1e-5),
        pool=values.choice("classifier_pooling", "cls", {"cls": "first", "mean": "mean"}),
        tied=values.flag("tie_word_embeddings", True),
        masked_bias=values.flag("decoder_bias", True),
    )


def _local(values: Values, layers: int) -> tuple[bool, ...]:
    kinds = values.get("layer_types")
    if kinds is None:
        every = values.integer("global_attn_every_n_layers", 3)
        return tuple(i % every != 0 for i in range(layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in known for kind in kinds):
        raise ModelError(f"config.json: layer_types is {kinds!r}; expected {layers} of {' and '.join(known)}.")
    return tuple(kind == "sliding_attention" for kind in kinds)


def _rope(values: Values, kind: str, old: str, theta: float, size: int) -> RopeConfig:
    described = values.get("rope_parameters")
    described = described.get(kind) if isinstance(described, Mapping) else None
    inner = Values(described if isinstance(described, Mapping) else {}, f"config.json: rope_parameters.{kind}")
    if inner.text("rope_type", "default") != "default":
        raise ModelError(f"config.json: rope_type of {kind} is {inner.get('rope_type')!r}; expected 'default'.")
    given = values.get(old)
    if given is None:  # some files name it null, where the other kind's is meant
        given = theta
    return RopeConfig(size, theta=inner.number("rope_theta", float(given) if isinstance(given, int | float) else theta))


class Block(nnx.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(
        self,
        config: ModernBertConfig,
        *,
        local: bool,
        first: bool,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        made = {"dtype": dtype, "rngs": rngs}
        normed = {"eps": config.norm_eps, "bias": config.norm_bias, **made}
        self.attention_norm = None if first else LayerNorm(config.features, **normed)
        self.attention = EncoderAttention(
            config.features,
            config.heads,
            config.features // config.heads,
            bias=config.attention_bias,
            rope=config.local_rope if local else config.global_rope,
            **made,
        )
        self.mlp_norm = LayerNorm(config.features, **normed)
        self.local = local
        mlp = {"activation": config.activation, "gated": True, "bias": config.mlp_bias, **made}
        self.mlp = MLP(config.features, config.hidden, **mlp)

    def __call__(self, x: Float[Array, "B T D"], mask: jax.Array | None, turn: Any) -> Float[Array, "B T D"]:
        """Returns the stream after this layer."""
        normed = x if self.attention_norm is None else self.attention_norm(x)
        x = x + self.attention(normed, mask=mask, turn=turn)
        return x + self.mlp(self.mlp_norm(x))


class ModernBert(HeadedEncoder):
    """A ModernBERT.

    Args:
        config: its shape.
        dtype: of activations, and of the parameters that `rngs` draws.
        rngs: None leaves the parameters abstract, for a loader to fill.
    """

    stacks = ("blocks",)

    def __init__(self, config: ModernBertConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        super().__init__(config, dtype)
        made = {"dtype": dtype, "rngs": rngs}
        normed = {"eps": config.norm_eps, "bias": config.norm_bias, **made}
        self.words = Embedding(config.vocab_size, config.features, **made)
        self.embedding_norm = LayerNorm(config.features, **normed)
        self.blocks: nnx.List[Any] | Stack = nnx.List(
            [Block(config, local=local, first=i == 0, **made) for i, local in enumerate(config.local)]
        )
        self.norm = LayerNorm(config.features, **normed)
        words = (config.vocab_size, config.features)
        self.head = None if config.head is None else Head(config.features, words, config.head, **made)

    def __call__(self, tokens: Int[Array, "B T"], mask: Any = None) -> Float[Array, "B T D"]:
        """Returns the last layer's states, normed.

        Args:
            tokens: T tokens of B rows; the first of a row stands at position 0, padding or not.
            mask: `[B, T]`, zero or False where a token is padding (on either side); None: all count.

        What stands in the rows of padding means nothing. Differentiable in the float weights.
        """
        config, length = self.config, tokens.shape[1]
        place = jax.lax.broadcasted_iota(jnp.int32, (1, length), 1)
        near = (jnp.abs(place[:, :, None] - place[:, None, :]) <= config.window)[:, None]  # [1, 1, T, T]
        visible = key_mask(mask)
        close = near if visible is None else near & visible
        turns = {local: angles(place, config.local_rope if local else config.global_rope) for local in (True, False)}
        x = self.embedding_norm(self.words(tokens).astype(self.dtype))

        def call(block: Any, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return run(block, x, close if block.local else visible, turns[block.local]), None

        return self.norm(run_blocks(self.blocks, call, x)[0])


_BLOCK = under(
    "blocks.{}.",
    "layers.{}.",
    (
        *norm("attention_norm", "attn_norm"),
        *joined(("attention.query", "attention.key", "attention.value"), "attn.Wqkv"),
        *linear("attention.out", "attn.Wo"),
        *norm("mlp_norm", "mlp_norm"),
        *joined(("mlp.gate", "mlp.up"), "mlp.Wi"),
        *linear("mlp.down", "mlp.Wo"),
    ),
)


_CLASSIFIER = HeadNames("head.dense", "head.norm", "classifier")
_HEADS: Mapping[Task, HeadNames] = {
    "masked": HeadNames("head.dense", "head.norm", "decoder", "decoder.bias"),
    "labels": _CLASSIFIER,
    "tokens": _CLASSIFIER,
    "spans": _CLASSIFIER,
}


def names(config: ModernBertConfig) -> Names:
    """Returns the names of the weights in checkpoints."""
    return Names(
        (
            plain("words.table", "embeddings.tok_embeddings.weight"),
            *norm("embedding_norm", "embeddings.norm"),
            *norm("norm", "final_norm"),
        ),
        _BLOCK,
        head=() if config.head is None else _HEADS[config.head.task].rules,
        prefixes=("model.",),
        ignored=("head.*", "decoder.*", "classifier.*"),
    )


FAMILY = Family(ModernBertConfig.from_hugging_face, ModernBert, names)
