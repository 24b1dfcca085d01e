"""An answer as it arrives: pieces of text, then what it cost.

A piece never ends inside a UTF-8 character, and never holds the beginning of a stop string that may still come.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np

from trustcore.generation.engine import Step


@dataclasses.dataclass
class Stats:
    """What an answer cost so far.

    Attributes:
        prompt_tokens: taken in.
        generated_tokens: made, the one that ended the answer included.
        first_token_seconds: from the request to the first token.
        decode_seconds: from the first token to the last.
    """

    prompt_tokens: int
    generated_tokens: int = 0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens a second until the first token was there."""
        return self.prompt_tokens / self.first_token_seconds if self.first_token_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens a second after the first one; 0 when there was none."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


class Answer:
    """The text of one row: decodes its tokens, watches for stop strings.

    Attributes:
        text: everything that has been released.
        tokens: ids so far.
        finish_reason: None while it goes on; then "stop" (a stop token or string) or "length".
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], stop_ids: frozenset[int], *, continuation: bool = True):
        self.text = ""
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._decoder = tokenizer.stream_decoder(continuation=continuation)
        self._stop, self._stop_ids = [s for s in stop if s], stop_ids
        self._held = ""

    def add(self, tokens: Sequence[int]) -> str:
        """Returns the text that these tokens release."""
        released = ""
        for token in tokens:
            if self.finish_reason is not None or token < 0:
                break
            self.tokens.append(int(token))
            if token in self._stop_ids:
                released += self.end("stop")
                break
            released += self._release(self._decoder.push(int(token)))
        return released

    def end(self, reason: str) -> str:
        """Returns what was held back, as the answer is over."""
        if self.finish_reason is not None:
            return ""
        released = self._release(self._decoder.flush())
        if self.finish_reason is None:
            self.finish_reason = reason
            self.text += self._held
            released, self._held = released + self._held, ""
        return released

    def _release(self, piece: str) -> str:
        if self.finish_reason is not None:
            return ""
        self._held += piece
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            released, self._held = self._held[: min(found)], ""
            self.finish_reason = "stop"
        else:
            keep = max((_overlap(self._held, s) for s in self._stop), default=0)
            cut = len(self._held) - keep
            released, self._held = self._held[:cut], self._held[cut:]
        self.text += released
        return released


class Stream(Iterator[str]):
    """Pieces of one answer, in order; iterate over it, or read `text` at the end.

    Attributes:
        stats: tokens and times so far.
    """

    def __init__(self, steps: Generator[Step, Any, None], answer: Answer, prompt_tokens: int):
        self.stats = Stats(prompt_tokens)
        self._steps, self._answer = steps, answer
        self._began: float | None = None
        self._first = 0.0

    def __next__(self) -> str:
        while self._answer.finish_reason is None:
            if self._began is None:
                self._began = time.perf_counter()
            try:
                step = next(self._steps)
            except StopIteration:
                piece = self._answer.end("length")
            else:
                piece = self._answer.add(step.tokens[0].tolist())
                self._count(step)
            if self._answer.finish_reason is not None:
                self._steps.close()
            if piece:
                return piece
        raise StopIteration

    def close(self) -> None:
        """Ends the answer here and gives its memory back; `text` keeps what has arrived."""
        self._answer.end("closed")
        self._steps.close()

    @property
    def text(self) -> str:
        """Everything that has arrived."""
        return self._answer.text

    @property
    def tokens(self) -> list[int]:
        """Token ids that have arrived."""
        return list(self._answer.tokens)

    @property
    def finish_reason(self) -> str | None:
        """None while it goes on; "stop" (stop token or string), "length" or "closed"."""
        return self._answer.finish_reason

    def _count(self, step: Step) -> None:
        assert self._began is not None
        now = time.perf_counter()
        if step.prefill:
            self._first = now
            self.stats.first_token_seconds = now - self._began
        self.stats.decode_seconds = now - self._first
        self.stats.generated_tokens += int((step.tokens[0] >= 0).sum())


def run_batch(steps: Generator[Step, Any, None], answers: Sequence[Answer]) -> None:
    """Feeds every row's answer until all are over; a row that met a stop string is ended on the device too."""
    done = None
    while True:
        try:
            step = steps.send(done)
        except StopIteration:
            break
        for answer, tokens in zip(answers, step.tokens, strict=True):
            answer.add(tokens.tolist())
        done = np.array([answer.finish_reason is not None for answer in answers])
        if done.all():
            steps.close()
            break
    for answer in answers:
        answer.end("length")


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
