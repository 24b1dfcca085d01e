"""all-MiniLM-L6-v2: sentence vectors as a pure function of weights, to measure packed ones by.

model = trustcore.load("minilm", dtype="float32")
tokens, mask = tokenize(model, sentences);  embed(model, tokens, mask) -> vectors [B, D]
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from trustcore.models.sentence import pool

LENGTH = 64


def tokenize(model: Any, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and mask, int32 and bool `[B, LENGTH]`; longer sentences are cut before their last token."""
    tokens = np.full((len(sentences), LENGTH), model.tokenizer.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, sentence in enumerate(sentences):
        ids = model.tokenizer.encode(sentence)
        ids = ids if len(ids) <= LENGTH else [*ids[: LENGTH - 1], ids[-1]]
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return tokens, mask


def embed(model: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns a unit vector for each sentence, float32 `[B, D]`."""
    return pool(model(tokens, mask), mask, model.pooling)
