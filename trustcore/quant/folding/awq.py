"""AWQ: channels that carry large activations are scaled up before they are rounded, and down again in front.

    y = x @ W = (x / s) @ (s W)         error of Q(s W): about 1 / s of what it was in the channels where s > 1

The scale is `s = mean|x|^alpha`, one alpha a link, the one whose rounded products differ least from the exact ones on
samples of activations; alpha = 0 is among them, so no link gets worse on them. Then each group of weights is clipped at
the fraction of its largest magnitude that serves its output best. Lin et al., arXiv 2306.00978, sections 3.2 and 5
("weight clipping"); equations 4 and 5.

We measure the error behind each link's matrices, where the paper's code measures behind the whole block; and rounding
is whatever the format's encoder does, in any format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import QuantizationError
from trustcore.quant.folding.packing import Packing, group_of
from trustcore.quant.folding.structure import Leaves, Link, check_links, inputs_of, scale_link
from trustcore.quant.quantize import Formats, Predicate, quantize

ALPHAS = tuple(i / 20 for i in range(20))  # the paper's grid
CLIPS = tuple(1 - i / 20 for i in range(10))  # the paper's: down to half the range
SMALLEST = 1e-4  # of a scale, before the scales are centred: the paper's


def awq(
    tree: Any,
    format: Formats,
    links: Sequence[Link],
    samples: Mapping[str, Any],
    *,
    alphas: Sequence[float] = ALPHAS,
    clips: Sequence[float] = CLIPS,
    clip: Predicate | None = None,
    importance: bool = False,
    search: bool = False,
    pack: bool = True,
    where: Predicate | None = None,
    transposed: Predicate | None = None,
) -> Any:
    """Returns `tree` packed after activation-aware scaling and clipping.

    Args:
        tree: a pytree of float weights.
        format: as in `trustcore.quantize`.
        links: whose channels are scaled; `trustcore.models.decoder_links(model)` for a decoder.
        samples: path of a matrix to rows of its inputs `[rows, K]`, as `capture(fn, tree, Sample(512))` gathers them.
            Matrices of a link read the same inputs: one of them is enough. Matrices outside of links that have samples
            are clipped and weighted as well.
        alphas: exponents to try for each link.
        clips: fractions of a group's largest magnitude to try; `(1,)` clips nothing.
        clip: which matrices may be clipped, by (path, array); None: all that have samples. The paper's code leaves out
            queries and keys.
        importance: whether the inputs' mean squares weigh the encoder's error, as an importance matrix does.
        search: whether the encoder searches scales by itself; see `trustcore.quant.encode.encode`. Clipping is a search
            already, and sees how inputs hang together, so that both are better left out: KL on SmolLM2, rotated, in
            q4_0 is 0.23 without and 0.26 with them (2026-11).
        pack: False returns the scaled tree in float, unclipped: the same function as `tree`, for another method.
        where: which matrices are packed; as in `trustcore.quantize`.
        transposed: which are stored `[N, K]`; as there.

    Raises:
        QuantizationError: links do not fit the tree, samples are missing, misshapen or not finite, or the tree cannot
            be packed in that format; all faults in one message.

    Encodes each matrix `len(alphas) + len(clips) + 1` times; O(rows * K * N) for each alpha. One link's samples and
    matrices are held in addition to the tree.
    """
    leaves = Leaves(tree, transposed=transposed, method="awq")
    check_links(leaves, links)
    rows = _samples(leaves, links, samples)
    packing = Packing(leaves, format, where=where, transposed=transposed, search=search)
    if not len(alphas) or not all(0 < c <= 1 for c in clips):
        raise QuantizationError(f"awq: alphas {alphas} must not be empty, and clips {clips} lie in (0, 1].")

    for link in links:
        x = rows[link.consumers[0]]
        scale = _best_scale(leaves, link, x, alphas, packing, importance)
        scale_link(leaves, link, scale)
        rows |= dict.fromkeys(link.consumers, x / link.spread(scale)[None, :])
    if not pack:
        return leaves.tree()

    weights = {path: np.asarray(jnp.mean(x * x, axis=0)) for path, x in rows.items()} if importance else {}
    for path, x in rows.items():
        may = packing.packs(path) and (clip is None or clip(path, leaves[path]))
        if may and any(ratio < 1 for ratio in clips):
            leaves.set_matrix(path, _clipped(leaves.matrix(path), x, clips, packing, path, weights.get(path)))
    return quantize(
        leaves.tree(), format, where=where, transposed=transposed, importance=weights or None, search=search
    )


def _samples(leaves: Leaves, links: Sequence[Link], samples: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns rows of inputs for every matrix that has some, by its link or by itself."""
    rows, faults = {}, []
    alone = [Link((), (path,)) for path in samples if path in leaves and not any(path in k.consumers for k in links)]
    faults += [f"samples name {path}, which is no path of the tree" for path in samples if path not in leaves]
    for path in (link.consumers[0] for link in alone):
        faults += leaves.faults(path, ndims=(2,))
    leaves.refuse(faults)
    for link in (*links, *alone):
        found, wrong = inputs_of(leaves, link, samples, ndim=2, what="samples")
        faults += wrong
        if found is not None:
            rows |= dict.fromkeys(link.consumers, found)
    leaves.refuse(faults)
    return rows


