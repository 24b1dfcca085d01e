"""`encode`: packs a whole matrix, tile by tile, and refuses what cannot be packed.

    weights [..., K, N] -> blocks [blocks, block, N] -> for each tile of blocks and columns: Encoder.blocks

One program walks over the tiles and writes each into its place in the result, so that the temporaries of a search stay
in the cache, whatever the size of the matrix. On a CPU a program of many small steps keeps one core busy, so the
columns are shared out among programs that run side by side. The simple formats and the K-quants have a handler
in C++ there (`trustcore/ops/cpu/encode_blocks.cc`), which takes the same steps several times as fast.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from trustcore.errors import QuantizationError
from trustcore.ops import cpu
from trustcore.quant.encode.block_floats import BLOCK_FLOATS
from trustcore.quant.encode.encoder import Encoded, Encoder
from trustcore.quant.encode.floats import float_encoder, nested_scales, table_codes
from trustcore.quant.encode.integers import integer_encoder, planes
from trustcore.quant.encode.iq import IQ
from trustcore.quant.encode.iq4 import IQ4
from trustcore.quant.encode.k_quants import K_QUANTS
from trustcore.quant.encode.plain import PLAIN
from trustcore.quant.encode.ternary import TERNARY
from trustcore.quant.formats import SCALED_FORMATS, BlockFormat, ScaledFormat
from trustcore.quant.formats.names import CHOICES, Storage, parse, storages

# Of formats of blocks.
ENCODERS: Mapping[str, Encoder] = {**PLAIN, **K_QUANTS, **IQ4, **IQ, **TERNARY, **BLOCK_FLOATS}

_TILE_ON_CPU = 1 << 15  # weights; its float32 copies stay in a 1 MB cache
_LEAST_COLUMNS = 64  # of a tile, however long its blocks: sums run over rows, columns are a vector's lanes
_PIECE = 1 << 20  # weights that are worth a program of their own


class Job(NamedTuple):
    """What encodes the blocks of one storage; hashable, and one object for each storage and K.

    Args:
        name: for messages.
        block: weights of K in a block.
        encoder: of a block.
        fields: name, rows a block (None: one, without an axis), and dtype of what the encoder gives.
    """

    name: str
    block: int
    encoder: Encoder
    fields: tuple[tuple[str, int | None, np.dtype], ...]


def encode(format: str, weights: jax.Array, *, importance: Any = None, search: bool = True) -> Encoded:
    """Returns the fields of `weights` packed as `format`, in the format's order.

    Minimizes, block by block, `sum importance[k] * (w[k, n] - decoded[k, n])^2` over the scales that a search tries;
    codes are nearest to the weights under the scales as stored.

    Args:
        format: a name in `ENCODERS` or `SCALED_FORMATS`; the latter with a granularity where the default is not wanted
            ("int4:g128:asym"; see `trustcore.quant.formats.names`).
        weights: float `[..., K, N]`; K is a multiple of the format's block.
        importance: what an error in input k costs, `[K]` or `[..., K]`, not negative: the mean square of that input's
            activations, for example. None: all cost the same. 16-bit floats have no use for it.
        search: False takes the scale that fits the codes of the full range and tries no other: one and a half to five
            times as fast, with an error 8 to 17% larger (with an importance, up to half; ternary formats: double).
            Scaled formats then are the textbook's round to nearest, and nf4 and fp4 bitsandbytes' own codes.

    Raises:
        QuantizationError: the format has no encoder, or the name is none; K is no multiple of the block; a weight is
            NaN, infinite, or larger than the format's scales can hold; the importance does not fit. Under a trace
            values cannot be looked at: scales then saturate, and NaN gives undefined codes.

    O(K * N) for each candidate of the search; temporaries of a few tiles, but a copy of the matrix in float32 where all
    columns or 128 of them share a scale. Not differentiable.
    """
    if why := no_encoder(format):
        raise QuantizationError(f"{format}: {why}.")
    storage = parse(format)
    weights = jnp.asarray(weights)
    if weights.ndim < 2 or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise QuantizationError(
            f"{format}: weights must be a float matrix [..., K, N], got {weights.dtype}{list(weights.shape)}."
        )
    weights = weights.astype(jnp.float32)
    *lead, k, n = weights.shape
    if why := storage.refusal(k):
        why = why.replace(f"K={k}", f"K={k} of weights {list(weights.shape)}", 1)
        padded = -(-k // storage.step) * storage.step
        advice = f"Pad K to {padded}, or choose" if padded > k else "Choose"
        raise QuantizationError(f"{format}: {why}. {advice} a format of smaller blocks.")
    job = _job(storage, k)
    weight = None if importance is None else _weight_of(job, importance, (*lead, k))
    shapes = storage.field_shapes(k, n)
    if weights.size == 0:
        return {name: jnp.zeros((*lead, *shape.shape), shape.dtype) for name, shape in shapes.items()}
    if _natively(storage, weights):
        encoder = job.encoder
        candidates, refits = encoder.tried(weight is not None, search)  # pyright: ignore[reportOptionalCall]
        rows = None if weight is None else weight.reshape(-1)
        fields, largest = _native(job, candidates, refits, weights, rows)
        if float(largest) > encoder.limit or not math.isfinite(largest):
            _refuse(format, weights, encoder.limit)
        return {name: fields[name] for name in shapes}
    _refuse(format, weights, job.encoder.limit)
    if job.block == 1 and isinstance(storage.format, BlockFormat):
        return _elementwise(job, weights)
    if isinstance(storage.format, ScaledFormat) and not search:
        weight = None  # the textbook's scales know of none
    if storage.columns == 1:
        fields = _in_pieces(job, weights.reshape(-1, job.block, n), weight, search)
    else:
        fields = _coarse(job, storage.columns or n, search, weights.reshape(-1, k, n), weight)
    fields = {name: field.reshape(*lead, *shapes[name].shape[:-1], field.shape[-1]) for name, field in fields.items()}
    if storage.double:
        fields = _doubled(storage, search, weights, fields)
    return {name: _of_dtype(fields[name], shape.dtype) for name, shape in shapes.items()}


def _of_dtype(field: jax.Array, dtype: np.dtype) -> jax.Array:
    return field if field.dtype == dtype else jax.lax.bitcast_convert_type(field, dtype)


def no_encoder(name: Any) -> str:
    """Returns why nothing is encoded under that name; "" where something is."""
    base = name.split(":", maxsplit=1)[0] if isinstance(name, str) else name
    if base in ENCODERS or base in SCALED_FORMATS or base in CHOICES:
        try:
            storages(name)
        except QuantizationError as error:
            return str(error).rstrip(".")
        return ""
    return (
        f"format {name!r} has no encoder; those with one: {', '.join(sorted({*ENCODERS, *SCALED_FORMATS, *CHOICES}))}"
    )


@functools.cache
def _job(storage: Storage, k: int) -> Job:
    """Returns the job for matrices of K inputs."""
    spec = storage.format
    if isinstance(spec, BlockFormat):
        fields = tuple((field.name, field.rows, field.dtype) for field in spec.fields)
        return Job(storage.name, spec.block, ENCODERS[spec.name], fields)
    assert isinstance(spec, ScaledFormat)
    run = storage.run(k)
    encoder = integer_encoder(storage, run) if spec.integer else float_encoder(storage)
    # Float8 codes come as bytes.
    parts: list[Any] = [
        (p.name, run * p.bits // 8, p.dtype if p.dtype == np.int8 else np.dtype(np.uint8)) for p in spec.planes
    ]
    parts.append(("scale", None, np.dtype(np.float32) if storage.double else storage.scale_dtype))
    if storage.asymmetric:
        parts.append(("zero", None, np.dtype(np.int8 if spec.bits == 8 else np.uint8)))
    return Job(storage.name, run, encoder, tuple(parts))


def _weight_of(job: Job, importance: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns `[blocks, block, 1]`, at most 1 and above 0: in each block relative to its largest."""
    importance = jnp.asarray(importance, jnp.float32)
    if importance.shape not in (shape, shape[-1:]):
        raise QuantizationError(
            f"{job.name}: the importance is {list(importance.shape)}, expected one number for each of the K inputs: "
            f"{list(shape[-1:])}" + (f" or {list(shape)}." if len(shape) > 1 else ".")
        )
    if not _traced(importance) and not bool(jnp.all((importance >= 0) & jnp.isfinite(importance))):
        raise QuantizationError(f"{job.name}: the importance must be finite and not negative.")
    rest = -shape[-1] % job.block  # of a last block that is shorter
    whole = jnp.broadcast_to(importance, shape).reshape(-1, shape[-1])
    blocks = jnp.pad(whole, ((0, 0), (0, rest)), mode="edge" if shape[-1] else "empty").reshape(-1, job.block, 1)
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


