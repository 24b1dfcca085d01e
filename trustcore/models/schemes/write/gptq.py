"""Writes matrices as GPTQ's packages read them; the layout is in `trustcore.models.schemes.gptq`.

One width and one group size serve the whole model. Zero points are stored as version 1 of the layout has them, which
everything reads, unless one is zero: version 1 cannot tell that from 2**bits, and version 2 is written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from trustcore.errors import ModelError
from trustcore.models.schemes.gptq import BITS
from trustcore.models.schemes.write.integers import Integers, half_scale, integers
from trustcore.quant import QuantizedArray
from trustcore.weights.bit_words import pack_words
from trustcore.weights.safetensors_writer import Planned

_I32 = np.dtype(np.int32)


class GPTQWriter:
    """Plans a model's tensors in GPTQ's layout."""

    name = "gptq"
    holds = "int2, int3, int4 and int8 (ternary, q4_0, q8_0), one width and group size for all matrices"

    def __init__(self) -> None:
        self.kind: tuple[int, int] | None = None  # bits, group size
        self.version, self.ordered, self.symmetric = 1, False, True

    def tensors(self, module: str, weight: QuantizedArray) -> dict[str, Planned]:
        """Returns the tensors of a matrix.

        Raises:
            ModelError: the layout cannot hold it.
        """
        matrix = integers(weight)
        if matrix is None or matrix.bits not in BITS:
            raise ModelError(f"is {weight!r}")
        bits, k, n = matrix.bits, matrix.k, matrix.n
        if k * bits % 32 or n * bits % 32:
            raise ModelError(f"is {weight!r}, of which {bits} bits do not fill words of 32 bits along both axes")
        size = -1 if matrix.run == k else matrix.run
        self.kind = one_kind(self.kind, (bits, size), k)
        scale = half_scale(matrix.scale)
        zeros = matrix.zeros()
        self.symmetric = self.symmetric and matrix.zero is None
        self.ordered = self.ordered or matrix.order is not None
        if not zeros.all():
            self.version = 2
        return {
            f"{module}.qweight": Planned((k * bits // 32, n), _I32, lambda: self._codes(matrix)),
            f"{module}.qzeros": Planned((matrix.groups, n * bits // 32), _I32, lambda: self._zeros(matrix)),
            f"{module}.scales": Planned.of(scale),
            f"{module}.g_idx": Planned((k,), _I32, matrix.group_index),
        }

    def config(self, packed: Sequence[str], plain: Sequence[str]) -> dict[str, Any]:
        """Returns the `quantization_config`; `plain` are the matrices that are not packed."""
        bits, size = self.kind or (4, 128)
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": size,
            "desc_act": self.ordered,
            "sym": self.symmetric,
            "lm_head": "lm_head" in packed,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "damp_percent": 0.1,
            "true_sequential": True,
            **({"dynamic": {f"-:^{re.escape(name)}$": {} for name in plain}} if plain else {}),
        }

    def _codes(self, matrix: Integers) -> np.ndarray:
        return pack_words(matrix.logical_codes(), matrix.bits, axis=0)

    def _zeros(self, matrix: Integers) -> np.ndarray:
        zeros = matrix.zeros() - np.uint8(self.version == 1)
        return pack_words(zeros, matrix.bits, axis=1)


def one_kind(known: tuple[int, int] | None, kind: tuple[int, int], k: int) -> tuple[int, int]:
    """Returns (bits, group size) of a model that has one of each.

    Raises:
        ModelError: this matrix differs from those before.
    """
    if known is not None and kind != known:
        raise ModelError(f"has {described(kind)}, matrices before it {described(known)}; the layout has one for all")
    return kind


def described(kind: tuple[int, int]) -> str:
    """Returns (bits, group size) in words."""
    return f"{kind[0]} bits in {'one group' if kind[1] == -1 else f'groups of {kind[1]}'}"
