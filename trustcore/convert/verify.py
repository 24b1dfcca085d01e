"""Whether a converted checkpoint is the same model: both are loaded in turn, and answer the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import ModelError
from trustcore.models import decoder_from_checkpoint
from trustcore.weights import Checkpoint, open_checkpoint

TOKENS = 32
# Largest difference of two logits, in units of the largest logit. Where numbers are the same only the order of sums
# differs; where they were rounded to 16 bits, bfloat16's 2^-9 adds up over the layers.
EXACT, ROUNDED = 1e-4, 0.1


@dataclass(frozen=True)
class Verification:
    """How far two models are apart on a fixed prompt.

    Attributes:
        max_difference: the largest difference of two logits.
        max_logit: the largest absolute logit of the source.
        agreement: share of positions at which both find the same token likeliest.
        tokens: of the prompt.
        limit: that `max_difference / max_logit` was held to.
    """

    max_difference: float
    max_logit: float
    agreement: float
    tokens: int
    limit: float


def verify_conversion(source: Checkpoint, out: Path, *, exact: bool) -> Verification:
    """Returns how far the logits of two checkpoints are apart, both computed in float32.

    Args:
        source: open.
        out: what it was converted to.
        exact: whether no number was rounded.

    Raises:
        ModelError: they are further apart than the conversion explains, or one of them is no model that can be loaded.

    Memory: the larger of the two models, in float32.
    """
    expected = _logits(source)
    with open_checkpoint(out) as checkpoint:
        found = _logits(checkpoint)
    if found.shape != expected.shape:
        raise ModelError(f"verify: the logits are {list(found.shape)}; those of the source {list(expected.shape)}.")
    difference, largest = float(np.abs(found - expected).max()), float(np.abs(expected).max())
    agreement = float((found.argmax(-1) == expected.argmax(-1)).mean())
    limit = EXACT if exact else ROUNDED
    if not difference <= limit * largest:  # also where one of them is no number
        raise ModelError(
            f"verify: logits differ by up to {difference:.3g}, where the largest is {largest:.3g}; expected at most "
            f"{limit} of it. What was written is not the same model, and was removed."
        )
    return Verification(difference, largest, agreement, expected.shape[0], limit)


def _logits(checkpoint: Checkpoint) -> np.ndarray:
    """Logits of the fixed prompt, float32 `[T, V]`."""
    model = decoder_from_checkpoint(checkpoint, dtype="float32")
    vocabulary = model.config.vocab_size
    tokens = (np.arange(TOKENS) * 7919 + 1) % vocabulary  # a prime: far apart, whatever the vocabulary
    return np.asarray(jax.device_get(model(jnp.asarray(tokens[None], jnp.int32))), np.float32)[0]
