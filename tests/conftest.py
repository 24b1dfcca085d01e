"""What every test shares: jax's strict modes, a cache of compiled programs, fresh processes, the demo model.

No fixture starts more than jax's one CPU device: a test that wants a mesh asks `fresh_python` for a process with
several.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import settings

from trustcore.cache import cache_folder

ROOT = Path(__file__).parents[1]

# The same examples in every run, so that a change answers for itself alone. `pytest --hypothesis-profile=default` looks
# for new ones.
settings.register_profile("same", derandomize=True, database=None)
settings.load_profile("same")


def pytest_configure(config: pytest.Config) -> None:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Compiled programs stay from run to run. A folder for each worker: jax writes them in place, so that two processes
    # which share a folder may read half of a program.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    jax.config.update("jax_compilation_cache_dir", str(cache_folder("test-programs", worker)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="module", autouse=True)
def _forgotten() -> Iterator[None]:
    """Lets go of a file's compiled programs: all of them together would take ten gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model file, fetched once a machine."""
    from trustcore.catalogue import pull

    return pull("smollm2")


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Any:
    """The real model, loaded once a worker."""
    import trustcore

    return trustcore.load(smollm2_path)


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The folder of the real encoder, fetched once a machine."""
    from trustcore.catalogue import pull

    return pull("minilm")


@pytest.fixture
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the tuner's tables of this test alone; compiled handlers stay where they are."""
    from trustcore.cache import cache_folder
    from trustcore.tune import choosing

    native = cache_folder("native")
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "native").symlink_to(native)
    monkeypatch.setenv("TRUSTCORE_CACHE", str(folder))
    monkeypatch.setattr(choosing, "_tried", set())
    return folder / "tune"


@pytest.fixture
def fresh_python() -> Callable[..., str]:
    """A function that runs Python source in a new process and returns what it printed.

    `fresh_python(source, devices=8)` gives the process eight CPU devices; `environment` adds variables. A status other
    than zero fails the test with what the process wrote.
    """

    def run(source: str, *, devices: int = 1, environment: dict[str, str] | None = None) -> str:
        variables = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), **(environment or {})}
        paths = [str(ROOT), str(ROOT / "backends"), variables.get("PYTHONPATH")]
        variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        command = [sys.executable, "-c", textwrap.dedent(source)]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300, check=False)
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
