"""Rotation: the same function with weights and activations that have no outlying channels.

    h' = h R:   embedding, writers @ R;   R.T @ diag(gain) @ readers;   gain = 1         (RMS norms see |h'| = |h|)
    v' = v R_h: values @ R_h, R_h.T @ out, head by head

Everything is folded into the weights ahead of time; nothing is computed when the model runs. QuaRot (Ashkboos et al.,
arXiv 2404.00456, section 4 stage 1) takes Hadamard matrices with random signs; SpinQuant (Liu et al., arXiv 2405.16406)
learns them: pass the matrix. The rotations that those papers compute on the fly (queries and keys, the input of the
down-projection) are not folded and not done here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import QuantizationError
from trustcore.quant.folding.orthogonal import random_hadamard, random_orthogonal
from trustcore.quant.folding.structure import Leaves, Link, Stream, channels_of, check_links, scale_link
from trustcore.quant.quantize import Predicate

Rotation = str | np.ndarray | jax.Array
KINDS = {"hadamard": random_hadamard, "orthogonal": random_orthogonal}


def rotate(
    tree: Any,
    stream: Stream,
    *,
    rotation: Rotation = "hadamard",
    values: Rotation | None = "hadamard",
    seed: int = 0,
    transposed: Predicate | None = None,
) -> Any:
    """Returns `tree` with its residual stream rotated and its norms' gains folded away: the same function.

    Args:
        tree: a pytree of float weights.
        stream: what reads and writes the stream; `trustcore.models.decoder_stream(model)` for a decoder. Its norms
            must be RMS norms: those that subtract a mean do not commute with a rotation.
        rotation: "hadamard" (random signs), "orthogonal" (uniformly random), or an orthogonal `[D, D]` matrix.
        values: the same for the channels of each attention head between values and output product, `[H, H]`; None
            leaves them.
        seed: of the random signs and matrices; each layer's heads draw their own.
        transposed: which matrices are `[N, K]`; None: those called "table" or "embedding".

    Raises:
        QuantizationError: paths are missing, packed or of the wrong shape; the matrix is not orthogonal or the size has
            no Hadamard matrix; or a table is both embedding and output layer, so that the last norm's gain cannot be
            folded into the one without changing the other.

    Products in float32 at highest precision; the leaves keep their dtypes. O(D^2) for each column or row of a weight.
    """
    leaves = Leaves(tree, transposed=transposed, method="rotate")
    size = _check(leaves, stream)
    turn = jnp.asarray(_matrix(rotation, size, seed, "rotation"), jnp.float32)
    _fold_norms(leaves, stream.norms, kept=stream.embeddings)
    for path in dict.fromkeys((*stream.embeddings, *stream.writers)):
        if path in stream.embeddings or leaves[path].ndim == 1:  # tables are looked up: rows are of D channels
            leaves[path] = _dot(jnp.asarray(leaves[path]), turn)
        else:
            leaves.set_matrix(path, _dot(leaves.matrix(path), turn))
    readers = dict.fromkeys(path for norm in stream.norms for path in norm.consumers)
    for path in readers:
        if path not in stream.embeddings:
            leaves.set_matrix(path, _dot(turn.T, leaves.matrix(path)))
    if values is not None:
        for i, link in enumerate(stream.values):
            _rotate_heads(leaves, link, values, seed + 1 + i)
    return leaves.tree()


def fold_norms(tree: Any, links: Sequence[Link], *, transposed: Predicate | None = None) -> Any:
    """Returns `tree` with each norm's gain folded into the matrices behind it, and ones in its place.

    Args:
        tree: a pytree of float weights.
        links: one for each norm, whose only source is its gain.
        transposed: which matrices are `[N, K]`.

    Raises:
        QuantizationError: paths are missing, packed or of the wrong shape.
    """
    leaves = Leaves(tree, transposed=transposed, method="fold_norms")
    check_links(leaves, links)
    _fold_norms(leaves, links, kept=())
    return leaves.tree()


def _check(leaves: Leaves, stream: Stream) -> int:
    """Returns D, or refuses what does not fit the stream."""
    faults = [fault for path in stream.embeddings for fault in leaves.faults(path, ndims=(2,))]
    faults += [fault for path in stream.writers for fault in leaves.faults(path, ndims=(1, 2))]
    leaves.refuse(faults)
    check_links(leaves, (*stream.norms, *stream.values))
    sizes = {path: int(leaves[path].shape[-1]) for path in stream.embeddings}
    sizes |= {path: channels_of(leaves, path) for path in stream.writers}
    for norm in stream.norms:
        if len(norm.sources) != 1 or leaves[norm.sources[0]].ndim != 1 or norm.repeats != 1:
            faults.append(f"{norm.sources}: the source of a norm's link must be its gain alone, a vector [D]")
        sizes |= {path: channels_of(leaves, path) for path in norm.sources}
    if len(set(sizes.values())) != 1:
        faults.append("widths of the stream differ: " + ", ".join(f"{p} {n}" for p, n in sizes.items()))
    for norm in stream.norms:
        both = [path for path in norm.consumers if path in stream.embeddings]
        if both and not faults and not bool(jnp.all(jnp.asarray(leaves[norm.sources[0]]) == 1)):
            faults.append(
                f"{both[0]} is both embedding and output layer, and the gain {norm.sources[0]} can be folded into the "
                "output layer alone; give the model an output layer of its own first: "
                "model = trustcore.models.untie(model)"
            )
    leaves.refuse(faults)
    return next(iter(sizes.values()))


def _fold_norms(leaves: Leaves, links: Sequence[Link], *, kept: Sequence[str]) -> None:
    for link in links:
        if not any(path in kept for path in link.consumers):
            scale_link(leaves, link, jnp.asarray(leaves[link.sources[0]]))
            leaves[link.sources[0]] = jnp.ones_like(leaves[link.sources[0]])  # exactly, also where the gain was zero


def _rotate_heads(leaves: Leaves, link: Link, rotation: Rotation, seed: int) -> None:
    heads, readers = link.heads
    size = channels_of(leaves, link.sources[0]) // heads
    turn = jnp.asarray(_matrix(rotation, size, seed, "values"), jnp.float32)
    for path in link.sources:
        made = jnp.asarray(leaves[path]) if leaves[path].ndim == 1 else leaves.matrix(path)
        turned = _dot(made.reshape(*made.shape[:-1], heads, size), turn).reshape(made.shape)
        if leaves[path].ndim == 1:
            leaves[path] = turned
        else:
            leaves.set_matrix(path, turned)
    for path in link.consumers:
        read = leaves.matrix(path)
        by_head = read.reshape(readers, size, -1).swapaxes(1, 2)  # [heads, N, H]
        leaves.set_matrix(path, _dot(by_head, turn).swapaxes(1, 2).reshape(read.shape))


def _matrix(rotation: Rotation, size: int, seed: int, name: str) -> np.ndarray:
    if isinstance(rotation, str):
        if rotation not in KINDS:
            raise QuantizationError(
                f"rotate: {name} is {rotation!r}; choose from {', '.join(KINDS)}, or pass an orthogonal matrix."
            )
        return KINDS[rotation](size, seed=seed)
    matrix = np.asarray(rotation, np.float64)
    if matrix.shape != (size, size):
        raise QuantizationError(f"rotate: {name} is {list(matrix.shape)}, expected [{size}, {size}].")
    off = float(np.abs(matrix @ matrix.T - np.eye(size)).max())
    if not off < 1e-4:
        raise QuantizationError(
            f"rotate: {name} is not orthogonal: R @ R.T differs from the identity by {off:.3g}. "
            "Take the Q of numpy.linalg.qr."
        )
    return matrix


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
