"""Heads of text encoders: what a checkpoint for a task has behind its states, chosen by its config.json.

    masked  norm(act(dense(h))) @ words.T + bias     which token stands in each place           [B, T, V]
    labels  output(act(dense(pooled)))               to which label a text belongs              [B, labels]
    tokens  output(h)                                to which label each token belongs          [B, T, labels]
    spans   output(h)                                where an answer begins and where it ends   [B, T, 2]

Families differ in which of the steps are there and how they are called, and in what a text is pooled to: its first
token, or the mean of those that count. The class in `architectures` decides, and only if the file has its weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from trustcore.errors import ModelError
from trustcore.models.model import TextEncoder
from trustcore.models.name_map import Rule, linear, norm, plain
from trustcore.nn.embedding import Embedding
from trustcore.nn.linear import Linear
from trustcore.nn.norm import LayerNorm
from trustcore.nn.parameter import parameter
from trustcore.ops.activate import activation

Task = Literal["masked", "labels", "tokens", "spans"]

_TASKS: Mapping[str, Task] = {
    "ForMaskedLM": "masked",
    "ForPreTraining": "masked",  # BERT's second head, of following sentences, is not read
    "ForSequenceClassification": "labels",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "spans",
}
_MOST_LABELS = 1 << 16


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """How a head is made.

    Attributes:
        task: see the header of this file.
        labels: names of what the scores are of; of "masked" none, as they are the vocabulary's.
        dense: width of the product before the output; 0: there is none.
        dense_bias: whether it has one.
        activation: behind it.
        normed: whether a layer norm follows.
        norm_bias, norm_eps: of that norm.
        pool: of "labels": "first" token, "mean" of those that count, or "pooler", the encoder's own.
        tied: of "masked": whether the output is the table of words.
        masked_bias: of "masked": whether the output has a bias.
    """

    task: Task
    labels: tuple[str, ...] = ()
    dense: int = 0
    dense_bias: bool = True
    activation: str = "gelu"
    normed: bool = False
    norm_bias: bool = True
    norm_eps: float = 1e-12
    pool: Literal["first", "mean", "pooler"] = "first"
    tied: bool = True
    masked_bias: bool = True

    def __post_init__(self) -> None:
        activation(self.activation)


@dataclasses.dataclass(frozen=True)
class HeadNames:
    """What the parts of a family's head for a task are called; "": the family's has no such part.

    Attributes:
        dense, norm, output: modules.
        bias: of an output that is the table of words.
    """

    dense: str = ""
    norm: str = ""
    output: str = ""
    bias: str = ""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of the weights, which stand outside of the prefix of the body's."""
        return (
            *(linear("head.dense", self.dense) if self.dense else ()),
            *(norm("head.norm", self.norm) if self.norm else ()),
            *(linear("head.output", self.output) if self.output else ()),
            *((plain("head.bias", self.bias, others=(f"{self.output}.bias",)),) if self.bias else ()),
        )


def task_of(config: Mapping[str, Any], names: Collection[str], heads: Mapping[Task, HeadNames]) -> Task | None:
    """Returns the task that the class in config.json is for; None: it is for none, or its weights are not there.

    Args:
        config: of the checkpoint.
        names: of its weights.
        heads: what the family calls them.
    """
    given = config.get("architectures")
    classes = [name for name in given if isinstance(name, str)] if isinstance(given, list) else []
    found: list[Task] = [task for end, task in _TASKS.items() for name in classes if name.endswith(end)]
    task = found[0] if found else None
    if task is None or task not in heads:
        return None
    parts = heads[task]
    told = f"{parts.dense or parts.output}.weight"
    return task if told in names else None


