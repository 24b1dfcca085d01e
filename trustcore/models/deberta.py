"""DeBERTa v2 and v3: scores of content and of relative position are computed apart and added.

    scores[t, s] = (q[t] . k[s] + q[t] . kr[d(t, s)] + k[s] . qr[d(t, s)]) / sqrt(3 H)

where kr and qr are keys and queries of a table of relative positions, and d(t, s) is how far t lies behind s, in
logarithmic buckets where there are `buckets`. He et al., arXiv 2006.03654, eq. 4, and arXiv 2111.09543.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from trustcore.errors import ModelError
from trustcore.models.heads import Head, HeadConfig, HeadedEncoder, HeadNames, Task, labels_of, task_of
from trustcore.models.model import key_mask, run
from trustcore.models.name_map import conv, linear, norm, plain
from trustcore.models.names import Names, under
from trustcore.models.registry import Family
from trustcore.models.values import Values
from trustcore.nn.conv import Conv
from trustcore.nn.embedding import Embedding
from trustcore.nn.encoder_attention import EncoderAttention
from trustcore.nn.linear import Linear
from trustcore.nn.mlp import MLP
from trustcore.nn.module import made_module
from trustcore.nn.norm import LayerNorm
from trustcore.nn.stack import Stack, run_blocks
from trustcore.ops.activate import activation
from trustcore.ops.masked_attention import masked_attention


@dataclasses.dataclass(frozen=True)
class DebertaConfig:
    """Shape of a DeBERTa v2 or v3.

    Attributes:
        vocab_size: V.
        features: D.
        embedded: width of the embeddings; where it is not D, a product follows them.
        layers: L.
        heads: N, a divisor of D.
        hidden: F.
        positions: tokens the model was made for, and rows of the table of positions where there is one.
        position_table: whether positions are added to words.
        token_types: rows of the table of token types; 0: there is none.
        relative: whether scores have parts of relative positions.
        distance: the farthest relative position that is told apart.
        buckets: half the number of logarithmic buckets; 0: relative positions are not put into buckets.
        content_to_position, position_to_content: which parts of the scores there are.
        shared: whether positions go through the products of content.
        relative_norm: whether the table of relative positions is normed.
        conv_size: window of the convolution beside the first layer; 0: there is none.
        conv_groups: its groups.
        conv_activation: its activation.
        activation: of the feed-forward layer.
        norm_eps: epsilon of the norms.
        family: config.json's `model_type`.
        head: for a task; None: there is none.
        bert_names: whether a head for masked tokens has the names of BERT's, and the width of the embeddings.
    """

    vocab_size: int
    features: int
    embedded: int
    layers: int
    heads: int
    hidden: int
    positions: int
    position_table: bool = False
    token_types: int = 0
    relative: bool = True
    distance: int = 512
    buckets: int = 256
    content_to_position: bool = True
    position_to_content: bool = True
    shared: bool = True
    relative_norm: bool = True
    conv_size: int = 0
    conv_groups: int = 1
    conv_activation: str = "tanh"
    activation: str = "gelu"
    norm_eps: float = 1e-7
    family: str = "deberta-v2"
    head: HeadConfig | None = None
    bert_names: bool = True

    def __post_init__(self) -> None:
        if self.features % self.heads:
            raise ModelError(f"config: {self.heads} heads do not divide a width of {self.features}.")
        if self.conv_size and (self.conv_size % 2 == 0 or self.features % self.conv_groups):
            raise ModelError(
                f"config: conv_kernel_size is {self.conv_size} and conv_groups {self.conv_groups}; expected an odd "
                f"window and a divisor of {self.features}."
            )
        if self.buckets == 1 or (self.buckets and self.distance <= self.buckets // 2 + 1):
            raise ModelError(f"config: {self.buckets} position_buckets do not divide {self.distance} positions.")
        activation(self.activation)
        activation(self.conv_activation)

    @property
    def context(self) -> int:
        """Tokens a row may have."""
        return self.positions

    @property
    def span(self) -> int:
        """Rows of the table of relative positions to either side."""
        return self.buckets or self.distance

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> DebertaConfig:
        """Returns the configuration that a config.json describes.

        Raises:
            ModelError: a value is missing, impossible, or asks for what is not supported.
        """
        values = Values(config, "config.json")
        parts = values.get("pos_att_type") or []
        parts = [part.strip() for part in parts.lower().split("|")] if isinstance(parts, str) else parts
        if not isinstance(parts, list) or not set(map(str, parts)) <= {"c2p", "p2c"}:
            raise ModelError(f"config.json: pos_att_type is {config['pos_att_type']!r}; expected c2p, p2c or both.")
        positions = values.integer("max_position_embeddings", 512)
        distance = values.integer("max_relative_positions", -1, least=-1)
        features = values.integer("hidden_size", 1536)
        norms = [part.strip() for part in values.text("norm_rel_ebd", "none").lower().split("|")]
        relative = values.flag("relative_attention", False)
        embedded = values.integer("embedding_size", features)
        bert_names = not any(name.startswith("lm_predictions.") for name in names)
        return cls(
            vocab_size=values.integer("vocab_size", 128100),
            features=features,
            embedded=embedded,
            layers=values.integer("num_hidden_layers", 24),
            heads=values.integer("num_attention_heads", 24),
            hidden=values.integer("intermediate_size", 6144),
            positions=positions,
            position_table=values.flag("position_biased_input", True),
            token_types=values.integer("type_vocab_size", 0, least=0),
            relative=relative,
            distance=distance if distance > 0 else positions,
            buckets=max(values.integer("position_buckets", -1, least=-1), 0),
            content_to_position="c2p" in parts,
            position_to_content="p2c" in parts,
            shared=values.flag("share_att_key", False),
            relative_norm="layer_norm" in norms,
            conv_size=values.integer("conv_kernel_size", 0, least=0),
            conv_groups=values.integer("conv_groups", 1),
            conv_activation=values.text("conv_act", "tanh"),
            activation=values.text("hidden_act", "gelu"),
            norm_eps=values.number("layer_norm_eps", 1e-7),
            head=_head(values, config, names, features, embedded if bert_names else features, bert_names),
            bert_names=bert_names,
        )


def _head(
    values: Values, config: Mapping[str, Any], names: Collection[str], features: int, width: int, bert_names: bool
) -> HeadConfig | None:
    task = task_of(config, names, _heads(bert_names))
    if task is None:
        return None
    labels = labels_of(config, task)
    if task == "masked":
        act, eps = values.text("hidden_act", "gelu"), values.number("layer_norm_eps", 1e-7)
        tied = values.flag("tie_word_embeddings", True) or not bert_names
        return HeadConfig(task, labels, width, activation=act, normed=True, norm_eps=eps, tied=tied)
    if task != "labels":
        return HeadConfig(task, labels)
    pooled = values.integer("pooler_hidden_size", features)
    if pooled != features:
        raise ModelError(f"config.json: pooler_hidden_size is {pooled}; states of {features} channels are pooled.")
    return HeadConfig(task, labels, features, activation=values.text("pooler_hidden_act", "gelu"))


def relative_rows(length: int, config: DebertaConfig) -> np.ndarray:
    """Returns which row of the table of relative positions stands for (query, key), int32 `[T, T]`.

    Distances up to half the buckets have one each, farther ones share them logarithmically, up to `distance`.
    """
    place = np.arange(length)
    behind = place[:, None] - place[None, :]
    if config.buckets:
        middle = config.buckets // 2
        far = np.maximum(np.abs(behind), middle).astype(np.float32)
        steps = np.log(far / np.float32(middle)) / np.float32(math.log((config.distance - 1) / middle))
        bucket = np.ceil(steps * (middle - 1)) + middle
        behind = np.where(np.abs(behind) <= middle, behind, bucket * np.sign(behind))
    return np.clip(behind + config.span, 0, 2 * config.span - 1).astype(np.int32)


class DisentangledAttention(EncoderAttention):
    """Self-attention whose scores add content and relative position; see the header of this file."""

    def __init__(self, config: DebertaConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        made = {"dtype": dtype, "rngs": rngs}
        super().__init__(config.features, config.heads, config.features // config.heads, **made)
        own = config.relative and not config.shared
        product = {"bias": True, **made}
        wanted = (own and config.content_to_position, own and config.position_to_content)
        self.position_key = Linear(config.features, config.features, **product) if wanted[0] else None
        self.position_query = Linear(config.features, config.features, **product) if wanted[1] else None
        self.config = config

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Float[Array, "B T D"],
        positions: Float[Array, "R D"] | None,
        rows: Int[Array, "T T"],
        mask: jax.Array | None,
    ) -> Float[Array, "B T D"]:
        """Returns the layer's output.

        Args:
            x: T tokens of B rows.
            positions: the table of relative positions.
            rows: which of its rows stands for (query, key).
            mask: of the keys.
        """
        config = self.config
        query = self.queries(x)
        key, value = self.keys_values(x)
        terms = 1 + config.content_to_position + config.position_to_content
        scale = (self.head_dim * terms) ** -0.5
        bias = None
        if positions is not None:
            parts = []
            if config.content_to_position:
                keys = self._heads((self.position_key or self.key)(positions))  # [R, N, H]
                parts.append(_gather(jnp.einsum("btnh,rnh->bntr", query, keys), rows))
            if config.position_to_content:
                queries = self._heads((self.position_query or self.query)(positions))
                found = _gather(jnp.einsum("bsnh,rnh->bnsr", key, queries), rows.T)
                parts.append(found.swapaxes(2, 3))
            bias = sum(parts[1:], parts[0]) * jnp.asarray(scale, x.dtype) if parts else None
        y = masked_attention(query, key, value, mask=mask, bias=bias, scale=scale)
        return self.out(y.reshape(*y.shape[:2], -1))


def _gather(scores: jax.Array, rows: jax.Array) -> jax.Array:
    """`scores[b, n, t, rows[t, s]]`."""
    return jnp.take_along_axis(scores, jnp.broadcast_to(rows, (*scores.shape[:2], *rows.shape)), axis=-1)


class Block(nnx.Module):
    """One layer: attention and feed-forward, each added to the stream before a norm; the first may be `convolved`."""

    def __init__(
        self, config: DebertaConfig, *, convolved: bool, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None
    ):
        made = {"dtype": dtype, "rngs": rngs}
        self.convolved = convolved
        self.attention = DisentangledAttention(config, **made)
        self.attention_norm = LayerNorm(config.features, eps=config.norm_eps, **made)
        self.mlp = MLP(config.features, config.hidden, activation=config.activation, **made)
        self.mlp_norm = LayerNorm(config.features, eps=config.norm_eps, **made)

    def __call__(
        self, x: Float[Array, "B T D"], positions: jax.Array | None, rows: jax.Array, mask: jax.Array | None
    ) -> Float[Array, "B T D"]:
        """Returns the stream after this layer."""
        x = self.attention_norm(x + self.attention(x, positions, rows, mask))
        return self.mlp_norm(x + self.mlp(x))


class Deberta(HeadedEncoder):
    """A DeBERTa v2 or v3.

    Args:
        config: its shape.
        dtype: of activations, and of the parameters that `rngs` draws.
        rngs: None leaves the parameters abstract, for a loader to fill.
    """

    stacks = ("blocks",)

    def __init__(self, config: DebertaConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        super().__init__(config, dtype)
        made = {"dtype": dtype, "rngs": rngs}
        width, features = config.embedded, config.features
        self.words = Embedding(config.vocab_size, width, **made)
        self.positions = Embedding(config.positions, width, **made) if config.position_table else None
        self.types = Embedding(config.token_types, width, **made) if config.token_types else None
        self.widen = Linear(width, features, **made) if width != features else None
        self.norm = LayerNorm(features, eps=config.norm_eps, **made)
        beside = (config.conv_size > 0 and i == 0 for i in range(config.layers))
        self.blocks: nnx.List[Any] | Stack = nnx.List([Block(config, convolved=own, **made) for own in beside])
        self.relative = Embedding(2 * config.span, features, **made) if config.relative else None
        normed = config.relative and config.relative_norm
        self.relative_norm = LayerNorm(features, eps=config.norm_eps, **made) if normed else None
        self.conv = self.conv_norm = None
        if config.conv_size:
            options = {"padding": "SAME", "feature_group_count": config.conv_groups}
            options |= {"dtype": dtype, "param_dtype": dtype}
            make = lambda rngs: Conv(features, features, (config.conv_size,), rngs=rngs, **options)  # noqa: E731
            self.conv = nnx.data(made_module(make, rngs))
            self.conv_norm = nnx.data(LayerNorm(features, eps=config.norm_eps, **made))
        words = (config.vocab_size, width)
        self.head = None if config.head is None else Head(features, words, config.head, **made)

    def __call__(
        self, tokens: Int[Array, "B T"], mask: Any = None, token_types: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Returns the last layer's states.

        Args:
            tokens: T tokens of B rows, at most `config.context` of them.
            mask: `[B, T]`, zero or False where a token is padding (on either side); None: all count.
            token_types: which segment a token belongs to; None: the first.

        What stands in the rows of padding means nothing. Differentiable in the float weights.
        """
        length = tokens.shape[1]
        if self.positions is not None and length > self.config.positions:
            raise ModelError(f"{length} tokens are more than the {self.config.positions} this model reads.")
        counts = (
            jnp.ones(tokens.shape, self.dtype) if mask is None else jnp.asarray(mask).astype(bool).astype(self.dtype)
        )
        x = self.words(tokens)
        if self.positions is not None:
            place = jax.lax.broadcasted_iota(jnp.int32, (1, length), 1)
            x = x + self.positions(jnp.broadcast_to(place, tokens.shape))
        if self.types is not None:
            x = x + self.types(jnp.zeros_like(tokens) if token_types is None else token_types)
        x = x.astype(self.dtype)
        x = self.norm(x if self.widen is None else self.widen(x)) * counts[..., None]
        table = None if self.relative is None else self.relative(jnp.arange(2 * self.config.span)).astype(self.dtype)
        if table is not None and self.relative_norm is not None:
            table = self.relative_norm(table)
        rows, visible = jnp.asarray(relative_rows(length, self.config)), key_mask(mask)

        def call(block: Any, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            after = run(block, x, table, rows, visible)
            if block.convolved and self.conv is not None and self.conv_norm is not None:
                y = self.conv(x) * counts[..., None]
                after = self.conv_norm(after + activation(self.config.conv_activation)(y)) * counts[..., None]
            return after, None

        return run_blocks(self.blocks, call, x)[0]


_BLOCK = under(
    "blocks.{}.",
    "encoder.layer.{}.",
    (
        *linear("attention.query", "attention.self.query_proj"),
        *linear("attention.key", "attention.self.key_proj"),
        *linear("attention.value", "attention.self.value_proj"),
        *linear("attention.position_key", "attention.self.pos_key_proj"),
        *linear("attention.position_query", "attention.self.pos_query_proj"),
        *linear("attention.out", "attention.output.dense"),
        *norm("attention_norm", "attention.output.LayerNorm"),
        *linear("mlp.up", "intermediate.dense"),
        *linear("mlp.down", "output.dense"),
        *norm("mlp_norm", "output.LayerNorm"),
    ),
)


def _heads(bert_names: bool) -> Mapping[Task, HeadNames]:
    """What heads are called; that for masked tokens as BERT's, or as DeBERTa's authors have it."""
    at, own = "cls.predictions", "lm_predictions.lm_head"
    masked = HeadNames(f"{at}.transform.dense", f"{at}.transform.LayerNorm", f"{at}.decoder", f"{at}.bias")
    return {
        "masked": masked if bert_names else HeadNames(f"{own}.dense", f"{own}.LayerNorm", bias=f"{own}.bias"),
        "labels": HeadNames(dense="pooler.dense", output="classifier"),
        "tokens": HeadNames(output="classifier"),
        "spans": HeadNames(output="qa_outputs"),
    }


def names(config: DebertaConfig) -> Names:
    """Returns the names of the weights in checkpoints."""
    unused = () if config.position_table else ("embeddings.position_embeddings.weight",)
    return Names(
        (
            plain("words.table", "embeddings.word_embeddings.weight"),
            plain("positions.table", "embeddings.position_embeddings.weight"),
            plain("types.table", "embeddings.token_type_embeddings.weight"),
            *linear("widen", "embeddings.embed_proj"),
            *norm("norm", "embeddings.LayerNorm"),
            plain("relative.table", "encoder.rel_embeddings.weight"),
            *norm("relative_norm", "encoder.LayerNorm"),
            *conv("conv", "encoder.conv.conv"),
            *norm("conv_norm", "encoder.conv.LayerNorm"),
        ),
        _BLOCK,
        head=() if config.head is None else _heads(config.bert_names)[config.head.task].rules,
        prefixes=("deberta.",),
        ignored=(*_UNREAD, *unused),
    )


_UNREAD = (
    *("cls.*", "lm_head.*", "lm_predictions.*", "mask_predictions.*", "pooler.*", "classifier.*", "qa_outputs.*"),
    "*.position_ids",
)

FAMILY = Family(DebertaConfig.from_hugging_face, Deberta, names)
