"""Holds the floors of the house: a file imports only from floors below, and siblings do not know each other.

Read from the source with `ast`, imports inside functions and under TYPE_CHECKING included: they bind as much.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Module -> floor, for the module and everything below it. The longest name that fits counts.
FLOORS: dict[str, int] = {
    "kernels_pallas": 0,
    "trustcore._jax": 0,
    "trustcore.cache": 0,
    "trustcore.dtypes": 0,
    "trustcore.errors": 0,
    "trustcore.heap": 0,
    "trustcore.trees": 0,
    "trustcore.units": 0,
    "trustcore.backend": 1,
    "trustcore.catalogue": 1,
    "trustcore.graph": 1,
    "trustcore.hub": 1,
    "trustcore.kernels": 1,
    "trustcore.ops": 1,
    "trustcore.debug": 2,
    "trustcore.dist": 2,
    "trustcore.grad": 2,
    "trustcore.memory": 2,
    "trustcore.precision": 2,
    "trustcore.quant": 2,
    "trustcore.sparse": 2,
    "trustcore.tune": 2,
    "trustcore.nn": 3,
    "trustcore.weights": 3,
    "trustcore.models": 4,
    "trustcore.text": 4,
    "trustcore.convert": 5,
    "trustcore.data": 5,
    "trustcore.evaluation": 5,
    "trustcore.execute": 5,
    "trustcore.export": 5,
    "trustcore.generation": 5,
    "trustcore.loading": 5,
    "trustcore.saving": 5,
    "trustcore.train": 5,
    "trustcore": 6,
    "trustcore.cli": 6,
    "trustcore.serve": 6,
    "trustcore_xla": 6,
    "trustcore.__main__": 7,
}
# Siblings of which the first may import the second.
PAIRS: frozenset[tuple[str, str]] = frozenset(
    {
        ("trustcore.catalogue", "trustcore.hub"),  # a catalogue hands ids of Hugging Face on
        ("trustcore.convert", "trustcore.saving"),  # what is packed weight by weight is saved as a model is
        ("trustcore.cli", "trustcore"),  # the command line calls what Python users call
        ("trustcore.serve", "trustcore"),
        ("trustcore.tune", "trustcore.quant"),  # products with packed weights declare what may be tuned of them
    }
)
# Kernels are for others to use by themselves.
KERNEL_IMPORTS: frozenset[str] = frozenset({"jax", "kernels_pallas"}) | sys.stdlib_module_names


def sources() -> list[Path]:
    folders = ("trustcore", "kernels_pallas", "backends")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    """`backends/trustcore_xla/discovery.py` -> `trustcore_xla.discovery`; a package's `__init__` is the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "backends" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str | None:
    """The name in FLOORS that covers a module; None where the table has none, or only the front door."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in FLOORS:
            return None if name == "trustcore" and end < len(parts) else name
    return None


def imports(module: str, source: str, *, package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports; `from a import b` is `a.b` where that is a module."""
    here = module.split(".") if package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield node.lineno, name if name in FLOORS or is_module(name) else base


def is_module(name: str) -> bool:
    path = Path(*name.split("."))
    return any(
        (root / path).with_suffix(".py").is_file() or (root / path / "__init__.py").is_file()
        for root in (ROOT, ROOT / "backends")
    )


def violations(module: str, source: str, *, package: bool = False) -> list[str]:
    """What one module imports that it must not; empty when it holds its floor."""
    unit = unit_of(module)
    if unit is None:
        return [f"{module} stands on no floor: add it to FLOORS"]
    found = []
    for line, name in imports(module, source, package=package):
        where = f"{module}:{line} imports {name}"
        if unit == "kernels_pallas" and name.split(".")[0] not in KERNEL_IMPORTS:
            found.append(f"{where}; kernels_pallas imports jax and itself alone")
        if name.split(".")[0] not in ("trustcore", "kernels_pallas", "trustcore_xla"):
            continue
        other = unit_of(name)
        if other is None:
            found.append(f"{where}, which stands on no floor: add it to FLOORS")
        elif other == unit or (unit, other) in PAIRS:
            continue
        elif FLOORS[other] > FLOORS[unit]:
            found.append(f"{where}: up from floor {FLOORS[unit]} to {FLOORS[other]}")
        elif FLOORS[other] == FLOORS[unit] and FLOORS[unit] > 0 and unit != "trustcore":
            found.append(f"{where}: a sibling on floor {FLOORS[unit]}")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_holds_its_floor(path: Path) -> None:
    assert violations(module_of(path), path.read_text(encoding="utf-8"), package=path.name == "__init__.py") == []


def test_sources_are_found() -> None:
    modules = {module_of(path) for path in sources()}
    assert {"trustcore", "trustcore.errors", "trustcore.cli.app", "trustcore_xla.discovery"} <= modules


def test_every_folder_of_sources_is_a_package() -> None:
    """A wheel leaves out a folder without `__init__.py`, though it can be imported from a checkout."""
    folders = {path.parent for path in sources()}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("trustcore.quant.array", "from trustcore.models import decoder", "up from floor 2 to 4"),
        ("trustcore.quant.array", "def f():\n    import trustcore.nn.layers", "trustcore.quant.array:2 imports"),
        ("trustcore.quant.array", "import trustcore", "up from floor 2 to 6"),
        ("trustcore.quant.array", "from trustcore import load", "up from floor 2 to 6"),
        ("trustcore.quant.array", "from ..nn import layers", "up from floor 2 to 3"),
        ("trustcore.quant.array", "from trustcore.sparse import SparseArray", "a sibling on floor 2"),
        ("trustcore.nn.layers", "from trustcore.weights import open_checkpoint", "a sibling on floor 3"),
        ("trustcore.text.template", "from trustcore.models import decoder", "a sibling on floor 4"),
        ("trustcore.hub", "from trustcore.catalogue import pull", "a sibling on floor 1"),
        ("trustcore.errors", "from trustcore.ops import linear", "up from floor 0 to 1"),
        ("trustcore.stray", "import os", "stands on no floor"),
        ("trustcore.cli.app", "from trustcore.stray import x", "stands on no floor"),
        ("kernels_pallas.attention", "import numpy", "jax and itself alone"),
        ("kernels_pallas.attention", "from trustcore.errors import TrustcoreError", "jax and itself alone"),
    ],
)
def test_a_violation_is_found(module: str, source: str, complaint: str) -> None:
    assert any(complaint in found for found in violations(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("trustcore.models.load", "from trustcore.nn import x\nfrom trustcore.weights import y\nfrom .config import z"),
        ("trustcore.ops.linear", "from trustcore.ops.weight import Weight\nfrom kernels_pallas import attention"),
        ("trustcore.cli.chat", "import trustcore\nfrom trustcore import backend"),
        ("trustcore", "from trustcore.cli import main"),
        ("kernels_pallas.attention", "import functools\nimport jax.numpy as jnp\nfrom kernels_pallas.x import y"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(module, source) == []
