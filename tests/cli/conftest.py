"""Runs the command line in this process, or as a program, over a stand-in for the model API."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import trustcore
from trustcore import catalogue
from trustcore.cli import main
from trustcore.models import random_model

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("fake_program.py")


@dataclass
class Done:
    """What a command line left: exit status, stdout, stderr."""

    status: int
    out: str
    err: str


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What the command line calls of the stand-in, which stands in for `trustcore` during the test."""
    fake = runpy.run_path(str(PROGRAM))
    for name, function in fake["API"].items():
        monkeypatch.setattr(trustcore, name, function)
    monkeypatch.setattr(catalogue, "resolve", fake["resolve"])
    return fake["CALLS"]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """A function that runs `trustcore` in this process with the given words, and bytes on stdin."""

    def run(*words: str, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as left:
            main(words)
        captured = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return Done(left.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def program() -> Callable[..., subprocess.Popen[Any]]:
    """A function that starts `trustcore` over the stand-in as a process of its own."""

    def start(*words: str, **options: Any) -> subprocess.Popen[Any]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
        return subprocess.Popen([sys.executable, str(PROGRAM), *words], env=environment, **options)

    return start


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model of two small layers."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = {"model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 2, **sizes}
    path = tmp_path_factory.mktemp("model")
    trustcore.save(random_model({**config, "max_position_embeddings": 512}), path)
    return path
