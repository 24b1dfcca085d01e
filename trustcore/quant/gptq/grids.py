"""Where codes may lie: what GPTQ has to know of a format.

A grid chooses the parameters of a group of rows when the group begins, and rounds rows under them, one at a time:

    params = start(rows [group, N], cost [group]);   code, value = round(row [N], params, j)   for j = 0 ... group - 1

and `pack` makes the weight of all codes. No format needs code of its own for `start`: its encoder packs the group as it
stands when its turn comes, and the scales that it chose are read back; only the codes are chosen anew.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import QuantizationError
from trustcore.quant.array import QuantizedArray
from trustcore.quant.encode import ENCODERS
from trustcore.quant.encode.encoder import fold
from trustcore.quant.encode.floats import float_encoder
from trustcore.quant.encode.integers import integer_encoder, planes
from trustcore.quant.encode.search import inverse
from trustcore.quant.formats import BLOCK_FORMATS, SCALED_FORMATS, ScaledFormat
from trustcore.quant.formats.names import Storage, parse


class Grid(abc.ABC):
    """One format as GPTQ sees it; hashable, so that it may be a static argument."""

    ordered: bool = False  # whether `pack` takes an order of the rows

    @abc.abstractmethod
    def group(self, k: int) -> int:
        """Returns the rows of K that share parameters.

        Raises:
            QuantizationError: K is no multiple of it.
        """

    @abc.abstractmethod
    def start(self, rows: jax.Array, cost: jax.Array) -> Any:
        """Returns the parameters of a group, `rows` `[group, N]`, an error in row j costing `cost[j]`."""

    @abc.abstractmethod
    def round(self, row: jax.Array, params: Any, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (code, value), float32 `[N]`, of row j of a group."""

    @abc.abstractmethod
    def pack(self, codes: jax.Array, params: Any, order: jax.Array | None) -> QuantizedArray:
        """Returns the weight `[K, N]` of codes `[K, N]` and of the parameters of all groups."""


