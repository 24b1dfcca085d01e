"""Runs the oracles again and compares what they say with what is recorded in `tests/data`.

    python tests/oracles/run.py --python PYTHON [NAME ...]          (make oracles makes both environments)

The program itself runs where trustcore is installed; `PYTHON` is that of an environment with what `requirements.txt`
names. Scripts write to a folder of their own; nothing recorded is touched. What a script needs and is not there, it is
not run for; with `--all`, that is a failure, too. Prints a line for each record and exits with 1 if one differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DATA = ROOT / "tests" / "data"


@dataclasses.dataclass(frozen=True)
class Record:
    """What one script records.

    Attributes:
        files: that it writes, as patterns below `tests/data`.
        needs: modules of the oracles' environment.
        arguments: of the script; `{out}` is a folder that stands for `tests/data`, `{work}` an empty one, `{NAME}` of
            a model of the catalogue the file or folder of that model.
        first: arguments of a run in trustcore's environment before, if there is one.
        tolerance: of numbers that are no integers, absolute, and relative where they are larger than one.
        free: ends of names that need not be the same: versions, bytes that depend on them.
    """

    files: tuple[str, ...]
    needs: tuple[str, ...]
    arguments: tuple[str, ...] = ("--out", "{out}")
    first: tuple[str, ...] = ()
    tolerance: float = 0.0
    free: tuple[str, ...] = ("about", "version", "versions")


TORCH, LLAMA = ("torch", "transformers"), ("llama_cpp", "gguf")
# Sums of a few hundred float32 numbers, in whatever order a processor takes them.
SUMS = 2e-5

RECORDS = {
    "decoders": Record(("decoders/*.npz",), TORCH, ("--out", "{out}/decoders"), tolerance=SUMS),
    "families": Record(("families/*.npz",), TORCH, ("--out", "{out}/families"), tolerance=SUMS),
    "layers": Record(("layers.npz",), TORCH, ("--out", "{out}/layers.npz"), tolerance=SUMS),
    "adapters": Record(("adapters.npz",), (*TORCH, "peft"), ("--data", "tests/data", "--out", "{out}"), tolerance=SUMS),
    "generation": Record(("generated.json",), TORCH, ("--out", "{out}/generated.json")),
    "configs": Record(
        ("written_configs.json",),
        TORCH,
        ("--read", "{work}/configs.json", "--out", "{out}/written_configs.json"),
        first=("--write", "{work}/configs.json"),
        tolerance=SUMS,
    ),
    "minilm": Record(("minilm.json",), TORCH, ("--model", "{minilm}", "--out", "{out}"), tolerance=SUMS),
    # The bytes of a file hold the version that wrote it.
    "pytorch_files": Record(("pytorch_files.npz",), ("torch",), free=("version", "/file")),
    "bitsandbytes": Record(("bitsandbytes.npz",), ("torch", "bitsandbytes"), tolerance=1e-6),
    "gguf_decoders": Record(
        ("gguf_decoders.npz",),
        ("llama_cpp",),
        ("--read", "{work}", "--out", "{out}/gguf_decoders.npz"),
        first=("--write", "{work}"),
        tolerance=1e-4,  # logits are up to 34
    ),
    "ggml_blocks": Record(("ggml_blocks.json",), LLAMA),
    "gguf_mixes": Record(("gguf_mixes.json",), LLAMA),
    "encode_errors": Record(("encode_errors.json",), (*LLAMA, "jax"), tolerance=1e-6),
    "llama_cpp": Record(
        ("smollm2_*.json", "vocab_*.json"),
        LLAMA,
        ("--model", "{smollm2}", "--out", "{out}"),
        tolerance=2e-2,  # products of activations rounded to 8 bits
    ),
}

# Not run again: they take packages that are unpacked by hand, or hours. Their headers say how they are run.
BY_HAND = ("packed_checkpoints", "perplexity")


def main() -> None:
    """Runs what is named, or everything; see the header of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECORDS)}; all where none is given")
    parser.add_argument("--python", required=True, help="of the oracles' environment")
    parser.add_argument("--all", action="store_true", help="fail where a script cannot be run")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in RECORDS]
    if unknown:
        raise SystemExit(f"there is no record called {unknown[0]!r}; choose from {', '.join(RECORDS)}.")
    unlisted = {path.stem.removeprefix("record_") for path in HERE.glob("record_*.py")} - {*RECORDS, *BY_HAND}
    if unlisted:
        raise SystemExit(f"{', '.join(sorted(unlisted))}: scripts that this program does not know of.")
    failed = False
    print(f"{'record':<16}{'values':>10}{'largest':>10}{'allowed':>10}{'seconds':>9}  result", flush=True)
    for name in args.names or RECORDS:
        began = time.perf_counter()
        result = run(RECORDS[name], name, args.python)
        failed |= result.differs or (args.all and result.missing)
        print(
            f"{name:<16}{result.values:>10}{result.largest:>10.1e}{RECORDS[name].tolerance:>10.1e}"
            f"{time.perf_counter() - began:>9.1f}  {result.said}",
            flush=True,
        )
    print(f"by hand: {', '.join(BY_HAND)}")
    raise SystemExit(1 if failed else 0)


