"""The encoder of BERT's shape: learned positions, norms after each sum, attention in both directions.

    x = norm(words[tokens] + positions[p] + types[t]);   x = norm(x + attention(x)), x = norm(x + mlp(x))  per block

BERT (Devlin et al., arXiv 1810.04805), RoBERTa (Liu et al., arXiv 1907.11692: positions count from behind the padding
token's number), DistilBERT (Sanh et al., arXiv 1910.01108: no token types), ELECTRA (Clark et al., arXiv 2003.10555:
embeddings may be narrower than the stream), and what has their shape: MiniLM, CamemBERT, XLM-R.
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
from trustcore.models.name_map import linear, norm, plain
from trustcore.models.names import Names, under
from trustcore.models.registry import Family
from trustcore.models.values import Values
from trustcore.nn.embedding import Embedding
from trustcore.nn.encoder_attention import EncoderAttention
from trustcore.nn.linear import Linear
from trustcore.nn.mlp import MLP
from trustcore.nn.norm import LayerNorm
from trustcore.nn.stack import Stack, run_blocks
from trustcore.ops.activate import activation


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shape of an encoder of BERT's kind.

    Attributes:
        vocab_size: V.
        features: D.
        embedded: width of the embeddings; where it is not D, a product follows them.
        layers: L.
        heads: N, a divisor of D.
        hidden: F.
        positions: rows of the table of positions.
        token_types: rows of the table of token types; 0: there is none.
        padding: RoBERTa: the token that does not count where positions are counted; None: a token's position is its
            place in the row.
        pooler: whether there is a product behind the first token.
        activation: of the feed-forward layer.
        norm_eps: epsilon of the norms.
        family: config.json's `model_type`.
        head: for a task; None: there is none.
    """

    vocab_size: int
    features: int
    embedded: int
    layers: int
    heads: int
    hidden: int
    positions: int
    token_types: int = 2
    padding: int | None = None
    pooler: bool = False
    activation: str = "gelu"
    norm_eps: float = 1e-12
    family: str = "bert"
    head: HeadConfig | None = None

    def __post_init__(self) -> None:
        if self.features % self.heads:
            raise ModelError(f"config: {self.heads} heads do not divide a width of {self.features}.")
        activation(self.activation)

    @property
    def context(self) -> int:
        """Tokens a row may have."""
        return self.positions - (0 if self.padding is None else self.padding + 1)

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> BertConfig:
        """Returns the configuration that a config.json describes; `names` of tensors tell whether there is a pooler.

        Raises:
            ModelError: a value is missing, impossible, or asks for what is not supported.
        """
        values = Values(config, "config.json")
        family = values.text("model_type", "bert")
        pooler = any(name.endswith("pooler.dense.weight") for name in names)
        if values.flag("is_decoder", False):
            raise ModelError("config.json: is_decoder is true; BERT as a decoder is not supported.")
        if values.text("position_embedding_type", "absolute") != "absolute":
            raise ModelError(
                f"config.json: position_embedding_type is {config['position_embedding_type']!r}; expected 'absolute'."
            )
        if family == "distilbert":
            return cls(
                vocab_size=values.integer("vocab_size", 30522),
                features=(features := values.integer("dim", 768)),
                embedded=features,
                layers=values.integer("n_layers", 6),
                heads=values.integer("n_heads", 12),
                hidden=values.integer("hidden_dim", 3072),
                positions=values.integer("max_position_embeddings", 512),
                token_types=0,
                activation=values.text("activation", "gelu"),
                family=family,
                head=_head(values, config, names, features, features, 1e-12, values.text("activation", "gelu")),
            )
        features = values.integer("hidden_size", 256 if family == "electra" else 768)
        offset = family in _ROBERTA
        embedded = values.integer("embedding_size", 128) if family == "electra" else features
        act, eps = values.text("hidden_act", "gelu"), values.number("layer_norm_eps", 1e-12)
        return cls(
            vocab_size=values.integer("vocab_size", 30522),
            features=features,
            embedded=embedded,
            layers=values.integer("num_hidden_layers", 12),
            heads=values.integer("num_attention_heads", 4 if family == "electra" else 12),
            hidden=values.integer("intermediate_size", 1024 if family == "electra" else 3072),
            positions=values.integer("max_position_embeddings", 512),
            token_types=values.integer("type_vocab_size", 2, least=0),
            padding=values.integer("pad_token_id", 1, least=0) if offset else None,
            pooler=pooler,
            activation=act,
            norm_eps=eps,
            family=family,
            head=_head(values, config, names, features, embedded, eps, act),
        )


