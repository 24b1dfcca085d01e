"""Convolutions over sequences and images, channels last: Flax's module over our products."""

from __future__ import annotations

from typing import Any

from flax import nnx

from trustcore.ops.conv import convolve


class Conv(nnx.Conv):
    """`flax.nnx.Conv`, whose products are `trustcore.ops.conv.convolve`'s: the same numbers, faster on CPUs.

    The length of `kernel_size` tells sequences `[B, T, C]` from images `[B, h, w, C]`; a `feature_group_count` as large
    as the number of channels makes it depthwise.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, conv_general_dilated=convolve, **options)
