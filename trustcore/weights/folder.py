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

# A tokenizer and what else goes with a model, as folders of Hugging Face and of sentence-transformers have them.
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "image_processor_config.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
)
_MODULES = "[0-9]_*/config.json"  # of sentence-transformers: 1_Pooling/config.json


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


def companions(folder: Path) -> list[str]:
    """Returns what lies beside the weights of a model in its folder, config.json aside: tokenizer, preprocessor."""
    modules = sorted(str(file.relative_to(folder)) for file in folder.glob(_MODULES))
    return [name for name in (*_FILES, TOKENIZER_GGUF, *modules) if (folder / name).is_file()]


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copies `companions` from one folder to another, and returns them."""
    names = companions(source)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    return names
