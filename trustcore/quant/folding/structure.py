"""What a folding method has to know of a model: which weights feed which, as paths and nothing else.

A folding changes weights in pairs so that the function stays the same. There are two kinds of pairs:

    Link     channels c that are made by `sources` and read by `consumers`, so that for any scale s[c] > 0
                 sources[..., c] / s[c]   and   consumers[c, ...] * s[c]       give the same outputs
    Stream   a residual stream h [D] that embeddings and writers add to and norms read from, so that for any
             orthogonal R
                 writers @ R   and   R.T @ readers                             give the same outputs

Paths are names joined by dots as `quantize` spells them, so dicts, dataclasses and modules are described alike. Who
builds a model describes it (`trustcore.models.decoder_links`, `decoder_stream`); the methods know no layers.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import QuantizationError
from trustcore.ops.weight import Weight
from trustcore.quant.calibration.observers import Range
from trustcore.quant.quantize import Predicate, is_table, path_name


@dataclasses.dataclass(frozen=True)
class Link:
    """Channels that some weights make and some matrices read, with nothing but products by numbers in between.

    Attributes:
        sources: paths of what the channels are proportional to: vectors `[C]` (a norm's gain and bias, a layer's bias)
            and matrices `[K, C]`. A gated layer's product is proportional to its `up` alone.
        consumers: paths of all matrices that read the channels, `[C, N]`. None may be left out.
        heads: (heads of the sources, heads of the consumers). Grouped-query attention makes C channels in K heads and
            reads them in N = r * K: consumers are then `[r * C, N]`, r heads after each other reading one source head.
    """

    sources: tuple[str, ...]
    consumers: tuple[str, ...]
    heads: tuple[int, int] = (1, 1)

    @property
    def repeats(self) -> int:
        """How often each source channel is read."""
        return self.heads[1] // self.heads[0]

    def spread(self, channels: jax.Array) -> jax.Array:
        """Returns a number for each source channel `[C]` as one for each input of the consumers `[r * C]`."""
        by_head = channels.reshape(self.heads[0], 1, -1)
        return jnp.broadcast_to(by_head, (self.heads[0], self.repeats, by_head.shape[-1])).reshape(-1)

    def gather(self, inputs: jax.Array) -> jax.Array:
        """Returns `[r, C]`: what stands at the r inputs `[r * C]` that read each source channel."""
        return inputs.reshape(self.heads[0], self.repeats, -1).swapaxes(0, 1).reshape(self.repeats, -1)


@dataclasses.dataclass(frozen=True)
class Stream:
    """A residual stream of D channels between RMS norms.

    Attributes:
        embeddings: tables `[V, D]` whose rows enter the stream.
        norms: a link for each norm that reads the stream: its gain `[D]`, and the matrices behind it.
        writers: matrices `[K, D]` and vectors `[D]` whose outputs are added to the stream.
        values: links between which everything is linear head by head, as from values to attention's output product.
    """

    embeddings: tuple[str, ...]
    norms: tuple[Link, ...]
    writers: tuple[str, ...]
    values: tuple[Link, ...] = ()


class Leaves:
    """The leaves of a tree by path, to be replaced one after the other. The tree that was given stays as it is.

    Args:
        tree: a pytree of weights.
        transposed: which matrices are stored `[N, K]`; see `trustcore.quantize`.
        method: the name that errors begin with.
    """

    def __init__(self, tree: Any, *, transposed: Predicate | None = None, method: str):
        flat, self._structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, Weight))
        self._paths = [path_name(path) for path, _ in flat]
        self._leaves = dict(zip(self._paths, (leaf for _, leaf in flat), strict=True))
        self._transposed = transposed or is_table
        self.method = method

    def __contains__(self, path: str) -> bool:
        return path in self._leaves

    def __getitem__(self, path: str) -> Any:
        return self._leaves[path]

    def __setitem__(self, path: str, array: jax.Array) -> None:
        self._leaves[path] = array.astype(self._leaves[path].dtype)

    def items(self) -> list[tuple[str, Any]]:
        """Returns paths and leaves, in the order of the tree."""
        return [(path, self._leaves[path]) for path in self._paths]

    def is_transposed(self, path: str) -> bool:
        """Returns whether the matrix is stored `[N, K]`."""
        return bool(self._transposed(path, self._leaves[path]))

    def matrix(self, path: str) -> jax.Array:
        """Returns the matrix as `[K, N]`."""
        matrix = jnp.asarray(self._leaves[path])
        return matrix.T if self.is_transposed(path) else matrix

    def set_matrix(self, path: str, matrix: jax.Array) -> None:
        """Puts a matrix given as `[K, N]` in its place."""
        self[path] = matrix.T if self.is_transposed(path) else matrix

    def put(self, path: str, leaf: Any) -> None:
        """Puts a leaf of any kind in place of another."""
        self._leaves[path] = leaf

    def tree(self) -> Any:
        """Returns the tree with the leaves as they are now."""
        return jax.tree_util.tree_unflatten(self._structure, [self._leaves[path] for path in self._paths])

    def faults(self, path: str, *, ndims: tuple[int, ...]) -> list[str]:
        """Returns what keeps the leaf at `path` from being folded: nothing, or one line."""
        if path not in self._leaves:
            near = difflib.get_close_matches(path, self._paths, n=1)
            return [f"{path} is no path of the tree" + (f" (nearest: {near[0]})" if near else "")]
        leaf = self._leaves[path]
        if isinstance(leaf, Weight):
            return [f'{path} is packed ({leaf!r}); fold float weights, such as load(source, dtype="float32") gives']
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return [f"{path} is abstract; load or initialize the weights first"]
        if shape is None or dtype is None or len(shape) not in ndims or not jnp.issubdtype(dtype, jnp.floating):
            described = f"{dtype}{list(shape)}" if shape is not None else type(leaf).__name__
            wanted = " or ".join({1: "a float vector", 2: "a float matrix"}[n] for n in ndims)
            return [f"{path} is {described}; expected {wanted}"]
        return []

    def refuse(self, faults: Iterable[str]) -> None:
        """Raises all faults in one QuantizationError, if there are any."""
        faults = list(dict.fromkeys(faults))
        if faults:
            more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
            raise QuantizationError(f"{self.method}: {'; '.join(faults[:20])}{more}")


def check_links(leaves: Leaves, links: Sequence[Link]) -> None:
    """Refuses links that do not fit the tree.

    Raises:
        QuantizationError: a path is missing, packed or no float array, or the channels of a link differ in number.
    """
    faults = []
    for link in links:
        found = [fault for path in link.sources for fault in leaves.faults(path, ndims=(1, 2))]
        found += [fault for path in link.consumers for fault in leaves.faults(path, ndims=(2,))]
        if not link.sources or not link.consumers:
            found.append(f"{link} has no sources or no consumers")
        if min(link.heads) < 1 or link.heads[1] % link.heads[0]:
            found.append(f"{', '.join(link.consumers)}: {link.heads[1]} heads cannot share {link.heads[0]} evenly")
        if not found:
            made = {path: channels_of(leaves, path) for path in link.sources}
            read = {path: leaves.matrix(path).shape[0] // link.repeats for path in link.consumers}
            # Inputs that the repeats do not divide are no channels either.
            uneven = any(leaves.matrix(path).shape[0] % link.heads[1] for path in link.consumers)
            if uneven or len({*made.values(), *read.values()}) > 1:
                sizes = ", ".join(f"{path} {list(leaves[path].shape)}" for path in (*made, *read))
                found.append(f"channels do not fit, with {link.heads[0]} and {link.heads[1]} heads: {sizes}")
        faults += found
    leaves.refuse(faults)


def channels_of(leaves: Leaves, path: str) -> int:
    """Returns how many channels a source makes."""
    return leaves[path].shape[0] if leaves[path].ndim == 1 else leaves.matrix(path).shape[1]


def scale_link(leaves: Leaves, link: Link, scale: jax.Array) -> None:
    """Divides the sources of a link by `scale` `[C]` and multiplies its consumers: the function stays the same."""
    scale = scale.astype(jnp.float32)
    for path in link.sources:
        # The channels are the last axis of a vector and of a matrix [K, C] alike.
        if leaves[path].ndim == 1:
            leaves[path] = jnp.asarray(leaves[path]).astype(jnp.float32) / scale
        else:
            leaves.set_matrix(path, leaves.matrix(path).astype(jnp.float32) / scale[None, :])
    for path in link.consumers:
        leaves.set_matrix(path, leaves.matrix(path).astype(jnp.float32) * link.spread(scale)[:, None])


def inputs_of(
    leaves: Leaves, link: Link, given: Mapping[str, Any], *, ndim: int, what: str
) -> tuple[jax.Array | None, list[str]]:
    """Returns what `given` holds for the inputs of a link, float32, and what is wrong with it.

    Args:
        leaves: the tree.
        link: its consumers read the same inputs, so the first that `given` names counts.
        given: path to array whose last axis is K.
        ndim: of the arrays.
        what: how errors call them.
    """
    path = next((path for path in link.consumers if path in given), None)
    if path is None:
        return None, [f"there are no {what} of {' or '.join(link.consumers)}"]
    found = given[path]
    array = np.asarray(found.largest if isinstance(found, Range) else found)
    k = leaves.matrix(path).shape[0]
    if array.ndim != ndim or array.shape[-1] != k or 0 in array.shape:
        expected = f"[rows, {k}]" if ndim == 2 else f"[{k}]"
        return None, [f"{what} of {path} are {list(array.shape)}, expected {expected}"]
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        return None, [f"{what} of {path} are NaN or infinite in {int((~np.isfinite(array)).sum())} places"]
    return jnp.asarray(array), []
