"""`import trustcore` starts no device, changes no environment, imports no optional package, and is quick."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

OPTIONAL = ("tokenizers", "jinja2", "huggingface_hub", "typer", "rich", "safetensors", "torch", "transformers", "gguf")
LIMIT = 0.7  # seconds beyond jax (and flax.nnx, where trustcore imports it)

# What trustcore stands on is imported first, so that only its own imports are judged.
_MEASURE = """
    import json, os, sys, time
    import jax
    if {flax}:
        import flax.nnx
    before, environment = set(sys.modules), dict(os.environ)
    start = time.perf_counter()
    import trustcore
    seconds = time.perf_counter() - start
    import jax._src.xla_bridge as bridge
    print(json.dumps({{
        "seconds": seconds,
        "modules": sorted(set(sys.modules) - before),
        "backends": sorted(bridge._backends),
        "environment": dict(os.environ) == environment,
    }}))
"""


@pytest.fixture
def imported(fresh_python: Callable[..., str]) -> Callable[[], dict]:
    flax = "flax" in json.loads(fresh_python(_MEASURE.format(flax=False)))["modules"]
    return lambda: json.loads(fresh_python(_MEASURE.format(flax=flax)))


def test_nothing_happens_at_import(imported: Callable[[], dict]) -> None:
    found = imported()
    assert "trustcore" in found["modules"]
    assert found["backends"] == []
    assert found["environment"]
    loaded = {name.split(".")[0] for name in found["modules"]}
    assert loaded.isdisjoint(OPTIONAL), sorted(loaded.intersection(OPTIONAL))


@pytest.mark.serial
def test_import_is_quick(imported: Callable[[], dict]) -> None:
    assert min(imported()["seconds"] for _ in range(3)) < LIMIT


def test_the_command_line_is_light(fresh_python: Callable[..., str]) -> None:
    source = "import sys\nimport trustcore.cli\nprint([name for name in sys.modules if name in ('typer', 'rich')])"
    assert fresh_python(source).strip() == "[]"