def _head(
    values: Values,
    config: Mapping[str, Any],
    names: Collection[str],
    features: int,
    embedded: int,
    eps: float,
    act: str,
) -> HeadConfig | None:
    """The head that the checkpoint has; all but the first class of them read the first token themselves."""
    family = values.text("model_type", "bert")
    task = task_of(config, names, _heads(family))
    if task is None:
        return None
    labels = labels_of(config, task)
    if task == "masked":
        act = act if family in ("bert", "distilbert") else "gelu"
        tied = values.flag("tie_word_embeddings", True)
        return HeadConfig(task, labels, embedded, activation=act, normed=True, norm_eps=eps, tied=tied)
    if task != "labels" or family == "bert":
        return HeadConfig(task, labels, pool="pooler")
    acts = {"distilbert": "relu", "electra": "gelu"}
    return HeadConfig(task, labels, features, activation=acts.get(family, "tanh"))


class Block(nnx.Module):
    """One layer: attention and feed-forward, each added to the stream before a norm."""

    def __init__(self, config: BertConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        made = {"dtype": dtype, "rngs": rngs}
        head_dim = config.features // config.heads
        self.attention = EncoderAttention(config.features, config.heads, head_dim, **made)
        self.attention_norm = LayerNorm(config.features, eps=config.norm_eps, **made)
        self.mlp = MLP(config.features, config.hidden, activation=config.activation, **made)
        self.mlp_norm = LayerNorm(config.features, eps=config.norm_eps, **made)

    def __call__(self, x: Float[Array, "B T D"], mask: jax.Array | None) -> Float[Array, "B T D"]:
        """Returns the stream after this layer."""
        x = self.attention_norm(x + self.attention(x, mask=mask))
        return self.mlp_norm(x + self.mlp(x))


class Bert(HeadedEncoder):
    """An encoder of BERT's kind.

    Args:
        config: its shape.
        dtype: of activations, and of the parameters that `rngs` draws.
        rngs: None leaves the parameters abstract, for a loader to fill.
    """

    stacks = ("blocks",)

    def __init__(self, config: BertConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs | None = None):
        super().__init__(config, dtype)
        made = {"dtype": dtype, "rngs": rngs}
        width = config.embedded
        self.words = Embedding(config.vocab_size, width, **made)
        self.positions = Embedding(config.positions, width, **made)
        self.types = Embedding(config.token_types, width, **made) if config.token_types else None
        self.norm = LayerNorm(width, eps=config.norm_eps, **made)
        self.widen = Linear(width, config.features, bias=True, **made) if width != config.features else None
        self.blocks: nnx.List[Any] | Stack = nnx.List([Block(config, **made) for _ in range(config.layers)])
        self.pooler = Linear(config.features, config.features, bias=True, **made) if config.pooler else None
        words = (config.vocab_size, width)
        self.head = None if config.head is None else Head(config.features, words, config.head, **made)

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
        if tokens.shape[1] > self.config.context:
            raise ModelError(f"{tokens.shape[1]} tokens are more than the {self.config.context} this model reads.")
        places = self._places(tokens)
        x = self.words(tokens) + self.positions(places)
        if self.types is not None:
            x = x + self.types(jnp.zeros_like(tokens) if token_types is None else token_types)
        x = self.norm(x.astype(self.dtype))
        x = x if self.widen is None else self.widen(x)
        visible = key_mask(mask)
        return run_blocks(self.blocks, lambda block, x, _: (run(block, x, visible), None), x)[0]

    def pool(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """Returns `tanh(dense(hidden[:, 0]))`, what BERT's classifiers read.

        Raises:
            ModelError: the checkpoint had no pooler.
        """
        if self.pooler is None:
            raise ModelError("this model has no pooler; use the states themselves.")
        return jnp.tanh(self.pooler(hidden[:, 0]))

    def _places(self, tokens: jax.Array) -> jax.Array:
        padding = self.config.padding
        if padding is None:
            return jnp.broadcast_to(jax.lax.broadcasted_iota(jnp.int32, (1, tokens.shape[1]), 1), tokens.shape)
        counts = (tokens != padding).astype(jnp.int32)
        return jnp.cumsum(counts, axis=1) * counts + padding


_BLOCK = under(
    "blocks.{}.",
    "encoder.layer.{}.",
    (
        *linear("attention.query", "attention.self.query"),
        *linear("attention.key", "attention.self.key"),
        *linear("attention.value", "attention.self.value"),
        *linear("attention.out", "attention.output.dense"),
        *norm("attention_norm", "attention.output.LayerNorm"),
        *linear("mlp.up", "intermediate.dense"),
        *linear("mlp.down", "output.dense"),
        *norm("mlp_norm", "output.LayerNorm"),
    ),
)
_DISTIL_BLOCK = under(
    "blocks.{}.",
    "transformer.layer.{}.",
    (
        *linear("attention.query", "attention.q_lin"),
        *linear("attention.key", "attention.k_lin"),
        *linear("attention.value", "attention.v_lin"),
        *linear("attention.out", "attention.out_lin"),
        *norm("attention_norm", "sa_layer_norm"),
        *linear("mlp.up", "ffn.lin1"),
        *linear("mlp.down", "ffn.lin2"),
        *norm("mlp_norm", "output_layer_norm"),
    ),
)


def names(config: BertConfig) -> Names:
    """Returns the names of the weights in checkpoints."""
    return Names(
        (
            plain("words.table", "embeddings.word_embeddings.weight"),
            plain("positions.table", "embeddings.position_embeddings.weight"),
            plain("types.table", "embeddings.token_type_embeddings.weight"),
            *norm("norm", "embeddings.LayerNorm"),
            *linear("widen", "embeddings_project"),
            *linear("pooler", "pooler.dense"),
        ),
        _DISTIL_BLOCK if config.family == "distilbert" else _BLOCK,
        head=() if config.head is None else _heads(config.family)[config.head.task].rules,
        prefixes=("bert.", "roberta.", "distilbert.", "electra."),
        ignored=_HEADS,
        spellings=_SPELLINGS,
    )


_ROBERTA = ("roberta", "xlm-roberta", "camembert")


def _heads(family: str) -> Mapping[Task, HeadNames]:
    """What the heads of a family are called."""
    same: dict[Task, HeadNames] = {"tokens": HeadNames(output="classifier"), "spans": HeadNames(output="qa_outputs")}
    parts = HeadNames(dense="classifier.dense", output="classifier.out_proj")
    if family in _ROBERTA:
        masked = HeadNames("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias")
    elif family == "distilbert":
        masked = HeadNames("vocab_transform", "vocab_layer_norm", "vocab_projector", "vocab_projector.bias")
        parts = HeadNames(dense="pre_classifier", output="classifier")
    elif family == "electra":
        masked = HeadNames(
            "generator_predictions.dense",
            "generator_predictions.LayerNorm",
            "generator_lm_head",
            "generator_lm_head.bias",
        )
    else:
        at = "cls.predictions"
        masked = HeadNames(f"{at}.transform.dense", f"{at}.transform.LayerNorm", f"{at}.decoder", f"{at}.bias")
        parts = HeadNames(output="classifier")
    return {**same, "masked": masked, "labels": parts}


# Heads for other tasks, and numbers that older files hold.
_HEADS = (
    *("cls.*", "lm_head.*", "classifier.*", "qa_outputs.*", "score.*", "*.position_ids", "*.token_type_ids"),
    *("vocab_transform.*", "vocab_layer_norm.*", "vocab_projector.*", "pre_classifier.*"),
    *("discriminator_predictions.*", "generator_predictions.*", "generator_lm_head.*"),
)

# Files that were converted from TensorFlow call the norms' weights so.
_SPELLINGS = ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias"))

FAMILY = Family(BertConfig.from_hugging_face, Bert, names)
