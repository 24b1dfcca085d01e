"""What it costs to quantize one matrix: measured on the logits, or estimated from the inputs of its product.

    kl        mean over the tokens of KL(softmax(logits before) || softmax(logits after)), that matrix alone changed:
              one forward for each matrix and format
    hessian   tr((W - Q)^T H (W - Q)) / tr(W^T H W), H = X^T X: the squared error of the product over its square. One
              pass for all, but it does not know what the product matters to the logits

Costs of different matrices are taken to add up when formats are chosen (`allocate`); for small errors they do nearly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import QuantizationError
from trustcore.quant.allocate import Option
from trustcore.quant.array import QuantizedArray
from trustcore.quant.calibration.capture import call, decoded, named_leaves, replaced, selected
from trustcore.quant.calibration.observers import Hessian
from trustcore.quant.calibration.stages import stages
from trustcore.quant.gptq.rows import output_error
from trustcore.quant.quantize import Predicate, is_matrix, is_table


class Divergence(NamedTuple):
    """How far logits are from those of reference.

    Attributes:
        kl: mean over the tokens of KL(reference || other), in nats.
        top1: share of the tokens for which both find the same most likely next token.
    """

    kl: float
    top1: float


class Reference:
    """The logits of a function on some data, for others to be compared with.

    Args:
        fn: a function of (params, *batch) that gives logits `[..., V]`; None: params is a model that is called itself.
        params: the weights of reference.
        batches: arrays, or tuples of the arguments after params.

    Holds `tokens * V` float32.
    """

    def __init__(self, fn: Callable[..., Any] | None, params: Any, batches: Sequence[Any]):
        if not batches:
            raise QuantizationError("there are no batches; give data of the shapes that the function takes.")
        self._batches = [batch if isinstance(batch, tuple | list) else (batch,) for batch in batches]
        self._program = jax.jit(lambda params, batch: _log_probabilities((fn or call)(params, *batch)))
        self._compare = jax.jit(
            lambda params, batch, before: _divergence(before, _log_probabilities((fn or call)(params, *batch)))
        )
        self._before = [self._program(params, batch) for batch in self._batches]

    def compare(self, params: Any) -> Divergence:
        """Returns how far the logits under other weights are from those of reference."""
        found = [self._compare(params, b, before) for b, before in zip(self._batches, self._before, strict=True)]
        tokens = np.array([np.prod(before.shape[:-1]) for before in self._before])
        kl, same = (np.array([float(f[i]) for f in found]) for i in (0, 1))
        return Divergence(float(kl @ tokens / tokens.sum()), float(same @ tokens / tokens.sum()))


def sensitivity(
    fn: Callable[..., Any] | None,
    params: Any,
    batches: Sequence[Any],
    formats: Sequence[str],
    *,
    by: Literal["kl", "hessian"] = "kl",
    where: Predicate | Sequence[str] | None = None,
    transposed: Predicate | None = None,
    importance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Option]:
    """Returns what each format costs each matrix, as `allocate` takes it.

    Args:
        fn: a function of (params, *batch), for "kl" one that gives logits; None: params is a model that is called.
        params: a pytree of weights; those selected are decoded to floats for the time being.
        batches: arrays, or tuples of the arguments after params.
        formats: that a matrix may take; those whose blocks do not divide its K are left out for it.
        by: see above.
        where: which leaves, by (path, array), or their paths; None: `is_matrix`.
        transposed: which arrays are `[N, K]`; None: those called "table" or "embedding".
        importance: as for `quantize`: matrices are packed with it.
        progress: called with (done, total).

    Raises:
        QuantizationError: nothing is selected, or no format fits a selected matrix.
    """
    leaves = named_leaves(params)
    paths = selected(params, is_matrix if where is None else where)
    if by not in ("kl", "hessian"):
        raise QuantizationError(f"sensitivity: by is {by!r}; choose 'kl' or 'hessian'.")
    floats = replaced(params, {path: jnp.asarray(decoded(leaves[path])) for path in paths})
    transposed = transposed or is_table
    found: dict[str, list[Option]] = {}
    done = 0
    for path, w, judge in _matrices(by, fn, floats, batches, paths, transposed, leaves):
        leaf = leaves[path]
        turned = leaf.transposed if isinstance(leaf, QuantizedArray) else transposed(path, leaf)
        found[path] = []
        for name, packed in _packings(path, w, formats, turned, (importance or {}).get(path)):
            if packed is not None:
                cost = judge(packed.dequantize().astype(w.dtype))
                found[path].append(Option(path, name, packed.nbytes, cost, int(np.prod(w.shape))))
            done += 1
            if progress is not None:
                progress(done, len(paths) * len(formats))
        if not found[path]:
            raise QuantizationError(f"sensitivity: none of {', '.join(formats)} fits {path} {list(w.shape)}.")
    return [option for path in paths for option in found[path]]


def _packings(
    path: str, w: Any, formats: Sequence[str], turned: bool, importance: Any
) -> Iterator[tuple[str, QuantizedArray | None]]:
    k = w.shape[-1] if turned else w.shape[-2]
    for name in formats:
        try:
            yield name, QuantizedArray.quantize(w, name, importance=importance, transposed=turned)
        except QuantizationError as error:
            if f"K={k}" not in str(error):
                raise
            yield name, None


def _matrices(
    by: str,
    fn: Any,
    floats: Any,
    batches: Sequence[Any],
    paths: Sequence[str],
    transposed: Predicate,
    leaves: Mapping[str, Any],
) -> Iterator[tuple[str, jax.Array, Callable[[jax.Array], float]]]:
    """Yields each matrix with what tells the cost of another in its place."""
    own = named_leaves(floats)
    if by == "kl":
        reference = Reference(fn, floats, batches)
        for path in paths:
            # Two equal sets of logits may differ by rounding, and a KL of nothing come out below zero.
            yield path, own[path], lambda w, path=path: max(reference.compare(replaced(floats, {path: w})).kl, 0.0)
        return
    data = [batch if isinstance(batch, tuple | list) else (batch,) for batch in batches]
    for stage in stages(fn or call, floats, data, Hessian(), paths):
        for matrix, state in stage.states.items():
            if matrix.index or matrix.site.stacked:
                raise QuantizationError(
                    f"sensitivity: {matrix.path} {list(matrix.site.shape)} is a stack of matrices; by='kl' takes them."
                )
            leaf = leaves[matrix.path]
            turned = leaf.transposed if isinstance(leaf, QuantizedArray) else transposed(matrix.path, leaf)
            w = own[matrix.path]
            yield matrix.path, w, lambda q, w=w, h=state.mean, t=turned: _output_error(w, q, h, t)


def _output_error(w: jax.Array, q: jax.Array, hessian: jax.Array, turned: bool) -> float:
    w, q = (jnp.swapaxes(m, -1, -2) if turned else m for m in (w.astype(jnp.float32), q.astype(jnp.float32)))
    return max(float(output_error(w, q, hessian)), 0.0)


def _log_probabilities(logits: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def _divergence(before: jax.Array, after: jax.Array) -> tuple[jax.Array, jax.Array]:
    kl = jnp.sum(jnp.exp(before) * (before - after), axis=-1)
    return jnp.mean(kl), jnp.mean((jnp.argmax(before, -1) == jnp.argmax(after, -1)).astype(jnp.float32))
