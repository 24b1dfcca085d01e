"""How well a model predicts a text, and how far two models are apart on it.

    text -> tokens -> chunks [n, T] -> hidden states -> logits of the tokens that count, a block at a time -> sums

The definition is that of llama.cpp's `perplexity` tool, so figures can be set side by side: the tokens are cut into
chunks of T, each is read on its own, its first token replaced by BOS where the tokenizer puts one before a text, and
the tokens after the first T / 2 count; a rest shorter than T is left out. Natural logarithms; sums in float64.

One program reads every chunk. It never holds logits of more than a block of positions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import EvaluationError

Progress = Callable[[int, int], None]

CONTEXT = 512
LOGITS = 1 << 24  # at a time: 64 MB as float32


@dataclass(frozen=True)
class Perplexity:
    """How a model predicts a text.

    Attributes:
        perplexity: `exp(mean negative log-likelihood)` of the tokens that count.
        error: standard error of `perplexity`.
        scored: tokens that count.
        tokens: of the whole text.
        chunks: that were read.
        context: T.
    """

    perplexity: float
    error: float
    scored: int
    tokens: int
    chunks: int
    context: int

    def as_json(self) -> dict[str, Any]:
        """Returns the figures as values that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """How far model B is from model A on a text.

    Attributes:
        kl_divergence: mean over positions of `sum p_A (log p_A - log p_B)`, in nats.
        kl_error: its standard error.
        kl_max: the largest at one position.
        top1_agreement: share of positions where both find the same token likeliest.
        max_logit_difference: the largest `|logit_A - logit_B|`.
        first: perplexity of A.
        second: perplexity of B.
    """

    kl_divergence: float
    kl_error: float
    kl_max: float
    top1_agreement: float
    max_logit_difference: float
    first: Perplexity
    second: Perplexity

    def as_json(self) -> dict[str, Any]:
        """Returns the figures as values that JSON can hold."""
        return asdict(self)


