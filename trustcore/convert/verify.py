"""Whether a converted checkpoint is the same model: both are loaded in turn, and answer the same input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from trustcore.errors import ModelError
from trustcore.models import model_from_checkpoint
from trustcore.weights import Checkpoint, open_checkpoint

# Largest difference of two logits (of an encoder: of two numbers of its states), in units of the largest. Where numbers
# are the same only the order of sums differs; where they were rounded to 16 bits, bfloat16's 2^-9 adds up over layers.
EXACT, ROUNDED = 1e-4, 0.1


@dataclass(frozen=True)
class Verification:
    """How far two models are apart on a fixed input.

    Attributes:
        max_difference: the largest difference of two logits, or of two numbers of an encoder's states.
        max_logit: the largest absolute one of the source.
        agreement: share of positions at which the same one is the largest: the token that is likeliest.
        tokens: positions.
        limit: that `max_difference / max_logit` was held to.
    """

    max_difference: float
    max_logit: float
    agreement: float
    tokens: int
    limit: float


def verify_conversion(source: Checkpoint, out: Path, *, exact: bool) -> Verification:
    """Returns how far what two checkpoints answer is apart, both computed in float32.

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
    return Verification(difference, largest, agreement, expected.size // expected.shape[-1], limit)


def _logits(checkpoint: Checkpoint) -> np.ndarray:
    """What the model answers to its example, float32: logits `[..., V]`, or states."""
    model = model_from_checkpoint(checkpoint, dtype="float32")
    found = model(*model.example())
    return np.asarray(jax.device_get(found[0] if isinstance(found, tuple) else found), np.float32)
