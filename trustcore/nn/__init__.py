"""Layers, as flax.nnx modules.

A layer built with `rngs` holds initialized parameters. One built without is abstract: its parameters are shapes
(`jax.ShapeDtypeStruct`) that a loader fills, possibly with packed weights, so that no weight is ever made twice.
"""

from trustcore.nn.attention import Attention
from trustcore.nn.cache import KVCache
from trustcore.nn.embedding import Embedding
from trustcore.nn.linear import Linear
from trustcore.nn.mlp import GatedMLP
from trustcore.nn.norm import RMSNorm

__all__ = ["Attention", "Embedding", "GatedMLP", "KVCache", "Linear", "RMSNorm"]
