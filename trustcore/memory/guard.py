"""`explained`: a function whose out-of-memory error says what took the memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from trustcore.errors import ProgramError
from trustcore.memory.account import account


def explained(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fn`, jitted where it is not; when it runs out of memory, the error holds its account.

    Args:
        fn: a function of pytrees, or what `jax.jit` made of one.

    Raises:
        ProgramError: on running out of device memory: the program's peak, and the largest buffers with their owners.
        Other errors pass through. A program that runs is neither looked at nor slowed.

    Donated arguments are gone by then; the account needs their shapes alone.
    """
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)

    @functools.wraps(fn)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return jax.block_until_ready(jitted(*args, **kwargs))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            first = str(error).splitlines()[0]
            try:
                told = str(account(jitted, *args, **kwargs))
            except (ProgramError, jax.errors.JaxRuntimeError) as second:
                told = f"(its buffers cannot be told: {str(second).splitlines()[0]})"
            raise ProgramError(f"{first}\n{told}") from error

    return called
