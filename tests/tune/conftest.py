"""A cache folder of a test's own, and an op made to be tuned: right, slow, wrong and broken forms of one product."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOY = Path(__file__).with_name("toy.py")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that returns the toy's declaration, changed as asked and registered."""
    from trustcore.tune import registry

    monkeypatch.setattr(registry, "_registered", {})
    spec = importlib.util.spec_from_file_location("toy", TOY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def made(**changes: Any) -> Any:
        tunable = dataclasses.replace(module.TOY, **changes)
        registry.register(tunable)
        return tunable

    return made
