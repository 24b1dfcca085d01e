"""Layers, as flax.nnx modules.

A layer built with `rngs` holds initialized parameters. One built without is abstract: its parameters are shapes
(`jax.ShapeDtypeStruct`) that a loader fills, possibly with packed weights, so that no weight is ever made twice.
"""

from trustcore.nn.attention import Attention
from trustcore.nn.cache import KVCache
from trustcore.nn.dropout import SpatialDropout
from trustcore.nn.embedding import Embedding
from trustcore.nn.encoder_attention import EncoderAttention
from trustcore.nn.feed_forward import FeedForward
from trustcore.nn.layer_norm import LayerNorm
from trustcore.nn.linear import Linear
from trustcore.nn.mamba import Mamba, Mamba2
from trustcore.nn.mlp import GatedMLP
from trustcore.nn.norm import RMSNorm
from trustcore.nn.positions import RelativeBias
from trustcore.nn.recurrent import Recurrent
from trustcore.nn.separable import SeparableConv

__all__ = [
    "Attention",
    "Embedding",
    "EncoderAttention",
    "FeedForward",
    "GatedMLP",
    "KVCache",
    "LayerNorm",
    "Linear",
    "Mamba",
    "Mamba2",
    "RMSNorm",
    "Recurrent",
    "RelativeBias",
    "SeparableConv",
    "SpatialDropout",
]
