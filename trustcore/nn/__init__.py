"""Layers, as flax.nnx modules.

A layer built with `rngs` holds initialized parameters. One built without is abstract: its parameters are shapes
(`jax.ShapeDtypeStruct`) that a loader fills, possibly with packed weights, so that no weight is ever made twice.
"""

from trustcore.nn.adapters import (
    AdaptedWeight,
    Adapter,
    adapter_filter,
    adapters_of,
    add_adapters,
    combine_adapters,
    merge_adapters,
    with_adapters,
    without_adapters,
)
from trustcore.nn.attention import Attention
from trustcore.nn.batch_norm import BatchNorm, GroupNorm, SyncBatchNorm
from trustcore.nn.cache import KVCache
from trustcore.nn.conv import Conv1d, Conv2d, DepthwiseConv
from trustcore.nn.dropout import Dropout, SpatialDropout
from trustcore.nn.embedding import Embedding
from trustcore.nn.encoder_attention import EncoderAttention
from trustcore.nn.expert_parallel import expert_parallel
from trustcore.nn.experts import Experts, ExpertsConfig
from trustcore.nn.initializers import initializer
from trustcore.nn.latent import LatentAttention, LatentConfig
from trustcore.nn.linear import Linear
from trustcore.nn.mamba import Mamba, Mamba2
from trustcore.nn.mlp import MLP
from trustcore.nn.norm import LayerNorm, RMSNorm
from trustcore.nn.positions import RelativeBias
from trustcore.nn.recurrent import Recurrent
from trustcore.nn.row_gradients import RowGradients, row_value_and_grad, update_rows
from trustcore.nn.separable import SeparableConv
from trustcore.nn.shelved import ShelvedStack
from trustcore.nn.stack import Stack, run_blocks

__all__ = [
    "MLP",
    "AdaptedWeight",
    "Adapter",
    "Attention",
    "BatchNorm",
    "Conv1d",
    "Conv2d",
    "DepthwiseConv",
    "Dropout",
    "Embedding",
    "EncoderAttention",
    "Experts",
    "ExpertsConfig",
    "GroupNorm",
    "KVCache",
    "LatentAttention",
    "LatentConfig",
    "LayerNorm",
    "Linear",
    "Mamba",
    "Mamba2",
    "RMSNorm",
    "Recurrent",
    "RelativeBias",
    "RowGradients",
    "SeparableConv",
    "ShelvedStack",
    "SpatialDropout",
    "Stack",
    "SyncBatchNorm",
    "adapter_filter",
    "adapters_of",
    "add_adapters",
    "combine_adapters",
    "expert_parallel",
    "initializer",
    "merge_adapters",
    "row_value_and_grad",
    "run_blocks",
    "update_rows",
    "with_adapters",
    "without_adapters",
]
