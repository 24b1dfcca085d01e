"""Finding backends: what an entry point names is a backend, or says why it is none."""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace

import pytest
import trustcore_xla

from trustcore import backend
from trustcore.errors import BackendError


def points(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    made = [metadata.EntryPoint(name, value, backend.GROUP) for name, value in values.items()]
    monkeypatch.setattr(backend.metadata, "entry_points", lambda group: made if group == backend.GROUP else [])


def test_the_xla_backend_is_found_and_keeps_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, xla="trustcore_xla:backend")
    (found,) = backend.find_backends()
    assert found is trustcore_xla.backend
    assert isinstance(found, backend.Backend)
    assert found.name == "xla"


def test_none_installed_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch)
    with pytest.raises(BackendError, match=r"pip install -e \."):
        backend.find_backends()


def test_a_broken_backend_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, zebra="trustcore_that_is_not_there:backend", xla="trustcore_xla:backend", odd="json:dumps")
    odd, xla, zebra = backend.find_backends()
    assert xla is trustcore_xla.backend
    assert odd.probe() == [
        backend.PlatformReport("odd", usable=False, reason="json:dumps is a function without `name` and `probe`")
    ]
    (report,) = zebra.probe()
    assert not report.usable
    assert "ModuleNotFoundError: No module named 'trustcore_that_is_not_there'" in report.reason


def test_an_object_without_probe_is_no_backend() -> None:
    assert not isinstance(SimpleNamespace(name="x"), backend.Backend)
