"""What the tests of text share: the recordings of llama.cpp and the demo model's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trustcore.text import Tokenizer
from trustcore.weights import open_checkpoint

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def recorded() -> Callable[[str], dict[str, Any]]:
    """A recording by name; `tests/oracles/record_llama_cpp.py` says what is in it."""
    return lambda name: json.loads((DATA / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_path: Path) -> dict[str, Any]:
    return dict(open_checkpoint(smollm2_path).metadata)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_metadata)


@pytest.fixture(scope="session")
def spm_metadata(recorded: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """The synthetic SentencePiece vocabulary with distinct scores."""
    data = recorded("vocab_spm")
    return {**data["metadata"], **data["variants"]["ranked"]["metadata"]}


@pytest.fixture(scope="session")
def bpe_metadata(recorded: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """The synthetic byte-level vocabulary, with a pre-tokenizer."""
    return {**recorded("vocab_bpe")["metadata"], "tokenizer.ggml.pre": "qwen2"}
