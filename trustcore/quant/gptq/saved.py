"""What a run of GPTQ has done so far, in a folder: one file for each matrix, and one that says which run it is.

A matrix's file appears under its name when it is complete. Fields lie as bytes, with their dtypes and shapes beside
them, so that any dtype comes back bit for bit. A folder of another run (other formats, options, data or weights) is
refused: its results would be mixed in.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.errors import QuantizationError
from trustcore.ops.weight import Weight
from trustcore.quant.array import QuantizedArray

_RUN = "run.json"


class Saved:
    """The finished matrices of one run; without a folder, none.

    Args:
        folder: where they lie; None keeps nothing.
        formats: of the leaves.
        options: of the run.
        batches: its data.
        leaves: its weights.

    Raises:
        QuantizationError: the folder belongs to another run.
    """

    def __init__(
        self,
        folder: str | Path | None,
        formats: Mapping[str, str],
        options: Mapping[str, Any],
        batches: Sequence[Any],
        leaves: Mapping[str, Any],
    ):
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        run = {"formats": dict(formats), "options": dict(options), "data": _digest(batches), "weights": _digest(leaves)}
        run = json.loads(json.dumps(run))
        path = self.folder / _RUN
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(path, json.dumps(run, indent=1).encode())
            return
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise QuantizationError(f"gptq: {path} is no JSON ({error}); give an empty folder.") from error
        different = [name for name in run if not isinstance(found, dict) or found.get(name) != run[name]]
        if different:
            raise QuantizationError(
                f"gptq: {self.folder} belongs to a run with other {' and '.join(different)}. Take that run up with the "
                "arguments it had, or give another folder."
            )

    def read(self, path: str, index: tuple[int, ...]) -> tuple[QuantizedArray, float, float] | None:
        """Returns (weight, error, error of rounding to nearest) of a matrix that is done."""
        file = self._file(path, index)
        if file is None or not file.exists():
            return None
        with np.load(file) as held:
            about = json.loads(bytes(held["about"]))
            fields = {
                name: jnp.asarray(np.frombuffer(held[name].tobytes(), jnp.dtype(dtype)).reshape(shape))
                for name, (dtype, shape) in about["fields"].items()
            }
        return QuantizedArray(about["format"], fields), about["error"], about["nearest"]

    def write(self, path: str, index: tuple[int, ...], packed: QuantizedArray, error: float, nearest: float) -> None:
        """Keeps a matrix that is done."""
        file = self._file(path, index)
        if file is None:
            return
        arrays = {name: np.asarray(field) for name, field in packed.fields.items()}
        about = {
            "format": packed.format,
            "error": error,
            "nearest": nearest,
            "fields": {name: (str(a.dtype), a.shape) for name, a in arrays.items()},
        }
        partial = file.with_suffix(".partial")
        with open(partial, "wb") as out:
            raw = {name: np.frombuffer(a.tobytes(), np.uint8) for name, a in arrays.items()}
            raw["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
            np.savez(out, allow_pickle=False, **raw)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)

    def _file(self, path: str, index: tuple[int, ...]) -> Path | None:
        if self.folder is None:
            return None
        name = ".".join([path, *map(str, index)])
        if len(name) > 150 or any(c in name for c in "/\\:\0"):
            name = hashlib.sha256(name.encode()).hexdigest()
        return self.folder / f"{name}.npz"


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def _digest(tree: Any) -> str:
    """A digest of the leaves of a tree, of their bytes."""
    hashed = hashlib.sha256()
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, Weight))[0]
    for path, leaf in flat:
        hashed.update(jax.tree_util.keystr(path).encode())
        for part in jax.tree.leaves(leaf):
            if hasattr(part, "dtype"):
                array = np.ascontiguousarray(part)
                hashed.update(f"{array.dtype}{array.shape}".encode())
                hashed.update(array.reshape(-1).view(np.uint8).data)
    return hashed.hexdigest()
