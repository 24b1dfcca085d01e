"""docs/capabilities.md is whole and true, and its checker sees every kind of fault."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load_checker() -> ModuleType:
    """The script as a module; `docs` is no package."""
    name = "check_capabilities"
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


checker = load_checker()


def test_the_page_has_no_faults() -> None:
    rows, titles, faults = checker.check()
    assert faults == []
    assert len(rows) == sum(checker.SECTIONS.values()) == 187
    assert list(titles) == list(checker.SECTIONS)


HEAD = """## ONE - first things

| id | class | capability | on JAX | name | test | state |
|---|---|---|---|---|---|---|
"""
GOOD = HEAD + (
    "| ONE-01 | a | either \\| or | here | `jax.jit` `trustcore.generate` | `tests/test_x.py::test_a` | works |\n"
    "| ONE-02 | c | more | some. Missing: the rest | `jax.grad` | `tests/test_x.py` `tests/test_x.py::TestB::test_c` "
    "| part |\n"
    "| ONE-03 | d | most | later | `jax.vmap` | - | open |\n"
    "\n## TWO - second things\n\n" + HEAD.partition("\n\n")[2] + "| TWO-01 | b | all | later | - | - | open |\n"
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that makes a project whose page, and README, read as given."""
    monkeypatch.setattr(checker, "SECTIONS", {"ONE": 3, "TWO": 1})
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests").mkdir()
    source = "def test_a(): ...\n\n\nclass TestB:\n    def test_c(self): ...\n\n\ndef helper(): ...\n"
    (tmp_path / "tests" / "test_x.py").write_text(source)
    (tmp_path / "tests" / "test_empty.py").write_text("def helper(): ...\n")

    def make(page: str = GOOD, readme: str | None = None) -> Path:
        (tmp_path / checker.PAGE).write_text(page)
        if readme is not None:
            (tmp_path / "README.md").write_text(readme)
        return tmp_path

    return make


def test_a_good_page_passes(project, capsys: pytest.CaptureFixture[str]) -> None:
    assert checker.main([], project()) == 0
    assert capsys.readouterr().out == "4 capabilities: 1 works, 1 part, 2 open; 0 faults\n"


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        # names
        ("`jax.jit` ", "", None),
        ("`jax.jit`", "`jax.jitt`", "ONE-01: jax.jitt does not import: AttributeError"),
        ("`jax.jit`", "`no_such_package.jit`", "ONE-01: no_such_package.jit does not import: ModuleNotFoundError"),
        ("`trustcore.generate`", "`trustcore.generate.well`", "ONE-01: trustcore.generate.well does not import"),
        (
            "`trustcore.generate`",
            "`trustcore.generation.text._prompts`",
            "ONE-01: trustcore.generation.text._prompts is",
        ),
        ("`jax.grad`", "-", "ONE-02: has no name"),
        ("`jax.grad`", "jax.grad", "ONE-02: name is 'jax.grad'; write `one` `after` `the other`"),
        ("`jax.vmap`", "`jax.vmapp`", "ONE-03: jax.vmapp does not import"),
        # tests
        ("::test_a`", "::test_z`", "ONE-01: tests/test_x.py::test_z: tests/test_x.py has no test_z"),
        ("::test_a`", "::helper`", "ONE-01: tests/test_x.py::helper: tests/test_x.py has no helper"),
        ("::TestB::test_c`", "::test_c`", "ONE-02: tests/test_x.py::test_c: tests/test_x.py has no test_c"),
        ("`tests/test_x.py`", "`tests/test_y.py`", "ONE-02: tests/test_y.py: there is no tests/test_y.py"),
        ("`tests/test_x.py`", "`tests/test_empty.py`", "ONE-02: tests/test_empty.py: tests/test_empty.py has no tests"),
        ("`tests/test_x.py`", "`tests/../test_x.py`", "is not a path tests/.../test_*.py"),
        ("`tests/test_x.py::test_a`", "-", "ONE-01: has no test"),
        ("| `jax.vmap` | - |", "| `jax.vmap` | `tests/test_x.py` |", "ONE-03: is open, but names a test"),
        # ids
        ("| TWO-01 | b | all | later | - | - | open |\n", "", "TWO-01: missing"),
        ("ONE-03", "ONE-02", "ONE-02: stands there 2 times"),
        ("ONE-03", "ONE-02", "ONE-03: missing"),
        ("ONE-03", "ONE-04", "'ONE-04' in line 7: not a known id"),
        ("## TWO - second things\n", "", "TWO-01: stands in section ONE"),
        ("## TWO - second things\n", "", "section TWO: missing"),
        # states and the rest of a row
        ("| works |", "| done |", "ONE-01: state is 'done', not one of works, part, open"),
        ("| works |", "| |", "ONE-01: state is ''"),
        (" Missing: the rest", "", "ONE-02: does not say what is missing"),
        ("| a | either", "| e | either", "ONE-01: class is 'e'"),
        ("| most | later |", "| most | |", "ONE-03: says nothing"),
        ("either \\| or", "either | or", "line 5: 8 cells, expected 7"),
    ],
)
def test_a_fault_is_found(project, capsys: pytest.CaptureFixture[str], old: str, new: str, fault: str | None) -> None:
    assert GOOD.count(old) >= 1
    status = checker.main([], project(GOOD.replace(old, new, 1)))
    lines = capsys.readouterr().out.splitlines()
    if fault is None:  # one of two names may go
        assert status == 0
    else:
        assert status == 1
        assert any(fault in line for line in lines[:-1]), lines