def labels_of(config: Mapping[str, Any], task: Task) -> tuple[str, ...]:
    """Returns the names of the labels, by config.json's `id2label`.

    Raises:
        ModelError: they are not numbered from 0 on.
    """
    if task in ("masked", "spans"):
        return () if task == "masked" else ("start", "end")
    given = config.get("id2label")
    if given is None:
        count = config.get("num_labels", 2)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= _MOST_LABELS:
            raise ModelError(f"config.json: num_labels is {count!r}; expected 1 to {_MOST_LABELS}.")
        return tuple(f"LABEL_{i}" for i in range(count))
    named = {str(key): value for key, value in given.items()} if isinstance(given, Mapping) else {}
    good = 0 < len(named) <= _MOST_LABELS and all(isinstance(name, str) for name in named.values())
    if not good or set(named) != {str(i) for i in range(len(named))}:
        raise ModelError(f"config.json: id2label is {str(given)[:64]}; expected names of labels 0, 1, 2, ...")
    return tuple(named[str(i)] for i in range(len(named)))


class Head(nnx.Module):
    """A head behind an encoder; `config` says which.

    Args:
        features: D, of the states.
        words: V of the table of words, and its width.
        config: everything else.
        dtype: of the parameters.
        rngs: None leaves them abstract.
    """

    def __init__(
        self,
        features: int,
        words: tuple[int, int],
        config: HeadConfig,
        *,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        made = {"dtype": dtype, "rngs": rngs}
        self.config = config
        width = config.dense or features
        self.dense = Linear(features, width, bias=config.dense_bias, **made) if config.dense else None
        normed = {"bias": config.norm_bias, "eps": config.norm_eps, **made}
        self.norm = LayerNorm(width, **normed) if config.normed else None
        masked = config.task == "masked"
        tied = masked and config.tied
        outputs = words[0] if masked else len(config.labels)
        self.output = None if tied else Linear(width, outputs, bias=not masked, **made)
        biased = masked and config.masked_bias
        self.bias = parameter(jax.nn.initializers.zeros, (words[0],), dtype, rngs) if biased else None

    def __call__(self, hidden: Float[Array, "*rows D"], words: Embedding) -> Float[Array, "*rows N"]:
        """Returns float32 scores of states, or of texts that were pooled; `words` is the encoder's table."""
        x = hidden
        if self.dense is not None:
            x = activation(self.config.activation)(self.dense(x))
        x = x if self.norm is None else self.norm(x)
        y = (words.unembed(x) if self.output is None else self.output(x)).astype(jnp.float32)
        if self.bias is None:
            return y
        return y + jnp.broadcast_to(self.bias.get_value().astype(jnp.float32), y.shape)


class HeadedEncoder(TextEncoder):
    """An encoder of text that may have a head.

    Attributes:
        head: None where the checkpoint has none.
        words: the table of words.
    """

    head: Head | None
    words: Embedding

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of what `scores` gives a number to; of a head for masked tokens none: they are the vocabulary's."""
        return () if self.head is None else self.head.config.labels

    def scores(self, tokens: Int[Array, "B T"], mask: Any = None, *more: Any) -> Float[Array, "B ..."]:
        """Returns the head's float32 scores, before any softmax: see the header of this file for their shapes.

        Args:
            tokens, mask, more: as of a call of the model.

        Raises:
            ModelError: the checkpoint has no head.

        Differentiable in the float weights.
        """
        if self.head is None:
            raise ModelError(
                f"this {self.config.family} checkpoint has no head for a task; call the model for its states."
            )
        hidden, config = self(tokens, mask, *more), self.head.config
        if config.task == "labels":
            hidden = self._pooled(hidden, mask, config.pool)
        return self.head(hidden, self.words)

    def _pooled(self, hidden: jax.Array, mask: Any, pool: str) -> jax.Array:
        if pool == "pooler":
            return self.pool(hidden)
        if pool == "first":
            return hidden[:, 0]
        counts = jnp.ones(hidden.shape[:2], hidden.dtype) if mask is None else jnp.asarray(mask).astype(hidden.dtype)
        return jnp.sum(hidden * counts[..., None], axis=1) / jnp.sum(counts, axis=1, keepdims=True)

    def pool(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """Returns the vector of a text that the encoder's pooler makes.

        Raises:
            ModelError: it has none.
        """
        raise ModelError("this model has no pooler; use the states themselves.")
