"""`scan_layers`: a model whose layers are run by a scan, so that compiling takes the same time at any depth.

    model = scan_layers(model, remat=True)      the same function of the same numbers
    save(unscan_layers(model), ...)             lists of layers again; `save` does it by itself

Weights are stacked by kind of layer: float and packed alike, and layers that alternate (windows, experts, formats) in
groups of a period; see `trustcore.nn.stack`. What a scan costs: each layer's weights are copied out of the stack when
its turn comes, which products of one token notice (generation) and those of many do not (training). Quantize first and
stack then: `quantize` packs matrices, and leaves stacks of them alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from trustcore.errors import ModelError
from trustcore.memory import Shelf
from trustcore.models.model import Model, parameters_of
from trustcore.nn.shelved import ShelvedStack
from trustcore.nn.stack import Remat, Stack

M = TypeVar("M", bound=nnx.Module)
Make = Callable[[str, Any], Any]


def scan_layers(model: M, *, remat: Remat = False, unroll: int = 1) -> M:
    """Returns the model with its blocks stacked, to be run by `jax.lax.scan`; the one given stays as it is.

    Args:
        model: of any family but convolutional networks: a decoder, an encoder, both, or a pair of towers; arrays or
            shapes.
        remat: whether activations within a repeat are computed again in the backward pass in place of being kept; or a
            policy of `jax.checkpoint_policies`.
        unroll: repeats that one step of the loop runs: a larger program that may run faster.

    Raises:
        ModelError: the model does not run its blocks one after the other, or unroll is not positive.

    Gradients come in the same form as the stacked model. `model.new_cache` makes a cache of that form; one of another
    form is stacked in each call. The stack is a copy: drop the given model to have its memory back.

    Example:
        >>> from trustcore.models import random_model, scan_layers
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
        >>> model = scan_layers(random_model({"model_type": "llama", "num_hidden_layers": 24, **sizes}))
        >>> model.blocks.repeats
        (24,)
    """
    if unroll < 1:
        raise ModelError(f"scan_layers: a step of {unroll} repeats; unroll must be positive.")
    return _with_blocks(model, "scan_layers", lambda _, blocks: Stack(list(blocks), remat=remat, unroll=unroll))


def unscan_layers(model: M) -> M:
    """Returns the model with a list of blocks, as it is loaded and saved; the inverse of `scan_layers`.

    Raises:
        ModelError: the model does not run its blocks one after the other.
    """
    return _with_blocks(model, "unscan_layers", lambda _, blocks: nnx.List(list(blocks)))


def spill_layers(model: M, folder: str | os.PathLike[str] | None = None) -> M:
    """Returns the model with the weights of its layers on disk, each read when its turn comes, the next one ahead.

    Args:
        model: as for `scan_layers`.
        folder: where the file is made, which has no name and vanishes with the model; None: where temporary files go.

    Raises:
        ModelError: the model does not run its blocks one after the other.
        ProgramError: the file cannot be written.

    The model computes the same. A pass over all layers reads the whole file, from the disk or from the system's cache
    of it: a token costs that much, a batch or a prompt no more. Derivatives take the layers' weights for constants.
    `trustcore.load(spill=True)` makes such a model of one that never was in memory.
    """
    shelf = Shelf(folder)
    return _with_blocks(model, "spill_layers", lambda _, blocks: ShelvedStack(shelf, [shelf.put(b) for b in blocks]))


def put_on_shelf(model: Any, shelf: Shelf, shelved: Mapping[str, int]) -> None:
    """Has a model whose layers are shapes take their weights from a shelf, where each parameter lies under a number.

    Raises:
        ModelError: the model does not run its blocks one after the other.
    """

    def made(place: str, blocks: Any) -> ShelvedStack:
        numbers = []
        for i, block in enumerate(blocks):
            own = [shelved[f"{place}.{i}.{path}"] for path in parameters_of(block)]
            numbers.append(shelf.join(jax.tree.structure(block), own))
        return ShelvedStack(shelf, numbers)

    _set_blocks(model, "spill", made)


def _with_blocks(model: Any, caller: str, make: Make) -> Any:
    copy = jax.tree.map(lambda leaf: leaf, model)
    _set_blocks(copy, caller, make)
    return copy


def _set_blocks(model: Any, caller: str, make: Make) -> None:
    """Puts what `make` gives for a list of blocks, and the list's place, in the place of each such list."""
    if not isinstance(model, Model) or not model.stacks:
        raise ModelError(
            f"{caller}: a {type(model).__name__} has no list of blocks that follow each other; pass a decoder, an "
            "encoder, an encoder-decoder or a pair of towers."
        )
    for place in model.stacks:
        *path, name = place.split(".")
        owner = functools.reduce(getattr, path, model)
        if len(getattr(owner, name)):
            setattr(owner, name, make(place, getattr(owner, name)))
