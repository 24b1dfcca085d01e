"""Depthwise separable convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from trustcore.nn.conv import Conv
from trustcore.nn.module import made_module


class SeparableConv(nnx.Module):
    """A convolution of each channel by itself, and a product at each place: `pointwise(depthwise(x))`.

    Costs `window + outputs` products a number where a full convolution costs `window * outputs`. Chollet, arXiv
    1610.02357; Howard et al., arXiv 1704.04861.

    Args:
        inputs, outputs: channels.
        window: of the convolution, one number an axis: one for sequences, two for images.
        stride: of it.
        padding: as `flax.nnx.Conv` takes it.
        bias: whether both parts have one.
        dtype: of the parameters.
        rngs: None leaves them abstract.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        window: Sequence[int],
        *,
        stride: int = 1,
        padding: Any = "SAME",
        bias: bool = True,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        made = {"use_bias": bias, "dtype": dtype, "param_dtype": dtype}
        deep = {"strides": stride, "padding": padding, "feature_group_count": inputs, **made}
        self.depthwise = made_module(lambda r: Conv(inputs, inputs, tuple(window), rngs=r, **deep), rngs)
        one = (1,) * len(window)
        self.pointwise = made_module(lambda r: Conv(inputs, outputs, one, rngs=r, **made), rngs)

    def __call__(self, x: Float[Array, "B *places c"]) -> Float[Array, "B *_ o"]:
        """Returns the convolved channels."""
        return self.pointwise(self.depthwise(x))
