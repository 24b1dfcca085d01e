"""AWQ's files (AutoAWQ): 4-bit integers with zero points, in the order of one of two kernels.

    GEMM   qweight i32 [K, N / 8]    qzeros i32 [G, N / 8]    scales f16 [G, N]
           the nibbles of a word, lowest first, are outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight
    GEMV   qweight i32 [N, K / 8]    qzeros i32 [N, W]        scales f16 [N, 8 W]
           nibbles in order; W words hold the zero points of K / group_size groups and are filled up with zeros

    w[k, n] = scales[k // group_size, n] * (code[k, n] - zero[k // group_size, n])

Lin et al., arXiv 2306.00978. GEMV's W is `ceil(groups / 8)`, rounded up to a multiple of 2 for groups of 64 and of 4
for groups of 32.
"""

from __future__ import annotations

import numpy as np

from trustcore.errors import ModelError
from trustcore.models.schemes.fields import integer_fields
from trustcore.models.schemes.gptq import finite_scale, group_size
from trustcore.models.schemes.scheme import FLOATS, Fields, Module, Packed, Tensors, choose
from trustcore.models.values import Values
from trustcore.weights import LazyArray
from trustcore.weights.bit_words import unpack_words

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each nibble of a word holds
_PLACE = np.argsort(ORDER)  # the nibble in which each output lies
BITS = 4


class AWQ:
    """Reads matrices that AutoAWQ wrote."""

    name = "AWQ"

    def __init__(self, config: Values):
        """Takes the `quantization_config`.

        Raises:
            ModelError: it describes a layout that is not read.
        """
        where = "quantization_config: "
        choose(f"{where}bits", config.get("bits", config.get("w_bit", BITS)), (BITS,))
        choose(f"{where}zero_point", config.get("zero_point", True), (True,))
        given = config.get("version") or config.get("format") or "gemm"
        self.version = choose(f"{where}version", str(given).lower(), ("gemm", "gemv"))
        self.group_size = group_size(config)

    def find(self, tensors: Tensors, module: str, k: int, n: int) -> Packed | None:
        """See `Scheme.find`."""
        parts = Module(tensors, module, self.name)
        if "qweight" not in parts and "weight" in parts:
            return None
        size = self.group_size or k
        if k % size or k % 8 or n % 8:
            raise parts.error(
                "qweight", f"cannot be: groups of {size} must divide {k} inputs, and 8 both {k} inputs and {n} outputs"
            )
        groups = k // size
        if self.version == "gemm":
            weight = parts.need("qweight", ("i32",), (k, n // 8))
            zeros = parts.need("qzeros", ("i32",), (groups, n // 8), why=f"groups of {size}")
            scales = parts.need("scales", FLOATS, (groups, n), why=f"groups of {size}")
        else:
            words = _gemv_words(groups, size)
            weight = parts.need("qweight", ("i32",), (n, k // 8))
            zeros = parts.need("qzeros", ("i32",), (n, words), why=f"groups of {size}")
            scales = parts.need("scales", FLOATS, (n, 8 * words), why=f"groups of {size}")
        return Packed("int4", tuple(parts.used), lambda: self._fields(parts, k, n, groups, weight, zeros, scales))

    def _fields(
        self, parts: Module, k: int, n: int, groups: int, weight: LazyArray, zeros: LazyArray, scales: LazyArray
    ) -> Fields:
        scale = finite_scale(parts, "scales", scales)
        try:
            if self.version == "gemm":
                return integer_fields(_gemm(weight.numpy(), n), BITS, scale, _gemm(zeros.numpy(), n))
            codes = unpack_words(weight.numpy(), BITS, k, axis=1).T
            zero = unpack_words(zeros.numpy(), BITS, groups, axis=1).T
            return integer_fields(codes, BITS, scale[:, :groups].T, zero)
        except ModelError as error:
            raise parts.error("qweight", str(error)) from None


def _gemm(words: np.ndarray, n: int) -> np.ndarray:
    """Codes `[rows, N]` of words `[rows, N / 8]` in GEMM order."""
    codes = unpack_words(words, BITS, n, axis=1)
    return codes.reshape(-1, n // 8, 8)[..., _PLACE].reshape(-1, n)


def _gemv_words(groups: int, size: int) -> int:
    """W of the header."""
    step = {64: 2, 32: 4}.get(size, 1)
    words = -(-groups // 8)
    return -(-words // step) * step
