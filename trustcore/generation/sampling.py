"""From logits to the next token, on the device and without sorting the vocabulary.

    logits --penalties--> --temperature--> --top-k--> --top-p--> --min-p--> one uniform number picks a token

Each filter is a threshold on the probabilities: top-k's and top-p's are found by bisection over the bit patterns of
float32, which are ordered as their values are, so they are exact; min-p's is a share of the largest. The draw inverts
the cumulative distribution in two levels: its cost is two passes over the vocabulary and one random number a row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from trustcore.errors import GenerationError

_BISECTIONS = 30  # halvings of the bit patterns from 0.0 to 1.0, 0 to 0x3f800000: down to a single one
_BLOCK = 256  # tokens summed at the first level of the cumulative distribution


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token, and nothing below but the penalties counts.
        top_k: only the k likeliest; None or 0: all.
        top_p: only the likeliest whose probabilities sum to p; None or 1: all. Holtzman et al., arXiv 1904.09751.
        min_p: only those at least this share as likely as the likeliest; None or 0: all. arXiv 2407.01082.
        repetition_penalty: divides positive and multiplies negative logits of every token in the prompt or the answer;
            1 changes nothing. Keskar et al., arXiv 1909.05858.
        frequency_penalty: subtracted from a token's logit for each time the answer has it.
        presence_penalty: subtracted once if the answer has it.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, lambda x: x >= 0, "0 (greedy) or more")
        _check("top_p", 1.0 if self.top_p is None else self.top_p, lambda x: 0 < x <= 1, "above 0 and at most 1")
        _check("min_p", 0.0 if self.min_p is None else self.min_p, lambda x: 0 <= x <= 1, "from 0 to 1")
        _check("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "above 0 (1: none)")
        _check("frequency_penalty", self.frequency_penalty, lambda x: True, "a number")
        _check("presence_penalty", self.presence_penalty, lambda x: True, "a number")
        if self.top_k is not None and (isinstance(self.top_k, bool) or int(self.top_k) != self.top_k or self.top_k < 0):
            raise GenerationError(f"top_k is {self.top_k!r}; it must be a whole number, 0 or None for all tokens.")

    @property
    def plan(self) -> Plan:
        """What a compiled program depends on."""
        greedy = self.temperature == 0
        return Plan(
            greedy=greedy,
            top_k=not greedy and bool(self.top_k),
            top_p=not greedy and self.top_p is not None and self.top_p < 1,
            min_p=not greedy and bool(self.min_p),
            repetition=self.repetition_penalty != 1,
            counting=self.frequency_penalty != 0 or self.presence_penalty != 0,
        )

    @property
    def values(self) -> Values:
        """What a compiled program takes as numbers."""
        return Values(
            *(
                jnp.float32(x)
                for x in (
                    self.temperature,
                    self.top_k or 0,
                    1.0 if self.top_p is None else self.top_p,
                    self.min_p or 0.0,
                    self.repetition_penalty,
                    self.frequency_penalty,
                    self.presence_penalty,
                )
            )
        )


class Plan(NamedTuple):
    """The static part of a `Sampling`: which steps a program has."""

    greedy: bool
    top_k: bool
    top_p: bool
    min_p: bool
    repetition: bool
    counting: bool


class Values(NamedTuple):
    """The dynamic part of a `Sampling`: float32 scalars."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition: jax.Array
    frequency: jax.Array
    presence: jax.Array


class History(NamedTuple):
    """What the penalties remember, for the vocabulary; None where no penalty asks.

    Attributes:
        seen: bool `[B, V]`, tokens of the prompt and the answer.
        counts: int32 `[B, V]`, how often the answer has each token.
    """

    seen: jax.Array | None
    counts: jax.Array | None

    @staticmethod
    def start(plan: Plan, batch: int, vocabulary: int) -> History:
        """Returns an empty history with the parts that `plan` needs."""
        return History(
            jnp.zeros((batch, vocabulary), bool) if plan.repetition else None,
            jnp.zeros((batch, vocabulary), jnp.int32) if plan.counting else None,
        )

    def prompt(self, tokens: jax.Array, valid: jax.Array) -> History:
        """Returns the history after prompt tokens `[B, T]`, of which `valid` count."""
        if self.seen is None:
            return self
        rows = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 0)
        return self._replace(seen=self.seen.at[rows, tokens].max(valid, mode="drop"))

    def answer(self, tokens: jax.Array) -> History:
        """Returns the history after one token of each row's answer, `[B]`; -1 stands for none."""
        rows = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 0)
        places = jnp.where(tokens < 0, jnp.iinfo(jnp.int32).max, tokens)  # dropped: negative indices would wrap
        seen, counts = self
        return History(
            None if seen is None else seen.at[rows, places].set(True, mode="drop"),
            None if counts is None else counts.at[rows, places].add(1, mode="drop"),
        )


