"""`trustcore memory`: what a model's forward pass, or a step of its training, takes of memory, before it is run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from trustcore.cli import console, options
from trustcore.cli.model import load_model
from trustcore.errors import ModelError

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
        console.out().print(f"\nwithin {console.size(limit or 0)}: {fitted}", soft_wrap=True, markup=False)


def next_token_step(name: str, model: Any, batch: int, length: int, *, train: bool) -> tuple[Callable[..., Any], Any]:
    """Returns `step(model, tokens)`, a forward pass or the gradient of the loss of next tokens, and the tokens' shape.

    Raises:
        ModelError: the model is no language model, or reads fewer tokens.
    """
    import jax
    import jax.numpy as jnp

    from trustcore.models import Decoder

    if not isinstance(model, Decoder):
        raise ModelError(f"{name}: this is told of language models; it is a {type(model).__name__}.")
    if length > model.config.context:
        raise ModelError(f"{name}: it reads {model.config.context} tokens, fewer than {length}; lower --length.")
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return (next_token_gradient if train else lambda model, tokens: model(tokens)), tokens


def next_token_loss(model: Any, tokens: Any) -> Any:
    """Returns the mean of -log p(next token) over `[B, T]` tokens."""
    import jax
    import jax.numpy as jnp

    chances = jax.nn.log_softmax(model(tokens[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(chances, tokens[:, 1:, None], -1))


def next_token_gradient(model: Any, tokens: Any) -> Any:
    """Returns that loss and its gradient."""
    import jax

    return jax.value_and_grad(next_token_loss, allow_int=True)(model, tokens)


def read_size(text: str) -> int:
    """Returns the bytes that "4GB", "512 MiB" or "1000" stand for.

    Raises:
        typer.BadParameter: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise typer.BadParameter(f"{text!r} is no size; write 4GB or 512MiB, for example", param_hint="'--budget'")
    return int(float(found[1]) * _UNITS[found[2]])
