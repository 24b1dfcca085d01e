"""Sounds as a model that transcribes takes them: pieces of the length that it reads, the language heard in each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trustcore.errors import GenerationError
from trustcore.generation.engine import generate_tokens
from trustcore.models.writing import Writer


def pieces_of(sound: Any, most: int) -> tuple[list[np.ndarray], list[int], bool]:
    """Returns the pieces of all sounds, how many each sound has, and whether there were several sounds.

    Args:
        sound: samples `[S]`, or a list of such.
        most: samples of a piece. Pieces follow each other without overlap: a word that is cut may be lost.

    Raises:
        GenerationError: it is something else.
    """
    several = isinstance(sound, Sequence) and bool(sound) and not isinstance(sound[0], int | float | np.number)
    rows = [np.asarray(row) for row in sound] if several else [np.asarray(sound)]
    for row in rows:
        if row.ndim != 1 or not row.size or row.dtype.kind != "f":
            raise GenerationError(
                f"the sound is {row.dtype}{list(row.shape)}; this model reads samples as floats from -1 to 1, mono, "
                "16000 a second, in an array of one axis."
            )
    pieces = [[row[at : at + most].astype(np.float32) for at in range(0, row.size, most)] for row in rows]
    return [piece for row in pieces for piece in row], [len(row) for row in pieces], several


def heard(model: Writer, pieces: Sequence[np.ndarray]) -> list[list[int]] | None:
    """Returns what the decoder begins each piece with, the language being the likeliest; None: as the checkpoint says.

    One step of the decoder behind its start token (Radford et al., arXiv 2212.04356, section 2.3).
    """
    writing = model.writing
    if not writing.languages:
        return None
    start = writing.first[:1]
    (step,) = generate_tokens(model, pieces, max_tokens=1, first=start, only=writing.languages)
    return [[*start, int(language), *writing.task] for language in step.tokens[:, 0]]