@dataclasses.dataclass(frozen=True)
class ScaledGrid(Grid):
    """Integers under a scale (and a zero point) for each group of rows or each column, and tables of up to 16 numbers.

    Args:
        storage: the format and its granularity.
        search: see `trustcore.quant.encode.encode`.
    """

    storage: Storage
    search: bool = True
    ordered = True

    @property
    def spec(self) -> ScaledFormat:
        """The entry of the format table."""
        assert isinstance(self.storage.format, ScaledFormat)
        return self.storage.format

    def group(self, k: int) -> int:
        """See `Grid`."""
        if why := self.storage.refusal(k):
            raise QuantizationError(f"{self.storage.name}: {why}.")
        return self.storage.run(k)

    def start(self, rows: jax.Array, cost: jax.Array) -> dict[str, jax.Array]:
        """Returns `scale` and, where there is one, `zero`, `[N]`, as the format's encoder chooses them."""
        run = rows.shape[0]
        encoder = integer_encoder(self.storage, run) if self.spec.integer else float_encoder(self.storage)
        fields = encoder.blocks(rows, _weights(cost) if self.search else None, self.search)
        return {name: fields[name].astype(jnp.float32) for name in ("scale", "zero") if name in fields}

    def round(self, row: jax.Array, params: Any, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Grid`."""
        scaled = row * inverse(params["scale"])
        if _is_table(self.spec):
            with jax.ensure_compile_time_eval():
                numbers = np.asarray(self.spec.numbers(jnp.arange(2**self.spec.bits, dtype=jnp.uint8)), np.float64)
            order = np.argsort(numbers, kind="stable")
            middles = (numbers[order][1:] + numbers[order][:-1]) / 2
            place = jnp.sum(scaled[None] > jnp.asarray(middles, jnp.float32)[:, None], axis=0)
            code = jnp.asarray(order, jnp.float32)[place]
            return code, params["scale"] * jnp.asarray(numbers[order], jnp.float32)[place]
        low, high, middle = _range_of(self.spec)
        zero = params.get("zero", jnp.float32(middle))
        code = jnp.clip(jnp.round(scaled + zero), low, high)
        return code, params["scale"] * (code - zero)

    def pack(self, codes: jax.Array, params: Any, order: jax.Array | None) -> QuantizedArray:
        """See `Grid`."""
        fields = {"scale": params["scale"].astype(self.storage.scale_dtype)}
        if "zero" in params:
            fields["zero"] = params["zero"].astype(jnp.int8 if self.spec.bits == 8 else jnp.uint8)
        if order is not None:
            fields["order"] = order.astype(jnp.int32)
        own = {"codes": codes.astype(jnp.int8)} if self.spec.bits == 8 else planes(self.spec, codes)
        return QuantizedArray(self.spec.name, {**own, **fields})


@dataclasses.dataclass(frozen=True)
class BlockGrid(Grid):
    """A format of GGUF that is scale * code + shift in each sub-block.

    Args:
        format: its name.
        search: see `trustcore.quant.encode.encode`.
    """

    format: str
    search: bool = True

    def group(self, k: int) -> int:
        """See `Grid`."""
        block = BLOCK_FORMATS[self.format].block
        if k % block:
            raise QuantizationError(f"{self.format}: K={k} is not a multiple of the block size {block}.")
        return block

    def start(self, rows: jax.Array, cost: jax.Array) -> dict[str, jax.Array]:
        """Returns the fields of the block as the encoder packs it, and its `scale` and `shift` `[subs, N]`."""
        weight = jnp.broadcast_to(_weights(cost), rows.shape)
        fields = ENCODERS[self.format].blocks(rows, weight if self.search else None, self.search)
        affine = BLOCK_FORMATS[self.format].affine
        assert affine is not None
        params = {f"field {name}": field for name, field in fields.items()} | {"scale": affine.scale(fields)}
        return params if affine.shift is None else {**params, "shift": affine.shift(fields)}

    def round(self, row: jax.Array, params: Any, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Grid`."""
        low, high = _CODES[self.format][:2]
        scale = params["scale"]
        sub = j // (BLOCK_FORMATS[self.format].block // scale.shape[0])
        scale = jax.lax.dynamic_index_in_dim(scale, sub, 0, keepdims=False)
        shift = jnp.float32(0)
        if "shift" in params:
            shift = jax.lax.dynamic_index_in_dim(params["shift"], sub, 0, keepdims=False)
        code = jnp.clip(jnp.round((row - shift) * inverse(scale)), low, high)
        return code, code * scale + shift

    def pack(self, codes: jax.Array, params: Any, order: jax.Array | None) -> QuantizedArray:
        """See `Grid`."""
        assert order is None
        spec = BLOCK_FORMATS[self.format]
        low, _, pack = _CODES[self.format]
        offset = 0 if self.format == "q8_0" else low
        packed = jax.vmap(pack)((codes - offset).reshape(-1, spec.block, codes.shape[-1]))
        fields = {f.name: packed.get(f.name, params[f"field {f.name}"]) for f in spec.fields}
        return QuantizedArray(self.format, fields)


def _weights(cost: jax.Array) -> jax.Array:
    """Returns `[group, 1]`, at most 1 and above 0, as encoders take it."""
    largest = jnp.max(cost)
    return jnp.where(largest > 0, jnp.maximum(cost / jnp.where(largest > 0, largest, 1), 1e-6), 1)[:, None]


def _is_table(spec: ScaledFormat) -> bool:
    return not spec.integer or spec.bits == 1


def _range_of(spec: ScaledFormat) -> tuple[int, int, int]:
    """The smallest and the largest code, and the code of zero where there is no zero point."""
    if spec.bits == 8:
        return -127, 127, 0  # as encoders write them
    if spec.name == "ternary":
        return 0, 2, 1
    return 0, 2**spec.bits - 1, 2 ** (spec.bits - 1)


def _split(low: int, chunk: int, name: str, bits: int, high_chunk: int) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Codes whose `low` lower bits lie in `codes` and whose other `bits` in `name`."""

    def pack(codes: jax.Array) -> dict[str, jax.Array]:
        codes = codes.astype(jnp.uint8)
        lower = codes & jnp.uint8(2**low - 1)
        return {"codes": fold(lower, low, chunk), name: fold(codes >> jnp.uint8(low), bits, high_chunk)}

    return pack


def _whole(bits: int, chunk: int) -> Callable[[jax.Array], dict[str, jax.Array]]:
    return lambda codes: {"codes": fold(codes.astype(jnp.uint8), bits, chunk)}


# The smallest and the largest code, as the format's scale multiplies it, and how codes from 0 are folded into bytes.
_CODES: Mapping[str, tuple[int, int, Callable[[jax.Array], dict[str, jax.Array]]]] = {
    "q4_0": (-8, 7, _whole(4, 16)),
    "q4_1": (0, 15, _whole(4, 16)),
    "q5_0": (-16, 15, _split(4, 16, "high", 1, 1)),
    "q5_1": (0, 31, _split(4, 16, "high", 1, 1)),
    "q8_0": (-127, 127, lambda codes: {"codes": codes.astype(jnp.int8)}),
    "q2_k": (0, 3, _whole(2, 32)),
    "q3_k": (-4, 3, _split(2, 32, "high", 1, 32)),
    "q4_k": (0, 15, _whole(4, 32)),
    "q5_k": (0, 31, _split(4, 32, "high", 1, 32)),
    "q6_k": (-32, 31, _split(4, 64, "high", 2, 32)),
}

GRIDS: tuple[str, ...] = (
    *(name for name, f in SCALED_FORMATS.items() if f.integer or (f.bits <= 4 and not f.powers)),
    *_CODES,
)


def grid_of(format: str, *, search: bool = True) -> Grid:
    """Returns the grid of a format: "q4_0", "q4_k", "int4", "int4:g64", "int3:channel", "int4:g128:asym", "nf4".

    Raises:
        QuantizationError: GPTQ does not know the format, or not with that granularity.
    """
    base = format.split(":", maxsplit=1)[0]
    if base not in GRIDS:
        raise QuantizationError(
            f"gptq: format {format!r} is not known; choose from {', '.join(GRIDS)}, those that are not GGUF's also "
            'with a granularity ("int4:g64", "int3:channel", "int4:g128:asym").'
        )
    storage = parse(format)
    if base in _CODES:
        return BlockGrid(base, search)
    if storage.columns != 1 or storage.double:
        raise QuantizationError(
            f"gptq: {format!r} has scales that columns share, or scales in codes; give a group or channel, such as "
            f'"{base}:g64".'
        )
    return ScaledGrid(storage, search)
