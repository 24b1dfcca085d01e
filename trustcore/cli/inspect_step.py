"""`trustcore inspect-step`: one step of a model's training, looked into: issues, statistics of every value, watches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trustcore.cli import console, options
from trustcore.cli.model import load_model
from trustcore.cli.step import next_token_gradient, next_token_loss, next_token_step, step_tokens


def inspect_step(
    model: options.Model,
    *,
    text: Annotated[str | None, typer.Option(help="What is trained on; without it, tokens drawn at random.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of random tokens.")] = 1,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    watch: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only these addresses: 'blocks/3/*'. May be repeated.")
    ] = None,
    forward: Annotated[bool, typer.Option("--forward", help="The loss alone, without its gradient.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as a page, too.")] = None,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
) -> None:
    """Run one step of training and tell what is wrong within: NaN, Inf, vanishing, exploding, and where it began."""
    from trustcore.debug import inspect
    from trustcore.errors import DebugError, ModelError

    loaded = load_model(model, options.FloatType.FLOAT32 if dtype is None else dtype)
    next_token_step(model, loaded, batch, length, train=not forward)  # refuses what has no such step
    tokens = step_tokens(model, loaded, text, batch, length, seed)
    if html is not None and html.is_dir():
        raise ModelError(f"--html {html}: that is a folder; name a file.")
    found = inspect(next_token_loss if forward else next_token_gradient, watch or "*")
    try:
        outputs, report = found.run(loaded, tokens)
    except DebugError as error:
        raise DebugError(f"--{error}" if str(error).startswith("watch:") else str(error)) from error
    loss = float(outputs if forward else outputs[0])
    if html is not None:
        report.to_html(html)
    if as_json:
        print(report.to_json())
        return
    out = console.out()
    what = "the loss" if forward else "a step of training"
    out.print(f"{what} on {tokens.shape[0]} x {tokens.shape[1]} tokens: loss {loss:.6g}", soft_wrap=True, markup=False)
    if out.is_terminal:
        out.print(report)
    else:
        print(str(report).rstrip())
    if html is not None:
        console.err().print(f"written: {html}", soft_wrap=True, markup=False)
