"""Quantized activations: what a product's other side goes through, in training and after it.

    "int8:token"     each row of x has the scale that its largest magnitude asks for; nothing is trained
    "int8", "lsq"    one scale, a trained step size (arXiv 1902.08153)
    "int8", "pact"   one scale, a trained clipping level alpha = scale * Q_P (Choi et al., PACT, arXiv 1805.06085)

A trained scale starts from what flows through the layer. `observing` is the identity, but the gradient of its second
argument is what was seen: statistics leave jit, scan and vmap as gradients do, and no layer knows of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from trustcore.errors import QuantizationError
from trustcore.quant.training.fake import SMALLEST, elementwise, scaled_gradient
from trustcore.quant.training.scheme import FORMATS, Grid, Scheme

METHODS = ("lsq", "pact")
SEEN = 3  # sum of mean magnitudes, sum of largest magnitudes, uses


def pact(
    x: Float[Array, "*shape"], alpha: Float[Array, ""], *, bits: int, signed: bool = False
) -> Float[Array, "*shape"]:
    """Returns x clipped to [0, alpha] and rounded to `2**bits - 1` equal steps (arXiv 1805.06085, eq. 1 to 3).

    Args:
        x: activations; PACT takes the place of a ReLU.
        alpha: the trained clipping level.
        bits: of a code.
        signed: clip to [-alpha, alpha] in `2**(bits - 1) - 1` steps each way, for activations of both signs. The paper
            has none.

    The gradient of x is that of the clipping; of alpha it is 1 where x >= alpha, -1 where x <= -alpha, else 0.
    """
    high = float(2 ** (bits - 1) - 1 if signed else 2**bits - 1)
    grid = Grid(-high if signed else 0.0, high)
    return _through(x, alpha.astype(jnp.float32) / high, grid, "pact")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """How a weight's inputs are quantized; static.

    Args:
        format: of the codes: int2 to int8, fp8_e4m3 or fp8_e5m2.
        token: whether each row of x has its own scale, found on the way, or all one that is trained.
        method: one of `METHODS`; of no meaning per token.
    """

    format: str
    token: bool = False
    method: str = "lsq"

    @staticmethod
    def parse(text: str, method: str) -> Inputs:
        """Returns what `text` names: a format, and after a colon "tensor" (the default) or "token".

        Raises:
            QuantizationError: the method, the format or the granularity is not known.
        """
        if method not in METHODS:
            raise QuantizationError(f"activation_method is {method!r}; choose from {', '.join(METHODS)}.")
        name, _, grain = text.partition(":")
        if name not in FORMATS or name in ("int1", "ternary") or grain not in ("", "tensor", "token"):
            raise QuantizationError(f"activations {text!r} are not known; write int8, int8:tensor or int8:token.")
        return Inputs(name, grain == "token", method)

    @property
    def trained(self) -> bool:
        """Whether there is a scale to train, a scalar."""
        return not self.token

    @property
    def grid(self) -> Grid:
        """The codes: as many below zero as above, so that one scale reaches equally far both ways."""
        grid = Scheme.parse(self.format).grid
        return dataclasses.replace(grid, low=-grid.high)

    def __call__(self, x: jax.Array, scale: jax.Array | None) -> jax.Array:
        """Returns x `[..., K]` through its codes, in its dtype; straight through for gradients."""
        grid = self.grid
        if scale is None:
            top = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)
            steps = jax.lax.stop_gradient(jnp.where(top > 0, jnp.maximum(top / grid.high, SMALLEST), 1.0))
            return _through(x, steps, grid, "lsq")
        factor = (x.size * grid.high) ** -0.5 if self.method == "lsq" else 1.0
        return _through(x, scaled_gradient(scale.astype(jnp.float32), factor), grid, self.method)

    def start(self, seen: jax.Array) -> jax.Array:
        """Returns the first scale: 2 mean|x| / sqrt(Q_P) for "lsq", the mean of the largest magnitudes for "pact"."""
        mean, top, uses = (seen[i] / jnp.maximum(seen[-1], 1.0) for i in range(SEEN))
        scale = 2.0 * mean / self.grid.high**0.5 if self.method == "lsq" else top / self.grid.high
        return jnp.where(uses > 0, jnp.maximum(scale, SMALLEST), jnp.nan)


@jax.custom_vjp
def observing(x: jax.Array, seen: jax.Array) -> jax.Array:
    """Returns x; the gradient of `seen` `[SEEN]` is what x was like, summed over all uses."""
    return x


def _seen(x: jax.Array, _: jax.Array) -> Any:
    size = jnp.abs(x.astype(jnp.float32))
    return x, jnp.stack([jnp.mean(size), jnp.max(size), jnp.ones(())])


observing.defvjp(_seen, lambda seen, g: (g, seen))


def _through(x: jax.Array, scale: jax.Array, grid: Grid, rule: str) -> jax.Array:
    y: jax.Array = elementwise(grid, rule, True, x.astype(jnp.float32), jnp.broadcast_to(scale, x.shape), None)
    return y.astype(x.dtype)
