"""bitsandbytes' files: 4-bit codes of a table with a scale for each block, and 8-bit rows.

4 bits (QLoRA, Dettmers et al., arXiv 2305.14314):

    weight                  bytes of `[N, K]` read row by row, two codes a byte, the high nibble first; u8
                            [N * K / 2, 1] or other numbers of as many bytes
    weight.absmax           f32 [blocks]: the largest magnitude of each block of the flattened matrix; or u8, the
                            indices of nested_quant_map
    weight.quant_map        f32 [16]: the value of each code
    weight.nested_absmax    f32 [blocks / nested_blocksize]
    weight.nested_quant_map f32 [256]
    weight.quant_state.bitsandbytes__nf4 (or __fp4)
                            u8: JSON with quant_type, blocksize, dtype, shape, and where scales are nested
                            nested_blocksize, nested_dtype, nested_offset

    absmax = nested_quant_map[absmax] * nested_absmax[block // nested_blocksize] + nested_offset
    w = quant_map[code] * absmax[block]

Nested scales stay nested where blocks lie within rows and 256 of them are shared evenly among rows; else they are
unnested: 0.5 bits a weight in place of 0.127 with blocks of 64.

8 bits (LLM.int8, arXiv 2208.07339): weight i8 [N, K], SCB f32 [N]; w = weight * SCB / 127. The scale is SCB * (1/127)
here, so decoded weights differ from the package's (weight * SCB) * (1/127) by the last rounding.
"""

from __future__ import annotations

import math

import numpy as np

from trustcore.errors import CheckpointError, ModelError
from trustcore.models.schemes.fields import SMALLEST_GROUP
from trustcore.models.schemes.gptq import finite_scale
from trustcore.models.schemes.scheme import Fields, Module, Packed, Tensors
from trustcore.models.values import Values
from trustcore.weights import LazyArray
from trustcore.weights.json_file import parse_object

_STATES = ("nf4", "fp4")
_BYTES = ("u8", "i8", "bf16", "f16", "f32")  # what the numbers that carry packed bytes may be called
_LARGEST_STATE = 4096  # bytes of JSON
_NESTED = 256  # scales under one scale of scales, in the fields of nf4 and fp4
_BLOCKS = tuple(1 << i for i in range(4, 14))

# The values of the codes, as float32: functional.get_4bit_type of the package.
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}