def sample(
    logits: Float[Array, "B V"], plan: Plan, values: Values, history: History, uniform: Float[Array, " B"]
) -> Int[Array, " B"]:
    """Returns one token a row, int32.

    Args:
        logits: float32.
        plan: which steps there are (static).
        values: their numbers.
        history: what the penalties remember.
        uniform: random numbers in [0, 1), one a row; not used when greedy.
    """
    logits = penalize(logits, plan, values, history)
    if plan.greedy:
        return likeliest(logits)
    return draw(filtered(logits, plan, values), uniform)


def likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Returns the first index of each row's largest logit, int32.

    By a maximum and a minimum: XLA's CPU compiler vectorizes both but not argmax (24 against 230 microseconds for 49152
    logits on two Zen 5 cores, jax 0.10.2).
    """
    places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    top = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits == top, places, logits.shape[1] - 1), axis=-1)


def penalize(logits: Float[Array, "B V"], plan: Plan, values: Values, history: History) -> Float[Array, "B V"]:
    """Returns the logits after the penalties."""
    if plan.repetition:
        assert history.seen is not None
        harder = jnp.where(logits > 0, logits / values.repetition, logits * values.repetition)
        logits = jnp.where(history.seen, harder, logits)
    if plan.counting:
        assert history.counts is not None
        counts = history.counts.astype(jnp.float32)
        logits = logits - values.frequency * counts - values.presence * (counts > 0).astype(jnp.float32)
    return logits


def filtered(logits: Float[Array, "B V"], plan: Plan, values: Values) -> Float[Array, "B V"]:
    """Returns unnormalized probabilities, 0 where a filter cut; the likeliest token has 1 and always stays."""
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / values.temperature
    weights = jnp.exp(scaled)
    if plan.top_k:
        enough = lambda kept: jnp.sum(kept > 0, axis=-1, keepdims=True).astype(jnp.float32) >= values.top_k  # noqa: E731
        weights = _largest(weights, enough)
    if plan.top_p:
        wanted = values.top_p * jnp.sum(weights, axis=-1, keepdims=True)
        weights = _largest(weights, lambda kept: jnp.sum(kept, axis=-1, keepdims=True) >= wanted)
    if plan.min_p:
        weights = jnp.where(weights >= values.min_p, weights, 0.0)
    return weights


def draw(weights: Float[Array, "B V"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """Returns for each row the token at which the cumulative weight passes `uniform` times the total."""
    batch, size = weights.shape
    padded = jnp.pad(weights, ((0, 0), (0, -size % _BLOCK))).reshape(batch, -1, _BLOCK)
    blocks = jnp.cumsum(jnp.sum(padded, axis=-1), axis=-1)
    target = uniform * blocks[:, -1]
    block = jnp.minimum(jnp.sum(blocks <= target[:, None], axis=-1, dtype=jnp.int32), blocks.shape[1] - 1)
    before = jnp.where(block > 0, _pick(blocks, jnp.maximum(block - 1, 0)), 0.0)
    inner = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
    within = jnp.sum(before[:, None] + jnp.cumsum(inner, axis=-1) <= target[:, None], axis=-1, dtype=jnp.int32)
    # Rounding may carry the target past the last positive weight: then the last token that has one.
    places = jax.lax.broadcasted_iota(jnp.int32, inner.shape, 1)
    last = jnp.max(jnp.where(inner > 0, places, 0), axis=-1)
    return (block * _BLOCK + jnp.minimum(within, last)).astype(jnp.int32)


def _largest(weights: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns weights in [0, 1] with the small ones set to 0: as many as `enough`, bool `[B, 1]`, allows."""

    def keep(bits: jax.Array) -> jax.Array:
        return jnp.where(weights >= jax.lax.bitcast_convert_type(bits, jnp.float32), weights, 0.0)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # at `low` there is enough, at `high` there is not
        middle = (low + high) // 2
        good = enough(keep(middle))
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    low = jnp.zeros((weights.shape[0], 1), jnp.int32)
    return keep(jax.lax.fori_loop(0, _BISECTIONS, halve, (low, jnp.full_like(low, 0x3F800001)))[0])


def _pick(rows: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(rows, index[:, None], axis=1)[:, 0]


def _check(name: str, value: float, allowed: object, words: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not allowed(value):  # type: ignore[operator]
        raise GenerationError(f"{name} is {value!r}; it must be {words}.")
