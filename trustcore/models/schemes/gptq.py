"""GPTQ's files (AutoGPTQ, GPTQModel): integers packed along the inputs, groups that may follow an order of activation.

    qweight  i32 [K * bits / 32, N]     codes of inputs, dense (see `trustcore.weights.bit_words`), 2, 3, 4 or 8 bits
    qzeros   i32 [G, N * bits / 32]     zero points of outputs; version 1 stores them less one, modulo 2**bits
    scales   f16 [G, N]
    g_idx    i32 [K]                    the group of each input; without it, input k is of group k // group_size

    w[k, n] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n])

Frantar et al., arXiv 2210.17323; the layout as AutoGPTQ 0.7 packs it. `checkpoint_format` tells version 1 ("gptq") from
version 2 ("gptq_v2"). A version 1 zero point of zero is stored as 2**bits - 1 and read as zero, as AutoGPTQ reads it.
"""

from __future__ import annotations

import numpy as np

from trustcore.errors import ModelError
from trustcore.models.schemes.fields import by_group, integer_fields, signed, zero_field
from trustcore.models.schemes.scheme import FLOATS, Fields, Module, Packed, Tensors, choose
from trustcore.models.values import Values
from trustcore.weights import LazyArray
from trustcore.weights.bit_words import unpack_words, word_count

BITS = (2, 3, 4, 8)


class GPTQ:
    """Reads matrices that GPTQ's packages wrote."""

    name = "GPTQ"

    def __init__(self, config: Values):
        """Takes the `quantization_config`.

        Raises:
            ModelError: it describes a layout that is not read.
        """
        where = "quantization_config: "
        self.bits = choose(f"{where}bits", config.get("bits"), BITS)
        self.group_size = group_size(config)
        self.descending = config.flag("desc_act", False)
        if config.flag("is_marlin_format", False):
            choose(f"{where}checkpoint_format", "marlin", ("gptq", "gptq_v2"))
        given = config.get("checkpoint_format") or config.get("format") or "gptq"
        self.version = 2 if choose(f"{where}checkpoint_format", given, ("gptq", "gptq_v2")) == "gptq_v2" else 1
        choose(f"{where}pack_dtype", config.get("pack_dtype") or "int32", ("int32",))
        # Rules for single modules, by regular expressions. The shapes say the same, and no pattern of a file is run.
        self.varied = bool(config.get("dynamic"))

    def find(self, tensors: Tensors, module: str, k: int, n: int) -> Packed | None:
        """See `Scheme.find`."""
        parts = Module(tensors, module, self.name)
        if "qweight" not in parts and "weight" in parts:
            return None
        bits, groups = self._sizes(parts, k, n)
        why = f"{bits} bits, {k} inputs, {n} outputs"
        words = word_count(n, bits)
        if k * bits % 32 or n * bits % 32:
            raise parts.error("qweight", f"cannot be: {why} do not fill words of 32 bits")
        weight = parts.need("qweight", ("i32",), (k * bits // 32, n), why=why)
        scales = parts.need("scales", FLOATS, (groups, n), why=f"{groups} groups of inputs")
        zeros = parts.need("qzeros", ("i32",), (groups, words), why=f"{groups} groups of inputs, {why}")
        index = parts.need("g_idx", ("i32",), (k,)) if self.descending or "g_idx" in parts else None
        return Packed(
            f"int{bits}",
            tuple(parts.used),
            lambda: self._fields(parts, bits, k, n, weight, scales, zeros, index),
        )

    def _sizes(self, parts: Module, k: int, n: int) -> tuple[int, int]:
        """Bits and groups: the configuration's, or where that has rules for single modules, what the shapes say."""
        bits, groups = self.bits, -(-k // self.group_size) if self.group_size else 1
        weight, scales = parts.get("qweight"), parts.get("scales")
        if self.varied and weight is not None and scales is not None and weight.shape[:1] and scales.shape[:1]:
            bits = next((b for b in BITS if b * k == 32 * weight.shape[0]), bits)
            groups = min(max(scales.shape[0], 1), k)
        return bits, groups

    def _fields(
        self,
        parts: Module,
        bits: int,
        k: int,
        n: int,
        weight: LazyArray,
        scales: LazyArray,
        zeros: LazyArray,
        index: LazyArray | None,
    ) -> Fields:
        scale = finite_scale(parts, "scales", scales)
        zero = unpack_words(zeros.numpy(), bits, n, axis=1)
        if self.version == 1:
            zero = (zero + np.uint8(1)) & np.uint8((1 << bits) - 1)
        group = self._group(parts, scale.shape[0], k) if index is None else index.numpy()
        try:
            if group.size and (group.min() < 0 or group.max() >= scale.shape[0]):
                raise ModelError(f"has groups {group.min()} to {group.max()}; there are {scale.shape[0]}")
            order, scale, zero = by_group(group, scale, zero)
        except ModelError as error:
            raise parts.error("g_idx", str(error)) from None
        assert zero is not None
        if order is None and bits != 3:  # the bytes of a word are the bytes of a plane
            stored = weight.numpy().view(np.uint8).reshape(-1, n, 4).transpose(0, 2, 1).reshape(-1, n)
            codes = signed(stored) if bits == 8 else stored
            return {"codes": codes, "scale": scale, **zero_field(zero, bits)}
        codes = unpack_words(weight.numpy(), bits, k, axis=0)
        if order is not None:
            codes = codes[order]
        return integer_fields(codes, bits, scale, zero, order)

    def _group(self, parts: Module, groups: int, k: int) -> np.ndarray:
        size = self.group_size or k
        if self.varied:
            if k % groups:
                raise parts.error("scales", f"has {groups} groups, which do not divide {k} inputs; g_idx is missing")
            size = k // groups
        return np.arange(k, dtype=np.int32) // size


def group_size(config: Values) -> int:
    """Returns the inputs of a group; 0 where one group takes them all."""
    size = config.get("group_size", 128)
    if size in (-1, None):
        return 0
    return config.integer("group_size", 128, least=8)


def finite_scale(parts: Module, suffix: str, tensor: LazyArray) -> np.ndarray:
    """Returns the scales as they are stored.

    Raises:
        ModelError: one of them is infinite or no number.
    """
    scale = tensor.numpy()
    if not bool(np.isfinite(scale.astype(np.float32)).all()):
        raise parts.error(suffix, "holds a scale that is infinite or no number")
    return scale
