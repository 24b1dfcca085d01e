"""Writes matrices as AutoAWQ has them, in GEMM order; the layout is in `trustcore.models.schemes.awq`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trustcore.errors import ModelError
from trustcore.models.schemes.awq import BITS, ORDER
from trustcore.models.schemes.write.gptq import one_kind
from trustcore.models.schemes.write.integers import half_scale, integers
from trustcore.quant import QuantizedArray
from trustcore.weights.bit_words import pack_words
from trustcore.weights.safetensors_writer import Planned

_I32 = np.dtype(np.int32)


class AWQWriter:
    """Plans a model's tensors in AWQ's layout."""

    name = "awq"
    holds = "int4 (q4_0) without an order of rows, one group size for all matrices"

    def __init__(self) -> None:
        self.kind: tuple[int, int] | None = None

    def tensors(self, module: str, weight: QuantizedArray) -> dict[str, Planned]:
        """Returns the tensors of a matrix.

        Raises:
            ModelError: the layout cannot hold it.
        """
        matrix = integers(weight)
        if matrix is None or matrix.bits != BITS:
            raise ModelError(f"is {weight!r}")
        if matrix.order is not None:
            raise ModelError("has rows in an order of their own")
        if matrix.n % 8:
            raise ModelError(f"has {matrix.n} outputs, which are no multiple of 8")
        size = -1 if matrix.run == matrix.k else matrix.run
        self.kind = one_kind(self.kind, (BITS, size), matrix.k)
        words = matrix.n // 8
        return {
            f"{module}.qweight": Planned((matrix.k, words), _I32, lambda: _gemm(matrix.codes())),
            f"{module}.qzeros": Planned((matrix.groups, words), _I32, lambda: _gemm(matrix.zeros())),
            f"{module}.scales": Planned.of(half_scale(matrix.scale)),
        }

    def config(self, packed: Sequence[str], plain: Sequence[str]) -> dict[str, Any]:
        """Returns the `quantization_config`; `plain` are the matrices that are not packed."""
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": (self.kind or (BITS, 128))[1],
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(plain) or None,
        }


def _gemm(codes: np.ndarray) -> np.ndarray:
    """Words `[rows, N / 8]` of codes `[rows, N]`."""
    ordered = codes.reshape(len(codes), -1, 8)[..., ORDER]
    return pack_words(ordered.reshape(len(codes), -1), BITS, axis=1)
