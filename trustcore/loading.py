"""From a name or a path to a model that can answer: catalogue, checkpoint, weights and tokenizer joined."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trustcore.heap import trim_heap
from trustcore.memory import Shelf
from trustcore.models import model_from_checkpoint


def load(
    source: str | os.PathLike[str],
    *,
    dtype: Any = None,
    progress: Callable[[int, int], None] | None = None,
    spill: bool | str | os.PathLike[str] = False,
) -> Any:
    """Returns the model that `source` names, with its tokenizer: a `Decoder`, or a `trustcore.models.Model`.

    Args:
        source: a name of the catalogue ("smollm2"), a GGUF or safetensors file, a folder with a model, or a Hugging
            Face id ("owner/name", "owner/name:Q4_K_M"). What is not on this machine yet is brought to the cache folder.
        dtype: None keeps matrices as they are stored (packed, or 16-bit) and computes in float32 on CPUs, bfloat16
            elsewhere. A dtype decodes all of them and computes in it.
        progress: called with (bytes done, bytes in all) while weights are read.
        spill: leaves the weights of layers on disk, as they are computed with (packed, or in `dtype`), and reads each
            layer when its turn comes: for models larger than memory. A folder for the file; True: where temporary
            files go. See `trustcore.models.spill_layers`.

    Raises:
        CatalogueError: the name is unknown or could not be brought here.
        CheckpointError: the file is broken.
        ModelError: its architecture is not supported, its tensors do not fit, or it does not run layers one by one.
        ProgramError: what is spilled cannot be written.
        TokenizerError: its tokenizer cannot be built.

    Example:
        >>> model = trustcore.load("smollm2")  # doctest: +SKIP
    """
    from trustcore.catalogue import resolve
    from trustcore.text import Tokenizer
    from trustcore.weights import open_checkpoint

    checkpoint = open_checkpoint(resolve(source))
    shelf = None if spill is False else Shelf(None if spill is True else spill)
    with checkpoint:
        model = model_from_checkpoint(checkpoint, dtype=dtype, progress=progress, shelf=shelf)
        if checkpoint.format != "gguf":
            model.tokenizer = _tokenizer_beside(checkpoint.path.parent)
        elif checkpoint.metadata.get("tokenizer.ggml.model") != "none":  # of weights alone: takes and gives token ids
            model.tokenizer = Tokenizer.from_gguf(checkpoint.metadata)
    del checkpoint
    trim_heap()
    return model


def _tokenizer_beside(folder: Path) -> Any:
    """The tokenizer of a folder: of its tokenizer.json, or of the GGUF metadata that a saved model may have instead.

    None where it has neither: such a model takes and gives token ids.
    """
    from trustcore.text import Tokenizer
    from trustcore.weights import open_checkpoint
    from trustcore.weights.checkpoint import TOKENIZER_GGUF

    metadata = folder / TOKENIZER_GGUF
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(folder)
    if not metadata.is_file():
        return None
    with open_checkpoint(metadata) as checkpoint:
        return Tokenizer.from_gguf(checkpoint.metadata)