def _natively(storage: Storage, weights: jax.Array) -> bool:
    """Whether the handler in C++ encodes this. Traced programs may run elsewhere than they are traced."""
    if storage.name not in cpu.ENCODED or _traced(weights) or jax.default_backend() != "cpu":
        return False
    return not cpu.why_not("encoders") and weights.shape[-1] >= cpu.vector_lanes("encoders")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _native(
    job: Job, candidates: tuple[float, ...], refits: int, weights: jax.Array, row_weight: jax.Array | None
) -> tuple[Encoded, jax.Array]:
    """Returns the fields of `[..., K, N]` and the largest magnitude, which is NaN or infinite if a weight is."""
    *lead, k, n = weights.shape
    matrix = weights.reshape(-1, n)
    blocks = len(matrix) // job.block
    shapes = {
        name: jax.ShapeDtypeStruct((blocks, n) if rows is None else (blocks, rows, n), dtype)
        for name, rows, dtype in job.fields
    }
    fields, largest = cpu.encode_blocks(job.name, matrix, row_weight, candidates, refits, shapes)
    blocks = k // job.block
    fields = {name: field.reshape(*lead, blocks, *field.shape[1:]) for name, field in fields.items()}
    return fields, jax.lax.bitcast_convert_type(largest[0], jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _elementwise(job: Job, weights: jax.Array) -> Encoded:
    return job.encoder.blocks(weights[None], None, False)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _coarse(job: Job, span: int, search: bool, weights: jax.Array, weight: jax.Array | None) -> Encoded:
    """Returns the fields of matrices `[L, K, N]` in which `span` columns share a scale.

    Blocks lie side by side as `[run, span, L * G * C]`; those that reach past the matrix repeat its last row or column
    there, with a weight of zero.
    """
    count, k, n = weights.shape
    run = job.block
    g, c = -(-k // run), -(-n // span)
    beyond = ((0, 0), (0, g * run - k), (0, c * span - n))

    def side_by_side(matrix: jax.Array) -> jax.Array:
        return matrix.reshape(count, g, run, c, span).transpose(2, 4, 0, 1, 3).reshape(run, span, -1)

    x = side_by_side(jnp.pad(weights, beyond, mode="edge"))
    if weight is not None:  # [count * g, run, 1]
        weight = jnp.repeat(weight.transpose(1, 2, 0), c, axis=2)
    if g * run > k or c * span > n:
        inside = side_by_side(jnp.pad(jnp.ones_like(weights), beyond))
        weight = inside if weight is None else inside * weight
    fields = {}
    encoded = job.encoder.blocks(x, weight, search)
    for name, rows, dtype in job.fields:
        if rows is None:
            fields[name] = encoded[name].reshape(count, g, c).astype(dtype)
        else:
            whole = encoded[name].reshape(rows, span, count, g, c).transpose(2, 3, 0, 4, 1)
            fields[name] = whole.reshape(count, g * rows, c * span)[:, : k * rows // run, :n]
    return fields


@functools.partial(jax.jit, static_argnums=(0, 1))
def _doubled(storage: Storage, search: bool, weights: jax.Array, fields: Encoded) -> Encoded:
    """Returns the fields with their scales as codes, and the codes chosen anew under those where there is a search."""
    spec = storage.format
    assert isinstance(spec, ScaledFormat)
    *lead, g, n = fields["scale"].shape
    nested = jax.vmap(nested_scales)(fields["scale"].reshape(-1, g, n))
    fields = {**fields, **{name: field.reshape(*lead, *field.shape[1:]) for name, field in nested.items()}}
    if search:
        runs = jnp.moveaxis(weights.reshape(*lead, g, -1, n), -2, 0)
        codes = jnp.moveaxis(table_codes(spec, runs, spec.scale(fields)), 0, -2)
        flat = codes.reshape(-1, g * runs.shape[0], n)
        folded = jax.vmap(functools.partial(planes, spec))(flat)
        fields |= {name: plane.reshape(fields[name].shape) for name, plane in folded.items()}
    return fields


def _in_pieces(job: Job, blocks: jax.Array, weight: jax.Array | None, search: bool) -> Encoded:
    n = blocks.shape[-1]
    on_cpu = jax.default_backend() == "cpu"
    pieces = min(os.cpu_count() or 1, n, -(-blocks.size // _PIECE))
    if not on_cpu or _traced(blocks) or pieces == 1:
        return _piece(job, n, on_cpu, search, blocks, weight, 0)
    width = -(-n // pieces)
    starts = [min(i * width, n - width) for i in range(pieces)]
    # Calls return before their programs have run.
    parts = [_piece(job, width, on_cpu, search, blocks, weight, start) for start in starts]
    joined = {}
    for name in parts[0]:
        columns = [part[name] for part in parts]
        columns[-1] = columns[-1][..., width * pieces - n :]  # the last piece begins within the one before
        joined[name] = jnp.concatenate(columns, axis=-1)
    return joined


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _piece(
    job: Job,
    width: int,
    on_cpu: bool,
    search: bool,
    blocks: jax.Array,
    weight: jax.Array | None,
    start: jax.Array | int,
) -> Encoded:
    """Returns the fields of columns `start` to `start + width`."""
    count, block, _ = blocks.shape
    tile = _TILE_ON_CPU if on_cpu else job.encoder.tile
    columns = min(width, max(tile // block, _LEAST_COLUMNS))
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
        encoded = job.encoder.blocks(side_by_side(x), None if here is None else side_by_side(here), search)
        for name, field in encoded.items():
            part = jnp.moveaxis(field.reshape(*field.shape[:-1], rows, columns), -2, 0)
            written[name] = jax.lax.dynamic_update_slice(
                fields[name], part.astype(fields[name].dtype), (row, *[0] * (part.ndim - 2), column)
            )
        return written

    empty = {
        name: jnp.zeros((count, *(() if rows_ is None else (rows_,)), width), dtype)
        for name, rows_, dtype in job.fields
    }
    return jax.lax.fori_loop(0, down * across, step, empty)
