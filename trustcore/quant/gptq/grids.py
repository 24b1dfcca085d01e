"""Where codes may lie: what GPTQ has to know of a format.

A grid chooses the parameters of a group of rows when the group begins, and rounds rows under them, one at a time:

    params = start(rows [group, N], cost [group]);   code, value = round(row [N], params, j)   for j = 0 ... group - 1

and `pack` makes the weight of all codes. GGUF's formats need no code of their own for `start`: their encoder packs the
block as it stands when its turn comes, and the scales that it chose are read back; only the codes are chosen anew.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trustcore.errors import QuantizationError
from trustcore.quant.array import QuantizedArray
from trustcore.quant.encode import ENCODERS
from trustcore.quant.encode.encoder import fold
from trustcore.quant.encode.search import (
    affine_grids,
    inverse,
    power_of_two,
    search_affine,
    search_symmetric,
    symmetric_grids,
    whole,
)
from trustcore.quant.formats import BLOCK_FORMATS


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
class IntegerGrid(Grid):
    """Integers of 2 to 8 bits under a scale, or a scale and a zero point, for each group of rows.

    Args:
        bits: of a code.
        size: rows of a group; None: all of K.
        asymmetric: whether there are zero points.
        search: False takes the scale that fits the full range of the codes.
    """

    bits: int
    size: int | None = 32
    asymmetric: bool = False
    search: bool = True
    ordered = True

    def group(self, k: int) -> int:
        """See `Grid`."""
        size = self.size or k
        if k % size:
            raise QuantizationError(f"int{self.bits}: K={k} is not a multiple of the group size {size}.")
        return size

    def start(self, rows: jax.Array, cost: jax.Array) -> dict[str, jax.Array]:
        """Returns `scale` and, when asymmetric, `zero`, `[N]`; w = scale * (code - zero), codes from 0."""
        unit = power_of_two(rows)
        x = rows / unit[None]
        weight = _weights(cost) if self.search else None
        if self.asymmetric:
            levels = 2**self.bits - 1
            scale, shift = search_affine(x, weight, levels, affine_grids(levels).choose(weight, self.search))
            # A constant group: its value as the scale of code 1.
            flat = scale == 0
            scale = jnp.where(flat, jnp.where(shift == 0, 1, shift), scale)
            zero = jnp.where(flat, jnp.where(shift == 0, 0, -1), jnp.round(-shift * inverse(scale)))
            return {"scale": scale * unit, "zero": zero}
        reach = 2 ** (self.bits - 1)
        grid = symmetric_grids(reach).choose(weight, self.search)
        return {"scale": search_symmetric(x, weight, whole(-reach, reach - 1), grid) * unit}

    def round(self, row: jax.Array, params: Any, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Grid`."""
        scale, zero = params["scale"], params.get("zero", jnp.float32(2 ** (self.bits - 1)))
        code = jnp.clip(jnp.round(row * inverse(scale) + zero), 0, 2**self.bits - 1)
        return code, scale * (code - zero)

    def pack(self, codes: jax.Array, params: Any, order: jax.Array | None) -> QuantizedArray:
        """See `Grid`. Scales float32; the layout of integer formats of any granularity."""
        fields = dict(params)
        if order is not None:
            fields["order"] = order.astype(jnp.int32)
        if self.bits == 8:
            half = 128  # int8 codes are signed
            if "zero" in fields:
                fields["zero"] = fields["zero"] - half
            planes = {"codes": (codes - half).astype(jnp.int8)}
        else:
            planes = _planes(codes.astype(jnp.uint8), self.bits)
        return QuantizedArray(f"int{self.bits}", {**planes, **fields})


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


def _planes(codes: jax.Array, bits: int) -> dict[str, jax.Array]:
    """Codes as planes of 4, 2 and 1 bits, the lowest first."""
    planes, names = {}, iter(("codes", "high", "top"))
    below = 0
    for width in (4, 2, 1):
        if bits - below >= width:
            part = (codes >> jnp.uint8(below)) & jnp.uint8(2**width - 1)
            planes[next(names)] = fold(part, width)
            below += width
    return planes


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

GRIDS: tuple[str, ...] = (*(f"int{bits}" for bits in range(2, 9)), *_CODES)


def grid_of(format: str, *, search: bool = True) -> Grid:
    """Returns the grid of a format: "q4_0", "q4_k", "int4", "int4:g64", "int3:channel", "int4:g128:asym".

    Raises:
        QuantizationError: GPTQ does not know the format.
    """
    name, *options = format.split(":")
    if name in _CODES and not options:
        return BlockGrid(name, search)
    if name in GRIDS and name.startswith("int"):
        bits = int(name[3:])
        size: int | None = None if bits == 8 else 32
        asymmetric = False
        for option in options:
            if option == "asym":
                asymmetric = True
            elif option == "channel":
                size = None
            elif option[:1] == "g" and option[1:].isdigit() and int(option[1:]) > 0:
                size = int(option[1:])
            else:
                break
        else:
            return IntegerGrid(bits, size, asymmetric, search)
    raise QuantizationError(
        f"gptq: format {format!r} is not known; choose from {', '.join(GRIDS)}, integers also with a granularity "
        '("int4:g64", "int3:channel", "int4:g128:asym").'
    )