def test_a_module_that_breaks_is_one_line(project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_capability.py").write_text("raise RuntimeError('beads are missing')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    faults = checker.check(project(GOOD.replace("jax.vmap", "broken_capability.x")))[2]
    assert faults == ["ONE-03: broken_capability.x does not import: RuntimeError: beads are missing"]


def test_the_map(project, capsys: pytest.CaptureFixture[str]) -> None:
    assert checker.main(["--map"], project()) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| capabilities | works | part | open |",
        "|---|--:|--:|--:|",
        "| first things | 1 | 1 | 1 |",
        "| second things | 0 | 0 | 1 |",
        "| **all** | **1** | **1** | **2** |",
    ]


def test_readme_repeats_the_map(project, capsys: pytest.CaptureFixture[str]) -> None:
    first, last = checker.MARKERS
    old = "| capabilities | works | part | open |"
    root = project(GOOD, f"# x\n\n{first}\n{old}\n{last}\n\nrest\n")
    assert checker.main([], root) == 1
    assert "README.md: the map is old" in capsys.readouterr().out
    assert checker.main(["--write"], root) == 0
    text = (root / "README.md").read_text()
    assert text.startswith(f"# x\n\n{first}\n{old}\n") and text.endswith(f"| **2** |\n{last}\n\nrest\n")
    assert checker.main([], root) == 0
    assert checker.main(["--write"], root) == 0 and (root / "README.md").read_text() == text


@pytest.mark.parametrize("readme", ["{0}\n{0}\n{1}\n", "{1}\n{0}\n", "{0}\n"])
def test_markers_that_do_not_pair_are_a_fault_and_nothing_is_written(project, readme: str) -> None:
    text = readme.format(*checker.MARKERS)
    root = project(GOOD, text)
    faults = checker.check(root)[2]
    assert len(faults) == 1 and "must stand there once each, in this order" in faults[0]
    assert checker.main(["--write"], root) == 1 and (root / "README.md").read_text() == text


def test_a_readme_without_markers_is_left_alone(project, capsys: pytest.CaptureFixture[str]) -> None:
    root = project(GOOD, "# x\n")
    assert checker.main([], root) == 0
    assert checker.main(["--write"], root) == 1
    assert "must stand there once each" in capsys.readouterr().err
    assert (root / "README.md").read_text() == "# x\n"
