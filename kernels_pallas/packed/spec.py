"""A product with packed weights as implementations see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kernels_pallas.packed.layout import Layout


class Call(NamedTuple):
    """A call: arrays or their types. `plain` computes it in XLA, of x and the fields by name."""

    layout: Layout
    x: Any  # [R, K]
    fields: Mapping[str, Any]
    plain: Any = None

    @property
    def blocks(self) -> Any:
        """Blocks along K."""
        return self.fields[self.layout.planes[0].name].shape[0]

    @property
    def columns(self) -> Any:
        """N."""
        return self.fields[self.layout.planes[0].name].shape[-1]

    def __str__(self) -> str:
        shapes = {"x": self.x, **self.fields}
        return (
            f"({self.layout.name}: "
            + ", ".join(f"{n} {x.dtype}[{','.join(map(str, x.shape))}]" for n, x in shapes.items())
            + ")"
        )
