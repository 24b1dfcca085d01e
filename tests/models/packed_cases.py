"""The recorded matrices of `tests/data/packed_checkpoints.safetensors`, case by case."""

import json
from pathlib import Path

import numpy as np

from trustcore.weights import open_checkpoint

FILE = Path(__file__).parents[1] / "data" / "packed_checkpoints.safetensors"

_CHECKPOINT = open_checkpoint(FILE)
CASES: dict[str, dict] = json.loads(_CHECKPOINT.metadata["cases"])


def tensors(case):
    """Returns the tensors of a case's module "m", by name."""
    start = f"{case}/"
    return {
        n.removeprefix(start): t for n, t in _CHECKPOINT.items() if n.startswith(start) and not n.endswith("expected")
    }


def expected(case):
    """Returns the matrix [..., N, K] as the original package decoded it, in its dtype."""
    return _CHECKPOINT[f"{case}/expected"].numpy()


def as_arrays(case):
    """Returns copies of the tensors' numbers, for tests that change them."""
    return {name: np.array(tensor.numpy()) for name, tensor in tensors(case).items()}
