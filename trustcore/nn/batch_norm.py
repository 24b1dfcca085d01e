"""Normalization over groups of channels and over the batch: Flax's layers under our names, channels last.

    y = weight * (x - mean) / sqrt(var + eps) + bias

                     mean and var are over
    GroupNorm        the places and the channels of a group, each example by itself
    BatchNorm        the batch and the places, each channel by itself; in `eval()` what was seen in training
    SyncBatchNorm    the same, of all devices of a named axis together

Var is the mean of squared differences (not `E[x^2] - E[x]^2`, which loses digits of channels far from zero).
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from trustcore.dtypes import accumulation_dtype
from trustcore.errors import ModelError
from trustcore.nn.module import flax_options


class GroupNorm(nnx.GroupNorm):
    """Normalizes each of `groups` groups of channels of each example. Wu and He, arXiv 1803.08494, eq. 1 and 7.

    One group is layer norm over places and channels; as many as there are channels is instance norm.

    Args:
        features: D.
        groups: a divisor of D.
        scale, bias: whether there are such parameters, one a channel.
        eps: keeps a constant group finite.
        dtype: of parameters and output.
        rngs: None leaves the parameters abstract.

    Raises:
        ModelError: the groups do not divide the channels.
    """

    def __init__(
        self,
        features: int,
        groups: int = 32,
        *,
        scale: bool = True,
        bias: bool = True,
        eps: float = 1e-5,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        if groups < 1 or features % groups:
            raise ModelError(f"GroupNorm: {features} channels do not fall into {groups} groups.")
        super().__init__(
            features,
            groups,
            epsilon=eps,
            use_scale=scale,
            use_bias=bias,
            use_fast_variance=False,
            dtype=dtype,
            param_dtype=dtype,
            **flax_options(rngs, scale=None, bias=None),
        )

    def __call__(self, x: Float[Array, "B *places D"], **options: Any) -> Float[Array, "B *places D"]:
        """Returns the normalized channels; options as `flax.nnx.GroupNorm` takes them."""
        with jax.numpy_dtype_promotion("standard"):  # Flax widens statistics by promotion
            return super().__call__(x, **options)


class BatchNorm(nnx.BatchNorm):
    """Normalizes each channel over the batch. Ioffe and Szegedy, arXiv 1502.03167, algorithm 1 and 2.

    In `train()` (as it is made) mean and var are those of the batch, and the running ones take
    `momentum * running + (1 - momentum) * batch`; in `eval()` they are the running ones. The running var is of the same
    mean of squares; PyTorch's is larger by `n / (n - 1)`. A call in training changes the layer: use `nnx.jit`, or
    `nnx.split` and `nnx.merge`, so that the change is not lost.

    Args:
        features: D.
        momentum: see above; 0.9 is PyTorch's 0.1.
        scale, bias: whether there are such parameters.
        eps: keeps a constant channel finite.
        axis_name: devices along this axis share their statistics; None: each has its own.
        dtype: of parameters and output; running statistics are float32 (float64 for float64).
        rngs: None leaves parameters and statistics abstract.
    """

    def __init__(
        self,
        features: int,
        *,
        momentum: float = 0.9,
        scale: bool = True,
        bias: bool = True,
        eps: float = 1e-5,
        axis_name: str | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(
            features,
            momentum=momentum,
            epsilon=eps,
            use_scale=scale,
            use_bias=bias,
            use_fast_variance=False,
            axis_name=axis_name,
            dtype=dtype,
            param_dtype=dtype,
            **flax_options(rngs, scale=None, bias=None),
        )
        wide = accumulation_dtype(dtype)
        for statistic in (self.mean, self.var):
            shape = jax.ShapeDtypeStruct((features,), wide)
            statistic.set_value(cast("Any", shape) if rngs is None else statistic.get_value().astype(wide))

    def __call__(self, x: Float[Array, "B *places D"], **options: Any) -> Float[Array, "B *places D"]:
        """Returns the normalized channels; options as `flax.nnx.BatchNorm` takes them."""
        with jax.numpy_dtype_promotion("standard"):  # Flax widens statistics by promotion
            return super().__call__(x, **options)


class SyncBatchNorm(BatchNorm):
    """`BatchNorm` whose statistics are of all devices along a named axis, for batches that are split over them.

    Args:
        features: D.
        axis_name: of a `shard_map`, `pmap` or `vmap` that the call runs in.
        options: of `BatchNorm`.

    Under plain jit with a sharded batch, `BatchNorm` by itself is synchronized: its means are over the whole array.
    """

    def __init__(self, features: int, axis_name: str, **options: Any):
        super().__init__(features, axis_name=axis_name, **options)
