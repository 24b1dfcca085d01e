"""The other direction: a packed matrix as the tensors that another package has it as. One file for each layout.

`WRITERS` has them by the name that `trustcore.save` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from trustcore.models.schemes.write.awq import AWQWriter
from trustcore.models.schemes.write.compressed_tensors import CompressedTensorsWriter
from trustcore.models.schemes.write.gptq import GPTQWriter
from trustcore.models.schemes.write.own import OwnWriter
from trustcore.quant import QuantizedArray
from trustcore.weights.safetensors_writer import Planned

__all__ = ["WRITERS", "Writer"]


class Writer(Protocol):
    """Plans the tensors of one model; `holds` says of which formats, for errors.

    Planning a module again changes nothing.
    """

    name: str
    holds: str

    def tensors(self, module: str, weight: QuantizedArray) -> dict[str, Planned]:
        """Returns the tensors of a matrix, by their whole names.

        Raises:
            ModelError: the layout cannot hold it; says why, without the module's name.
        """
        ...

    def config(self, packed: Sequence[str], plain: Sequence[str]) -> dict[str, Any]:
        """Returns the `quantization_config` of the model whose matrices have been planned."""
        ...


WRITERS: Mapping[str, Callable[[], Writer]] = {
    writer.name: writer for writer in (OwnWriter, GPTQWriter, AWQWriter, CompressedTensorsWriter)
}
