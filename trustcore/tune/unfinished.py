"""What a search that was stopped had found so far: which candidates are out and why, and the samples of the others.

    {"version": 1, "call": [...], "spent": seconds,
     "trials": [{"values", "refused", "error", "compile", "samples"}, ...]}

One small file a call in the cache folder, beside the tables, written every now and then while a search runs (whole at
all times, as tables are) and removed at its end. A search of the same call (op, sources, release of jaxlib, facts) on
the same device goes on from it: what is out stays out, samples count with those that follow. A file that is broken, or
of another call, is as none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernels_pallas.tuning import Facts, Tunable, Values
from trustcore.cache import cache_folder
from trustcore.tune import registry, table
from trustcore.tune.device import Device

VERSION = 1
EVERY = 0.5  # seconds between two writings
MOST_SAMPLES = 100_000  # of a candidate, that are read


@dataclasses.dataclass
class Kept:
    """Of one candidate: why it is out, how far it lies from the oracle, seconds of compiling, seconds of its calls."""

    refused: str = ""
    error: float | None = None
    compile: float | None = None
    samples: list[float] = dataclasses.field(default_factory=list)


class Unfinished:
    """The file of a call, and what it holds: `trials` by candidate, `spent` seconds of timing."""

    def __init__(self, device: Device, tunable: Tunable, facts: Facts) -> None:
        self.call = [
            str(device), tunable.op, registry.source_hash(tunable), tunable.revision, table.jaxlib_version(),
            json.dumps(dict(facts), sort_keys=True),
        ]  # fmt: skip
        name = hashlib.sha256(json.dumps(self.call).encode()).hexdigest()[:24]
        self.path = cache_folder("tune", "unfinished") / f"{name}.json"
        self.trials, self.spent = _read(self.path, self.call)
        self._written = time.monotonic()

    def of(self, values: Values) -> Kept:
        """Returns what is known of a candidate; nothing, at first."""
        return self.trials.setdefault(_key(values), Kept())

    @property
    def measured(self) -> int:
        """How many candidates have a time, or are out."""
        return sum(bool(kept.refused or kept.samples) for kept in self.trials.values())

    def write(self, *, now: bool = False) -> None:
        """Writes the file if the last writing is a while ago, or at once; a folder that takes none is no error."""
        if not now and time.monotonic() - self._written < EVERY:
            return
        told = {
            "version": VERSION, "call": self.call, "spent": self.spent,
            "trials": [{"values": json.loads(key), **vars(kept)} for key, kept in self.trials.items()],
        }  # fmt: skip
        try:
            handle, scratch = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".part")
        except OSError:
            return
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(told, file)
            os.replace(scratch, self.path)
        except OSError:
            Path(scratch).unlink(missing_ok=True)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
        self._written = time.monotonic()

    def drop(self) -> None:
        """Removes the file: the search is over."""
        self.path.unlink(missing_ok=True)


def measured(device: Device, tunable: Tunable, facts: Facts) -> int:
    """Returns how many candidates of a call are known from a search that was stopped."""
    return Unfinished(device, tunable, facts).measured


def _key(values: Values) -> str:
    return json.dumps(dict(values), sort_keys=True)


def _read(path: Path, call: Sequence[Any]) -> tuple[dict[str, Kept], float]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["version"] != VERSION or told["call"] != list(call):
            return {}, 0.0
        trials = {_key(dict(one["values"])): _kept(one) for one in told["trials"]}
        return trials, _seconds(told["spent"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}, 0.0


def _kept(told: Any) -> Kept:
    samples = [_seconds(s) for s in told["samples"][:MOST_SAMPLES]]
    error, compiling = (None if told[n] is None else _seconds(told[n]) for n in ("error", "compile"))
    return Kept(str(told["refused"]), error, compiling, samples)


def _seconds(told: Any) -> float:
    number = float(told)
    if math.isnan(number) or number < 0:
        raise ValueError("it is no length of time")
    return number
