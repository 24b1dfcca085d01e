"""Rotary position embedding: pairs of channels turned by an angle that grows with the position.

    pair i at position p:  (a, b) -> (a cos - b sin, a sin + b cos),  angle = p * frequency[i]

Two pairings exist: *half* joins channel i with i + R/2 (Hugging Face's weights), *interleaved* joins 2i with 2i + 1
(the paper, and GGUF files of the Llama family, whose query and key rows are permuted to match). Su et al., arXiv
2104.09864, eq. 34.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.rope import turned
from trustcore.errors import ModelError

Scaling = Literal["none", "linear", "dynamic", "yarn", "llama3", "longrope"]
SCALINGS: tuple[str, ...] = get_args(Scaling)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions turn the channels of a head.

    Attributes:
        size: R, channels of a head that are turned; even. The others pass.
        theta: base of the frequencies `theta ** (-2 i / R)`.
        interleaved: which pairing; see the header of this file.
        scaling: "none"; "linear" (positions divided by `factor`); "dynamic" (NTK: theta grows once a context exceeds
            `original_context`); "yarn" (Peng et al., arXiv 2309.00071); "llama3" (Llama 3.1's three bands);
            "longrope" (Ding et al., arXiv 2402.13753: frequencies divided by `long_divisors` once a context exceeds
            `original_context`, by `divisors` before).
        factor: of the context's extension.
        original_context: T the model was trained with before extension, in tokens.
        low_frequency, high_frequency: "llama3": bands are cut at wavelengths `original_context / value`.
        beta_fast, beta_slow: "yarn": rotations within the original context where the ramp begins and ends.
        truncate: "yarn": whether the ramp begins and ends at whole pairs.
        attention_factor: factor of cosine and sine; None: `0.1 ln(factor) + 1` for "yarn", else 1.
        divisors: further divisors of the R / 2 frequencies, as some GGUF files store them; empty: none.
        long_divisors: "longrope": those of long contexts.
    """

    size: int
    theta: float = 10000.0
    interleaved: bool = False
    scaling: Scaling = "none"
    factor: float = 1.0
    original_context: int | None = None
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.size <= 0 or self.size % 2:
            raise ModelError(f"rope: {self.size} turned channels; there must be a positive, even number.")
        if not (math.isfinite(self.theta) and self.theta > 0):
            raise ModelError(f"rope: theta is {self.theta}; it must be a positive number.")
        if self.scaling not in SCALINGS:
            raise ModelError(f"rope: scaling {self.scaling!r} is not one of {', '.join(SCALINGS)}.")
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ModelError(f"rope: scaling factor is {self.factor}; it must be a positive number.")
        if self.scaling in ("dynamic", "yarn", "llama3", "longrope") and not self.original_context:
            raise ModelError(f"rope: {self.scaling} scaling needs the original context length, in tokens.")
        for divisors in (self.divisors, self.long_divisors):
            if divisors and len(divisors) != self.size // 2:
                raise ModelError(f"rope: {len(divisors)} frequency divisors for {self.size // 2} pairs of channels.")
        if self.scaling == "longrope" and not (self.divisors and self.long_divisors):
            raise ModelError("rope: longrope scaling needs divisors for short and for long contexts.")

    def frequencies(self, context: int | None = None) -> np.ndarray:
        """Returns float64 `[R / 2]`, in radians a token, for a context of that many tokens (None: the original)."""
        pair = np.arange(0, self.size, 2) / self.size
        theta = self.theta
        if self.scaling == "dynamic" and context and self.original_context and context > self.original_context:
            ratio = self.factor * context / self.original_context - (self.factor - 1)
            theta = theta * ratio ** (self.size / (self.size - 2))
        plain = theta**-pair
        divisors = self.divisors
        if self.scaling == "longrope" and context and self.original_context and context > self.original_context:
            divisors = self.long_divisors
        return self._scaled(plain) / (np.asarray(divisors) if divisors else 1.0)

    def _scaled(self, plain: np.ndarray) -> np.ndarray:
        if self.scaling == "linear":
            return plain / self.factor
        if self.scaling == "yarn":
            assert self.original_context is not None
            low, high = (
                self.size * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
                for turns in (self.beta_fast, self.beta_slow)
            )  # eq. 17: pairs that turn `turns` times within the original context
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, self.size - 1)
            ramp = np.clip((np.arange(self.size // 2) - low) / max(high - low, 1e-3), 0, 1)
            return plain / self.factor * ramp + plain * (1 - ramp)
        if self.scaling == "llama3":
            assert self.original_context is not None
            turns = self.original_context * plain / (2 * math.pi)  # within the original context
            width = self.high_frequency - self.low_frequency  # 0 in Llama 4: no pair lies between
            smooth = np.clip((turns - self.low_frequency) / width, 0, 1) if width else turns > self.low_frequency
            return (1 - smooth) * plain / self.factor + smooth * plain
        return plain

    @property
    def magnitude(self) -> float:
        """Factor of cosine and sine."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.scaling == "yarn" and self.factor > 1 else 1.0


def rope(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    config: RopeConfig,
    *,
    context: int | None = None,
) -> Float[Array, "B T N H"]:
    """Returns x with the first `config.size` channels of each head turned by their token's position.

    Args:
        x: queries or keys.
        positions: of the tokens, in tokens from 0.
        config: frequencies and pairing.
        context: tokens the call may see in all, for "dynamic" scaling.

    Angles are float32, products too (float64 for float64); the result has the dtype of x. Differentiable in x.
    """
    return rotate(x, angles(positions, config, context=context), config)


def angles(
    positions: Int[Array, "B T"], config: RopeConfig, *, context: int | None = None
) -> tuple[Float[Array, "B T 1 R2"], Float[Array, "B T 1 R2"]]:
    """Returns cosine and sine for every position and pair, float32: computed once, used by every layer."""
    frequencies = jnp.asarray(config.frequencies(context), jnp.float32)
    turn = positions.astype(jnp.float32)[..., None, None] * jnp.broadcast_to(frequencies, (1, 1, 1, config.size // 2))
    magnitude = jnp.float32(config.magnitude)
    return jnp.cos(turn) * magnitude, jnp.sin(turn) * magnitude


def rotate(
    x: Float[Array, "B T N H"],
    turn: tuple[Float[Array, "B T 1 R2"], Float[Array, "B T 1 R2"]],
    config: RopeConfig,
) -> Float[Array, "B T N H"]:
    """Returns x turned by the cosines and sines of `angles`."""
    return turned(x, *turn, interleaved=config.interleaved)