@dataclasses.dataclass
class Result:
    """How far a script's files are from those recorded."""

    said: str = "the same"
    values: int = 0
    largest: float = 0.0
    differs: bool = False
    missing: bool = False

    def fault(self, said: str) -> None:
        """Notes what is wrong; the first thing is told."""
        if not self.differs:
            self.said = said
        self.differs = True


def run(record: Record, name: str, python: str) -> Result:
    """Returns what becomes of one record."""
    script = str(HERE / f"record_{name}.py")
    absent = [module for module in record.needs if not _has(python, module)]
    if absent:
        return Result(f"not run: no module {', '.join(absent)}", missing=True)
    with tempfile.TemporaryDirectory() as folder:
        out, work = Path(folder) / "out", Path(folder) / "work"
        for path in (out, work, *(out / file for file in record.files)):
            (path if path in (out, work) else path.parent).mkdir(parents=True, exist_ok=True)
        places = {"out": str(out), "work": str(work), **_models(record)}
        for interpreter, arguments in ((sys.executable, record.first), (python, record.arguments)):
            if not arguments:
                continue
            command = [interpreter, script, *(argument.format(**places) for argument in arguments)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
                return Result(f"{Path(script).name} failed: {last}", differs=True)
        return compare(record, out)


def compare(record: Record, out: Path, data: Path = DATA) -> Result:
    """Returns how far the files of a record in `out` are from those in `data`."""
    result = Result()
    for pattern in record.files:
        kept = {path.relative_to(data) for path in data.glob(pattern)}
        found = {path.relative_to(out) for path in out.glob(pattern)}
        for path in sorted(kept ^ found):
            result.fault(f"{path} is {'no longer written' if path in kept else 'written and not recorded'}")
        for path in sorted(kept & found):
            then, now = dict(_values(data / path, record.free)), dict(_values(out / path, record.free))
            if then.keys() != now.keys():
                result.fault(f"{path}: {sorted(then.keys() ^ now.keys())[0]} is in one of the two")
            for key in then.keys() & now.keys():
                _compare(f"{path}: {key}", then[key], now[key], record.tolerance, result)
    return result


def _compare(key: str, then: Any, now: Any, tolerance: float, result: Result) -> None:
    if not (isinstance(then, np.ndarray) and isinstance(now, np.ndarray)):
        result.values += 1
        if then != now:
            result.fault(f"{key} was {str(then)[:40]!r}, is {str(now)[:40]!r}")
        return
    if then.shape != now.shape or then.dtype != now.dtype:
        result.fault(f"{key} was {then.dtype}{list(then.shape)}, is {now.dtype}{list(now.shape)}")
        return
    result.values += then.size
    if then.dtype.kind != "f":
        if not np.array_equal(then, now):
            result.fault(f"{key}: {np.sum(then != now)} of {then.size} values differ")
        return
    then, now = then.astype(np.float64), now.astype(np.float64)
    same = (then == now) | (np.isnan(then) & np.isnan(now))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(then - now) / np.maximum(np.abs(then), 1.0))
    largest = float(np.max(apart, initial=0.0))
    result.largest = max(result.largest, largest)
    if not largest <= tolerance:
        result.fault(f"{key} differs by {largest:.2g}")


def _values(path: Path, free: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """What a file holds, by name: arrays, and of JSON its numbers and texts."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            for key in file.files:
                value = file[key]
                if not key.endswith(free):
                    yield key, str(value) if value.dtype.kind in "US" else value
    elif path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            for key in file.keys():  # noqa: SIM118
                yield key, file.get_tensor(key)
    else:
        yield from _leaves(json.loads(path.read_text()), "", free)


def _leaves(value: Any, key: str, free: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if not name.endswith(free):
                yield from _leaves(inner, f"{key}/{name}", free)
    elif isinstance(value, list):
        if value and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value):
            floats = any(isinstance(x, float) for x in value)
            yield key, np.array(value, np.float64 if floats else np.int64)
        else:
            yield f"{key}/length", len(value)
            for i, inner in enumerate(value):
                yield from _leaves(inner, f"{key}/{i}", free)
    elif isinstance(value, float) and math.isfinite(value):
        yield key, np.array([value])
    else:
        yield key, value


def _has(python: str, module: str) -> bool:
    command = [python, "-c", f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _models(record: Record) -> dict[str, str]:
    """Paths of the models of the catalogue that the arguments name; they are fetched where they are not there yet."""
    wanted = [name for name in ("smollm2", "minilm") if f"{{{name}}}" in record.arguments]
    resolve = importlib.import_module("trustcore.catalogue").resolve if wanted else None
    return {name: str(resolve(name)) for name in wanted if resolve is not None}


if __name__ == "__main__":
    main()