class BitsAndBytes:
    """Reads matrices that bitsandbytes wrote."""

    name = "bitsandbytes"

    def __init__(self, config: Values):
        """Takes the `quantization_config`.

        Raises:
            ModelError: it says neither 4 nor 8 bits.
        """
        if config.flag("load_in_4bit", False) == config.flag("load_in_8bit", False):
            raise ModelError("quantization_config: one of load_in_4bit and load_in_8bit must be true")
        self.four = config.flag("load_in_4bit", False)

    def find(self, tensors: Tensors, module: str, k: int, n: int) -> Packed | None:
        """See `Scheme.find`."""
        parts = Module(tensors, module, self.name)
        return self._find_4bit(parts, k, n) if self.four else self._find_8bit(parts, k, n)

    def _find_8bit(self, parts: Module, k: int, n: int) -> Packed | None:
        weight = parts.get("weight")
        if weight is not None and weight.encoding != "i8":
            return None
        weight = parts.need("weight", ("i8",), (n, k))
        scale = parts.need("SCB", ("f32",), (n,))
        if "weight_format" in parts:
            kind = parts.need("weight_format", ("u8",), (), (1,))
            if int(kind.numpy().reshape(-1)[0]) != 0:
                raise parts.error(
                    "weight_format", f"is {int(kind.numpy().reshape(-1)[0])}; only 0, row by row, is read"
                )

        def fields() -> Fields:
            largest = finite_scale(parts, "SCB", scale)
            return {"codes": weight.numpy().T, "scale": (largest * np.float32(1 / 127))[None, :]}

        return Packed("int8", tuple(parts.used), fields)

    def _find_4bit(self, parts: Module, k: int, n: int) -> Packed | None:
        companions = [f"weight.quant_state.bitsandbytes__{kind}" for kind in _STATES]
        kinds = [kind for kind, name in zip(_STATES, companions, strict=True) if name in parts]
        weight = parts.get("weight")
        if not kinds:
            if weight is not None and weight.encoding != "u8":
                return None
            if weight is not None or "weight.absmax" in parts:
                parts.need(companions[0], ("u8",))  # says that it is missing
        if len(kinds) > 1:
            raise parts.error(companions[0], f"stands beside {companions[1]}; expected one of them")
        weight = parts.need("weight", _BYTES)
        if 2 * weight.nbytes != n * k:
            raise parts.error("weight", f"has {weight.nbytes} bytes; {n} x {k} codes of 4 bits take {n * k / 2:g}")
        kind = kinds[0]
        suffix = f"weight.quant_state.bitsandbytes__{kind}"
        state = self._state(parts, suffix, kind, k, n)
        block = state.integer("blocksize")
        if block not in _BLOCKS:
            raise parts.error(suffix, f"has blocksize {block}; expected one of {', '.join(map(str, _BLOCKS))}")
        group = block if k % block == 0 else math.gcd(k, block)
        if group < SMALLEST_GROUP:
            raise parts.error(suffix, f"has blocksize {block}, which does not fit rows of {k} weights")
        blocks = -(-n * k // block)
        table = parts.need("weight.quant_map", ("f32",), (16,))
        nested = state.get("nested_blocksize") is not None
        absmax = parts.need("weight.absmax", ("u8",) if nested else ("f32",), (blocks,), why=f"blocksize {block}")
        outer = None
        if nested:
            size = state.integer("nested_blocksize")
            outer = (
                parts.need("weight.nested_absmax", ("f32",), (-(-blocks // size),), why=f"nested_blocksize {size}"),
                parts.need("weight.nested_quant_map", ("f32",), (256,)),
                size,
                state.number("nested_offset"),
            )

        def fields() -> Fields:
            if not np.array_equal(table.numpy(), np.asarray(TABLES[kind], np.float32)):
                raise parts.error("weight.quant_map", f"is not the table of {kind}")
            scale = _unnested(absmax, outer)
            if not bool(np.isfinite(scale).all()):
                raise parts.error("weight.absmax", "gives a scale that is infinite or no number")
            kept = None if outer is None or group != block else _nested(absmax, outer, k // block, n)
            return {"codes": _codes(weight, k, n), **(kept or {"scale": _per_group(scale, k, n, block, group)})}

        return Packed(kind, tuple(parts.used), fields)

    def _state(self, parts: Module, suffix: str, kind: str, k: int, n: int) -> Values:
        """The JSON of a matrix, of which shape and type have been checked."""
        tensor = parts.need(suffix, ("u8",))
        if tensor.nbytes > _LARGEST_STATE:
            raise parts.error(suffix, f"has {tensor.nbytes} bytes; expected at most {_LARGEST_STATE}")
        try:
            found = parse_object(tensor.raw().tobytes(), tensor.path, tensor.name, tensor.offset, unique=True)
        except CheckpointError as error:
            raise ModelError(str(error)) from error
        if found.get("quant_type") != kind or found.get("shape") != [n, k]:
            raise parts.error(
                suffix,
                f"says quant_type {str(found.get('quant_type'))[:20]!r} and shape {str(found.get('shape'))[:40]}; "
                f"expected {kind!r} and {[n, k]}",
            )
        return Values(found, f"{parts.name}.{suffix}")


def _unnested(absmax: LazyArray, outer: tuple[LazyArray, LazyArray, int, float] | None) -> np.ndarray:
    """Float32 scales of all blocks; the sums and products are float32, as the package does them."""
    if outer is None:
        return absmax.numpy()
    largest, table, size, offset = outer
    inner = table.numpy()[absmax.numpy()]
    return inner * largest.numpy()[np.arange(len(inner)) // size] + np.float32(offset)


def _nested(
    absmax: LazyArray, outer: tuple[LazyArray, LazyArray, int, float], groups: int, n: int
) -> dict[str, np.ndarray] | None:
    """The fields of scales that stay codes; None where the format has no such shape."""
    largest, table, size, offset = outer
    if size != _NESTED or (_NESTED % groups and groups % _NESTED):
        return None
    values = largest.numpy()
    return {
        "scale": absmax.numpy().reshape(n, groups).T,
        "levels": table.numpy()[:, None],
        "nested": values[None, :] if _NESTED % groups == 0 else values.reshape(n, -1).T,
        "offset": np.full((1, 1), offset, np.float32),
    }


def _codes(weight: LazyArray, k: int, n: int) -> np.ndarray:
    """Bytes `[K / 2, N]` with the low nibble first."""
    packed = weight.raw().reshape(n, k // 2)
    return ((packed >> np.uint8(4)) | (packed << np.uint8(4))).T


def _per_group(scale: np.ndarray, k: int, n: int, block: int, group: int) -> np.ndarray:
    """Scales of flat blocks as `[K / group, N]`: a block may lie across rows, a group never does."""
    first = np.arange(n, dtype=np.int64)[None, :] * k + np.arange(0, k, group, dtype=np.int64)[:, None]
    return scale[first // block]
