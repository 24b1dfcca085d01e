"""Convolutions of sequences and images, full, grouped and depthwise, channels last: Flax's module over our products.

    y[t, o] = bias[o] + sum over w, i of x[stride * t + dilation * w, i] * kernel[w, i, o]

With groups, outputs of a group see the inputs of that group alone: `kernel` is `[*window, inputs / groups, outputs]`.
`SeparableConv` is a depthwise convolution and a product at each place. `Conv` takes Flax's arguments, the others ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from trustcore.errors import ModelError
from trustcore.nn.initializers import initializer as named_initializer
from trustcore.nn.module import flax_options
from trustcore.ops.conv import convolve


class Conv(nnx.Conv):
    """`flax.nnx.Conv`, whose products are `trustcore.ops.conv.convolve`'s: the same numbers, faster on CPUs.

    The length of `kernel_size` tells sequences `[B, T, C]` from images `[B, h, w, C]`; a `feature_group_count` as large
    as the number of channels makes it depthwise.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, conv_general_dilated=convolve, **options)


class _Conv(Conv):
    """What the convolutions share; `window` has a number for each axis of places."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        window: tuple[int, ...],
        *,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        padding: Any = "SAME",
        bias: bool = True,
        initializer: Any = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        if groups < 1 or inputs % groups or outputs % groups:
            raise ModelError(f"convolution: {inputs} inputs and {outputs} outputs do not fall into {groups} groups.")
        if isinstance(initializer, str):
            initializer = named_initializer(initializer)
        super().__init__(
            inputs,
            outputs,
            window,
            strides=stride,
            padding=padding,
            kernel_dilation=dilation,
            feature_group_count=groups,
            use_bias=bias,
            dtype=dtype,
            param_dtype=dtype,
            **flax_options(rngs, kernel=initializer, bias=None),
        )


class Conv1d(_Conv):
    """A convolution along a sequence.

    Args:
        inputs, outputs: channels.
        window: places of the kernel.
        options: `stride`, `dilation`; `groups`, into which channels fall; `padding`, as `flax.nnx.Conv` takes it
            ("SAME", "VALID", "CAUSAL", a number); `bias`, whether there is one; `initializer` of the kernel, a name in
            `trustcore.nn.initializers` or a function; `dtype` of the parameters; `rngs`, None leaves them abstract.

    Raises:
        ModelError: the groups do not divide the channels.
    """

    def __init__(self, inputs: int, outputs: int, window: int, **options: Any):
        super().__init__(inputs, outputs, (window,), **options)

    def __call__(self, x: Float[Array, "B T c"], **options: Any) -> Float[Array, "B _ o"]:
        """Returns the convolved channels."""
        return super().__call__(x, **options)


class Conv2d(_Conv):
    """A convolution over an image; `window` one number for both axes, or two. Options as for `Conv1d`."""

    def __init__(self, inputs: int, outputs: int, window: int | tuple[int, int], **options: Any):
        super().__init__(inputs, outputs, (window, window) if isinstance(window, int) else tuple(window), **options)

    def __call__(self, x: Float[Array, "B h w c"], **options: Any) -> Float[Array, "B _ _ o"]:
        """Returns the convolved channels."""
        return super().__call__(x, **options)


class DepthwiseConv(_Conv):
    """A convolution of each channel by itself, into `multiplier` channels each. Howard et al., arXiv 1704.04861.

    Args:
        features: channels.
        window: of the kernel, one number an axis.
        multiplier: outputs of a channel; they follow each other.
        options: as for `Conv1d`, without `groups`.
    """

    def __init__(self, features: int, window: Sequence[int], *, multiplier: int = 1, **options: Any):
        super().__init__(features, features * multiplier, tuple(window), groups=features, **options)

    def __call__(self, x: Float[Array, "B *places c"], **options: Any) -> Float[Array, "B *_ o"]:
        """Returns the convolved channels."""
        return super().__call__(x, **options)
