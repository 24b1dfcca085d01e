"""Flax's own layers, made abstract where there are no random keys, as `trustcore.nn.parameter` makes parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

M = TypeVar("M", bound=nnx.Module)


def made_module(make: Callable[[nnx.Rngs], M], rngs: nnx.Rngs | None) -> M:
    """Returns `make(rngs)`; without rngs, the same module with shapes in place of arrays."""
    return nnx.eval_shape(lambda: make(nnx.Rngs(0))) if rngs is None else make(rngs)


def flax_options(rngs: nnx.Rngs | None, **initializers: Any) -> dict[str, Any]:
    """Returns what makes a layer that inherits one of Flax's: `rngs`, and `NAME_init` for each initializer.

    Without rngs the initializers give shapes.
    """
    if rngs is not None:
        return {"rngs": rngs, **{f"{name}_init": given for name, given in initializers.items() if given is not None}}
    return {"rngs": _NoRngs(), **{f"{name}_init": _shape for name in initializers}}


class _NoRngs:
    def params(self) -> None:
        return None


def _shape(key: None, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
