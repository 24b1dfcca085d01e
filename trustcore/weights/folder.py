"""Folders and files that appear when they are complete, and what lies beside the weights of a model in them.

Invariant: what is written goes to a hidden folder beside its place, and is moved there when it is whole; a failure
leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from trustcore.errors import CheckpointError
from trustcore.weights.checkpoint import TOKENIZER_GGUF

# A tokenizer and what goes with it, as Hugging Face's folders have them.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
    *("generation_config.json", "preprocessor_config.json"),
)


def refuse_occupied(folder: Path) -> None:
    """Raises the CheckpointError that says why a folder cannot be written: it holds something, or is a file."""
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError("the folder is not empty; give one that is not there yet", path=folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise CheckpointError("this is a file; give a folder that is not there yet", path=folder)


@contextlib.contextmanager
def appearing(path: Path, *, file: bool = False) -> Iterator[Path]:
    """Gives a hidden folder that becomes the folder at `path` when the block ends without an error.

    With `file`, the file of that name in it becomes the file at `path`, in place of what was there, and the rest goes.

    Raises:
        OSError: the disk refuses, or the folder at `path` holds something.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.partial")
    try:
        partial.mkdir()
        yield partial
        if file:
            os.replace(partial / path.name, path)
        else:
            if path.exists():
                path.rmdir()  # empty, or the disk says so
            os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # not there any more where it became the folder


def tokenizer_files(folder: Path) -> list[Path]:
    """Returns the files of a tokenizer in a folder of a model, and what goes with them."""
    return [folder / name for name in (*TOKENIZER_FILES, TOKENIZER_GGUF) if (folder / name).is_file()]
