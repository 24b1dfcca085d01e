"""Initializers of kernels by the names under which papers and other libraries have them.

    variance of a kernel [..., K, N]                  uniform / normal
    lecun           gain^2 / K                        LeCun et al., Efficient BackProp, 1998
    xavier, glorot  gain^2 / ((K + N) / 2)            Glorot and Bengio, AISTATS 2010, eq. 12 and 16
    kaiming, he     gain^2 * 2 / K                    He et al., arXiv 1502.01852, eq. 10 (2 is ReLU's)
    truncated_normal    std^2, cut at two standard deviations of the uncut one, then widened to std
    orthogonal      columns or rows, whichever are fewer, are orthonormal times gain    Saxe et al., arXiv 1312.6120

`jax.nn.initializers` does the arithmetic. Normal ones are not cut; jax's own `he_normal` and its like are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trustcore.errors import ModelError

Initializer = Callable[..., jax.Array]

_init = jax.nn.initializers


def _scaled(factor: float, fan: str, distribution: str) -> Callable[..., Initializer]:
    def make(*, gain: float = 1.0, batch_axis: tuple[int, ...] = ()) -> Initializer:
        return _init.variance_scaling(factor * gain**2, fan, distribution, batch_axis=batch_axis)  # pyright: ignore

    return make


def _truncated_normal(*, std: float = 0.02) -> Initializer:
    return _init.truncated_normal(std / 0.87962566103423978)  # standard deviation of N(0, 1) cut at +-2


def _orthogonal(*, gain: float = 1.0) -> Initializer:
    exact = _init.orthogonal(gain)

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, **options: Any) -> jax.Array:
        wide = dtype if jnp.dtype(dtype).itemsize > 2 else jnp.float32  # there is no QR decomposition in 16 bits
        return exact(key, shape, wide, **options).astype(dtype)

    return init


def _normal(*, std: float = 0.02) -> Initializer:
    return _init.normal(std)


INITIALIZERS: Mapping[str, Callable[..., Initializer]] = {
    "lecun_uniform": _scaled(1.0, "fan_in", "uniform"),
    "lecun_normal": _scaled(1.0, "fan_in", "normal"),
    "xavier_uniform": _scaled(1.0, "fan_avg", "uniform"),
    "xavier_normal": _scaled(1.0, "fan_avg", "normal"),
    "glorot_uniform": _scaled(1.0, "fan_avg", "uniform"),
    "glorot_normal": _scaled(1.0, "fan_avg", "normal"),
    "kaiming_uniform": _scaled(2.0, "fan_in", "uniform"),
    "kaiming_normal": _scaled(2.0, "fan_in", "normal"),
    "he_uniform": _scaled(2.0, "fan_in", "uniform"),
    "he_normal": _scaled(2.0, "fan_in", "normal"),
    "normal": _normal,
    "truncated_normal": _truncated_normal,
    "orthogonal": _orthogonal,
}


def initializer(name: str, **options: Any) -> Initializer:
    """Returns the initializer of that name: a function of (key, shape, dtype).

    Args:
        name: in `INITIALIZERS`.
        options: `gain` (a factor of the numbers) where the variance follows from the shape, and of "orthogonal"; there
            also `batch_axis`, axes that count to neither side, except for "orthogonal"; `std` for "normal" and
            "truncated_normal" (0.02).

    Raises:
        ModelError: the name or an option is not known.

    >>> initializer("kaiming_normal", gain=0.5)(jax.random.key(0), (256, 64), "float32").shape
    (256, 64)
    """
    if name not in INITIALIZERS:
        raise ModelError(f"initializer is {name!r}; choose from {', '.join(INITIALIZERS)}, or pass a function.")
    try:
        return INITIALIZERS[name](**options)
    except TypeError as fault:
        raise ModelError(f"initializer {name!r} has no such option: {fault}.") from fault
