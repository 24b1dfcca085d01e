"""Flax's own layers, made abstract where there are no random keys, as `trustcore.nn.parameter` makes parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from flax import nnx

M = TypeVar("M", bound=nnx.Module)


def made_module(make: Callable[[nnx.Rngs], M], rngs: nnx.Rngs | None) -> M:
    """Returns `make(rngs)`; without rngs, the same module with shapes in place of arrays."""
    return nnx.eval_shape(lambda: make(nnx.Rngs(0))) if rngs is None else make(rngs)
