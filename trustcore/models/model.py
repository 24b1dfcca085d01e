"""What models of every family share: where they came from, how large they are, one layer run as one program."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Model(nnx.Module):
    """A model that a checkpoint describes.

    Attributes:
        config: its shape.
        dtype: of activations.
        tokenizer: set by `trustcore.load`, where the model reads text.
        pooling: set by `trustcore.load`, where the checkpoint says how tokens become one vector.
        source: where the weights came from, for people.
        origin: the file they came from, or "".
    """

    def __init__(self, config: Any, dtype: Any):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.tokenizer: Any = None
        self.pooling: Any = None
        self.source = ""
        self.origin = ""

    @property
    def parameters(self) -> int:
        """Number of weights."""
        leaves = jax.tree.leaves(nnx.state(self, nnx.Param), is_leaf=lambda x: hasattr(x, "dequantize"))
        return sum(leaf.size for leaf in leaves)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are held."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def __repr__(self) -> str:
        source = f"{self.source}: " if self.source else ""
        return f"{type(self).__name__}({source}{self.config.family}, {self.parameters} parameters)"

    __str__ = __repr__  # nnx would print every layer


class TextEncoder(Model):
    """A model that gives each token of a text a state: `model(tokens, mask)` is `[B, T, D]`. `embed` takes these."""


@jax.jit
def run(layer: Any, *args: Any) -> Any:
    """Returns `layer(*args)`, compiled: layers of one shape share one program."""
    return layer(*args)


def key_mask(mask: Any) -> jax.Array | None:
    """Returns a mask of tokens `[B, S]` (numbers or truth values) as one of keys, bool `[B, 1, 1, S]`."""
    return None if mask is None else jnp.asarray(mask).astype(bool)[:, None, None, :]
