"""compressed-tensors' files (llm-compressor, vLLM): groups of modules, each with its own kind of weight.

    pack-quantized          weight_packed i32 [N, ceil(K * bits / 32)], codes + 2**(bits-1), dense along K (older files:
                            padded); weight_scale; weight_zero_point i32 [ceil(N * bits / 32), G], packed along N;
                            weight_shape [2] = N, K; weight_g_idx i32 [K], the group of each input (older files)
    int-, naive-quantized   weight i8 [N, K], signed codes; weight_scale; weight_zero_point i8 of its shape
    float-quantized         weight f8_e4m3 [N, K]; weight_scale
    nvfp4-pack-quantized    weight_packed u8 [N, K / 2]; weight_scale f8_e4m3 [N, K / 16]; weight_global_scale f32 [1]
    mxfp4-pack-quantized    weight_packed u8 [N, K / 2]; weight_scale u8 [N, K / 32]
    mxfp6-pack-quantized    weight_packed u8 [N, K * 6 / 8], E2M3, dense; weight_scale u8 [N, K / 32]
    mxfp8-quantized         weight f8_e4m3 [N, K]; weight_scale u8 [N, K / 32]

    w = scale * (code - zero);      nvfp4: w = e2m1 * scale / global_scale
    weight_scale: [1], [N, 1], [N, G] or [ceil(N / rows), ceil(K / columns)], by strategy tensor, channel, group, block

Layouts as compressed-tensors 0.20 packs them. NVFP4 keeps 1 / global_scale, so that decoded weights differ from the
package's, which divides scales, by the last rounding of float32. Transforms of activations are refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trustcore.errors import ModelError
from trustcore.models.schemes.fields import block_scale, by_group, integer_fields, plane_fields
from trustcore.models.schemes.float4 import mxfp4_fields, nvfp4_fields
from trustcore.models.schemes.float8 import EXTRAS, FORMATS, block_size, float8
from trustcore.models.schemes.gptq import finite_scale
from trustcore.models.schemes.patterns import matches
from trustcore.models.schemes.scheme import FLOATS, Fields, Module, Packed, Tensors, choose
from trustcore.models.values import Values
from trustcore.weights import LazyArray
from trustcore.weights.bit_words import unpack_words, word_count

PACKED = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized")
PLAIN = ("int-quantized", "naive-quantized", "float-quantized", "mxfp8-quantized", "dense")
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
_MX = 32


class _Group:
    """One entry of `config_groups`: how the weights of its targets are stored."""

    def __init__(self, name: str, entry: Any, default_format: Any):
        where = f"quantization_config: config_groups.{name}"
        if not isinstance(entry, dict) or not isinstance(entry.get("targets"), list):
            raise ModelError(f"{where} is no object with targets and weights; names of presets are not read")
        self.targets = [str(target) for target in entry["targets"]]
        weights = entry.get("weights")
        self.quantized = weights is not None
        if not isinstance(weights, dict | None):
            raise ModelError(f"{where}.weights is no object")
        values = Values(weights or {}, f"{where}.weights")
        self.bits = values.integer("num_bits", 8)
        self.kind = choose(f"{where}.weights.type", values.text("type", "int").lower(), ("int", "float"))
        self.symmetric = values.flag("symmetric", True)
        self.size = 0 if values.get("group_size") in (None, -1) else values.integer("group_size", least=8)
        inferred = "group" if self.size else "channel" if values.get("group_size") == -1 else "tensor"
        self.strategy = choose(f"{where}.weights.strategy", values.text("strategy", inferred).lower(), _STRATEGIES)
        if self.strategy in ("group", "tensor_group") and not self.size:
            raise ModelError(f"{where}.weights.group_size is missing; strategy {self.strategy!r} needs it")
        self.block = block_size(values.get("block_structure"), f"{where}.weights.block_structure")
        if self.strategy == "block" and self.block is None:
            raise ModelError(f"{where}.weights.block_structure is missing; strategy 'block' needs it")
        given = entry.get("format") or default_format
        self.format = choose(f"{where}: format", given, (*PACKED, *PLAIN, "mixed-precision"))

    def scale_shapes(self, k: int, n: int) -> tuple[tuple[int, ...], ...]:
        """The shapes that `weight_scale` may have."""
        if self.strategy == "tensor":
            return (1,), (), (1, 1)
        if self.strategy == "channel":
            return (n, 1), (n,)
        if self.strategy == "block":
            assert self.block is not None
            return ((-(-n // self.block[0]), -(-k // self.block[1])),)
        return ((n, -(-k // self.size)),)


class CompressedTensors:
    """Reads matrices that compressed-tensors wrote."""

    name = "compressed-tensors"

    def __init__(self, config: Values):
        """Takes the `quantization_config`.

        Raises:
            ModelError: it describes something that is not read; says what is.
        """
        where = "quantization_config: "
        sparsity = config.get("sparsity_config")
        if isinstance(sparsity, dict) and sparsity:
            choose(f"{where}sparsity_config.format", sparsity.get("format", "dense"), ("dense",))
        if config.get("transform_config"):
            raise ModelError(
                f"{where}transform_config asks for transforms of activations, which are not computed; supported: "
                "models without them"
            )
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups or len(groups) > 256:
            raise ModelError(f"{where}config_groups is no object with 1 to 256 groups")
        default = config.get("format") or "dense"
        self.groups = [_Group(str(name)[:64], entry, default) for name, entry in groups.items()]

    def find(self, tensors: Tensors, module: str, k: int, n: int) -> Packed | None:
        """See `Scheme.find`."""
        parts = Module(tensors, module, self.name)
        weight = parts.get("weight")
        if "weight_packed" not in parts and weight is not None and weight.encoding not in ("i8", *FORMATS):
            return None
        group = self._group(module)
        if "weight_packed" in parts or (weight is None and group.format in PACKED):
            packed = self._find_packed(parts, group, k, n)
        elif weight is None or weight.encoding == "i8":
            packed = self._find_integers(parts, group, k, n)
        elif group.format == "mxfp8-quantized" or self._has_exponents(parts):
            packed = self._find_mxfp8(parts, k, n)
        else:
            packed = self._find_float8(parts, group, k, n)
        return packed

    def _group(self, module: str) -> _Group:
        """The group of a module; lists of exceptions do not matter, since a packed module is in some group."""
        groups = [group for group in self.groups if group.quantized]
        if len(groups) == 1:
            return groups[0]
        kind = "Embedding" if "embed" in module else "Linear"
        exact = (group for group in groups if module in group.targets)
        meant = (group for group in groups if matches(module, kind, group.targets))
        found = next(exact, None) or next(meant, None)
        if found is None:
            raise ModelError(f"{module} is packed, and no group of quantization_config has it among its targets")
        return found

    @staticmethod
    def _has_exponents(parts: Module) -> bool:
        scale = parts.get("weight_scale")
        return scale is not None and scale.encoding == "u8"

    def _find_packed(self, parts: Module, group: _Group, k: int, n: int) -> Packed:
        if group.kind == "int":
            return self._find_pack_quantized(parts, group, k, n)
        if group.bits == 4 and group.size == 16:
            return self._find_nvfp4(parts, k, n)
        if group.bits in (4, 6) and group.size == _MX:
            return self._find_mx(parts, group.bits, k, n)
        raise parts.error(
            "weight_packed",
            f"holds floats of {group.bits} bits in groups of {group.size}; supported: 4 bits in groups of 16 (NVFP4), "
            "4 and 6 bits in groups of 32 (MXFP4, MXFP6)",
        )

    def _find_pack_quantized(self, parts: Module, group: _Group, k: int, n: int) -> Packed:
        bits = choose(f"{parts.name}: num_bits", group.bits, tuple(range(2, 9)))
        why = f"{bits} bits, {n} outputs, {k} inputs"
        dense, loose = word_count(k, bits), word_count(k, bits, padded=True)
        weight = parts.need("weight_packed", ("i32",), *dict.fromkeys([(n, dense), (n, loose)]), why=why)
        padded = weight.shape[1] != dense
        scale = parts.need("weight_scale", FLOATS, *group.scale_shapes(k, n), why=f"strategy {group.strategy}")
        groups = scale.shape[1] if len(scale.shape) == 2 else 1
        zeros = None
        if not group.symmetric:
            shapes = {(word_count(n, bits, padded=padded), groups): "i32", (n, groups): "i8"}
            found = parts.get("weight_zero_point")
            plain = found is not None and found.encoding == "i8"
            zeros = parts.need(
                "weight_zero_point", ("i32", "i8"), *[s for s, e in shapes.items() if (e == "i8") == plain]
            )
        shape = parts.need("weight_shape", ("i64", "i32"), (2,)) if "weight_shape" in parts else None
        index = parts.need("weight_g_idx", ("i32",), (k,)) if "weight_g_idx" in parts else None

        def fields() -> Fields:
            if shape is not None and shape.numpy().tolist() != [n, k]:
                raise parts.error("weight_shape", f"says {shape.numpy().tolist()}; expected {[n, k]}")
            codes = unpack_words(weight.numpy(), bits, k, axis=1, padded=padded).T
            zero = None
            if zeros is not None and zeros.encoding == "i32":
                zero = unpack_words(zeros.numpy(), bits, n, axis=0, padded=padded).T
            elif zeros is not None:
                zero = _unsigned(parts, "weight_zero_point", zeros, bits).T
            field = _scale(parts, scale, group, k, n)
            return _integers(parts, codes, bits, field, zero, index, group.size)

        return Packed(f"int{bits}", tuple(parts.used), fields, parts.extras(*EXTRAS, "input_zero_point"))

    def _find_integers(self, parts: Module, group: _Group, k: int, n: int) -> Packed:
        bits = choose(f"{parts.name}: num_bits", group.bits, tuple(range(2, 9)))
        weight = parts.need("weight", ("i8",), (n, k))
        scale = parts.need("weight_scale", FLOATS, *group.scale_shapes(k, n), why=f"strategy {group.strategy}")
        zeros = None
        if not group.symmetric:
            zeros = parts.need("weight_zero_point", ("i8",), *group.scale_shapes(k, n))

        def fields() -> Fields:
            field = _scale(parts, scale, group, k, n)
            zero = None
            if zeros is not None:
                values = _unsigned(parts, "weight_zero_point", zeros, bits)
                zero = _oriented(values, group, k, n)
            return _integers(parts, _unsigned(parts, "weight", weight, bits).T, bits, field, zero, None, 0)

        return Packed(f"int{bits}", tuple(parts.used), fields, parts.extras(*EXTRAS, "input_zero_point"))

    def _find_float8(self, parts: Module, group: _Group, k: int, n: int) -> Packed:
        if group.strategy in ("group", "tensor_group"):
            return float8(parts, "weight_scale", k, n, (1, group.size))
        return float8(parts, "weight_scale", k, n, group.block)

    def _find_mxfp8(self, parts: Module, k: int, n: int) -> Packed:
        weight = parts.need("weight", tuple(FORMATS), (n, k))
        scale = parts.need("weight_scale", ("u8",), (n, k // _MX), why=f"{k} inputs in blocks of {_MX}")
        return Packed(
            f"mx{FORMATS[weight.encoding]}",
            tuple(parts.used),
            lambda: {"codes": weight.numpy().T, "scale": scale.numpy().T},
        )

    def _find_nvfp4(self, parts: Module, k: int, n: int) -> Packed:
        if k % 64:
            raise parts.error("weight_packed", f"has {k} inputs; NVFP4 is read in blocks of 64, which must divide them")
        weight = parts.need("weight_packed", ("u8",), (n, k // 2))
        scale = parts.need("weight_scale", ("f8_e4m3",), (n, k // 16))
        whole = parts.need("weight_global_scale", ("f32",), (1,), (), (1, 1))

        def fields() -> Fields:
            finite_scale(parts, "weight_scale", scale)
            stored = scale.numpy().view(np.uint8)
            if bool((stored > 127).any()):
                raise parts.error("weight_scale", "holds a negative scale; NVFP4's are unsigned")
            divisor = float(finite_scale(parts, "weight_global_scale", whole).reshape(()))
            if not divisor > 0:
                raise parts.error("weight_global_scale", f"is {divisor}; expected a positive number")
            return nvfp4_fields(weight.numpy(), stored, np.float32(1) / np.float32(divisor))

        return Packed("nvfp4", tuple(parts.used), fields, parts.extras("input_global_scale"))

    def _find_mx(self, parts: Module, bits: int, k: int, n: int) -> Packed:
        if k % _MX:
            raise parts.error("weight_packed", f"has {k} inputs; blocks of {_MX} must divide them")
        weight = parts.need("weight_packed", ("u8",), (n, k * bits // 8))
        scale = parts.need("weight_scale", ("u8",), (n, k // _MX))

        def fields() -> Fields:
            if bits == 4:
                return mxfp4_fields(weight.numpy().reshape(n, k // _MX, _MX // 2), scale.numpy())
            codes = unpack_words(weight.numpy(), bits, k, axis=1).T
            return {**plane_fields(np.ascontiguousarray(codes), bits), "scale": scale.numpy().T}

        return Packed("mxfp4" if bits == 4 else "mxfp6_e2m3", tuple(parts.used), fields, parts.extras(*EXTRAS))


def _scale(parts: Module, tensor: LazyArray, group: _Group, k: int, n: int) -> np.ndarray:
    """The scale field of a `weight_scale`."""
    return _oriented(finite_scale(parts, "weight_scale", tensor), group, k, n)


def _oriented(values: np.ndarray, group: _Group, k: int, n: int) -> np.ndarray:
    """`[G, C]` of numbers of the shapes of `scale_shapes`."""
    if group.strategy == "block":
        assert group.block is not None
        return block_scale(values, k, n, *group.block, integer=True)
    if group.strategy in ("group", "tensor_group"):
        return values.T
    return values.reshape(1, -1)


def _unsigned(parts: Module, suffix: str, tensor: LazyArray, bits: int) -> np.ndarray:
    """Signed codes of `bits` bits as unsigned ones, more by 2**(bits-1)."""
    half = 1 << (bits - 1)
    values = tensor.numpy()
    if bits < 8 and values.size and (values.min() < -half or values.max() >= half):
        raise parts.error(
            suffix, f"holds {values.min()} to {values.max()}; integers of {bits} bits are {-half} to {half - 1}"
        )
    return (values.view(np.uint8) + np.uint8(half)) & np.uint8((1 << bits) - 1)


def _integers(
    parts: Module,
    codes: np.ndarray,
    bits: int,
    scale: np.ndarray,
    zero: np.ndarray | None,
    index: LazyArray | None,
    size: int,
) -> Fields:
    """The fields of integers whose inputs are in the groups of `index`, or of `size` in turn."""
    try:
        order = None
        k, groups = codes.shape[0], scale.shape[0]
        if index is not None or (size and k % size):
            group = np.arange(k, dtype=np.int32) // size if index is None else index.numpy()
            if group.size and group.max() < 0:  # all -1: an index that was never set
                group = np.arange(k, dtype=np.int32) // (size or k)
            if group.size and (group.min() < 0 or group.max() >= groups):
                raise ModelError(f"has groups {group.min()} to {group.max()}; there are {groups}")
            order, scale, zero = by_group(group, scale, zero)
        codes = np.ascontiguousarray(codes if order is None else codes[order])
        return integer_fields(codes, bits, scale, zero, order)
    except ModelError as error:
        raise parts.error("weight_g_idx" if index is not None else "weight", str(error)) from None
