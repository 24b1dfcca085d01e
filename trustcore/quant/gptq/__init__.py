"""GPTQ (Frantar et al., arXiv 2210.17323): rounding that corrects, in the rows to come, what it got wrong so far."""

from trustcore.quant.gptq.grids import GRIDS, Grid, ScaledGrid, grid_of
from trustcore.quant.gptq.rows import Rounded, output_error, round_rows, round_to_nearest
from trustcore.quant.gptq.sweep import Layer, gptq

__all__ = [
    "GRIDS",
    "Grid",
    "Layer",
    "Rounded",
    "ScaledGrid",
    "gptq",
    "grid_of",
    "output_error",
    "round_rows",
    "round_to_nearest",
]
