"""`gptq`: a whole model, layer by layer; each layer sees what the layers before it give once they are quantized.

    for each stage of the program:  H = X^T X / rows over the batches -> Q of its matrices -> X of the next stage

Memory beyond the model: one stage's matrices as floats, one Hessian for each input of the stage, and the activations of
the batches between two products. With `folder`, each leaf is written as soon as it is done; a run that was stopped goes
on from there and gives the same result, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import QuantizationError
from trustcore.quant.array import QuantizedArray
from trustcore.quant.calibration.capture import call, named_leaves, replaced, selected
from trustcore.quant.calibration.observers import Hessian
from trustcore.quant.calibration.stages import Matrix, stages
from trustcore.quant.gptq.grids import Grid, grid_of
from trustcore.quant.gptq.rows import output_error, round_rows, round_to_nearest
from trustcore.quant.gptq.saved import Saved
from trustcore.quant.quantize import Formats, Predicate, format_of, is_matrix, is_table


class Layer(NamedTuple):
    """What `progress` is told of each matrix.

    Attributes:
        path: of its leaf.
        index: its position on the leaf's leading axes; () where the leaf is one matrix.
        format: it was quantized to.
        error: squared error of its products over their square, on the calibration data.
        nearest: the same for rounding to nearest; None where it was not computed.
        done: matrices that are done, this one included.
        total: matrices in all.
        resumed: whether it was read from `folder`.
    """

    path: str
    index: tuple[int, ...]
    format: str
    error: float
    nearest: float | None
    done: int
    total: int
    resumed: bool


def gptq(
    fn: Callable[..., Any] | None,
    params: Any,
    batches: Sequence[Any],
    *,
    format: Formats,
    where: Predicate | Sequence[str] | None = None,
    transposed: Predicate | None = None,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool | None = None,
    search: bool = True,
    folder: str | Path | None = None,
    progress: Callable[[Layer], None] | None = None,
) -> Any:
    """Returns `params` with matrices packed so that their products on the data of `batches` change little.

    Frantar et al., arXiv 2210.17323; see `rows` for the equations and where they deviate.

    Args:
        fn: a function of (params, *batch); None: params is a model that is called itself.
        params: a pytree of weights; packed matrices among those selected are decoded and packed anew.
        batches: calibration data: arrays, or tuples of the arguments after params; all of one shape.
        format: as for `quantize`: a name, patterns, or a function. See `grid_of` for the names.
        where: which leaves, by (path, array), or their paths. None: `is_matrix`, if K is a multiple of the group
            and the leaf takes part in a product.
        transposed: which arrays are `[N, K]`; None: those called "table" or "embedding".
        damping: share of the mean diagonal added to the Hessian.
        act_order: rows whose inputs fire most first. Integer formats then keep an `order`, unless groups are static.
        static_groups: groups of rows that lie together, scales chosen ahead. None: only where `act_order` meets a
            format that has no `order`.
        search: whether scales are searched; False takes those that fit the full range of the codes.
        folder: where finished leaves are kept, for a run to be taken up again with the same arguments.
        progress: called after each matrix.

    Raises:
        QuantizationError: a format is not known to GPTQ, a leaf does not fit it or takes part in no product, batches
            differ in shape, or the folder belongs to another run. All leaves' faults in one message.

    Where rounding to nearest under the same search makes the smaller error, that is what is kept.
    """
    leaves = named_leaves(params)
    explicit = where is not None
    paths = selected(params, where if explicit else is_matrix)
    is_transposed = transposed or is_table
    grids: dict[str, tuple[str, Grid]] = {}
    faults = []
    for path in paths:
        name = format_of(format, path, leaves[path])
        if name is None:
            continue
        grid = grid_of(name, search=search)
        shape = leaves[path].shape
        k = shape[-1] if _turned(path, leaves[path], is_transposed) else shape[-2]
        try:
            grid.group(k)
        except QuantizationError as error:
            if explicit:
                faults.append(f"{path}: {error}")
            continue
        grids[path] = (name, grid)
    if faults or not grids:
        raise QuantizationError("gptq: " + ("; ".join(faults[:20]) or "no selected leaf fits the format."))

    data = [batch if isinstance(batch, tuple | list) else (batch,) for batch in batches]
    options = {"damping": damping, "act_order": act_order, "static_groups": static_groups, "search": search}
    saved = Saved(folder, {path: name for path, (name, _) in grids.items()}, options, data, leaves)
    parts: dict[str, dict[tuple[int, ...], QuantizedArray]] = {}
    total, done = 0, 0
    for stage in stages(fn or call, params, data, Hessian(), list(grids), strict=explicit):
        for matrix in list(stage.values):
            name, grid = grids[matrix.path]
            turned = _turned(matrix.path, leaves[matrix.path], is_transposed)
            _refuse(matrix, turned)
            w = stage.values[matrix].astype(jnp.float32)
            w = jnp.swapaxes(w, -1, -2) if turned else w
            kept = saved.read(matrix.path, matrix.index)
            if kept is not None:
                packed, error, nearest = kept
            else:
                static = static_groups if static_groups is not None else act_order and not grid.ordered
                if act_order and not static and not grid.ordered:
                    raise QuantizationError(f"gptq: {name} cannot keep an order of rows; leave static_groups at None.")
                packed, error, nearest = _matrices(
                    w, stage.states[matrix].mean, grid, damping=damping, act_order=act_order, static_groups=static
                )
                saved.write(matrix.path, matrix.index, packed, error, nearest)
            stage.values[matrix] = _as_leaf(packed, turned).astype(stage.values[matrix].dtype)
            parts.setdefault(matrix.path, {})[matrix.index] = packed
            done += 1
            total = max(total, _count(leaves, grids))
            if progress is not None:
                progress(Layer(matrix.path, matrix.index, name, error, nearest, done, total, kept is not None))
    packed_leaves = {}
    for path, those in parts.items():
        lead = leaves[path].shape[: len(next(iter(those)))]
        turned = _turned(path, leaves[path], is_transposed)
        packed_leaves[path] = _joined(those, lead, turned)
    return replaced(params, packed_leaves)


def _matrices(w: jax.Array, hessian: jax.Array, grid: Grid, **options: Any) -> tuple[QuantizedArray, float, float]:
    """One matrix, or each of a stack: the packed weight and its errors."""
    if w.ndim == 2:
        return _matrix(w, hessian, grid, **options)
    each = [_matrices(one, h, grid, **options) for one, h in zip(w, hessian, strict=True)]
    packed = jax.tree.map(lambda *fields: jnp.stack(fields), *(one for one, _, _ in each))
    return packed, float(np.mean([e for _, e, _ in each])), float(np.mean([n for _, _, n in each]))


def _matrix(w: jax.Array, hessian: jax.Array, grid: Grid, **options: Any) -> tuple[QuantizedArray, float, float]:
    rounded = round_rows(w, hessian, grid, **options)
    plain = round_to_nearest(w, jnp.diagonal(hessian), grid)
    error, nearest = (float(output_error(w, r.values, hessian)) for r in (rounded, plain))
    best = rounded if error <= nearest else plain
    return grid.pack(best.codes, best.params, best.order), min(error, nearest), nearest


def _as_leaf(packed: QuantizedArray, turned: bool) -> jax.Array:
    """What the weight is from now on, in the orientation of its leaf."""
    w = packed.dequantize()
    return jnp.swapaxes(w, -1, -2) if turned else w


def _joined(parts: Mapping[tuple[int, ...], QuantizedArray], lead: tuple[int, ...], turned: bool) -> QuantizedArray:
    if not lead:
        whole = parts[()]
    else:
        missing = [index for index in np.ndindex(*lead) if index not in parts]
        if missing:
            raise QuantizationError(f"gptq: no product was found with the matrices at {missing[:5]} of a leaf.")
        whole = jax.tree.map(
            lambda *fields: jnp.stack(fields).reshape(*lead, *fields[0].shape),
            *(parts[index] for index in np.ndindex(*lead)),
        )
    return QuantizedArray(whole.format, whole.fields, transposed=turned)


def _refuse(matrix: Matrix, turned: bool) -> None:
    """Only matrices whose K is the axis that blocks run along."""
    shape, axes = matrix.site.shape, matrix.site.contracted
    wanted = len(shape) - 1 if turned else len(shape) - 2
    if axes != (wanted,):
        raise QuantizationError(
            f"gptq: products with {matrix.path} {list(shape)} sum over its axes {list(axes)}, but its blocks would run "
            f"along axis {wanted}. Leave it out by `where`, or say by `transposed` which arrays are [N, K]."
        )


def _turned(path: str, leaf: Any, transposed: Predicate) -> bool:
    return leaf.transposed if isinstance(leaf, QuantizedArray) else transposed(path, leaf)


def _count(leaves: Mapping[str, Any], paths: Any) -> int:
    return sum(int(np.prod(leaves[path].shape[:-2])) for path in paths)
