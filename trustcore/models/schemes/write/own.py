"""Writes matrices in trustcore's own layout: every format, field by field; see `trustcore.weights.packed_layout`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trustcore.quant import QuantizedArray
from trustcore.weights.packed_layout import describe, field_tensors
from trustcore.weights.safetensors_writer import Planned


class OwnWriter:
    """Plans a model's tensors in the layout that `trustcore.load` opens, whatever their format."""

    name = "trustcore"
    holds = "every format"

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}

    def tensors(self, module: str, weight: QuantizedArray) -> dict[str, Planned]:
        """Returns the tensors of a matrix, or of a table."""
        name = f"{module}.weight"
        self.entries[name] = describe(weight)
        return field_tensors(name, weight)

    def config(self, packed: Sequence[str], plain: Sequence[str]) -> dict[str, Any]:
        """Returns the `quantization_config`, by which other programs know that they cannot read the weights."""
        return {"quant_method": "trustcore"}
