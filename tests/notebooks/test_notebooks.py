"""Every notebook runs from top to bottom in a clean kernel, and is stored with the outputs of such a run.

The kernel is this test's own interpreter, under a kernel specification of its own: neither an installed "python3"
kernel nor the user's IPython profile takes part.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
KERNEL = "trustcore-tests"

# Folders of one machine, and what access tokens look like (Hugging Face, GitHub, GitLab, AWS, OpenAI-style, JWT).
_PRIVATE = re.compile(
    r"(?<![\w.:/])/(?:home|root|work|tmp|Users|usr|opt|srv|var|mnt|content|private)/[^\s'\"]*"
    r"|\b[A-Za-z]:\\+Users\\+[^\s'\"]*"
    r"|\b(?:hf_|gh[pousr]_|github_pat_|glpat-|AKIA|sk-)[A-Za-z0-9_-]{16,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"
)


def load(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: Any) -> list[str]:
    """What a cell put out, a run of pieces on one stream counted once."""
    names = [f"{out.output_type} {out.get('name', '')}".strip() for out in cell.outputs]
    return [name for i, name in enumerate(names) if i == 0 or name != names[i - 1]]


def stored_faults(notebook: Any) -> list[str]:
    """What is wrong with a notebook as it is stored; empty when nothing is."""
    faults = []
    kernel = notebook.metadata.get("kernelspec", {}).get("name")
    if kernel != "python3":
        faults.append(f"the kernel is {kernel!r}, not the plain 'python3'")
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        faults.append(f"not stored after one run from top to bottom: cells were run as {counts}")
    if not any(cell.outputs for cell in code_cells(notebook)):
        faults.append("no outputs are stored")
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        faults += [
            f"cell {cell.id}: stored with {out.ename}: {out.evalue}" for out in outputs if out.output_type == "error"
        ]
        text = json.dumps([cell.source, outputs], ensure_ascii=False).replace("\\n", "\n")
        faults += [f"cell {cell.id}: {found!r} belongs to one machine or person" for found in _PRIVATE.findall(text)]
    return faults


@pytest.fixture
def own_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a kernel that is this interpreter with this checkout and nothing of the user's."""
    folder = tmp_path / "kernels" / KERNEL
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": command, "display_name": KERNEL, "language": "python"}))
    paths = [str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # without it jupyter_core warns of a change of folders
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return KERNEL


def run(notebook: Any, kernel: str, folder: Path) -> Any:
    """The notebook after a run from top to bottom; a cell that raises ends it."""
    from nbclient import NotebookClient

    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, kernel_name=kernel, timeout=300, resources=resources).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, own_kernel: str, smollm2_path: Path) -> None:
    stored = load(path)
    ran = run(load(path), own_kernel, path.parent)
    for before, after in zip(code_cells(stored), code_cells(ran), strict=True):
        assert kinds(after) == kinds(before), f"cell {after.id} puts out something else than what is stored"
        assert "error" not in kinds(after) and "stream stderr" not in kinds(after), f"cell {after.id}: {after.outputs}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_its_outputs_and_nothing_private(path: Path) -> None:
    assert stored_faults(load(path)) == []


def test_there_are_notebooks() -> None:
    assert "01_generate" in [path.stem for path in NOTEBOOKS]


def small(*sources: str) -> Any:
    """A notebook of code cells, as it would be stored after a run that put out nothing but a line."""
    cells = [nbformat.v4.new_code_cell(source, execution_count=i) for i, source in enumerate(sources, 1)]
    cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text="a line\n")]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def test_the_kernel_is_this_interpreter_and_this_checkout(own_kernel: str, tmp_path: Path) -> None:
    source = "import sys, trustcore\nprint(sys.executable)\nprint(trustcore.__file__)"
    (cell,) = run(small(source), own_kernel, tmp_path).cells
    assert "".join(out.text for out in cell.outputs).splitlines() == [
        sys.executable,
        str(ROOT / "trustcore" / "__init__.py"),
    ]


def test_a_cell_that_raises_ends_the_run(own_kernel: str, tmp_path: Path) -> None:
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="beads are missing"):
        run(small("raise ValueError('beads are missing')"), own_kernel, tmp_path)


def error(notebook: Any) -> None:
    notebook.cells[1].outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])]


def text(value: str) -> Any:
    def put(notebook: Any) -> None:
        notebook.cells[0].outputs[0].text = value

    return put


def source(value: str) -> Any:
    def put(notebook: Any) -> None:
        notebook.cells[1].source = value

    return put


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda notebook: notebook.cells[1].update(execution_count=None), "not stored after one run"),
        (lambda notebook: notebook.cells[0].update(execution_count=7), "not stored after one run"),
        (lambda notebook: notebook.cells[0].update(outputs=[]), "no outputs are stored"),
        (lambda notebook: notebook.metadata.kernelspec.update(name="my-venv"), "not the plain 'python3'"),
        (error, "stored with ValueError: no"),
        (text("loaded /home/ada/models/x.gguf\n"), "'/home/ada/models/x.gguf' belongs"),
        (text("in '/tmp/x'\n"), "'/tmp/x' belongs"),
        (text("C:\\Users\\ada\\x.gguf\n"), "belongs to one machine"),
        (source("login('hf_" + "a1" * 17 + "')"), "belongs to one machine or person"),
    ],
)
def test_a_faulty_notebook_is_caught(damage: Any, complaint: str) -> None:
    notebook = small("1 + 1", "see('https://example.org/home/x')\na = b / tmp / c")
    assert stored_faults(notebook) == []
    damage(notebook)
    assert any(complaint in fault for fault in stored_faults(notebook))
