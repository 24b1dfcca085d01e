"""Small random models as transformers stores them, and what it computes (`tests/oracles/record_families.py`)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from trustcore.models import model_from_checkpoint
from trustcore.weights import open_checkpoint

FOLDER = Path(__file__).parents[1] / "data" / "families"

# Of hidden states and logits, whose size is one or a few: float32 sums of some hundred numbers, in another order.
TOLERANCE = 2e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """One recorded model."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    def write(self, folder: Path, *, config: dict[str, Any] | None = None, **weights: np.ndarray | None) -> Path:
        """Writes the folder that the library would save; `weights` replace tensors, None leaves one out."""
        held = {name: array for name, array in {**self.weights, **weights}.items() if array is not None}
        save_file({name: np.array(array, order="C") for name, array in held.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**self.config, **(config or {})}))
        return folder

    def open(self, folder: Path, *, dtype: Any = "float32", **changes: Any) -> Any:
        """Returns the model that the folder holds."""
        with open_checkpoint(self.write(folder, **changes)) as checkpoint:
            return model_from_checkpoint(checkpoint, dtype=dtype)


def read(name: str) -> Case:
    """Returns a recorded case."""
    groups: dict[str, dict[str, np.ndarray]] = {"w": {}, "i": {}, "o": {}}
    with np.load(FOLDER / f"{name}.npz") as held:
        for key in held.files:
            mark, _, rest = key.partition(":")
            if rest:
                groups[mark][rest] = held[key]
        config = json.loads(str(held["config"]))
    return Case(config, *groups.values())


def apart(found: Any, expected: np.ndarray, where: np.ndarray | None = None) -> float:
    """The largest difference, of the rows that `where` names."""
    found = np.asarray(found)
    assert found.shape == expected.shape
    difference = np.abs(found - expected)
    return float(np.max(difference if where is None else difference[where]))


def jitted(model: Any, *args: Any, **options: Any) -> Any:
    """The model's call as one program."""
    return jax.jit(lambda model, args, options: model(*args, **options))(model, args, options)
