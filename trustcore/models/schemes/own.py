"""trustcore's own layout, as a scheme: the packed weights that a file's header describes, under their names."""

from __future__ import annotations

from collections.abc import Mapping

from trustcore.errors import CheckpointError, ModelError
from trustcore.models.schemes.scheme import Fields, Packed, Tensors
from trustcore.weights.packed_layout import PackedTensor


class Own:
    """Reads matrices that `trustcore.save` wrote in its own layout."""

    name = "trustcore"

    def __init__(self, packed: Mapping[str, PackedTensor]):
        """Takes what `packed_tensors` found."""
        self.packed = packed

    def find(self, tensors: Tensors, module: str, k: int, n: int) -> Packed | None:
        """See `Scheme.find`; a matrix without leading axes."""
        return self.find_stack(tensors, module, (), k, n)

    def find_stack(self, tensors: Tensors, module: str, lead: tuple[int, ...], k: int, n: int) -> Packed | None:
        """Returns what a stack `[*lead, K, N]` of matrices, such as one for each expert, is made of; None: plain."""
        found = self.packed.get(f"{module}.weight")
        if found is None:
            return None
        *stack, rows, columns = found.shape
        if found.transposed:
            rows, columns = columns, rows
        if tuple(stack) != lead or (rows, columns) != (k, n):
            of = f" in a stack {list(lead)}" if lead else ""
            raise ModelError(
                f"{module}.weight is {list(found.shape)}{' transposed' if found.transposed else ''}; expected {k} "
                f"inputs and {n} outputs{of}"
            )

        def fields() -> Fields:
            try:
                return found.numpy()
            except CheckpointError as error:
                raise ModelError(str(error)) from None

        extra = tensors.get(f"{module}.input_scale")
        return Packed(found.format, tuple(found.fields.values()), fields, () if extra is None else (extra,))