def _best_scale(
    leaves: Leaves, link: Link, x: jax.Array, alphas: Sequence[float], packing: Packing, importance: bool
) -> jax.Array:
    """Returns the scale `[C]` whose rounded products `x @ W` are nearest to the exact ones."""
    magnitude = jnp.mean(link.gather(jnp.mean(jnp.abs(x), axis=0)), axis=0)
    scales = [scale_of(magnitude, alpha) for alpha in alphas]
    packed = [path for path in link.consumers if packing.packs(path)]
    errors = []
    for scale in scales if packed else ():
        spread = link.spread(scale)
        weight = np.asarray(jnp.mean((x / spread[None, :]) ** 2, axis=0)) if importance else None
        error = 0.0
        for path in packed:
            matrix = leaves.matrix(path).astype(jnp.float32)
            rounded = packing.rounded(path, matrix * spread[:, None], weight) / spread[:, None]
            error += float(_output_error(x, matrix - rounded))
        errors.append(error)
    return scales[int(np.argmin(errors))] if packed else jnp.ones_like(magnitude)


def scale_of(magnitude: jax.Array, alpha: float) -> jax.Array:
    """Returns `magnitude^alpha`, centred so that its largest and smallest entries are inverse to each other."""
    scale = jnp.maximum(magnitude**alpha, SMALLEST)
    return scale / jnp.sqrt(jnp.max(scale) * jnp.min(scale))


@jax.jit
def _output_error(x: jax.Array, error: jax.Array) -> jax.Array:
    return jnp.mean((x @ error) ** 2) * error.shape[1]


def _clipped(
    matrix: jax.Array,
    x: jax.Array,
    clips: Sequence[float],
    packing: Packing,
    path: str,
    importance: np.ndarray | None,
) -> jax.Array:
    """Returns the matrix with each group of each column clipped where its rounded part of the output fits best."""
    matrix = matrix.astype(jnp.float32)
    k, n = matrix.shape
    group = group_of(packing.packed(path, matrix, importance))
    if group == 1 or k % group:
        return matrix
    gram, groups = _group_gram(x, group), matrix.reshape(-1, group, n)
    bound = jnp.max(jnp.abs(groups), axis=1, keepdims=True)  # [groups, 1, N]
    best: Any = None
    for ratio in dict.fromkeys((1.0, *clips)):
        clipped = jnp.clip(groups, -ratio * bound, ratio * bound).reshape(k, n)
        error = _group_error(gram, matrix - packing.rounded(path, clipped, importance))
        best = (error, jnp.full_like(error, ratio)) if best is None else _better(best, error, ratio)
    limit = best[1][:, None, :] * bound
    return jnp.clip(groups, -limit, limit).reshape(k, n)


def _better(best: tuple[jax.Array, jax.Array], error: jax.Array, ratio: float) -> tuple[jax.Array, jax.Array]:
    less = error < best[0]
    return jnp.where(less, error, best[0]), jnp.where(less, jnp.float32(ratio), best[1])


def _group_gram(x: jax.Array, group: int) -> jax.Array:
    """Returns `[groups, group, group]`: mean products of the inputs within each group."""
    by_group = x.reshape(x.shape[0], -1, group)
    return jnp.einsum("rgi,rgj->gij", by_group, by_group) / x.shape[0]


@jax.jit
def _group_error(gram: jax.Array, error: jax.Array) -> jax.Array:
    """Returns `[groups, N]`: mean squares of what each group adds to the error of each output."""
    by_group = error.reshape(gram.shape[0], gram.shape[1], -1)
    return jnp.sum(by_group * jnp.einsum("gij,gjn->gin", gram, by_group), axis=1)
