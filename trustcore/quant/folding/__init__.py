"""Methods that fold into neighbours: the function stays, the weights become easier to pack."""

from trustcore.quant.folding.awq import awq
from trustcore.quant.folding.rotation import fold_norms, rotate
from trustcore.quant.folding.smoothquant import Migration, MigrationReport, migration, smoothquant
from trustcore.quant.folding.structure import Link, Stream

__all__ = [
    "Link",
    "Migration",
    "MigrationReport",
    "Stream",
    "awq",
    "fold_norms",
    "migration",
    "rotate",
    "smoothquant",
]
