"""Texts to vectors: tokens in batches of few lengths, an encoder, one vector a text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import ModelError
from trustcore.models.model import TextEncoder
from trustcore.models.sentence import SentencePooling, pool

_SHORTEST = 16  # tokens; rows are padded to a power of two from here on, so that few programs are compiled


def embed(
    model: TextEncoder,
    texts: Sequence[str],
    *,
    batch: int = 32,
    max_length: int | None = None,
    normalize: bool | None = None,
) -> np.ndarray:
    """Returns one vector a text, float32 `[texts, D]`.

    Args:
        model: an encoder of text that `trustcore.load` opened.
        texts: any number of strings.
        batch: texts that are read at a time.
        max_length: tokens of a text that are read, special ones among them; None: as the checkpoint says.
        normalize: whether vectors have length one, so that a product of two is their cosine; None: as the checkpoint
            says, and yes where it says nothing.

    Without a description of sentence-transformers beside the weights, a vector is the mean of the tokens' states.

    Raises:
        ModelError: the model reads no text, or its description asks for something that is not supported.

    Example:
        >>> vectors = embed(trustcore.load("all-MiniLM-L6-v2"), ["a cat", "a kitten"])  # doctest: +SKIP
    """
    pooling = _pooling(model, normalize)
    limit = model.config.context
    for given in (pooling.max_length, max_length):
        limit = limit if given is None else min(limit, given)
    if batch < 1 or limit < 3:
        raise ModelError(f"embed: batch is {batch} and max_length {limit}; expected at least 1 and 3.")
    rows = [_tokens(model.tokenizer, text, limit) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: list[np.ndarray | None] = [None] * len(rows)
    for start in range(0, len(rows), batch):
        chosen = order[start : start + batch]
        length = _padded(max(len(rows[i]) for i in chosen), limit)
        count = min(batch, 1 << (len(chosen) - 1).bit_length())
        tokens = np.full((count, length), model.tokenizer.pad_id or 0, np.int32)
        mask = np.zeros((count, length), bool)
        mask[len(chosen) :, 0] = True  # rows beyond the last text
        for row, i in enumerate(chosen):
            tokens[row, : len(rows[i])], mask[row, : len(rows[i])] = rows[i], True
        vectors = np.asarray(_vectors(model, jnp.asarray(tokens), jnp.asarray(mask), pooling), np.float32)
        for row, i in enumerate(chosen):
            found[i] = vectors[row]
    if not found:
        return np.zeros((0, model.config.features * len(pooling.modes)), np.float32)
    return np.stack([vector for vector in found if vector is not None])


@functools.partial(jax.jit, static_argnums=3)
def _vectors(model: Any, tokens: jax.Array, mask: jax.Array, pooling: SentencePooling) -> jax.Array:
    return pool(model(tokens, mask), mask, pooling)


def _pooling(model: Any, normalize: bool | None) -> SentencePooling:
    if not isinstance(model, TextEncoder) or model.tokenizer is None:
        raise ModelError(
            f"embed: {type(model).__name__} is no encoder of text with a tokenizer. Open one with trustcore.load: a "
            "folder with config.json of a BERT-like model, model.safetensors and tokenizer.json."
        )
    pooling = model.pooling or SentencePooling()
    if pooling.refused:
        raise ModelError(f"embed: modules.json asks for {pooling.refused} behind the pooling, which is not supported.")
    return pooling if normalize is None else dataclasses.replace(pooling, normalize=normalize)


def _padded(length: int, limit: int) -> int:
    return min(max(_SHORTEST, 1 << (length - 1).bit_length()), limit)


def _tokens(tokenizer: Any, text: str, limit: int) -> list[int]:
    """The ids of a text with its special ones; of a longer text the first, and all special ones."""
    ids = tokenizer.encode(text)
    if len(ids) <= limit:
        return ids or [tokenizer.pad_id or 0]
    inner = tokenizer.encode(text, add_special=False)
    extra = len(ids) - len(inner)
    head = next((i for i in range(extra + 1) if ids[i : i + len(inner)] == inner), 0)
    tail = ids[head + len(inner) :]
    return ids[: limit - len(tail)] + tail