def perplexity(
    model: Any,
    text: str | Sequence[int],
    *,
    context: int = CONTEXT,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Returns how well `model` predicts `text`.

    Args:
        model: a decoder with a tokenizer.
        text: a string, or token ids, which are taken as they stand.
        context: T, tokens that the model sees at a time.
        stride: None: chunks follow each other and their second halves count. S: a chunk of `context + S // 2` tokens
            begins every S tokens and its last S count, so every token is predicted from a long past; slower, and the
            figure is lower. (llama.cpp's `--ppl-stride`, which, unlike here, never sees BOS.)
        progress: called with (chunks done, chunks in all).

    Raises:
        EvaluationError: the text is too short, an id is no token, or context and stride do not fit.

    Compiles one program for a model's structure and context. O(T) forward tokens a chunk; logits in blocks.
    """
    chunks, targets, counted, total = _chunks(model, text, context, stride)
    losses = []
    for i in range(len(chunks)):
        losses.append(np.asarray(_losses(model, chunks[i : i + 1], targets[i : i + 1], counted), np.float64))
        if progress is not None:
            progress(i + 1, len(chunks))
    return _perplexity(np.concatenate(losses), total, len(chunks), chunks.shape[1])


def compare(
    first: Any,
    second: Any,
    text: str | Sequence[int],
    *,
    context: int = CONTEXT,
    progress: Progress | None = None,
) -> Comparison:
    """Returns how far the predictions of `second` are from those of `first` on `text`.

    Args:
        first: the reference, a decoder with a tokenizer.
        second: another with the same vocabulary: the same model packed, for example.
        text: a string, or token ids.
        context: T, tokens that the models see at a time.
        progress: called with (chunks done, chunks in all).

    Raises:
        EvaluationError: the text is too short, or the models have different vocabularies.
    """
    sizes = [model.config.vocab_size for model in (first, second)]
    if sizes[0] != sizes[1]:
        raise EvaluationError(
            f"compare: the models have {sizes[0]} and {sizes[1]} tokens; they must share a vocabulary."
        )
    if not isinstance(text, str):
        ids = text
    elif first.tokenizer is not None and second.tokenizer is not None:
        ids = first.tokenizer.encode(text)
        if ids != second.tokenizer.encode(text):
            raise EvaluationError("compare: the models' tokenizers give this text different ids; they must share one.")
    else:
        raise EvaluationError("compare: a model has no tokenizer; give token ids instead of a string.")
    chunks, targets, counted, total = _chunks(first, ids, context, None)
    found = []
    for i in range(len(chunks)):
        distances = _distances(first, second, chunks[i : i + 1], targets[i : i + 1], counted)
        found.append([np.asarray(part, np.float64) for part in distances])
        if progress is not None:
            progress(i + 1, len(chunks))
    kl, same, largest, nll_a, nll_b = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Comparison(
        kl_divergence=float(kl.mean()),
        kl_error=_standard_error(kl),
        kl_max=float(kl.max()),
        top1_agreement=float(same.mean()),
        max_logit_difference=float(largest.max()),
        first=_perplexity(nll_a, total, len(chunks), context),
        second=_perplexity(nll_b, total, len(chunks), context),
    )


def _chunks(
    model: Any, text: str | Sequence[int], context: int, stride: int | None
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Chunks `[n, T]`, the token after each of their places, how many of the last count, and tokens in all."""
    tokenizer = model.tokenizer
    if isinstance(text, str):
        if tokenizer is None:
            raise EvaluationError("the model has no tokenizer; give token ids instead of a string.")
        text = tokenizer.encode(text)
    ids = np.asarray(text, np.int64).reshape(-1)
    if not isinstance(context, int) or context < 4:
        raise EvaluationError(f"the context is {context!r}; it must be an integer of at least 4 tokens.")
    if stride is not None and not 0 < stride < context:
        raise EvaluationError(f"the stride is {stride}; it must be between 1 and the context, {context}.")
    if ids.size and not 0 <= ids.min() <= ids.max() < model.config.vocab_size:
        raise EvaluationError(
            f"token ids reach from {ids.min()} to {ids.max()}; expected 0 to {model.config.vocab_size - 1}."
        )
    length = context if stride is None else context + stride // 2
    least = 2 * context if stride is None else length + 1
    if len(ids) < least:
        raise EvaluationError(
            f"the text has {len(ids)} tokens; a context of {context}"
            + (f" with a stride of {stride}" if stride else "")
            + f" needs at least {least}. Give a longer text or a smaller context."
        )
    ends = len(ids) // context * context if stride is None else len(ids) - length
    starts = range(0, ends, stride or context)
    chunks = np.stack([ids[start : start + length] for start in starts])
    targets = np.concatenate([chunks[:, 1:], chunks[:, :1]], axis=1)  # the last place predicts nothing that counts
    first = tokenizer.encode("")[:1] if tokenizer is not None else []
    if stride is None and tokenizer is not None and tokenizer.bos_id is not None and first == [tokenizer.bos_id]:
        chunks[:, 0] = tokenizer.bos_id
    counted = length - length // 2 - 1 if stride is None else stride
    return chunks.astype(np.int32), targets.astype(np.int32), counted, len(ids)


@functools.partial(jax.jit, static_argnums=3)
def _losses(model: Any, chunk: jax.Array, target: jax.Array, counted: int) -> jax.Array:
    """Returns float32 `[counted]`: the negative log-likelihood of the last tokens of a chunk `[1, T]`."""

    def score(hidden: jax.Array, wanted: jax.Array) -> jax.Array:
        return _negative_log_likelihood(model.logits(hidden), wanted)

    hidden = model.hidden_states(chunk)[0][0, -counted - 1 : -1]
    return _in_blocks(score, model.config.vocab_size, hidden, target[0, -counted - 1 : -1])


@functools.partial(jax.jit, static_argnums=4)
def _distances(first: Any, second: Any, chunk: jax.Array, target: jax.Array, counted: int) -> Any:
    """Returns for each of the last places: KL divergence, same likeliest token, largest difference, both losses."""

    def score(a: jax.Array, b: jax.Array, wanted: jax.Array) -> Any:
        a, b = first.logits(a), second.logits(b)
        log_p, log_q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        same = (jnp.argmax(a, -1) == jnp.argmax(b, -1)).astype(jnp.float32)
        largest = jnp.max(jnp.abs(a - b), axis=-1)
        return kl, same, largest, _negative_log_likelihood(a, wanted), _negative_log_likelihood(b, wanted)

    a, b = (model.hidden_states(chunk)[0][0, -counted - 1 : -1] for model in (first, second))
    return _in_blocks(score, 4 * first.config.vocab_size, a, b, target[0, -counted - 1 : -1])


def _negative_log_likelihood(logits: jax.Array, wanted: jax.Array) -> jax.Array:
    picked = jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _in_blocks(score: Callable[..., Any], width: int, *places: jax.Array) -> Any:
    """Returns `score` of all places, computed for as many at a time as leave `LOGITS` numbers of that width each."""
    count = places[0].shape[0]
    size = min(max(LOGITS // width, 1), count)
    blocks = -(-count // size)
    padded = [jnp.pad(p, [(0, blocks * size - count), *[(0, 0)] * (p.ndim - 1)]) for p in places]
    stacked = [p.reshape(blocks, size, *p.shape[1:]) for p in padded]
    scored = jax.lax.map(lambda block: score(*block), tuple(stacked))
    return jax.tree.map(lambda part: part.reshape(blocks * size)[:count], scored)


def _perplexity(losses: np.ndarray, tokens: int, chunks: int, context: int) -> Perplexity:
    mean = float(losses.mean())
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, value * _standard_error(losses), losses.size, tokens, chunks, context)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std() / math.sqrt(max(values.size - 1, 1)))
