"""The one door for a product with a weight.

    y[..., n] = sum_k x[..., k] * w[k, n] + bias[n]

`w` is a float array or any `Weight` (packed, sparse); which program computes the product is chosen while tracing, by
platform, rows and form. Products accumulate in float32; the result has the dtype of x.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from trustcore.dtypes import accumulation_dtype
from trustcore.errors import ImplementationError
from trustcore.ops.weight import Weight


def linear(
    x: Float[Array, "*rows K"],
    w: Float[Array, "K N"] | Weight,
    bias: Float[Array, " N"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "*rows N"]:
    """Returns `x @ w + bias`.

    Args:
        x: activations.
        w: weight matrix, contraction axis first.
        bias: added in the dtype of x.
        implementation: None chooses; a name pins one and never falls back (packed weights: see
            `trustcore.quant.matmul`; float weights know only "dot").

    Raises:
        ImplementationError: the named implementation cannot compute this product.

    Differentiable in x, bias and float leaves of w. O(rows * K * N) time.
    """
    return linear_many(x, (w,), (bias,), implementation=implementation)[0]


def linear_many(
    x: Float[Array, "*rows K"],
    weights: Sequence[Float[Array, "K _"] | Weight],
    biases: Sequence[Float[Array, " _"] | None] | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "*rows _"], ...]:
    """Returns `x @ w + bias` for several weights that share one x (queries, keys and values; gate and up).

    Weights of one packed class go through one call, which reads x once and joins its threads once.
    """
    biases = biases or (None,) * len(weights)
    results: dict[int, jax.Array] = {}
    kinds = {type(w) for w in weights if isinstance(w, Weight)}
    for kind in kinds:
        places = [i for i, w in enumerate(weights) if type(w) is kind]
        chosen = [w for w in weights if isinstance(w, kind)]
        results.update(zip(places, kind.products(x, chosen, implementation=implementation), strict=True))
    for i, w in enumerate(weights):
        if not isinstance(w, Weight):
            results[i] = _dot(x, w, implementation)
    return tuple(results[i] if bias is None else _add(results[i], bias) for i, bias in enumerate(biases))


def _add(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


def _dot(x: jax.Array, w: jax.Array, implementation: str | None) -> jax.Array:
    if implementation not in (None, "dot"):
        raise ImplementationError(
            f"linear: implementation {implementation!r} was asked for, but the weight is a {w.dtype} array; "
            'pass implementation="dot" or None.'
        )
    accumulate = accumulation_dtype(x.dtype)
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, w.astype(x.dtype), dims, preferred_element_type=accumulate).astype(x.dtype)
