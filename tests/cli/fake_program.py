"""The command line over a stand-in for the model API: run as a script, or loaded by this folder's conftest.

The "model" is its name, which says how it behaves: "echo" answers with the prompt, "slow" waits between words, "many"
never ends, "stops" is interrupted after two words, "refuses" and "breaks" raise.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trustcore.errors import GenerationError, ModelError

CALLS: list[tuple[str, Any]] = []


@dataclass
class FakeStream:
    """What `trustcore.generate(..., stream=True)` gives: an iterator of pieces with figures."""

    model: str
    prompt: str
    text: str = ""
    finish_reason: str | None = None
    closed: bool = False
    pieces: Iterator[str] = field(init=False)

    def __post_init__(self) -> None:
        self.pieces = self._run()
        self.stats = SimpleNamespace(
            prompt_tokens=7,
            generated_tokens=3,
            first_token_seconds=0.25,
            prefill_tokens_per_second=123.45,
            decode_tokens_per_second=45.67,
        )

    def _run(self) -> Iterator[str]:
        if self.model == "many":
            while True:
                yield "word and another\n"
        for number, word in enumerate(self.prompt.split(" ")):
            if self.model == "stops" and number == 2:
                raise KeyboardInterrupt
            if self.model == "slow":
                time.sleep(0.2)
            yield ("" if number == 0 else " ") + word

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self.pieces)
        self.text += piece
        return piece

    def close(self) -> None:
        self.closed = True
        self.pieces.close()


def resolve(source: str, *, progress: Any = None) -> Path:
    if progress is not None:
        progress("downloading", 50, 100)
        progress("downloading", 100, 100)
    return Path(source)


def load(path: Path, *, dtype: Any = None, progress: Any = None) -> str:
    source = os.fspath(path)
    CALLS.append(("load", (source, dtype)))
    if source == "refuses":
        raise ModelError("model of\ntwo lines\nrefused")
    if source == "breaks":
        raise RuntimeError("a defect")
    if progress is not None:
        progress(100, 100)
    return source


def generate(model: str, prompt: str, *, stream: bool = True, **options: Any) -> FakeStream:
    CALLS.append(("generate", (prompt, options)))
    return FakeStream(model, prompt)


def chat(model: str, messages: list[dict[str, str]], *, stream: bool = True, **options: Any) -> FakeStream:
    CALLS.append(("chat", ([dict(message) for message in messages], options)))
    last = messages[-1]["content"]
    if last == "overflow":
        raise GenerationError("the conversation does not fit")
    return FakeStream(model, f"({len(messages)}) {last}")


API = {"load": load, "generate": generate, "chat": chat}

if __name__ == "__main__":
    import trustcore
    from trustcore import catalogue
    from trustcore.cli import main

    for name, function in API.items():
        setattr(trustcore, name, function)
    catalogue.resolve = resolve
    main(sys.argv[1:])
