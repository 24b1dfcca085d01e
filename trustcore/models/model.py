"""What models of every family share: where they came from, how large they are, one layer run as one program."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trustcore.models.writing import Writing
from trustcore.nn.stack import Stack
from trustcore.quant.quantize import path_name


class Model(nnx.Module):
    """A model that a checkpoint describes.

    Attributes:
        config: its shape.
        dtype: of activations.
        tokenizer: set by `trustcore.load`, where the model reads text.
        pooling: set by `trustcore.load`, where the checkpoint says how tokens become one vector.
        writing: what the checkpoint says of how the model writes, where it does.
        source: where the weights came from, for people.
        origin: the file they came from, or "": `trustcore.save` takes the tokenizer's files from beside it.
        described: the config.json that it was made of, or "".
        prefix: of the names in that file, see `Names`; None: the usual one.
        input_scales: (path, scale) of matrices whose checkpoint has a static scale for quantized inputs. Products do
            not use them; they are kept for whoever does.
        stacks: paths of its lists of blocks that follow each other, which `run_blocks` runs and `scan_layers` stacks.
    """

    stacks: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, dtype: Any):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.tokenizer: Any = None
        self.pooling: Any = None
        self.writing = Writing()
        self.source = ""
        self.origin = ""
        self.described = ""
        self.prefix: str | None = None
        self.input_scales: tuple[tuple[str, float], ...] = ()

    @property
    def parameters(self) -> int:
        """Number of weights; a tied table counts once."""
        leaves = jax.tree.leaves(nnx.state(self, nnx.Param), is_leaf=lambda x: hasattr(x, "dequantize"))
        return sum(leaf.size for leaf in leaves)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are held."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def example(self) -> tuple[Any, ...]:
        """Returns arguments of a call, the same for every model of this shape: tokens, frames or images."""
        return (sample_tokens(self.config.vocab_size, self.config.context),)

    def __repr__(self) -> str:
        source = f"{self.source}: " if self.source else ""
        return f"{type(self).__name__}({source}{self.config.family}, {self.parameters} parameters)"

    __str__ = __repr__  # nnx would print every layer


def parameters_of(model: nnx.Module) -> dict[str, nnx.Variable[Any]]:
    """Returns the parameters of a model, statistics of norms among them, by their paths, names joined by dots.

    Those of stacked layers (`scan_layers`) are copies, under the names that they have in a list.
    """
    flat = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda node: isinstance(node, nnx.Variable | Stack))[0]
    found: dict[str, nnx.Variable[Any]] = {}
    for path, node in flat:
        if not isinstance(node, Stack):
            found[path_name(path)] = node
            continue
        for i, block in enumerate(node):
            found.update({f"{path_name(path)}.{i}.{name}": part for name, part in parameters_of(block).items()})
    return found


def sample_tokens(vocab_size: int, most: int = 32) -> jax.Array:
    """Returns tokens `[1, T]`, T up to 32 and `most`, far apart in the vocabulary."""
    return ((jnp.arange(min(most, 32), dtype=jnp.int32) * 7919 + 1) % vocab_size)[None]  # a prime


def sample_images(size: tuple[int, int], channels: int) -> jax.Array:
    """Returns an image `[1, height, width, channels]` of waves."""
    down, across, color = np.ogrid[: size[0], : size[1], :channels]
    return jnp.asarray(np.sin(down / 3 + across / 5 + color)[None], jnp.float32)


class TextEncoder(Model):
    """A model that gives each token of a text a state: `model(tokens, mask)` is `[B, T, D]`. `embed` takes these."""


@jax.jit
def run(layer: Any, *args: Any) -> Any:
    """Returns `layer(*args)`, compiled: layers of one shape share one program."""
    return layer(*args)


def key_mask(mask: Any) -> jax.Array | None:
    """Returns a mask of tokens `[B, S]` (numbers or truth values) as one of keys, bool `[B, 1, 1, S]`."""
    return None if mask is None else jnp.asarray(mask).astype(bool)[:, None, None, :]
