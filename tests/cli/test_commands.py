"""What all commands share: one-line errors, exit status, version; and the small commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from trustcore import backend, catalogue, units
from trustcore.cli import console, doctor
from trustcore.cli.generate import peak_memory
from trustcore.errors import BackendError, CatalogueError


@pytest.mark.parametrize(
    ("words", "status", "complaint"),
    [
        (["generate", "refuses", "x"], 2, "trustcore: model of two lines refused\n"),
        (["generate", "breaks", "x"], 1, "trustcore: internal error: RuntimeError: a defect (run again with --debug"),
        (["generate"], 2, "Missing argument 'MODEL'"),
        (["generate", "echo", "x", "--top-p", "2"], 2, "Invalid value for '--top-p'"),
        (["generate", "echo", "x", "--colour"], 2, "No such option: --colour"),
        (["generate", "echo", "x", "--dtype", "float64"], 2, "Invalid value for '--dtype'"),
        (["genrate"], 2, "No such command 'genrate'"),
        (["pull", "owner/name", "--verify"], 2, "checksums are known for smollm2, minilm only"),
    ],
)
def test_errors_are_one_line(cli, calls, words: list[str], status: int, complaint: str) -> None:
    done = cli(*words)
    assert done.status == status
    assert done.out == ""
    assert complaint in done.err
    assert done.err.startswith("trustcore: ") and done.err.count("\n") == 1
    assert "Traceback" not in done.err


def test_names_of_nothing_are_one_line(cli) -> None:
    done = cli("info", "nothing.gguf")
    assert (done.status, done.err) == (2, "trustcore: nothing.gguf: no such file or folder.\n")
    done = cli("pull", "smolm2")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "Did you mean 'smollm2'" in done.err


@pytest.mark.parametrize("words", [["--debug", "generate", "breaks", "x"], ["generate", "breaks", "x", "--debug"]])
def test_debug_lets_the_exception_through(cli, calls, words: list[str]) -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        cli(*words)


def test_help_and_version(cli) -> None:
    assert cli().out == cli("--help").out
    for name in ("generate", "chat", "info", "pull", "quantize", "perplexity", "compare", "doctor"):
        assert name in cli("--help").out
        assert cli(name, "--help").status == 0
    assert cli("--version").out.startswith("trustcore ")


def test_pull_prints_the_path_alone(cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []

    def pull(name: str, *, verify: bool, progress: Callable[[str, int, int], None]) -> Path:
        progress("fetching", 1, 2)  # draws nothing, for stderr is no terminal
        asked.append(verify)
        return tmp_path / name

    monkeypatch.setattr(catalogue, "pull", pull)
    assert cli("pull", "smollm2").out == f"{tmp_path / 'smollm2'}\n"
    told = cli("pull", "smollm2", "--verify").err
    assert "SHA-256 is right" in told and "fetching" not in told
    assert asked == [False, True]


def test_pull_takes_hub_ids(cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(catalogue, "resolve", lambda name, *, progress: tmp_path / name.replace("/", "-"))
    assert cli("pull", "owner/name").out == f"{tmp_path / 'owner-name'}\n"


def test_pull_refusals_are_one_line(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def pull(name: str, **_: object) -> Path:
        raise CatalogueError("the network is away")

    monkeypatch.setattr(catalogue, "pull", pull)
    done = cli("pull", "smollm2")
    assert (done.status, done.err) == (2, "trustcore: the network is away\n")


class Abacus:
    """A backend with one platform that works and one that does not."""

    name = "abacus"

    def probe(self) -> list[backend.PlatformReport]:
        beads = tuple(backend.DeviceInfo(number, "beads [red]", 4000) for number in range(2))
        return [
            backend.PlatformReport("wood", True, devices=beads, memory_bytes=4000, dtypes=("float32", "int4")),
            backend.PlatformReport("steel", False, reason="not installed: buy one"),
        ]


def test_doctor(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "find_backends", lambda: (Abacus(),))
    done = cli("doctor")
    assert done.status == 0
    for word in ("python", "jax ", "flax ", "instructions", "compiler", "cpu kernels", "cache"):
        assert word in done.out
    assert "2 x beads [red]" in done.out and "4.0 kB" in done.out and "float32 int4" in done.out
    assert "not installed: buy one" in done.out
    report = json.loads(cli("doctor", "--json").out)
    wood, steel = report["platforms"]
    assert wood["backend"] == "abacus" and wood["usable"] and wood["devices"][1]["memory_bytes"] == 4000
    assert not steel["usable"] and steel["reason"] == "not installed: buy one"
    assert report["packages"]["jax"] and report["processor"]["cores"] >= 1 and report["problem"] is None


def test_doctor_without_backends_says_so_and_tells_the_rest(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> tuple:
        raise BackendError("no backend: run `pip install -e .`")

    monkeypatch.setattr(backend, "find_backends", none)
    done = cli("doctor")
    assert done.status == 0
    assert "no backend: run `pip install -e .`" in done.out and "compiler" in done.out


def test_doctor_reports_a_cache_folder_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRUSTCORE_CACHE", str(tmp_path / "file"))
    assert "Set TRUSTCORE_CACHE" in doctor._cache()["reason"]


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert console.plain("a\x1b[2Jb\u202ec\n") == "a\\x1b[2Jb\\u202ec\\n"
    assert console.plain("a\nb\t\x07", lines=True) == "a\nb\t\\x07"


def test_figures_for_people() -> None:
    assert [units.size(n) for n in (0, 999, 1000, 98362432, 3e9, 5e12)] == [
        *("0 B", "999 B", "1.0 kB", "98.4 MB", "3.0 GB", "5.0 TB"),
    ]
    assert [units.count(n) for n in (7, 134515008)] == ["7", "134.5 M"]


def test_peak_memory_counts_bytes() -> None:
    touched = bytearray(b"x") * (64 << 20)
    peak = peak_memory()
    assert peak is not None
    assert len(touched) <= peak < 1 << 40
