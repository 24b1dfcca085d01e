"""`encode`: packs a whole matrix, tile by tile, and refuses what cannot be packed.

    weights [..., K, N] -> blocks [blocks, block, N] -> for each tile of blocks and columns: Encoder.blocks

One program walks over the tiles and writes each into its place in the result, so that the temporaries of a search stay
in the cache, whatever the size of the matrix. On a CPU a program of many small steps keeps one core busy, so the
columns are shared out among programs that run side by side. The simple formats have a handler in C++ there
(`trustcore/ops/cpu/encode_blocks.cc`), which takes the same steps several times as fast.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from trustcore.errors import QuantizationError
from trustcore.ops import cpu
from trustcore.quant.encode.block_floats import BLOCK_FLOATS
from trustcore.quant.encode.encoder import Encoded, Encoder
from trustcore.quant.encode.iq import IQ
from trustcore.quant.encode.iq4 import IQ4
from trustcore.quant.encode.k_quants import K_QUANTS
from trustcore.quant.encode.plain import PLAIN
from trustcore.quant.encode.ternary import TERNARY
from trustcore.quant.formats import Format, get_format

ENCODERS: Mapping[str, Encoder] = {**PLAIN, **K_QUANTS, **IQ4, **IQ, **TERNARY, **BLOCK_FLOATS}

_TILE_ON_CPU = 1 << 15  # weights; its float32 copies stay in a 1 MB cache
_PIECE = 1 << 20  # weights that are worth a program of their own


def encode(format: str, weights: jax.Array, *, importance: Any = None, search: bool = True) -> Encoded:
    """Returns the fields of `weights` packed as `format`, in the format's order.

    Minimizes, block by block, `sum importance[k] * (w[k, n] - decoded[k, n])^2` over the scales that a search tries;
    codes are nearest to the weights under the scales as stored.

    Args:
        format: a name in `ENCODERS`.
        weights: float `[..., K, N]`; K is a multiple of the format's block.
        importance: what an error in input k costs, `[K]` or `[..., K]`, not negative: the mean square of that input's
            activations, for example. None: all cost the same. 16-bit floats have no use for it.
        search: False takes the scale that fits the codes of the full range and tries no other: one and a half to five
            times as fast, with an error 8 to 17% larger (with an importance, up to half; ternary formats: double).

    Raises:
        QuantizationError: the format has no encoder; K is no multiple of the block; a weight is NaN, infinite, or
            larger than the format's scales can hold; the importance does not fit. Under a trace values cannot be
            looked at: scales then saturate at 65504, and NaN gives undefined codes.

    O(K * N) for each candidate of the search; temporaries of a few tiles. Not differentiable.
    """
    spec = get_format(format)
    encoder = ENCODERS.get(format)
    if encoder is None:
        raise QuantizationError(f"{format}: there is no encoder. Formats with one: {', '.join(sorted(ENCODERS))}.")
    weights = jnp.asarray(weights)
    if weights.ndim < 2 or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise QuantizationError(
            f"{format}: weights must be a float matrix [..., K, N], got {weights.dtype}{list(weights.shape)}."
        )
    weights = weights.astype(jnp.float32)
    *lead, k, n = weights.shape
    if k % spec.block:
        raise QuantizationError(
            f"{format}: K={k} of weights {list(weights.shape)} is not a multiple of the block size {spec.block}. "
            f"Pad K to {-(-k // spec.block) * spec.block}, or choose a format of smaller blocks."
        )
    weight = None if importance is None else _weight_of(spec, importance, (*lead, k))
    if weights.size == 0:
        shapes = spec.field_shapes(k, n)
        return {name: jnp.zeros((*lead, *shape.shape), shape.dtype) for name, shape in shapes.items()}
    if _natively(format, weights):
        candidates, refits = encoder.tried(weight is not None, search)  # pyright: ignore[reportOptionalCall]
        rows = None if weight is None else weight.reshape(-1)
        fields, largest = _native(format, candidates, refits, weights, rows)
        if float(largest) > encoder.limit or not math.isfinite(largest):
            _refuse(format, weights, encoder.limit)
        return {f.name: fields[f.name] for f in spec.fields}
    _refuse(format, weights, encoder.limit)
    if spec.block == 1:
        return _elementwise(format, weights)
    fields = _in_pieces(spec, weights.reshape(-1, spec.block, n), weight, search)
    return {f.name: fields[f.name].reshape(*lead, k // spec.block, *fields[f.name].shape[1:]) for f in spec.fields}


def _weight_of(spec: Format, importance: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns `[blocks, block, 1]`, at most 1 and above 0: in each block relative to its largest."""
    importance = jnp.asarray(importance, jnp.float32)
    if importance.shape not in (shape, shape[-1:]):
        raise QuantizationError(
            f"{spec.name}: the importance is {list(importance.shape)}, expected one number for each of the K inputs: "
            f"{list(shape[-1:])}" + (f" or {list(shape)}." if len(shape) > 1 else ".")
        )
    if not _traced(importance) and not bool(jnp.all((importance >= 0) & jnp.isfinite(importance))):
        raise QuantizationError(f"{spec.name}: the importance must be finite and not negative.")
    blocks = jnp.broadcast_to(importance, shape).reshape(-1, spec.block, 1)
    largest = jnp.max(blocks, axis=1, keepdims=True)
    # What weighs less than a millionth of its neighbours does not sway a sum in float32.
    return jnp.where(largest > 0, jnp.maximum(blocks / jnp.where(largest > 0, largest, 1), 1e-6), 1)


