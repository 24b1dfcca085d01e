"""`trustcore perplexity` and `trustcore compare`: how well models predict a text, and how far apart two of them are."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from trustcore.cli import console, options
from trustcore.cli.model import load_model
from trustcore.errors import EvaluationError

Text = Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text. A line feed at its end does not count.")]
Context = Annotated[int | None, typer.Option(min=4, help="Tokens that are read at a time; 512 by default.")]


def perplexity(
    model: options.Model,
    *,
    text: Text,
    context: Context = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Begin a chunk every so many tokens, so that all have a long past.")
    ] = None,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure how well a model predicts a text, as llama.cpp's tool of that name does."""
    from trustcore.evaluation import perplexity as measure

    content = read_text(text)
    loaded = load_model(model, dtype)
    with _bar() as progress:
        found = measure(loaded, content, progress=progress, **options.given(context=context, stride=stride))
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        print(f"perplexity {_figure(found)}, {found.scored} of {found.tokens} tokens in {found.chunks} chunks")


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="The reference: a model as `generate` takes it.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The model that is compared with it.")],
    *,
    text: Text,
    context: Context = None,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure how far the predictions of model B are from those of model A on a text."""
    from trustcore.evaluation import compare as measure

    content = read_text(text)
    reference, other = load_model(first, dtype), load_model(second, dtype)
    with _bar() as progress:
        found = measure(reference, other, content, progress=progress, **options.given(context=context))
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    print(f"mean KL divergence     {found.kl_divergence:.6f} +/- {found.kl_error:.6f} (largest {found.kl_max:.4f})")
    print(f"same likeliest token   {100 * found.top1_agreement:.2f} %")
    print(f"largest difference     {found.max_logit_difference:.4f} of a logit")
    print(f"perplexity of A        {_figure(found.first)}")
    print(f"perplexity of B        {_figure(found.second)}")
    print(
        f"{found.first.scored} of {found.first.tokens} tokens in {found.first.chunks} chunks of {found.first.context}"
    )


def read_text(path: Path) -> str:
    """Returns a text file without the line feed at its end.

    Raises:
        EvaluationError: it cannot be read, or is no UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from error
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{path}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}. Convert it, for example with "
            "`iconv -f latin1 -t utf-8`."
        ) from error


def _figure(found: Any) -> str:
    return f"{found.perplexity:.4f} +/- {found.error:.4f}"


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A callback that draws a bar of chunks on stderr."""
    from trustcore.generation.programs import keep_programs

    keep_programs()
    with console.progress_bar(unit="chunks") as report:
        yield functools.partial(report, "reading")
