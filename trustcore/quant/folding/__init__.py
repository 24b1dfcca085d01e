"""Methods that fold into neighbours: the function stays, the weights become easier to pack."""

from trustcore.quant.folding.rotation import fold_norms, rotate
from trustcore.quant.folding.structure import Link, Stream

__all__ = ["Link", "Stream", "fold_norms", "rotate"]