def _refuse(format: str, weights: jax.Array, limit: float) -> None:
    if _traced(weights):
        return
    largest = float(_largest(weights))
    if not math.isfinite(largest):
        bad = ~jnp.isfinite(weights)
        first = [int(i) for i in jnp.unravel_index(jnp.argmax(bad), weights.shape)]
        raise QuantizationError(
            f"{format}: {int(bad.sum())} of the weights {list(weights.shape)} are NaN or infinite, first at {first}."
        )
    if largest > limit:
        raise QuantizationError(
            f"{format}: the largest weight is {largest:g}, and the scales of the format reach {limit:g}. "
            "Scale the weights down and their product up."
        )


def _traced(array: jax.Array) -> bool:
    return isinstance(array, Tracer)


@jax.jit
def _largest(weights: jax.Array) -> jax.Array:
    """Returns the largest magnitude; NaN or infinity if there is one.

    By bits, where those stand above all numbers: the CPU compiler of jax 0.10.2 loses NaN in a maximum of floats.
    """
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32) & jnp.int32(0x7FFFFFFF)
    return jax.lax.bitcast_convert_type(jnp.max(bits), jnp.float32)


def _natively(format: str, weights: jax.Array) -> bool:
    """Whether the handler in C++ encodes this. Traced programs may run elsewhere than they are traced."""
    if format not in cpu.ENCODED or _traced(weights) or jax.default_backend() != "cpu":
        return False
    return not cpu.why_not("encoders") and weights.shape[-1] >= cpu.vector_lanes("encoders")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _native(
    format: str, candidates: tuple[float, ...], refits: int, weights: jax.Array, row_weight: jax.Array | None
) -> tuple[Encoded, jax.Array]:
    """Returns the fields of `[..., K, N]` and the largest magnitude, which is NaN or infinite if a weight is."""
    *lead, k, n = weights.shape
    matrix = weights.reshape(-1, n)
    shapes = get_format(format).field_shapes(len(matrix), n)
    fields, largest = cpu.encode_blocks(format, matrix, row_weight, candidates, refits, shapes)
    blocks = k // get_format(format).block
    fields = {name: field.reshape(*lead, blocks, *field.shape[1:]) for name, field in fields.items()}
    return fields, jax.lax.bitcast_convert_type(largest[0], jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _elementwise(format: str, weights: jax.Array) -> Encoded:
    return ENCODERS[format].blocks(weights[None], None, False)


def _in_pieces(spec: Format, blocks: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
    n = blocks.shape[-1]
    on_cpu = jax.default_backend() == "cpu"
    pieces = min(os.cpu_count() or 1, n, -(-blocks.size // _PIECE))
    if not on_cpu or _traced(blocks) or pieces == 1:
        return _piece(spec.name, n, on_cpu, search, blocks, weight, 0)
    width = -(-n // pieces)
    starts = [min(i * width, n - width) for i in range(pieces)]
    # Calls return before their programs have run.
    parts = [_piece(spec.name, width, on_cpu, search, blocks, weight, start) for start in starts]
    joined = {}
    for name in parts[0]:
        columns = [part[name] for part in parts]
        columns[-1] = columns[-1][..., width * pieces - n :]  # the last piece begins within the one before
        joined[name] = jnp.concatenate(columns, axis=-1)
    return joined


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _piece(
    format: str,
    width: int,
    on_cpu: bool,
    search: bool,
    blocks: jax.Array,
    weight: jax.Array | None,
    start: jax.Array | int,
) -> Encoded:
    """Returns the fields of columns `start` to `start + width`."""
    spec, encoder = get_format(format), ENCODERS[format]
    count, block, _ = blocks.shape
    tile = _TILE_ON_CPU if on_cpu else encoder.tile
    columns = min(width, max(tile // block, 1))
    rows = min(count, max(tile // (block * columns), 1))
    down, across = -(-count // rows), -(-width // columns)

    def side_by_side(tile: jax.Array) -> jax.Array:
        return tile.swapaxes(0, 1).reshape(block, -1)  # [rows, block, columns] -> [block, rows * columns]

    def step(i: jax.Array, fields: Encoded) -> Encoded:
        # The last tiles of each direction begin early, within their neighbours, which gives the same numbers again.
        row = jnp.minimum(i // across * rows, count - rows)
        column = jnp.minimum(i % across * columns, width - columns)
        x = jax.lax.dynamic_slice(blocks, (row, 0, start + column), (rows, block, columns))
        here = None if weight is None else jax.lax.dynamic_slice_in_dim(weight, row, rows, 0)
        if here is not None and rows > 1:
            here = jnp.broadcast_to(here, x.shape)
        written = {}
        encoded = encoder.blocks(side_by_side(x), None if here is None else side_by_side(here), search)
        for name, field in encoded.items():
            part = jnp.moveaxis(field.reshape(*field.shape[:-1], rows, columns), -2, 0)
            written[name] = jax.lax.dynamic_update_slice(fields[name], part, (row, *[0] * (part.ndim - 2), column))
        return written

    shapes = spec.field_shapes(count * block, width)
    empty = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
    return jax.lax.fori_loop(0, down * across, step, empty)
