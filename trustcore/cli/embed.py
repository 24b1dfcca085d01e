"""`trustcore embed`: vectors of texts, or how similar they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from trustcore.cli import console, options
from trustcore.cli.model import load_model
from trustcore.errors import EvaluationError

SHOWN = 40  # characters of a text in a table


def embed(
    model: options.Model,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts; none: lines of stdin.")] = None,
    *,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="UTF-8 text, a line a text.")] = None,
    similarity: Annotated[bool, typer.Option("--similarity", help="Show cosines in place of vectors.")] = False,
    max_length: Annotated[int | None, typer.Option(min=3, help="Tokens of a text that are read.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Texts that are read at a time.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not scale vectors to length one.")] = False,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
) -> None:
    """Turn texts into vectors, or show how similar they are."""
    from trustcore.generation.programs import keep_programs
    from trustcore.models.sentence_vectors import embed as vectors_of

    content = _texts(texts, file)
    loaded = load_model(model, dtype)
    keep_programs()
    scaled = {"normalize": False} if raw and not similarity else {"normalize": True} if similarity else {}
    found = vectors_of(loaded, content, **options.given(max_length=max_length, batch=batch), **scaled)
    if similarity:
        cosines = (found @ found.T).tolist()
        if as_json:
            print(json.dumps({"texts": content, "similarities": cosines}, ensure_ascii=False))
        else:
            _print_table(content, cosines)
    elif as_json:
        print(json.dumps({"texts": content, "vectors": found.tolist()}, ensure_ascii=False))
    else:
        for vector in found.tolist():
            print(" ".join(f"{number:.6g}" for number in vector))


def _texts(texts: list[str] | None, file: Path | None) -> list[str]:
    """The texts that were given: as words, in a file, or on stdin.

    Raises:
        EvaluationError: there are none, they come from two places, or they are no UTF-8.
    """
    if texts and file is not None:
        raise EvaluationError("texts were given as words and in --file; give one of them.")
    if texts:
        return texts
    if file is None and sys.stdin.isatty():
        raise EvaluationError('no text; write trustcore embed MODEL "a text" "another", or name a file with --file.')
    try:
        data = sys.stdin.buffer.read() if file is None else file.read_bytes()
        lines = data.decode("utf-8").splitlines()
    except OSError as error:
        raise EvaluationError(f"{file}: cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        where = "stdin" if file is None else str(file)
        raise EvaluationError(f"{where}: not UTF-8 at offset {error.start}.") from error
    if not lines:
        raise EvaluationError(f"{'stdin' if file is None else file}: there is no text.")
    return lines


def _print_table(texts: list[str], cosines: list[list[float]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("text")
    for i in range(len(texts)):
        table.add_column(str(i + 1), justify="right")
    for i, (text, row) in enumerate(zip(texts, cosines, strict=True)):
        shown = console.plain(text)
        shown = shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."
        table.add_row(str(i + 1), shown, *(f"{number:.4f}" for number in row))
    console.print_table(console.out(), table)
