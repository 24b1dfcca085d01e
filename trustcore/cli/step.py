"""The program that `memory`, `cost` and `inspect-step` tell of: a language model's forward pass, or a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trustcore.errors import ModelError


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


def step_tokens(name: str, model: Any, text: str | None, batch: int, length: int, seed: int) -> Any:
    """Returns int32 `[B, T]` tokens for a step: those of a text, as one row of at most `length`; or random ones.

    Raises:
        ModelError: the model has no tokenizer, or the text has fewer than two tokens.
    """
    import jax.numpy as jnp
    import numpy as np

    if text is None:
        drawn = np.random.default_rng(seed).integers(0, model.config.vocab_size, (batch, length))
        return jnp.asarray(drawn.astype(np.int32))
    if model.tokenizer is None:
        raise ModelError(f"{name}: it has no tokenizer; leave --text out for tokens drawn at random.")
    ids = model.tokenizer.encode(text)[:length]
    if len(ids) < 2:
        raise ModelError(f"--text has {len(ids)} tokens; a loss of next tokens needs two at least.")
    return jnp.asarray([ids], jnp.int32)
