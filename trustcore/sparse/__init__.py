"""Sparse weights: a pytree that stands where a weight stands, and a transform that puts it there."""

from trustcore.sparse.array import SparseArray
from trustcore.sparse.sparsify import densify, sparsify

__all__ = ["SparseArray", "densify", "sparsify"]
