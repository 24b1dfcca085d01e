"""`trustcore memory`: what a model's forward pass, or a step of its training, takes of memory, before it is run."""

from __future__ import annotations

import json
import re
from typing import Annotated

import typer

from trustcore import units
from trustcore.cli import console, options
from trustcore.cli.model import load_model
from trustcore.cli.step import next_token_loss, next_token_step

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def memory(
    model: options.Model,
    *,
    batch: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 1,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 512,
    train: Annotated[bool, typer.Option("--train", help="A gradient of all float weights.")] = False,
    budget: Annotated[
        str | None, typer.Option(metavar="4GB", help="With --train: find the cheapest step that fits.")
    ] = None,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
) -> None:
    """Tell what a forward pass or a step of training takes of memory; nothing is run."""
    limit = None if budget is None else read_size(budget)
    if limit is not None and not train:
        raise typer.BadParameter("it is for training: add --train", param_hint="'--budget'")
    from trustcore.memory import account, fit

    loaded = load_model(model, options.FloatType.FLOAT32 if train and dtype is None else dtype)
    step, tokens = next_token_step(model, loaded, batch, length, train=train)
    found = account(step, loaded, tokens)
    fitted = None if limit is None else fit(next_token_loss, limit, loaded, tokens, batch=(1,))
    if as_json:
        plans = {} if fitted is None else {"plan": vars(fitted.plan), "plain": vars(fitted.plain)}
        print(json.dumps({**found.as_json(), **plans}, indent=2))
        return
    console.out().print(str(found), soft_wrap=True, markup=False)
    if fitted is not None:
        console.out().print(f"\nwithin {units.size(limit or 0)}: {fitted}", soft_wrap=True, markup=False)


def read_size(text: str) -> int:
    """Returns the bytes that "4GB", "512 MiB" or "1000" stand for.

    Raises:
        typer.BadParameter: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise typer.BadParameter(f"{text!r} is no size; write 4GB or 512MiB, for example", param_hint="'--budget'")
    return int(float(found[1]) * _UNITS[found[2]])
