"""From logits to the next token, on the device and without sorting the vocabulary.

    logits --penalties--> --temperature--> --top-k--> --top-p--> --min-p--> one uniform number picks a token

Each filter is a threshold on the probabilities: top-k's is the k-th largest, top-p's is found by bisection, min-p's is
a share of the largest. The draw inverts the cumulative distribution in two levels, so its cost is two passes over the
vocabulary and one random number a row.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from trustcore.errors import GenerationError

_BISECTIONS = 24  # halvings of the range of a probability: finer than float32 tells neighbours apart near top-p's edge
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
            top_k=0 if greedy else int(self.top_k or 0),
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
    top_k: int
    top_p: bool
    min_p: bool
    repetition: bool
    counting: bool


class Values(NamedTuple):
    """The dynamic part of a `Sampling`: float32 scalars."""

    temperature: jax.Array
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
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return draw(filtered(logits, plan, values), uniform)


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
    """Returns unnormalized probabilities, 0 for the tokens that the filters cut; the likeliest has 1 and always stays."""
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / values.temperature
    weights = jnp.exp(scaled)
    if 0 < plan.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(weights, plan.top_k)[0][:, -1:]
        weights = jnp.where(weights >= kth, weights, 0.0)
    if plan.top_p:
        weights = jnp.where(weights >= _nucleus(weights, values.top_p), weights, 0.0)
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


def _nucleus(weights: jax.Array, top_p: jax.Array) -> jax.Array:
    """Returns `[B, 1]`, the largest threshold at which the weights above it still sum to top_p of their total."""
    wanted = top_p * jnp.sum(weights, axis=-1, keepdims=True)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # thresholds; at `low` there is enough
        middle = (low + high) / 2
        enough = jnp.sum(jnp.where(weights >= middle, weights, 0.0), axis=-1, keepdims=True) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    bounds = jnp.zeros_like(wanted), jnp.ones_like(wanted)
    return jax.lax.fori_loop(0, _BISECTIONS, halve, bounds)[0]


def _pick(rows: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(rows, index[:, None], axis=1)[:, 0]


def _check(name: str, value: float, allowed: object, words: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not allowed(value):  # type: ignore[operator]
        raise GenerationError(f"{name} is {value!r}; it must be {words}.")
