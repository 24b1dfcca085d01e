"""Linear layer whose kernel may be a float array or packed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from trustcore.nn.initializers import initializer as named_initializer
from trustcore.nn.parameter import parameter
from trustcore.ops.linear import linear, linear_many


class Linear(nnx.Module):
    """`y = x @ kernel + bias`.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        dtype: of the parameters.
        initializer: of the kernel, `[K, N]`: a name in `trustcore.nn.initializers`, such as "kaiming_normal", or a
            function of (key, shape, dtype); LeCun's normal, cut, by default. The bias starts at zero.
        rngs: None leaves the parameters abstract.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: Any = jnp.float32,
        initializer: Any = None,
        rngs: nnx.Rngs | None = None,
    ):
        if isinstance(initializer, str):
            initializer = named_initializer(initializer)
        initializer = initializer or jax.nn.initializers.lecun_normal()
        self.kernel = parameter(initializer, (in_features, out_features), dtype, rngs)
        self.bias = parameter(jax.nn.initializers.zeros, (out_features,), dtype, rngs) if bias else None

    def __call__(self, x: Float[Array, "*rows K"]) -> Float[Array, "*rows N"]:
        """Returns the product, in the dtype of x."""
        return linear(x, self.kernel.get_value(), _value(self.bias))


def project(x: Float[Array, "*rows K"], *layers: Linear) -> tuple[Float[Array, "*rows _"], ...]:
    """Returns `layer(x)` for each layer, in one call where their weights allow it."""
    return linear_many(x, [layer.kernel.get_value() for layer in layers], [_value(layer.bias) for layer in layers])


def _value(bias: nnx.Param[Any] | None) -> jax.Array | None:
    return None if bias is None else bias.get_value()
