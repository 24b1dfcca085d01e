"""Outputs of packed matrices, moved as they are: parts of a fused tensor, another order, several side by side."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import ModelError
from trustcore.quant import QuantizedArray


def places(widths: Sequence[int], groups: int) -> list[np.ndarray]:
    """Returns for each of the parameters which outputs of the fused tensor are its own.

    Raises:
        ModelError: the outputs fall into no such groups.
    """
    if groups < 1 or any(width % groups for width in widths):
        raise ModelError(f"outputs of {list(widths)} matrices fall into no {groups} groups.")
    whole = np.arange(sum(widths)).reshape(groups, -1)
    ends = np.cumsum([width // groups for width in widths])[:-1]
    return [part.reshape(-1) for part in np.split(whole, ends, axis=1)]


def outputs_in(weight: QuantizedArray, order: np.ndarray) -> QuantizedArray:
    """Returns the outputs `order` of a packed `[..., K, N]` matrix, in that order; codes and scales stay as they are.

    Raises:
        ModelError: outputs that share a scale would no longer stand together.
    """
    fields = {}
    for name, span in weight.spec.spans(weight.fields).items():
        if span == 0:
            fields[name] = weight.fields[name]
            continue
        shared = order[::span] // span
        if not np.array_equal(order // span, np.repeat(shared, span)[: order.size]):
            raise ModelError(f"has outputs that share their {name} and are to be put apart; quantize it anew")
        fields[name] = jnp.take(weight.fields[name], shared, axis=-1)
    return QuantizedArray(weight.format, fields)


def stack_packed(weights: Sequence[QuantizedArray]) -> QuantizedArray:
    """Returns packed matrices of one form as one stack `[E, ...]`.

    Raises:
        ModelError: they are not of one form.
    """
    forms = {(jax.tree.structure(w), tuple(f.shape for f in w.fields.values())) for w in weights}
    if len(forms) > 1:
        raise ModelError(f"are packed in different ways: {', '.join(sorted({repr(w) for w in weights})[:3])}")
    return jax.tree.map(lambda *fields: jnp.stack(fields), *weights)


def side_by_side(weights: Sequence[QuantizedArray]) -> QuantizedArray:
    """Returns packed matrices `[..., K, N]` as one, their outputs one after the other.

    Raises:
        ModelError: they differ in format, or each has a scale for all its outputs at once.
    """
    first = weights[0]
    for other in weights[1:]:
        if other.description != first.description or set(other.fields) != set(first.fields):
            raise ModelError(f"is to be one tensor of {first!r} and {other!r}, which differ in format")
    fields = {}
    for name, span in first.spec.spans(first.fields).items():
        parts = [weight.fields[name] for weight in weights]
        if span == 0:
            if any(not np.array_equal(np.asarray(part), np.asarray(parts[0])) for part in parts[1:]):
                raise ModelError(f"is to be one tensor of several that have a {name} for all their outputs at once")
            fields[name] = parts[0]
        else:
            fields[name] = jnp.concatenate(parts, axis=-1)
    return QuantizedArray(first.format, fields)
