"""SmoothQuant: what is hard to round in activations is moved into the weights, which are easy.

    y = x @ W = (x / s) @ (s W),    s[j] = max|x[:, j]|^alpha / max|W[j, :]|^(1 - alpha)

The division is folded into what makes x: a norm's gain, or the matrix before. At alpha 0.5 activations and weights have
the same range in every channel; more moves more into the weights. Xiao et al., arXiv 2211.10438, equations 3 and 4.
The result is the same function in float; pack it to int8 with activations rounded for each token to use it (W8A8).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trustcore.errors import QuantizationError
from trustcore.quant.folding.structure import Leaves, Link, check_links, inputs_of, scale_link
from trustcore.quant.quantize import Predicate

Alpha = float | Sequence[float]


@dataclasses.dataclass(frozen=True)
class Migration:
    """What smoothing does to one link.

    Attributes:
        consumers: paths of the matrices that read the channels.
        alpha: migration strength.
        activations: the largest magnitude before and after.
        outliers: the largest channel's range over the median channel's, of activations, before and after.
        weights: the largest magnitude of the consumers before and after.
    """

    consumers: tuple[str, ...]
    alpha: float
    activations: tuple[float, float]
    outliers: tuple[float, float]
    weights: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class MigrationReport:
    """All links; printed, a table."""

    links: tuple[Migration, ...]

    def __str__(self) -> str:
        width = max([len(link.consumers[0]) for link in self.links] + [8])
        lines = [f"{'consumer':{width}}  alpha  {'max |x|':>17}  {'max / median':>17}  {'max |w|':>17}"]
        for link in self.links:
            pairs = (link.activations, link.outliers, link.weights)
            cells = "  ".join(f"{before:7.3g} -> {after:6.3g}" for before, after in pairs)
            lines.append(f"{link.consumers[0]:{width}}  {link.alpha:5.2f}  {cells}")
        return "\n".join(lines)


def smoothquant(
    tree: Any,
    links: Sequence[Link],
    ranges: Mapping[str, Any],
    *,
    alpha: Alpha = 0.5,
    transposed: Predicate | None = None,
) -> Any:
    """Returns `tree` with the ranges of activations moved into the weights: the same function.

    Args:
        tree: a pytree of float weights.
        links: whose channels are smoothed; `trustcore.models.decoder_links(model)` for a decoder.
        ranges: path of a matrix to the largest magnitude of each of its inputs, `[K]`, or the `Range` that
            `capture(fn, tree, MinMax(per_channel=True))` gathers. Matrices of a link read the same inputs: one of them
            is enough.
        alpha: migration strength in [0, 1], one for all links or one for each. The paper has 0.5, and 0.75 for models
            with larger outliers.
        transposed: which matrices are `[N, K]`; None: those called "table" or "embedding".

    Raises:
        QuantizationError: links do not fit the tree, ranges are missing, misshapen, negative or not finite, or an alpha
            is out of range; all faults in one message.

    A channel whose activations or weights are all zero is left alone. Scales in float32; leaves keep their dtypes.
    """
    return _smoothed(tree, links, ranges, alpha, transposed, "smoothquant")[0]


def migration(
    tree: Any,
    links: Sequence[Link],
    ranges: Mapping[str, Any],
    *,
    alpha: Alpha = 0.5,
    transposed: Predicate | None = None,
) -> MigrationReport:
    """Returns what `smoothquant` with these arguments does to the ranges of activations and weights."""
    return MigrationReport(_smoothed(tree, links, ranges, alpha, transposed, "migration")[1])


def _smoothed(
    tree: Any,
    links: Sequence[Link],
    ranges: Mapping[str, Any],
    alpha: Alpha,
    transposed: Predicate | None,
    method: str,
) -> tuple[Any, tuple[Migration, ...]]:
    leaves = Leaves(tree, transposed=transposed, method=method)
    check_links(leaves, links)
    alphas = [float(alpha)] * len(links) if isinstance(alpha, int | float) else [float(a) for a in alpha]
    if len(alphas) != len(links) or not all(0 <= a <= 1 for a in alphas):
        raise QuantizationError(
            f"{method}: alpha is {alpha}; pass a number from 0 to 1, or one for each of the {len(links)} links."
        )
    found, faults = [], []
    for link in links:
        largest, wrong = inputs_of(leaves, link, ranges, ndim=1, what="ranges")
        if largest is not None and bool(jnp.any(largest < 0)):
            wrong = [f"ranges of {link.consumers[0]} are negative; give the largest magnitudes"]
        found.append(largest)
        faults += wrong
    leaves.refuse(faults)

    done = []
    for link, largest, strength in zip(links, found, alphas, strict=True):
        assert largest is not None
        before = _range_of_inputs(leaves, link)
        scale = migration_scale(jnp.max(link.gather(largest), axis=0), jnp.max(link.gather(before), axis=0), strength)
        scale_link(leaves, link, scale)
        smooth = largest / link.spread(scale)
        done.append(
            Migration(
                link.consumers,
                strength,
                (float(jnp.max(largest)), float(jnp.max(smooth))),
                (_outliers(largest), _outliers(smooth)),
                (float(jnp.max(before)), float(jnp.max(_range_of_inputs(leaves, link)))),
            )
        )
    return leaves.tree(), tuple(done)


def migration_scale(activations: jax.Array, weights: jax.Array, alpha: float) -> jax.Array:
    """Returns `activations^alpha / weights^(1 - alpha)` for each channel, 1 where either is zero."""
    alive = (activations > 0) & (weights > 0)
    scale = jnp.where(alive, activations, 1) ** alpha / jnp.where(alive, weights, 1) ** (1 - alpha)
    return jnp.where(alive, scale, 1)


def _range_of_inputs(leaves: Leaves, link: Link) -> jax.Array:
    """Returns the largest magnitude that the consumers have at each input, `[r * C]`."""
    each = [jnp.max(jnp.abs(leaves.matrix(path).astype(jnp.float32)), axis=1) for path in link.consumers]
    return jnp.max(jnp.stack(each), axis=0)


def _outliers(ranges: jax.Array) -> float:
    middle = float(jnp.median(ranges))
    return float(jnp.max(ranges)) / middle if middle > 0 else float("inf")
